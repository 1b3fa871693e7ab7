"""`moe` against its reference: plain, FP8 and FP4 experts, few and many rows."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, DTYPES, assert_close, integers, random
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.formats import quantise_fp4, quantise_fp8

LIMIT = 1.5
"""Low enough that it cuts some channels off."""
KINDS = ["plain", "fp8", "fp4"]


def experts_of(
    kind: str, num_experts: int, d: int, inner: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """w13, w2 and their scales."""
    w13 = random(num_experts, 2 * inner, d, scale=d**-0.5)
    w2 = random(num_experts, d, inner, scale=inner**-0.5)
    if kind == "plain":
        return w13.to(dtype), w2.to(dtype), None, None
    (w13, w13_scale), (w2, w2_scale) = _quantised(w13, kind), _quantised(w2, kind)
    return w13, w2, w13_scale, w2_scale


def _quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    quantise = {"fp8": quantise_fp8, "fp4": quantise_fp4}[kind]
    # Groups of columns of very different sizes: a wrong scale is a wrong number.
    sizes = torch.exp2(integers(-3, 4, weight.shape[2] // 32).float()).repeat_interleave(32)
    values, scales = zip(*(quantise(expert) for expert in (weight * sizes).cpu()))
    # As bytes, because torch does not stack its small types everywhere.
    value, scale = (torch.stack([part.view(torch.uint8) for part in parts]).to(DEVICE) for parts in (values, scales))
    return value.view(values[0].dtype), scale.view(scales[0].dtype)


def choices(num_rows: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights, and different experts for each row."""
    return random(num_rows, top_k).abs(), random(num_rows, num_experts).argsort(1)[:, :top_k].contiguous()


def check(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    stored: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    num_experts: int | None = None,
    first_expert: int = 0,
) -> Tensor:
    """Results are float32, and as good as the rows they come from.

    With quantised experts they are as good as bfloat16 rows at best: an activation between two FP8 numbers becomes the
    other one where its sum is a little different.
    """
    num_experts = len(stored[0]) if num_experts is None else num_experts
    arguments = (hidden, weights, experts, *stored[:2], LIMIT, num_experts, first_expert, *stored[2:])
    actual, expected = gpu.moe(*arguments), reference.moe(*arguments)
    assert_close(actual, expected, hidden.dtype if stored[2] is None else torch.bfloat16)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "d", "inner"), [(1, 600, 24), (7, 160, 136), (129, 72, 72)])
def test_plain_experts_match_the_reference(dtype: torch.dtype, num_rows: int, d: int, inner: int) -> None:
    weights, experts = choices(num_rows, 2, 4)
    check(random(num_rows, d, dtype=dtype), weights, experts, experts_of("plain", 4, d, inner, dtype))


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "d", "inner"), [(1, 256, 128), (7, 384, 256), (129, 128, 256)])
def test_quantised_experts_match_the_reference(
    kind: str, dtype: torch.dtype, num_rows: int, d: int, inner: int
) -> None:
    weights, experts = choices(num_rows, 2, 4)
    hidden = random(num_rows, d, dtype=dtype)
    hidden[0, :128] = 0
    check(hidden, weights, experts, experts_of(kind, 4, d, inner))


