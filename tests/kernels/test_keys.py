"""Window keys against the reference, packed ones byte for byte.

The kernel sums a row's squares in another order than the reference, and a value beside an E4M3 boundary may then fall
on its other side. So bytes are compared where that cannot happen: of keys that the kernel itself stored unrounded, and
of keys whose bfloat16 numbers come out exactly, whatever the order.
"""

from __future__ import annotations

import compare
import pytest
import torch
from test_norm import angles
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.formats import pack_keys, packed_key_bytes

EPS = 1e-6
PACKED = [(512, 64), (200, 8), (128, 64)]


def some_slots(rows: int, pool_rows: int) -> Tensor:
    return torch.randperm(pool_rows, generator=compare.generator())[:rows].to(compare.DEVICE)


def random_bytes(*shape: int) -> Tensor:
    return compare.integers(0, 256, *shape).to(torch.uint8)


def angles_of(slots: Tensor, rotary_dims: int) -> tuple[Tensor, Tensor]:
    """The same for the same slots, so that two calls can be compared."""
    turns = slots.float().unsqueeze(1) * torch.linspace(0.1, 1.0, rotary_dims // 2, device=slots.device)
    return turns.cos(), turns.sin()


def check_unrounded(rows: int, channels: int, rotary_dims: int, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    kv, weight = compare.random(rows, channels, dtype=dtype), compare.random(channels, dtype=dtype)
    pool, slots = compare.random(rows + 7, channels, dtype=pool_dtype), some_slots(rows, rows + 7)
    expected = pool.clone()
    reference.store_window(kv, weight, EPS, *angles_of(slots, rotary_dims), expected, slots)
    gpu.store_window(kv, weight, EPS, *angles_of(slots, rotary_dims), pool, slots)
    compare.assert_close(pool, expected, dtype if pool_dtype == torch.float32 else pool_dtype)


@pytest.mark.parametrize(("rows", "channels", "rotary_dims"), [(1, 24, 8), (5, 64, 32), (3, 512, 64), (3, 600, 600)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("pool_dtype", compare.DTYPES)
def test_keys_go_to_their_rows_and_nowhere_else(
    rows: int, channels: int, rotary_dims: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    check_unrounded(rows, channels, rotary_dims, dtype, pool_dtype)


def test_many_keys_go_to_their_rows_and_nowhere_else() -> None:
    check_unrounded(129, 24, 8, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(("channels", "rotary_dims"), PACKED)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_packed_bytes_are_those_of_the_unrounded_keys(
    rows: int, channels: int, rotary_dims: int, dtype: torch.dtype
) -> None:
    kv, weight = compare.random(rows, channels, dtype=dtype), compare.random(channels, dtype=dtype)
    slots = some_slots(rows, rows + 7)
    keys = compare.random(rows + 7, channels, dtype=dtype)
    gpu.store_window(kv, weight, EPS, *angles_of(slots, rotary_dims), keys, slots)
    pool = random_bytes(rows + 7, packed_key_bytes(channels, rotary_dims))
    expected = pool.clone()
    expected[slots] = pack_keys(keys[slots], rotary_dims)
    for quantise in (False, True):
        gpu.store_window(kv, weight, EPS, *angles_of(slots, rotary_dims), pool, slots, quantise)
        assert torch.equal(pool, expected)


@pytest.mark.parametrize(("channels", "rotary_dims"), PACKED)
@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("pool_dtype", compare.DTYPES)
def test_rounded_keys_are_the_unrounded_ones_rounded(
    channels: int, rotary_dims: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    kv, weight = compare.random(5, channels, dtype=dtype), compare.random(channels, dtype=dtype)
    slots = some_slots(5, 9)
    keys = compare.random(9, channels, dtype=dtype)
    gpu.store_window(kv, weight, EPS, *angles_of(slots, rotary_dims), keys, slots)
    pool = compare.random(9, channels, dtype=pool_dtype)
    expected = pool.clone()
    expected[slots] = reference.fake_quant_fp8(keys[slots], channels - rotary_dims).to(pool_dtype)
    gpu.store_window(kv, weight, EPS, *angles_of(slots, rotary_dims), pool, slots, quantise=True)
    assert torch.equal(pool, expected)


def exact_rows(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv [N, 512], weight [512] in bfloat16 and cos, sin [N, 32] of keys that are exact until they are turned.

    Channels are 0, +-1, +-2 in random order, with a mean square of 1. Weights make groups of 64 that are of ordinary
    size, zero, below the smallest scale, at 448 times a power of two, just above that, large, and of many sizes.
    """
    channels = torch.tensor([1.0] * 128 + [-1.0] * 128 + [2.0] * 32 + [-2.0] * 32 + [0.0] * 192)
    kv = torch.stack([channels[torch.randperm(512, generator=compare.generator())] for _ in range(rows)])
    weight = compare.random(512).cpu()
    weight = (weight.sign() * weight.abs().remainder(1.5) + weight.sign() * 0.5).view(8, 64)
    weight[1] = 0
    weight[2] *= 2.0**-20
    weight[3, 7:] = weight[3, 7:].clamp(-1.75, 1.75)
    weight[3, :7] = 1.75
    weight[4, :7] = 1.7578125
    weight[5] *= 2.0**10
    weight[6] *= torch.exp2(-(torch.arange(64) // 4).float())
    cos, sin = (compare.integers(-8, 9, rows, 32).float() / 8 for _ in range(2))
    return kv.bfloat16().to(compare.DEVICE), weight.flatten().bfloat16().to(compare.DEVICE), cos, sin


def test_bytes_equal_those_of_the_reference_where_no_sum_is_rounded() -> None:
    kv, weight, cos, sin = exact_rows(60)
    pool, slots = random_bytes(70, 584), some_slots(60, 70)
    expected = pool.clone()
    reference.store_window(kv, weight, 1e-12, cos, sin, expected, slots, quantise=True)
    gpu.store_window(kv, weight, 1e-12, cos, sin, pool, slots, quantise=True)
    assert torch.equal(pool, expected)


def test_rounded_keys_equal_those_of_the_reference_where_no_sum_is_rounded() -> None:
    kv, weight, cos, sin = exact_rows(20)
    pool, slots = compare.random(24, 512, dtype=torch.bfloat16), some_slots(20, 24)
    expected = pool.clone()
    reference.store_window(kv, weight, 1e-12, cos, sin, expected, slots, quantise=True)
    gpu.store_window(kv, weight, 1e-12, cos, sin, pool, slots, quantise=True)
    assert torch.equal(pool, expected)


def test_keys_are_rounded_between_norm_and_rotation() -> None:
    kv = compare.random(3, 64).sign().bfloat16()  # of mean square 1: the norm is the weight
    weight, slots = compare.random(64), some_slots(3, 5)
    cos, sin = (compare.integers(-8, 9, 3, 32).float() / 8 for _ in range(2))
    pool = compare.random(5, 64, dtype=torch.bfloat16)
    expected = pool.clone()
    reference.store_window(kv, weight, 1e-12, cos, sin, expected, slots)
    gpu.store_window(kv, weight, 1e-12, cos, sin, pool, slots)
    assert torch.equal(pool, expected)


def test_keys_come_out_of_wider_rows_and_go_into_wider_rows() -> None:
    kv, weight, slots = compare.random(5, 100)[:, 10:34], compare.random(24), some_slots(5, 9)
    wide = compare.random(9, 40)
    expected = wide.clone()
    reference.store_window(kv, weight, EPS, *angles_of(slots, 8), expected[:, 8:32], slots)
    gpu.store_window(kv, weight, EPS, *angles_of(slots, 8), wide[:, 8:32], slots)
    compare.assert_close(wide, expected)


def test_no_tokens_leave_the_pool_as_it_is() -> None:
    pool = compare.random(3, 24)
    expected = pool.clone()
    gpu.store_window(compare.random(0, 24), compare.random(24), EPS, *angles(0, 8), pool, some_slots(0, 3))
    assert torch.equal(pool, expected)


def test_a_pool_that_does_not_fit_the_keys_is_refused() -> None:
    kv, weight, slots = compare.random(2, 128), compare.random(128), some_slots(2, 3)
    for pool in (random_bytes(3, 128), compare.random(3, 64), compare.random(128, 3).t()):
        with pytest.raises(ValueError, match="expected rows of"):
            gpu.store_window(kv, weight, EPS, *angles(2, 64), pool, slots)


def test_channels_that_are_no_whole_groups_are_refused_where_they_are_rounded() -> None:
    kv, weight, slots = compare.random(2, 128), compare.random(128), some_slots(2, 3)
    with pytest.raises(ValueError, match="96 channels to round to FP8: expected a multiple of 64"):
        gpu.store_window(kv, weight, EPS, *angles(2, 32), compare.random(3, 128), slots, quantise=True)
