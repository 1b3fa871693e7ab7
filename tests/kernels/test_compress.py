"""The compressor against the reference; packed entries byte for byte, as in `test_keys.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import compare
import pytest
import torch
from test_keys import random_bytes, some_slots
from test_norm import angles
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.formats import pack_keys, packed_key_bytes

EPS = 1e-6


@pytest.mark.parametrize(("rows", "channels", "ratio"), [(1, 10, 4), (129, 40, 4), (3, 1100, 128)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_raw_rows_go_to_their_slots_only(rows: int, channels: int, ratio: int, dtype: torch.dtype) -> None:
    kv, gate = compare.random(rows, channels, dtype=dtype), compare.random(rows, channels, dtype=dtype)
    ape, positions = compare.random(ratio, channels), compare.integers(0, 1 << 20, rows)
    pool, slots = compare.random(rows + 5, 2 * channels), some_slots(rows, rows + 5)
    expected = pool.clone()
    reference.store_raw(kv, gate, ape, positions, expected, slots)
    gpu.store_raw(kv, gate, ape, positions, pool, slots)
    assert torch.equal(pool, expected)


def test_raw_rows_come_out_of_one_product() -> None:
    kv, gate = compare.random(3, 2 * 24).chunk(2, dim=-1)
    ape, positions, slots = compare.random(4, 24), compare.integers(0, 99, 3), some_slots(3, 5)
    pool = compare.random(5, 48)
    expected = pool.clone()
    reference.store_raw(kv, gate, ape, positions, expected, slots)
    gpu.store_raw(kv, gate, ape, positions, pool, slots)
    assert torch.equal(pool, expected)


def test_no_raw_rows_leave_the_pool_as_it_is() -> None:
    pool = compare.random(3, 48)
    expected = pool.clone()
    kv, positions = compare.random(0, 24), compare.integers(0, 9, 0)
    gpu.store_raw(kv, kv, compare.random(4, 24), positions, pool, positions)
    assert torch.equal(pool, expected)


def test_a_raw_pool_that_does_not_fit_is_refused() -> None:
    kv, ape, slots = compare.random(2, 24), compare.random(4, 24), some_slots(2, 3)
    for pool in (compare.random(3, 24), compare.random(3, 48, dtype=torch.bfloat16), compare.random(48, 3).t()):
        with pytest.raises(ValueError, match="expected rows of 48 float32"):
            gpu.store_raw(kv, kv, ape, slots, pool, slots)


@dataclass(frozen=True)
class Windows:
    """Arguments of `compress` but for the entries."""

    pool: Tensor
    index: Tensor
    weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor
    store_entries: Tensor

    def compressed(self, op: Callable[..., None], entries: Tensor, quantise: bool = False) -> Tensor:
        entries = entries.clone()
        tables = (self.pool, self.index, self.weight, self.eps, self.cos, self.sin)
        op(*tables, entries, self.store_entries, quantise)
        return entries


def some_windows(
    count: int,
    rows: int,
    channels: int,
    rotary_dims: int,
    overlapping: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Windows:
    """About half of them close, all but the first may lack some of their first rows; the rest of the pool is NaN."""
    width = 2 * channels if overlapping else channels
    pool = torch.full((count * rows + 1, 2 * width), torch.nan, device=compare.DEVICE)
    # Row 0, to which the index of an absent row might lead, belongs to no window.
    index = 1 + torch.randperm(count * rows, generator=compare.generator()).view(count, rows).to(compare.DEVICE)
    absent = compare.integers(0, rows, count)
    absent[0] = 0
    index[torch.arange(rows, device=compare.DEVICE) < absent.unsqueeze(1)] = -1
    pool[index[index >= 0]] = compare.random(int((index >= 0).sum()), 2 * width, scale=3.0)
    store_entries = some_slots(count, count + 3)
    store_entries[compare.integers(0, 2, count) == 0] = -1
    store_entries[0] = count + 2
    store_entries[1:][store_entries[1:] == count + 2] = -1
    weight = compare.random(channels, dtype=dtype)
    return Windows(pool, index, weight, EPS, *angles(count, rotary_dims), store_entries)


# Rows of a window in one chunk of 8, in several, and in a last one that is not full.
@pytest.mark.parametrize(("rows", "overlapping"), [(8, True), (6, True), (1, False), (128, False), (21, False)])
@pytest.mark.parametrize(("channels", "rotary_dims"), [(24, 8), (64, 32), (513 + 87, 64)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_entries_of_closing_windows_equal_the_reference(
    rows: int, overlapping: bool, channels: int, rotary_dims: int, dtype: torch.dtype
) -> None:
    windows = some_windows(5, rows, channels, rotary_dims, overlapping, dtype)
    entries = compare.random(8, channels, dtype=dtype)
    expected = windows.compressed(reference.compress, entries)
    compare.assert_close(windows.compressed(gpu.compress, entries), expected)


def test_a_single_window_closes() -> None:
    windows, entries = some_windows(1, 8, 24, 8, overlapping=True), compare.random(4, 24)
    expected = windows.compressed(reference.compress, entries)
    compare.assert_close(windows.compressed(gpu.compress, entries), expected)


def test_a_program_closes_several_windows() -> None:
    windows, entries = some_windows(129, 8, 24, 8, overlapping=True), compare.random(132, 24)
    expected = windows.compressed(reference.compress, entries)
    compare.assert_close(windows.compressed(gpu.compress, entries), expected)


def test_gates_far_apart_leave_one_row() -> None:
    windows, entries = some_windows(5, 21, 24, 8), compare.random(8, 24)
    windows.pool[:, 24:] *= 300
    expected = windows.compressed(reference.compress, entries)
    compare.assert_close(windows.compressed(gpu.compress, entries), expected)


def test_windows_that_do_not_close_write_nothing() -> None:
    windows, entries = some_windows(5, 8, 24, 8), compare.random(8, 24)
    windows.store_entries.fill_(-1)
    assert torch.equal(windows.compressed(gpu.compress, entries), entries)


def test_no_windows_write_nothing() -> None:
    windows, entries = some_windows(2, 8, 24, 8), compare.random(8, 24)
    none = replace(windows, index=windows.index[:0], store_entries=windows.store_entries[:0], cos=windows.cos[:0])
    assert torch.equal(none.compressed(gpu.compress, entries), entries)


@pytest.mark.parametrize(("rows", "overlapping"), [(8, True), (20, False)])
@pytest.mark.parametrize(("channels", "rotary_dims"), [(512, 64), (200, 8)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_rounded_and_packed_entries_are_the_unrounded_ones_rounded(
    rows: int, overlapping: bool, channels: int, rotary_dims: int, dtype: torch.dtype
) -> None:
    # Packed entries are pooled in the weight's dtype, the others in their own.
    windows = some_windows(5, rows, channels, rotary_dims, overlapping, dtype)
    closes = windows.store_entries >= 0
    chosen = windows.store_entries[closes]
    unrounded = compare.random(8, channels, dtype=dtype)
    keys = windows.compressed(gpu.compress, unrounded)[chosen]
    expected = unrounded.clone()
    expected[chosen] = reference.fake_quant_fp8(keys, channels - rotary_dims)
    assert torch.equal(windows.compressed(gpu.compress, unrounded, quantise=True), expected)
    packed = random_bytes(8, packed_key_bytes(channels, rotary_dims))
    expected = packed.clone()
    expected[chosen] = pack_keys(keys, rotary_dims)
    assert torch.equal(windows.compressed(gpu.compress, packed, quantise=True), expected)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [compare.DTYPES, compare.DTYPES[::-1]])
def test_pooled_rows_are_rounded_before_the_norm(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    # One row per window, of numbers that bfloat16 rounds to +-1: the norm is then the weight.
    windows = some_windows(4, 1, 128, 64, dtype=weight_dtype)
    ones = compare.random(5, 128).sign()
    windows.pool[:, :128] = ones + ones * compare.random(5, 128).abs().clamp_max(1) * 2.0**-9
    plain, packed = compare.random(7, 128, dtype=dtype), random_bytes(7, packed_key_bytes(128, 64))
    for entries, rounded_to in ((plain, dtype), (packed, weight_dtype)):
        if rounded_to == torch.bfloat16:
            expected = windows.compressed(reference.compress, entries)
            assert torch.equal(windows.compressed(gpu.compress, entries), expected)


def test_mismatched_shapes_are_refused() -> None:
    windows, entries = some_windows(2, 8, 24, 8), compare.random(8, 24)
    for changed, what in (
        ({"pool": compare.random(20, 60)}, "rows of 60 numbers: expected 2 or 4 times 24 channels"),
        ({"pool": compare.random(20, 96), "index": windows.index[:, :7]}, "7 rows of overlapping windows"),
        ({"pool": compare.random(20, 48).bfloat16()}, "expected rows of 48 float32"),
        ({"weight": compare.random(1025)}, "entries of 1025 channels: expected at most 1024"),
    ):
        with pytest.raises(ValueError, match=what):
            replace(windows, **changed).compressed(gpu.compress, entries)
    with pytest.raises(ValueError, match="expected rows of 24 numbers"):
        windows.compressed(gpu.compress, compare.random(8, 48))
