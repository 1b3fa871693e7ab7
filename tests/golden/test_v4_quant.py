"""Quantised storage against numbers made by the official converter and by another engine's cache rounding."""

from __future__ import annotations

import pytest
import torch
from golden_files import GoldenCase, case_files
from torch import Tensor

import dspark_kernels as ops
from dspark_kernels.formats import dequantise_fp4, dequantise_fp8

CASES = [GoldenCase.load(path) for path in case_files("v4_quant*/*.json")]


def weights(case: GoldenCase, form: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(values, scale, float32 values they stand for) of every quantised weight in one form."""
    stored = case.group(f"{form}.")
    return [
        (stored[f"{name}.weight"], stored[f"{name}.scale"], expected)
        for name, expected in case.group("dequant.").items()
    ]


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    return dequantise_fp4(values, scale) if values.dtype == torch.int8 else dequantise_fp8(values, scale)


@pytest.mark.parametrize("form", ["checkpoint", "converted"])
@pytest.mark.parametrize("case", CASES)
def test_quantised_weights_stand_for_exactly_the_recorded_values(case: GoldenCase, form: str) -> None:
    for values, scale, expected in weights(case, form):
        assert torch.equal(dequantise(values, scale), expected)


def test_the_cases_cover_both_formats() -> None:
    dtypes = {values.dtype for case in CASES for values, _, _ in weights(case, "checkpoint")}
    assert dtypes == {torch.int8, torch.float8_e4m3fn}


@pytest.mark.parametrize("case", CASES)
def test_wo_a_dequantises_to_the_converters_bfloat16(case: GoldenCase) -> None:
    stored, converted = case.group("checkpoint."), case.group("converted.")
    names = [name for name in converted if name.endswith("wo_a.weight")]
    assert names
    for name in names:
        values = dequantise_fp8(stored[name], stored[name.replace(".weight", ".scale")])
        assert torch.equal(values.to(torch.bfloat16), converted[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_key_rounding_gives_the_recorded_values(case: GoldenCase, dtype: str) -> None:
    keys, expected = case.tensors[f"kvquant.{dtype}.in"], case.tensors[f"kvquant.{dtype}.out"]
    assert torch.equal(ops.fake_quant_fp8(keys.clone(), keys.shape[-1]), expected)
