"""`moe` against its reference: plain, FP8 and FP4 experts, few and many rows."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, DTYPES, assert_close, integers, random
from dspark_kernels import gpu, reference
from dspark_kernels.formats import quantise_fp4, quantise_fp8
from torch import Tensor

LIMIT = 1.5
"""Low enough that it cuts some channels off."""


def experts_of(num_experts: int, d: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w13 = random(num_experts, 2 * inner, d, dtype=dtype, scale=d**-0.5)
    return w13, random(num_experts, d, inner, dtype=dtype, scale=inner**-0.5)


def quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Weight [E, out, in] and its scales."""
    quantise = {"fp8": quantise_fp8, "fp4": quantise_fp4}[kind]
    values, scales = zip(*(quantise(expert) for expert in weight.cpu()))
    # Stacked as bytes: torch cannot stack its small types everywhere.
    value, scale = (torch.stack([part.view(torch.uint8) for part in parts]) for parts in (values, scales))
    return value.view(values[0].dtype).to(DEVICE), scale.view(torch.float8_e8m0fnu).to(DEVICE)


def choices(num_rows: int, top_k: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Weights and different experts low .. high - 1 for every row."""
    experts = random(num_rows, high - low).argsort(1)[:, :top_k] + low
    return random(num_rows, top_k).abs(), experts


def check(hidden: Tensor, *arguments: object) -> Tensor:
    """Outputs are float32, and as good as the rows they come from.

    With quantised experts they are as good as bfloat16 rows at best: an activation between two FP8 numbers may go to
    either one when its sum is a little different.
    """
    actual, expected = gpu.moe(hidden, *arguments), reference.moe(hidden, *arguments)
    assert_close(actual, expected, hidden.dtype if len(arguments) <= 6 else torch.bfloat16)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "d", "inner"), [(1, 64, 32), (7, 160, 80), (129, 48, 40)])
def test_plain_experts_match_the_reference(dtype: torch.dtype, num_rows: int, d: int, inner: int) -> None:
    weights, experts = choices(num_rows, 3, 0, 5)
    check(random(num_rows, d, dtype=dtype), weights, experts, *experts_of(5, d, inner, dtype), LIMIT)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 7, 129])
def test_quantised_experts_match_the_reference(kind: str, dtype: torch.dtype, num_rows: int) -> None:
    weights, experts = choices(num_rows, 3, 0, 5)
    w13, w2 = experts_of(5, 384, 256, torch.float32)
    (w13, w13_scale), (w2, w2_scale) = quantised(w13, kind), quantised(w2, kind)
    check(random(num_rows, 384, dtype=dtype), weights, experts, w13, w2, LIMIT, 0, w13_scale, w2_scale)