def test_more_pairs_than_are_listed_at_a_time_match() -> None:
    stored = experts_of("plain", 8, 16, 16, torch.bfloat16)
    check(random(129, 16, dtype=torch.bfloat16), *choices(129, 8, 8), stored)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_two_ranks_add_up(kind: str) -> None:
    hidden, (weights, experts), stored = random(5, 128), choices(5, 2, 5), experts_of(kind, 5, 128, 128)
    parts = []
    for first, last in ((0, 3), (3, 5)):
        mine = tuple(None if tensor is None else tensor[first:last] for tensor in stored)
        parts.append(check(hidden, weights, experts, mine, 5, first))  # type: ignore[arg-type]
    whole = gpu.moe(hidden, weights, experts, *stored[:2], LIMIT, 5, 0, *stored[2:])
    assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unchosen_experts_are_not_read(dtype: torch.dtype) -> None:
    """The reference's path for few experts multiplies with all of them: it gets others."""
    w13, w2, *_ = experts_of("plain", 6, 64, 32, dtype)
    hidden, (weights, experts) = random(5, 64, dtype=dtype), choices(5, 2, 2)
    experts = experts * 3 + 1  # 1 and 4
    expected = reference.moe(hidden, weights, experts, w13, w2, LIMIT, 6)
    for expert in (0, 2, 3, 5):
        w13[expert], w2[expert] = torch.nan, torch.nan
    assert_close(gpu.moe(hidden, weights, experts, w13, w2, LIMIT, 6), expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_experts"), [(20, 4), (70, 3)])
def test_all_rows_may_choose_one_expert(kind: str, num_rows: int, num_experts: int) -> None:
    """Several tiles of one expert, of 8 rows and of more."""
    experts = integers(1, 2, num_rows, 1)
    hidden = random(num_rows, 128, dtype=torch.bfloat16)
    check(hidden, random(num_rows, 1), experts, experts_of(kind, num_experts, 128, 128, torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_chosen_experts_adds_nothing(kind: str) -> None:
    weights, experts = choices(3, 2, 4)
    actual = check(random(3, 128), weights, experts, experts_of(kind, 4, 128, 128), num_experts=8, first_expert=4)
    assert not actual.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [9, 70])
def test_rows_that_choose_no_expert_add_nothing(kind: str, num_rows: int) -> None:
    """Padding rows choose expert -1; their weights may be anything."""
    weights, experts = choices(num_rows, 2, 4)
    padding = torch.arange(num_rows, device=DEVICE) % 3 == 1
    weights[padding], experts[padding] = torch.nan, -1
    dtype = torch.bfloat16
    hidden, stored = random(num_rows, 128, dtype=dtype), experts_of(kind, 4, 128, 128, dtype)
    assert not check(hidden, weights, experts, stored, 8)[padding].any()
    assert not reference.moe(hidden, weights, experts, *stored[:2], LIMIT, 8, 0, *stored[2:])[padding].any()


def test_expert_numbers_beyond_the_layer_are_refused() -> None:
    w13, w2, *_ = experts_of("plain", 2, 64, 32)
    for op in (gpu.moe, reference.moe):
        with pytest.raises(ValueError, match=r"experts 3 \.\. 4 of 4: expected some of 0 \.\. 3"):
            op(random(1, 64), *choices(1, 1, 2), w13, w2, LIMIT, 4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind: str) -> None:
    assert check(random(0, 128), *choices(0, 2, 4), experts_of(kind, 4, 128, 128)).shape == (0, 128)


def test_rows_need_not_be_contiguous() -> None:
    weights, experts = choices(4, 2, 5)
    hidden, apart = random(64, 4).t(), experts.t().contiguous().t()
    check(hidden, weights.t().contiguous().t(), apart, experts_of("plain", 5, 64, 32))


def test_channels_that_fill_no_group_are_refused() -> None:
    arguments = (random(1, 192), *choices(1, 1, 2))
    w13, w2, w13_scale, w2_scale = experts_of("fp4", 2, 192, 128)
    with pytest.raises(ValueError, match=r"\(192, 128\) channels: expected multiples of 128"):
        gpu.moe(*arguments, w13, w2, LIMIT, 2, 0, w13_scale, w2_scale)


def test_experts_of_another_dtype_are_refused() -> None:
    w13, w2, *_ = experts_of("plain", 2, 64, 32, torch.bfloat16)
    with pytest.raises(ValueError, match="expected one dtype"):
        gpu.moe(random(1, 64), *choices(1, 1, 2), w13, w2, LIMIT, 2)


def test_scales_of_another_dtype_are_refused() -> None:
    w13, w2, w13_scale, w2_scale = experts_of("fp8", 2, 128, 128)
    with pytest.raises(ValueError, match=r"expected torch\.float8_e8m0fnu"):
        gpu.moe(random(1, 128), *choices(1, 1, 2), w13, w2, LIMIT, 2, 0, w13_scale.float(), w2_scale)
