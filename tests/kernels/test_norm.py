"""Norm, rotation and gated activation against the reference."""

from __future__ import annotations

import compare
import pytest
import torch
from torch import Tensor

from dspark_kernels import gpu, reference

EPS = 1e-6


def angles(rows: int, rotary_dims: int) -> tuple[Tensor, Tensor]:
    turns = compare.random(rows, rotary_dims // 2, scale=100.0)
    return turns.cos(), turns.sin()


# 24 and 40 channels share a program with other rows: few of them, or many where there are rows enough.
@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (129, 24), (1700, 24), (2, 3, 40), (129, 600), (3, 9000)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_rms_norm_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = compare.random(*shape, dtype=dtype), compare.random(shape[-1], dtype=dtype)
    compare.assert_close(gpu.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    compare.assert_close(gpu.rms_norm(x, None, EPS), reference.rms_norm(x, None, EPS))


def test_rms_norm_of_the_widest_model_takes_all_of_a_row() -> None:
    x, weight = compare.random(2, 28672), compare.random(28672, dtype=torch.bfloat16)
    compare.assert_close(gpu.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_rms_norm_of_zeros_is_zero_and_of_tiny_numbers_follows_eps(dtype: torch.dtype) -> None:
    x = torch.cat((compare.random(2, 24, scale=1e-3), compare.random(2, 24, scale=0.0))).to(dtype)
    compare.assert_close(gpu.rms_norm(x, None, EPS), reference.rms_norm(x, None, EPS))


def test_rms_norm_reads_a_part_of_wider_rows() -> None:
    wide, weight = compare.random(5, 100), compare.random(24)
    compare.assert_close(gpu.rms_norm(wide[:, 30:54], weight, EPS), reference.rms_norm(wide[:, 30:54], weight, EPS))
    columns = compare.random(24, 5).t()
    compare.assert_close(gpu.rms_norm(columns, weight, EPS), reference.rms_norm(columns, weight, EPS))


def test_no_rows_give_no_rows() -> None:
    cos, sin = angles(0, 8)
    x = compare.random(0, 3, 24)
    for empty in (
        gpu.rms_norm(x, None, EPS),
        gpu.rope(x, cos, sin),
        gpu.norm_rope(x, None, EPS, cos, sin),
        gpu.swiglu(x, x, 1.0),
    ):
        assert empty.shape == x.shape


def test_a_row_that_fits_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="32769 channels: expected at most 32768"):
        gpu.rms_norm(compare.random(1, 32769), None, EPS)


ROTATED = [((1, 24), 8), ((129, 24), 8), ((600, 3, 24), 8), ((129, 2, 64), 32), ((3, 2, 3, 40), 40), ((5, 4, 512), 64)]


@pytest.mark.parametrize(("shape", "rotary_dims"), ROTATED)
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_rope_equals_the_reference_in_both_directions(
    shape: tuple[int, ...], rotary_dims: int, dtype: torch.dtype
) -> None:
    x, (cos, sin) = compare.random(*shape, dtype=dtype), angles(shape[0], rotary_dims)
    for inverse in (False, True):
        compare.assert_close(gpu.rope(x, cos, sin, inverse), reference.rope(x, cos, sin, inverse))


def test_rope_leaves_the_other_channels_as_they_are() -> None:
    x, (cos, sin) = compare.random(7, 3, 24), angles(7, 8)
    assert torch.equal(gpu.rope(x, cos, sin)[..., :16], x[..., :16])


@pytest.mark.parametrize(("shape", "rotary_dims"), ROTATED)
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_norm_rope_equals_the_reference(shape: tuple[int, ...], rotary_dims: int, dtype: torch.dtype) -> None:
    x, (cos, sin) = compare.random(*shape, dtype=dtype), angles(shape[0], rotary_dims)
    for weight in (None, compare.random(shape[-1], dtype=dtype)):
        actual, expected = (ops.norm_rope(x, weight, EPS, cos, sin) for ops in (gpu, reference))
        compare.assert_close(actual, expected)


def test_norm_rope_rounds_between_its_two_operations() -> None:
    x, weight = compare.random(3, 64).sign().bfloat16(), compare.random(64)  # of mean square 1: the norm is the weight
    cos, sin = (compare.integers(-8, 9, 3, 32).float() / 8 for _ in range(2))
    assert torch.equal(gpu.norm_rope(x, weight, 1e-12, cos, sin), reference.norm_rope(x, weight, 1e-12, cos, sin))


def test_norm_rope_reads_heads_out_of_wider_rows() -> None:
    x, (cos, sin) = compare.random(5, 4, 100)[:, 1:3, 10:34], angles(5, 8)
    compare.assert_close(gpu.norm_rope(x, None, EPS, cos, sin), reference.norm_rope(x, None, EPS, cos, sin))


@pytest.mark.parametrize(("channels", "rotary_dims"), [(25, 8), (6, 8)])
def test_channels_that_are_no_pairs_are_refused(channels: int, rotary_dims: int) -> None:
    with pytest.raises(ValueError, match=f"{channels} channels, {rotary_dims} of them rotary"):
        gpu.rope(compare.random(2, channels), *angles(2, rotary_dims))


# A block is 1024 columns at most.
@pytest.mark.parametrize("shape", [(1, 1), (129, 40), (3, 2500), (2, 3, 48), (7,)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_swiglu_equals_the_reference_on_both_sides_of_its_limit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = compare.random(*shape, dtype=dtype, scale=4.0), compare.random(*shape, dtype=dtype, scale=4.0)
    for limit in (1.5, 10.0):
        compare.assert_close(gpu.swiglu(gate, up, limit), reference.swiglu(gate, up, limit))


def test_swiglu_takes_halves_of_one_product() -> None:
    gate, up = compare.random(5, 2 * 1100, scale=4.0).chunk(2, dim=-1)
    compare.assert_close(gpu.swiglu(gate, up, 3.0), reference.swiglu(gate, up, 3.0))


def test_swiglu_refuses_halves_that_differ() -> None:
    with pytest.raises(ValueError, match="expected two alike"):
        gpu.swiglu(compare.random(2, 8), compare.random(2, 9), 1.0)
