"""`sparse_attention` against its reference."""

from __future__ import annotations

from typing import Any

import compare
import numpy
import pytest
import torch
import triton.language as tl
from compare import DEVICE, DTYPES
from dspark_kernels import gpu, reference
from dspark_kernels.formats import pack_keys
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

NAN = float("nan")


def _numbers(operand: TensorHandle) -> numpy.ndarray:
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return (operand.data.astype(numpy.uint32) << 16).view(numpy.float32)


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as integers, and multiplies those."""

    def create_dot(_: Any, left: TensorHandle, right: TensorHandle, added: TensorHandle, *args: Any) -> TensorHandle:
        return TensorHandle(_numbers(left) @ _numbers(right) + added.data, added.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def pool(rows: int, head_dim: int, dtype: torch.dtype, rotary_dims: int = 0) -> Tensor:
    """Keys of rows 2 .. rows - 1, packed where there are rotary channels; rows 0 and 1 were never written."""
    keys = compare.random(rows, head_dim, dtype=torch.float32 if rotary_dims else dtype)
    if rotary_dims:
        packed = pack_keys(keys, rotary_dims)
        packed[:2] = 255  # NaN in every part
        return packed
    keys[:2] = NAN
    return keys


def window(num_rows: int, length: int, pool_rows: int) -> Tensor:
    """Some rows in no order, none in places."""
    index = compare.integers(2, pool_rows, num_rows, length)
    missing = compare.integers(0, 4, num_rows, length) == 0
    return index.masked_fill(missing, -1)


def entries(num_rows: int, length: int, pool_rows: int) -> Tensor:
    """A random number of rows, none behind them; the first row sees all and the last sees nothing."""
    counts = compare.integers(0, length + 1, num_rows, 1)
    counts[0], counts[-1] = length, 0 if num_rows > 1 else length
    index = compare.integers(2, pool_rows, num_rows, length)
    return index.masked_fill(torch.arange(length, device=DEVICE) >= counts, -1)


def angles(num_rows: int, rotary_dims: int) -> tuple[Tensor, Tensor]:
    angle = compare.random(num_rows, rotary_dims // 2) * 100
    return angle.cos(), angle.sin()


def assert_equal_results(query: Tensor, *args: Any, **kwargs: Any) -> None:
    expected = reference.sparse_attention(query, *args, **kwargs)
    compare.assert_close(gpu.sparse_attention(query, *args, **kwargs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "head_dim", "rotary_dims"),
    [(1, 3, 64, 0), (1, 3, 64, 16), (3, 20, 24, 8), (2, 70, 80, 16), (129, 1, 24, 24)],
)
def test_rows_attend_to_window_and_entries(
    num_rows: int, num_heads: int, head_dim: int, rotary_dims: int, dtype: torch.dtype
) -> None:
    query, sink = compare.random(num_rows, num_heads, head_dim, dtype=dtype), compare.random(num_heads)
    cos, sin = angles(num_rows, rotary_dims) if rotary_dims else (None, None)
    window_length, entry_length = (5, 40) if num_rows == 129 else (133, 150)
    assert_equal_results(
        query,
        pool(50, head_dim, dtype),
        window(num_rows, window_length, 50),
        pool(90, head_dim, dtype),
        entries(num_rows, entry_length, 90),
        sink,
        head_dim**-0.5,
        cos,
        sin,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", ["both", "window", "entries"])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_keys_may_be_packed(num_rows: int, packed: str, dtype: torch.dtype) -> None:
    """Three groups under a scale and a rotary part that does not fill one."""
    head_dim, rotary_dims = 192 + 16, 16
    query, sink = compare.random(num_rows, 17, head_dim, dtype=dtype), compare.random(17)
    assert_equal_results(
        query,
        pool(50, head_dim, dtype, rotary_dims if packed != "entries" else 0),
        window(num_rows, 70, 50),
        pool(90, head_dim, dtype, rotary_dims if packed != "window" else 0),
        entries(num_rows, 80, 90),
        sink,
        head_dim**-0.5,
        *angles(num_rows, rotary_dims),
    )


def test_packed_keys_of_very_different_size_keep_their_scales() -> None:
    head_dim, rotary_dims = 128 + 64, 64
    keys = compare.random(40, head_dim) * torch.exp2(compare.integers(-12, 4, 40, 1).float())
    query, index = compare.random(2, 4, head_dim), torch.arange(40, device=DEVICE).expand(2, 40)
    assert_equal_results(
        query, pack_keys(keys, rotary_dims), index, None, None, compare.random(4), 0.01, *angles(2, rotary_dims)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_row_without_keys_is_zero(num_rows: int, dtype: torch.dtype) -> None:
    query, keys, sink = compare.random(num_rows, 3, 64, dtype=dtype), pool(9, 64, dtype), compare.random(3)
    nothing = torch.full((num_rows, 133), -1, device=DEVICE)
    out = gpu.sparse_attention(query, keys, nothing, keys, nothing, sink, 0.1, *angles(num_rows, 16))
    assert out.dtype == dtype
    assert torch.equal(out, torch.zeros_like(query))


def test_the_window_of_a_text_that_begins_has_its_keys_at_the_end() -> None:
    query, sink = compare.random(2, 3, 64), compare.random(3)
    index = torch.full((2, 133), -1, device=DEVICE)
    index[:, -2:] = 5
    assert_equal_results(query, pool(9, 64, torch.float32), index, None, None, sink, 0.125)


@pytest.mark.parametrize("length", [1, 16, 17, 511, 512, 513, 1300])
def test_rows_end_anywhere(length: int) -> None:
    """One key more or less at the edge of blocks, and at the steps in which the keys of a row are counted."""
    counts = torch.tensor([0, 1, length // 2, max(length - 513, 0), length - 1, length], device=DEVICE)
    index = compare.integers(2, 90, len(counts), length)
    index = index.masked_fill(torch.arange(length, device=DEVICE) >= counts.unsqueeze(1), -1)
    query, sink = compare.random(len(counts), 1, 16), compare.random(1)
    keys = pool(90, 16, torch.float32)
    assert_equal_results(query, keys, window(len(counts), 3, 90), keys, index, sink, 0.25)


@pytest.mark.parametrize("num_rows", [1, 7])
def test_logits_of_any_size_do_not_overflow(num_rows: int) -> None:
    query, sink = compare.random(num_rows, 3, 64, scale=40.0), compare.random(3, scale=40.0)
    keys = pool(50, 64, torch.float32)
    assert_equal_results(query, keys, window(num_rows, 133, 50), None, None, sink, 1.0)


def test_a_large_sink_leaves_little_to_the_keys() -> None:
    query, sink = compare.random(5, 3, 64), torch.tensor([-1e4, 0.0, 1e4], device=DEVICE)
    keys = pool(50, 64, torch.float32)
    assert_equal_results(query, keys, window(5, 40, 50), None, None, sink, 0.125)


def test_a_block_of_queries_counts_as_heads() -> None:
    """As in the drafter: more heads than a program takes, no rotation, the same keys for all."""
    query, sink = compare.random(2, 150, 64, dtype=torch.bfloat16), compare.random(150)
    assert_equal_results(query, pool(50, 64, torch.bfloat16), window(2, 45, 50), None, None, sink, 0.125)


def test_full_width_of_the_model() -> None:
    query, sink = compare.random(1, 2, 512, dtype=torch.bfloat16), compare.random(2)
    packed = pool(50, 512, torch.bfloat16, 64)
    assert packed.shape[1] == 584
    index, more = window(1, 40, 50), entries(1, 40, 50)
    assert_equal_results(query, packed, index, packed, more, sink, 512**-0.5, *angles(1, 64))


def test_index_may_be_a_slice_and_of_32_bits() -> None:
    query, sink, keys = compare.random(3, 3, 64), compare.random(3), pool(50, 64, torch.float32)
    index = window(3, 80, 50).int()
    assert_equal_results(query, keys, index[:, 10:70], keys, entries(3, 80, 50)[:, :50], sink, 0.125)
    assert_equal_results(query.transpose(0, 1), keys, index.t()[:3], None, None, sink, 0.125)


def test_no_rows_and_no_keys() -> None:
    keys, sink = pool(9, 64, torch.float32), compare.random(3)
    none = torch.empty(0, 5, dtype=torch.int64, device=DEVICE)
    assert gpu.sparse_attention(compare.random(0, 3, 64), keys, none, None, None, sink, 0.1).shape == (0, 3, 64)
    query, empty = compare.random(2, 3, 64), torch.empty(2, 0, dtype=torch.int64, device=DEVICE)
    assert_equal_results(query, keys, empty, keys, window(2, 8, 9), sink, 0.125)
    assert_equal_results(query, keys, window(2, 8, 9), keys, empty, sink, 0.125)
    assert_equal_results(query, keys, empty, keys, empty, sink, 0.125)


def test_pools_of_another_width_are_refused() -> None:
    query, sink, index = compare.random(2, 3, 80), compare.random(3), window(2, 8, 9)
    packed = pool(9, 80, torch.float32, 16)
    with pytest.raises(ValueError, match="80 channels outside the rotary part"):
        gpu.sparse_attention(query, packed, index, None, None, sink, 0.1)
    with pytest.raises(ValueError, match="packed keys have 103 bytes: expected 104"):
        gpu.sparse_attention(query, packed[:, :-1].contiguous(), index, None, None, sink, 0.1, *angles(2, 16))
    with pytest.raises(ValueError, match="keys have 64 channels: expected the query's 80"):
        gpu.sparse_attention(query, pool(9, 64, torch.float32), index, None, None, sink, 0.1)
    with pytest.raises(ValueError, match="expected a contiguous one"):
        gpu.sparse_attention(query, pool(18, 80, torch.float32)[::2], index, None, None, sink, 0.1)
