"""`linear_fp8` against its reference: few and many rows, blocks that the weight's edge cuts off."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, DTYPES, assert_close, random
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.formats import quantise_fp8

FEW = [1, 7, 13]
MANY = [17, 129]


def weight_of(out_channels: int, in_channels: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(out_channels, in_channels) * in_channels**-0.5
    # Blocks of very different sizes: a wrong scale is a wrong number.
    weight[:128, 128:256] *= 40
    weight[128:] *= 0.1
    value, scale = quantise_fp8(weight)
    return value.to(DEVICE), scale.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_channels", "in_channels"), [(200, 384), (48, 1280)])
@pytest.mark.parametrize("num_rows", [*FEW, *MANY])
def test_rows_match_the_reference(dtype: torch.dtype, out_channels: int, in_channels: int, num_rows: int) -> None:
    x = random(num_rows, in_channels, dtype=dtype)
    value, scale = weight_of(out_channels, in_channels)
    assert_close(gpu.linear_fp8(x, value, scale), reference.linear_fp8(x, value, scale))
