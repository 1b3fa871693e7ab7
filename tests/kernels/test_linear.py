"""`linear_fp8` against its reference: few and many rows, and weights whose last block of scales is cut off."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, DTYPES, assert_close, random
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.formats import quantise_fp8


def weight_of(out_channels: int, in_channels: int) -> tuple[Tensor, Tensor]:
    weight = random(out_channels, in_channels, scale=in_channels**-0.5).cpu()
    # Blocks of very different sizes: a wrong scale is a wrong number.
    weight[:128, 128:256] *= 40
    weight[128:] *= 0.1
    value, scale = quantise_fp8(weight)
    return value.to(DEVICE), scale.to(DEVICE)


def check(x: Tensor, out_channels: int) -> None:
    value, scale = weight_of(out_channels, x.shape[1])
    assert_close(gpu.linear_fp8(x, value, scale), reference.linear_fp8(x, value, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_channels", "in_channels"), [(200, 640), (48, 1152), (70, 384)])
@pytest.mark.parametrize("num_rows", [1, 13, 17, 129])
def test_rows_match_the_reference(dtype: torch.dtype, out_channels: int, in_channels: int, num_rows: int) -> None:
    """Rows and output channels that make every choice of block sizes, on a device with three processors."""
    check(random(num_rows, in_channels, dtype=dtype), out_channels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [1, 2])
def test_small_numbers_are_rounded_to_steps_of_the_largest_one(dtype: torch.dtype, repeats: int) -> None:
    """Largest ones on both sides of where the scale doubles, and below the smallest scale; alone they count nothing."""
    largest = torch.tensor([448.0, 450.0, 5.0, 6.0, 6.5, 6.96875, 7.0, 7.03125, 7.5, 2e-4, 5e-5, 1e-6, 0.0])
    x = random(len(largest) * repeats, 128) * 2.0**-15
    largest = largest.repeat(repeats).to(x.device)
    x *= largest[:, None]
    x[:, 5] = -largest
    value, scale = weight_of(40, 128)
    value.view(torch.uint8)[:, 5] = 0
    # Row by row: the largest result decides how close they have to be.
    actual, expected = (linear(x.to(dtype), value, scale) for linear in (gpu.linear_fp8, reference.linear_fp8))
    for row in range(len(x)):
        assert_close(actual[row], expected[row])


@pytest.mark.parametrize("num_rows", [2, 18])
def test_rows_need_not_be_contiguous(num_rows: int) -> None:
    check(random(256, num_rows).t(), 32)


def test_no_rows_give_no_rows() -> None:
    value, scale = weight_of(32, 128)
    assert gpu.linear_fp8(random(0, 128), value, scale).shape == (0, 32)


def test_channels_that_fill_no_group_are_refused() -> None:
    value, scale = weight_of(32, 192)
    with pytest.raises(ValueError, match="192 input channels: expected a multiple of 128"):
        gpu.linear_fp8(random(1, 192), value, scale)


def test_scales_of_another_dtype_are_refused() -> None:
    value, scale = weight_of(32, 128)
    with pytest.raises(ValueError, match=r"expected torch\.float8_e8m0fnu"):
        gpu.linear_fp8(random(1, 128), value, scale.float())
