"""`sparse_attention` against its reference."""

from __future__ import annotations

from typing import Any

import compare
import pytest
import torch
from compare import DEVICE, DTYPES
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.formats import pack_keys
from dspark_kernels.gpu import attention

NAN = float("nan")


def pool(rows: int, head_dim: int, dtype: torch.dtype, rotary_dims: int = 0) -> Tensor:
    """Keys, packed where there are rotary channels; row 1 was never written."""
    keys = compare.random(rows, head_dim, dtype=torch.float32 if rotary_dims else dtype)
    if rotary_dims:
        packed = pack_keys(keys, rotary_dims)
        packed[1] = 255  # NaN in every part
        return packed
    keys[1] = NAN
    return keys


def written(pool_rows: int, *shape: int) -> Tensor:
    """Random rows of a pool, without row 1."""
    index = compare.integers(1, pool_rows, *shape)
    return torch.where(index == 1, 0, index)


def window(num_rows: int, length: int, pool_rows: int) -> Tensor:
    """Random rows in random order, -1 at random places."""
    index = written(pool_rows, num_rows, length)
    missing = compare.integers(0, 4, num_rows, length) == 0
    return index.masked_fill(missing, -1)


def entries(num_rows: int, length: int, pool_rows: int) -> Tensor:
    """A random number of rows, none behind them; the first row sees all and the last sees nothing."""
    counts = compare.integers(0, length + 1, num_rows, 1)
    counts[0], counts[-1] = length, 0 if num_rows > 1 else length
    index = written(pool_rows, num_rows, length)
    return index.masked_fill(torch.arange(length, device=DEVICE) >= counts, -1)


