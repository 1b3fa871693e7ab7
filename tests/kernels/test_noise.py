"""Noise inside kernels against `philox.py`."""

from __future__ import annotations

import compare
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels import philox
from dspark_kernels.gpu import noise

SEEDS = (0, 1, -1, -(2**63), 2**63 - 1, 2**32, -(2**32) + 5, 123456789012345)
POSITIONS = (0, 2**32 - 1, 2**32, 2**40 + 7, 5, 2**62, 17, 1)


@triton.jit
def _tile_kernel(
    p_seeds, p_positions, p_bits, first_block, ROWS: tl.constexpr, STREAM: tl.constexpr, SIZE: tl.constexpr
):
    o_rows = tl.arange(0, ROWS)
    b_bits = noise.philox_tile(tl.load(p_seeds + o_rows), tl.load(p_positions + o_rows), STREAM, first_block, SIZE)
    tl.store(p_bits + o_rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :], b_bits.to(tl.int64))


@triton.jit
def _single_kernel(p_seeds, p_positions, p_bits, first_id, STREAM: tl.constexpr, SIZE: tl.constexpr):
    i_row = tl.program_id(0)
    o_ids = tl.arange(0, SIZE)
    seed, position = tl.load(p_seeds + i_row), tl.load(p_positions + i_row)
    b_bits = noise.philox_bits(seed, position, STREAM, first_id + o_ids)
    tl.store(p_bits + i_row * SIZE + o_ids, b_bits.to(tl.int64))


@triton.jit
def _function_kernel(p_bits, p_uniforms, p_noise, p_rough, p_least, SIZE: tl.constexpr):
    o_bits = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_bits = tl.load(p_bits + o_bits).to(tl.uint32)
    tl.store(p_uniforms + o_bits, noise.uniform(b_bits))
    tl.store(p_noise + o_bits, noise.gumbel(b_bits))
    tl.store(p_rough + o_bits, noise.rough_gumbel(b_bits))
    tl.store(p_least + o_bits, noise.least_exponential(b_bits))


def addresses() -> tuple[Tensor, Tensor]:
    return torch.tensor(SEEDS, device=compare.DEVICE), torch.tensor(POSITIONS, device=compare.DEVICE)


def expected_bits(stream: int, first_id: int, num_ids: int) -> Tensor:
    """[rows, num_ids] by the definition: id // 4 is a counter word, id % 4 picks the output word."""
    seeds, positions = (tensor.unsqueeze(1) for tensor in addresses())
    ids = torch.arange(first_id, first_id + num_ids, device=compare.DEVICE)
    mask = 0xFFFFFFFF
    counter = (ids // 4, positions & mask, (positions >> 32) & mask, torch.full_like(ids, stream))
    words = torch.stack(philox.philox_4x32(counter, (seeds & mask, (seeds >> 32) & mask)))
    return words.gather(0, (ids % 4).expand(1, len(seeds), -1)).squeeze(0)


def outputs(num_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    uniforms = torch.empty(num_bits, dtype=torch.float64, device=compare.DEVICE)
    noises, rough, least = (torch.empty(num_bits, device=compare.DEVICE) for _ in range(3))
    return uniforms, noises, rough, least


def computed(bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = outputs(len(bits))
    _function_kernel[(len(bits) // 64,)](bits, *results, SIZE=64)
    return results


def bits_everywhere() -> Tensor:
    """Both ends of the range, powers of two, and random ones."""
    powers = 2 ** torch.arange(32)
    near = torch.cat((powers - 1, powers, powers + 1, 2**32 - 1 - powers, 2**32 - powers, 2**31 + powers))
    return torch.cat((near.clamp(0, 2**32 - 1).to(compare.DEVICE), compare.integers(0, 2**32, 4096)))


@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("first_block", [0, 32319])
def test_a_tile_has_the_bits_of_the_reference(stream: int, first_block: int) -> None:
    seeds, positions = addresses()
    bits = seeds.new_empty(len(seeds), 64)
    _tile_kernel[(1,)](seeds, positions, bits, first_block, ROWS=len(seeds), STREAM=stream, SIZE=64)
    assert torch.equal(bits, expected_bits(stream, 4 * first_block, 64))


@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("first_id", [0, 129, 129278, 2**31 - 40])
def test_bits_of_single_ids_are_those_of_the_reference(stream: int, first_id: int) -> None:
    seeds, positions = addresses()
    bits = seeds.new_empty(len(seeds), 32)
    _single_kernel[(len(seeds),)](seeds, positions, bits, first_id, STREAM=stream, SIZE=32)
    assert torch.equal(bits, expected_bits(stream, first_id, 32))


def test_uniforms_are_exact_and_gumbel_noise_is_that_of_the_reference() -> None:
    seeds, positions = addresses()
    bits = expected_bits(philox.STREAM_SAMPLE, 0, 256)
    uniforms, noises, _, _ = computed(bits.flatten())
    first = uniforms.view(len(seeds), -1)[:, 0]
    assert torch.equal(first, philox.uniform_noise(seeds, positions, philox.STREAM_SAMPLE))
    expected = philox.gumbel_noise(seeds, positions, philox.STREAM_SAMPLE, 0, 256).flatten()
    # Libraries differ in the last bit of a float64 logarithm, which seldom moves the float32 it rounds to.
    steps = [torch.nextafter(expected, torch.full_like(expected, end)) for end in (-torch.inf, torch.inf)]
    same = noises == expected
    assert (same | (noises == steps[0]) | (noises == steps[1])).all()
    assert same.double().mean() >= 0.999


def test_the_error_of_rough_noise_is_within_its_bound() -> None:
    uniforms, _, rough, _ = computed(bits_everywhere())
    exact = -(-uniforms.log()).log()
    assert (rough.double() - exact).abs().max() <= 2.0**-18


def test_the_bound_without_logarithms_holds_and_is_tight_where_noise_is_large() -> None:
    uniforms, _, _, least = computed(bits_everywhere())
    exponentials = -torch.log1p(uniforms - 1)
    ratios = least.double() / exponentials
    assert ratios.max() <= 1 + 2.0**-22
    assert ratios[exponentials < 0.01].min() >= 1 - 1e-4