def angles(num_rows: int, rotary_dims: int) -> tuple[Tensor, Tensor]:
    angle = compare.random(num_rows, rotary_dims // 2) * 100
    return angle.cos(), angle.sin()


def assert_as_reference(query: Tensor, *args: Any, **kwargs: Any) -> None:
    expected = reference.sparse_attention(query, *args, **kwargs)
    compare.assert_close(gpu.sparse_attention(query, *args, **kwargs), expected)


def queries(num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Small enough that the reference, which rounds logits to the dtype, errs less than the bound."""
    return compare.random(num_rows, num_heads, head_dim, dtype=dtype, scale=0.5)


# One program per row; several for the keys of a row; several for its heads, of which the last has few.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "head_dim", "rotary_dims", "window_length", "entry_length"),
    [
        (1, 3, 64, 0, 133, 150),
        (1, 3, 64, 16, 133, 150),
        (3, 20, 24, 8, 70, 90),
        (1, 70, 80, 16, 70, 150),
    ],
)
def test_rows_attend_to_window_and_entries(
    num_rows: int,
    num_heads: int,
    head_dim: int,
    rotary_dims: int,
    window_length: int,
    entry_length: int,
    dtype: torch.dtype,
) -> None:
    assert_as_reference(
        queries(num_rows, num_heads, head_dim, dtype),
        pool(50, head_dim, dtype),
        window(num_rows, window_length, 50),
        pool(90, head_dim, dtype),
        entries(num_rows, entry_length, 90),
        compare.random(num_heads),
        head_dim**-0.5,
        *(angles(num_rows, rotary_dims) if rotary_dims else ()),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype: torch.dtype) -> None:
    query, sink = queries(129, 1, 24, dtype), compare.random(1)
    assert_as_reference(query, pool(50, 24, dtype), window(129, 5, 50), None, None, sink, 0.2, *angles(129, 24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", ["both", "window", "entries"])
@pytest.mark.parametrize(("num_rows", "num_heads"), [(1, 17), (4, 2)])
def test_keys_may_be_packed(num_rows: int, num_heads: int, packed: str, dtype: torch.dtype) -> None:
    """Three groups under a scale and a rotary part that does not fill one."""
    head_dim, rotary_dims = 192 + 16, 16
    assert_as_reference(
        queries(num_rows, num_heads, head_dim, dtype),
        pool(50, head_dim, dtype, rotary_dims if packed != "entries" else 0),
        window(num_rows, 40, 50),
        pool(90, head_dim, dtype, rotary_dims if packed != "window" else 0),
        entries(num_rows, 70, 90),
        compare.random(num_heads),
        head_dim**-0.5,
        *angles(num_rows, rotary_dims),
    )


def test_packed_keys_of_very_different_size_keep_their_scales() -> None:
    head_dim, rotary_dims = 128 + 64, 64
    keys = compare.random(40, head_dim) * torch.exp2(compare.integers(-12, 4, 40, 1).float())
    query, index = compare.random(2, 4, head_dim), torch.arange(40, device=DEVICE).expand(2, 40)
    assert_as_reference(
        query, pack_keys(keys, rotary_dims), index, None, None, compare.random(4), 0.01, *angles(2, rotary_dims)
    )


def test_keys_may_be_plain_without_rotation_and_packed_without_a_rotary_part() -> None:
    query, sink = queries(2, 3, 128, torch.float32), compare.random(3)
    packed = pack_keys(compare.random(50, 128), 0)
    assert_as_reference(query, packed, window(2, 20, 50), packed, entries(2, 20, 50), sink, 0.1)


def test_keys_may_have_another_dtype_than_queries() -> None:
    query, sink = queries(2, 3, 64, torch.float32), compare.random(3)
    keys = pool(50, 64, torch.bfloat16)
    assert_as_reference(query, keys, window(2, 20, 50), keys, entries(2, 20, 50), sink, 0.125)
    query = query.bfloat16()
    keys = pool(50, 64, torch.float32)
    assert_as_reference(query, keys, window(2, 20, 50), keys.bfloat16(), entries(2, 20, 50), sink, 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_row_without_keys_is_zero(num_rows: int, dtype: torch.dtype) -> None:
    query, keys, sink = queries(num_rows, 3, 64, dtype), pool(9, 64, dtype), compare.random(3)
    nothing = torch.full((num_rows, 133), -1, device=DEVICE)
    out = gpu.sparse_attention(query, keys, nothing, keys, nothing, sink, 0.1, *angles(num_rows, 16))
    assert out.dtype == dtype
    assert torch.equal(out, torch.zeros_like(query))


def test_the_window_of_a_text_that_begins_has_its_keys_at_the_end() -> None:
    query, sink = compare.random(2, 3, 64), compare.random(3)
    index = torch.full((2, 133), -1, device=DEVICE)
    index[:, -2:] = 5
    assert_as_reference(query, pool(9, 64, torch.float32), index, None, None, sink, 0.125)


@pytest.mark.parametrize("length", [1, 16, 17, 33, 300])
def test_rows_end_anywhere(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the edge of blocks, and at that of the steps in which the keys of a row are counted, here 16."""
    monkeypatch.setattr(attention, "_SAMPLES", 16)
    counts = torch.tensor([length // 2, max(length - 17, 1), length - 1, length], device=DEVICE)
    index = written(9, len(counts), length)
    index = index.masked_fill(torch.arange(length, device=DEVICE) >= counts.unsqueeze(1), -1)
    query, keys, sink = compare.random(len(counts), 1, 16), pool(9, 16, torch.float32), compare.random(1)
    assert_as_reference(query, keys, window(len(counts), 3, 9), keys, index, sink, 0.25)


@pytest.mark.parametrize(("num_rows", "count"), [(1, 500), (1, 30), (2, 500)])
def test_many_programs_share_the_keys_of_a_row(num_rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are joined at a time; with few keys most of them have none."""
    monkeypatch.setattr(attention, "num_processors", lambda _: 21)
    query, keys, sink = compare.random(num_rows, 2, 16), pool(90, 16, torch.float32), compare.random(2)
    index = written(90, num_rows, 500)
    index[:, count:] = -1
    index[1:, 100:] = -1
    cos, sin = angles(num_rows, 8)
    assert_as_reference(query, keys, window(num_rows, 20, 90), keys, index, sink, 0.25, cos, sin)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_logits_of_any_size_do_not_overflow(num_rows: int) -> None:
    query, sink = compare.random(num_rows, 3, 64, scale=40.0), compare.random(3, scale=40.0)
    keys = pool(50, 64, torch.float32)
    assert_as_reference(query, keys, window(num_rows, 70, 50), None, None, sink, 1.0)


def test_a_large_sink_leaves_little_to_the_keys() -> None:
    query, sink = compare.random(5, 3, 64), torch.tensor([-1e4, 0.0, 1e4], device=DEVICE)
    keys = pool(50, 64, torch.float32)
    assert_as_reference(query, keys, window(5, 40, 50), None, None, sink, 0.125)


def test_a_block_of_queries_counts_as_heads() -> None:
    """As in the drafter: more heads than a program takes, no rotation, the same keys for all."""
    query, sink = queries(2, 150, 64, torch.bfloat16), compare.random(150)
    assert_as_reference(query, pool(50, 64, torch.bfloat16), window(2, 45, 50), None, None, sink, 0.125)


def test_full_width_of_the_model() -> None:
    query, sink = queries(1, 2, 512, torch.bfloat16), compare.random(2)
    packed = pool(50, 512, torch.bfloat16, 64)
    assert packed.shape[1] == 584
    index, more = window(1, 40, 50), entries(1, 40, 50)
    assert_as_reference(query, packed, index, packed, more, sink, 512**-0.5, *angles(1, 64))


def test_index_may_be_a_slice_and_of_32_bits() -> None:
    query, sink, keys = compare.random(3, 3, 64), compare.random(3), pool(50, 64, torch.float32)
    index = window(3, 80, 50).int()
    assert_as_reference(query, keys, index[:, 10:40], keys, entries(3, 40, 50)[:, :30], sink, 0.125)
    assert_as_reference(query.transpose(0, 1), keys, index.t()[:3, :3].t(), None, None, sink, 0.125)


def test_no_rows_and_no_entries() -> None:
    keys, sink = pool(9, 64, torch.float32), compare.random(3)
    none = torch.empty(0, 5, dtype=torch.int64, device=DEVICE)
    assert gpu.sparse_attention(compare.random(0, 3, 64), keys, none, None, None, sink, 0.1).shape == (0, 3, 64)
    query, no_entries = compare.random(2, 3, 64), torch.empty(2, 0, dtype=torch.int64, device=DEVICE)
    assert_as_reference(query, keys, window(2, 8, 9), keys, no_entries, sink, 0.125)


def test_unsupported_inputs_are_refused() -> None:
    query, sink, index = compare.random(2, 3, 80), compare.random(3), window(2, 8, 9)
    packed = pool(9, 80, torch.float32, 16)
    with pytest.raises(ValueError, match="80 channels outside the rotary part"):
        gpu.sparse_attention(query, packed, index, None, None, sink, 0.1)
    with pytest.raises(ValueError, match="pool of keys of 103 numbers: expected 104"):
        gpu.sparse_attention(query, packed[:, :-1].contiguous(), index, None, None, sink, 0.1, *angles(2, 16))
    with pytest.raises(ValueError, match="pool of keys of 64 numbers: expected 80"):
        gpu.sparse_attention(query, pool(9, 64, torch.float32), index, None, None, sink, 0.1)
    with pytest.raises(ValueError, match="expected a contiguous one"):
        gpu.sparse_attention(query, pool(18, 80, torch.float32)[::2], index, None, None, sink, 0.1)
    with pytest.raises(ValueError, match="14 rotary channels: packed keys have a multiple of 4"):
        gpu.sparse_attention(query[..., :78], packed, index, None, None, sink, 0.1, *angles(2, 14))
    with pytest.raises(ValueError, match="head_dim 79: expected at most 512, and an even number"):
        gpu.sparse_attention(query[..., :79], packed, index, None, None, sink, 0.1, *angles(2, 14))
