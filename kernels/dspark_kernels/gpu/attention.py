"""Attention over gathered keys that are values too: a tile of keys is read once for both products.

One program serves a block of heads of one row. Few rows do not fill the device; then the keys of a row are split over
several programs, whose partial results a second kernel joins. Splits divide the keys that a row has, not the width of
the index: a graph captured for long texts costs little at short ones.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.formats import KEY_GROUP, packed_key_bytes

from .device import num_processors

_LOG2_E = math.log2(math.e)
_MIN_SPLIT_BLOCKS = 2
"""Smallest number of key blocks that justifies a program and its partial result."""
_COMBINED_SPLITS = 8
"""Partial results that are read at a time."""
_SAMPLES = 512


def sparse_attention(
    query: Tensor,
    window_keys: Tensor,
    window_index: Tensor,
    entry_keys: Tensor | None,
    entry_index: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """See `reference.sparse_attention`. Pools must be contiguous; they are never copied."""
    num_rows, num_heads, head_dim = query.shape
    query, sink = query.contiguous(), sink.float().contiguous()
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    if cos is None or sin is None:
        cos = sin = sink  # not read
        rotary_dims = 0
    else:
        cos, sin = cos.contiguous(), sin.contiguous()
        rotary_dims = 2 * cos.shape[-1]
    if head_dim > 512 or (rotary_dims and head_dim % 2):
        raise ValueError(f"head_dim {head_dim}: expected at most 512, and an even number where channels rotate")
    has_entries = entry_keys is not None and entry_index is not None and entry_index.shape[1] > 0
    if entry_keys is None or entry_index is None or not has_entries:
        entry_keys, entry_index = window_keys, window_index  # not read
    window_index, entry_index = _dense_rows(window_index), _dense_rows(entry_index)
    window_length, entry_length = window_index.shape[1], entry_index.shape[1] if has_entries else 0
    window_bytes = _packed_bytes(window_keys, head_dim, rotary_dims)
    entry_bytes = _packed_bytes(entry_keys, head_dim, rotary_dims)

    block_h, block_k, num_warps = _tile(query, window_keys, entry_keys)
    head_blocks = triton.cdiv(num_heads, block_h)
    key_blocks = triton.cdiv(window_length, block_k) + triton.cdiv(entry_length, block_k)
    num_splits = _num_splits(num_rows * head_blocks, key_blocks, num_processors(query))
    if num_splits > 1:
        partial = query.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32)
        partial_max = query.new_empty(num_rows, num_heads, num_splits, dtype=torch.float32)
        partial_sum = torch.empty_like(partial_max)
    else:
        partial = partial_max = partial_sum = sink  # not written

    padded_dim = max(16, triton.next_power_of_2(head_dim))
    _attention_kernel[(num_rows * head_blocks, num_splits)](
        query,
        window_keys,
        window_index,
        entry_keys,
        entry_index,
        sink,
        cos,
        sin,
        out,
        partial,
        partial_max,
        partial_sum,
        softmax_scale * _LOG2_E,
        num_heads,
        window_length,
        window_index.stride(0),
        entry_length,
        entry_index.stride(0),
        D=head_dim,
        D_PADDED=padded_dim,
        ROTARY=rotary_dims,
        WINDOW_BYTES=window_bytes,
        ENTRY_BYTES=entry_bytes,
        HAS_ENTRIES=has_entries,
        # One loop that selects its pointers, because two loops take more registers.
        ONE_LIST=(window_keys.dtype, window_index.dtype) == (entry_keys.dtype, entry_index.dtype),
        SPLIT=num_splits > 1,
        BLOCK_H=block_h,
        BLOCK_K=block_k,
        SAMPLES=_SAMPLES,
        num_warps=num_warps,
        num_stages=_num_stages(query, window_keys, entry_keys),
    )
    if num_splits > 1:
        _combine_kernel[(num_rows * num_heads,)](
            partial,
            partial_max,
            partial_sum,
            sink,
            cos,
            sin,
            out,
            num_heads,
            num_splits,
            D=head_dim,
            D_PADDED=padded_dim,
            ROTARY=rotary_dims,
            SPLITS_PADDED=triton.next_power_of_2(num_splits),
            BLOCK_S=_COMBINED_SPLITS,
            num_warps=4,
        )
    return out


def _dense_rows(index: Tensor) -> Tensor:
    return index if index.stride(1) == 1 else index.contiguous()


def _packed_bytes(keys: Tensor, head_dim: int, rotary_dims: int) -> int:
    """Bytes of a packed key, 0 for an unpacked pool."""
    if not keys.is_contiguous():
        raise ValueError(f"a pool of keys with strides {keys.stride()}: expected a contiguous one")
    is_packed, width = keys.dtype == torch.uint8, head_dim
    if is_packed:
        plain = head_dim - rotary_dims
        if plain % KEY_GROUP or not KEY_GROUP <= plain <= 8 * KEY_GROUP:
            raise ValueError(f"{plain} channels outside the rotary part: packed keys have a multiple of {KEY_GROUP}")
        if rotary_dims % 4 or rotary_dims > KEY_GROUP:
            raise ValueError(f"{rotary_dims} rotary channels: packed keys have a multiple of 4, at most {KEY_GROUP}")
        width = packed_key_bytes(head_dim, rotary_dims)
    if keys.shape[1] != width:
        raise ValueError(f"a pool of keys of {keys.shape[1]} numbers: expected {width}")
    return width if is_packed else 0


def _tile(query: Tensor, *pools: Tensor) -> tuple[int, int, int]:
    """(heads, keys, warps) of a program: a product needs at least 16 heads, and results of 64 fill the registers."""
    if query.dtype == torch.float32:
        return 16, 16, 8
    if query.shape[1] <= 16:
        return 16, 64 if all(pool.element_size() == 2 for pool in pools) else 32, 8
    return 64, 32, 8


def _num_stages(*loaded: Tensor) -> int:
    """Pipeline stages: index, wait, keys, wait, products; none for float32, which takes too much memory."""
    return 5 if all(x.dtype != torch.float32 for x in loaded) else 1


def _num_splits(num_programs: int, key_blocks: int, processors: int) -> int:
    """As many splits as there are idle processors, with a minimum of key blocks each."""
    return max(1, min(processors // num_programs, key_blocks // _MIN_SPLIT_BLOCKS))


@triton.jit(do_not_specialize=["window_length", "window_stride", "entry_length", "entry_stride"])
def _attention_kernel(
    p_query,
    p_window_keys,
    p_window_index,
    p_entry_keys,
    p_entry_index,
    p_sink,
    p_cos,
    p_sin,
    p_out,
    p_partial,
    p_partial_max,
    p_partial_sum,
    scale,
    num_heads,
    window_length,
    window_stride,
    entry_length,
    entry_stride,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    WINDOW_BYTES: tl.constexpr,
    ENTRY_BYTES: tl.constexpr,
    HAS_ENTRIES: tl.constexpr,
    ONE_LIST: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    i_row = (tl.program_id(0) // head_blocks).to(tl.int64)
    o_h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, D_PADDED)
    m_h = o_h < num_heads
    m_hd = m_h[:, None] & (o_d < D)[None, :]
    o_heads = i_row * num_heads + o_h
    o_hd = o_heads[:, None] * D + o_d[None, :]
    p_window_index += i_row * window_stride
    p_entry_index += i_row * entry_stride

    # Blocks are numbered continuously: first the window's, then the entries'.
    window_blocks = tl.cdiv(window_length, BLOCK_K)
    num_entries = 0
    if HAS_ENTRIES:
        num_entries = count_keys(p_entry_index, entry_length, SAMPLES)
    first = 0
    last = window_blocks + tl.cdiv(num_entries, BLOCK_K)
    if SPLIT:
        share = tl.cdiv(last, tl.num_programs(1))
        first = tl.minimum(tl.program_id(1) * share, last)
        last = tl.minimum(first + share, last)

    m_query = m_h
    if SPLIT:
        m_query = o_h < tl.where(first < last, num_heads, 0)  # without keys there are no reads
    b_query = tl.load(p_query + o_hd, mask=m_query[:, None] & (o_d < D)[None, :], other=0.0)
    b_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    b_values = tl.zeros([BLOCK_H, D_PADDED], tl.float32)
    if ONE_LIST:
        b_max, b_sum, b_values = _attend(
            b_query, b_max, b_sum, b_values, p_window_keys, p_window_index, window_length,
            p_entry_keys, p_entry_index, num_entries, first, last, scale,
            D, D_PADDED, ROTARY, WINDOW_BYTES, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        b_max, b_sum, b_values = _attend(
            b_query, b_max, b_sum, b_values, p_window_keys, p_window_index, window_length,
            p_window_keys, p_window_index, 0,
            tl.minimum(first, window_blocks), tl.minimum(last, window_blocks), scale,
            D, D_PADDED, ROTARY, WINDOW_BYTES, BLOCK_H, BLOCK_K,
        )  # fmt: skip
        if HAS_ENTRIES:
            b_max, b_sum, b_values = _attend(
                b_query, b_max, b_sum, b_values, p_entry_keys, p_entry_index, num_entries,
                p_entry_keys, p_entry_index, 0,
                tl.maximum(first - window_blocks, 0), tl.maximum(last - window_blocks, 0), scale,
                D, D_PADDED, ROTARY, ENTRY_BYTES, BLOCK_H, BLOCK_K,
            )  # fmt: skip

    if SPLIT:
        o_splits = o_heads * tl.num_programs(1) + tl.program_id(1)
        tl.store(p_partial_max + o_splits, b_max, mask=m_h)
        tl.store(p_partial_sum + o_splits, b_sum, mask=m_h)
        if first < last:
            tl.store(p_partial + o_splits[:, None] * D + o_d[None, :], b_values, mask=m_hd)
    else:
        b_sink = tl.load(p_sink + o_h, mask=m_h, other=0.0) * 1.4426950408889634  # log2(e)
        b_largest = tl.maximum(b_max, b_sink)
        b_weight = tl.exp2(b_max - b_largest)
        b_total = b_sum * b_weight + tl.exp2(b_sink - b_largest)
        b_values = (b_values * (b_weight / b_total)[:, None]).to(p_out.dtype.element_ty)
        if ROTARY > 0:
            b_values = _rotated_back(b_values, p_cos, p_sin, i_row, D, D_PADDED, ROTARY, BLOCK_H)
        tl.store(p_out + o_hd, b_values, mask=m_hd)


@triton.jit
def count_keys(p_index, length, SAMPLES: tl.constexpr):
    """Number of p_index[:length] that are not -1, where all -1 are at the end; takes two dependent reads."""
    stride = tl.cdiv(length, SAMPLES)
    o_s = tl.arange(0, SAMPLES)
    b_sample = tl.load(p_index + o_s * stride, mask=o_s * stride < length, other=-1)
    # Fewer than `stride` keys follow the last sample that is a key.
    start = tl.maximum(tl.sum((b_sample >= 0).to(tl.int32), 0) - 1, 0) * stride
    count = start
    for first in range(0, stride, SAMPLES):
        o_i = first + o_s
        m_i = (o_i < stride) & (start + o_i < length)
        b_index = tl.load(p_index + start + o_i, mask=m_i, other=-1)
        count += tl.sum((b_index >= 0).to(tl.int32), 0)
    return count


@triton.jit
def _attend(
    b_query,
    b_max,
    b_sum,
    b_values,
    p_first_keys,
    p_first_index,
    num_first,
    p_second_keys,
    p_second_index,
    num_second,
    first,
    last,
    scale,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Softmax over blocks first .. last - 1 of two lists of keys: running maximum, sum and weighted sum."""
    first_blocks = tl.cdiv(num_first, BLOCK_K)
    for i_block in range(first, last):
        is_first = i_block < first_blocks
        p_keys = tl.where(is_first, p_first_keys, p_second_keys)
        p_index = tl.where(is_first, p_first_index, p_second_index)
        num_keys = tl.where(is_first, num_first, num_second)
        o_k = tl.where(is_first, i_block, i_block - first_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        b_index = tl.load(p_index + o_k, mask=o_k < num_keys, other=-1).to(tl.int64)
        m_k = b_index >= 0
        if KEY_BYTES == 0:
            b_keys = _plain_keys(p_keys, b_index, m_k, D, D_PADDED).to(b_query.dtype)
        else:
            b_keys = _packed_keys(p_keys, b_index, m_k, D, D_PADDED, ROTARY, KEY_BYTES, BLOCK_K).to(b_query.dtype)
        b_weights = tl.zeros([BLOCK_H, BLOCK_K], b_query.dtype)
        b_kept = tl.full([BLOCK_H], 1.0, tl.float32)
        # Always true. For two products in a row the compiler gives each warp all keys of the first, which is then
        # computed more than once; after a branch it distributes them.
        if i_block < last:
            b_logits = tl.dot(b_query, tl.trans(b_keys), input_precision="ieee") * scale
            b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))
            b_largest = tl.maximum(b_max, tl.max(b_logits, 1))
            b_finite = tl.where(b_largest == float("-inf"), 0.0, b_largest)
            b_logits = tl.exp2(b_logits - b_finite[:, None])
            b_kept = tl.exp2(b_max - b_finite)
            b_sum = b_sum * b_kept + tl.sum(b_logits, 1)
            b_max = b_largest
            b_weights = b_logits.to(b_query.dtype)
        b_values = tl.dot(b_weights, b_keys, b_values * b_kept[:, None], input_precision="ieee")
    return b_max, b_sum, b_values


@triton.jit
def _plain_keys(p_keys, b_index, m_k, D: tl.constexpr, D_PADDED: tl.constexpr):
    o_d = tl.arange(0, D_PADDED)
    p_keys += b_index[:, None] * D + o_d[None, :]
    if D == D_PADDED:
        b_keys = tl.load(p_keys, mask=m_k[:, None], other=0.0)
    else:
        b_keys = tl.load(p_keys, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)
    return b_keys


@triton.jit
def _packed_keys(
    p_keys,
    b_index,
    m_k,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_K, D_PADDED] of E4M3 bytes, bfloat16 rotary part and E8M0 scales; see `formats.pack_keys`."""
    PLAIN: tl.constexpr = D - ROTARY
    GROUP: tl.constexpr = 64
    o_g, o_c = tl.arange(0, D_PADDED // GROUP)[None, :], tl.arange(0, GROUP)[None, :]
    p_keys += b_index * KEY_BYTES
    # The scales of a key as one number, wide enough for an asynchronous copy. A byte is the exponent of a float32.
    b_scales = tl.load((p_keys + PLAIN + 2 * ROTARY).to(tl.pointer_type(tl.int64)), mask=m_k, other=0)
    b_scale = (((b_scales[:, None] >> (8 * o_g)) & 0xFF).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    o_d = (tl.arange(0, D_PADDED // GROUP) * GROUP)[None, :, None] + o_c[:, None, :]
    b_bytes = tl.load(p_keys[:, None, None] + o_d, mask=m_k[:, None, None] & (o_d < PLAIN), other=0)
    b_keys = b_bytes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * b_scale[:, :, None]
    if ROTARY > 0:
        # Starts at a group and fills at most one.
        p_rotary = (p_keys + PLAIN).to(tl.pointer_type(tl.bfloat16))
        b_rotary = tl.load(p_rotary[:, None] + o_c, mask=m_k[:, None] & (o_c < ROTARY), other=0.0).to(tl.float32)
        b_keys = tl.where(o_g[:, :, None] == PLAIN // GROUP, b_rotary[:, None, :], b_keys)
    return tl.reshape(b_keys, [BLOCK_K, D_PADDED])


@triton.jit
def _rotated_back(
    b_values, p_cos, p_sin, i_row, D: tl.constexpr, D_PADDED: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr
):
    """b_values [ROWS, D_PADDED] with the pairs of the last ROTARY channels turned by the negative angle."""
    PAIRS: tl.constexpr = D_PADDED // 2
    o_p = tl.arange(0, PAIRS) - (D - ROTARY) // 2
    m_p = (o_p >= 0) & (o_p < ROTARY // 2)
    o_angle = i_row * (ROTARY // 2) + o_p
    b_cos = tl.load(p_cos + o_angle, mask=m_p, other=1.0)[None, :]
    b_sin = tl.load(p_sin + o_angle, mask=m_p, other=0.0)[None, :]
    b_even, b_odd = tl.split(tl.reshape(b_values.to(tl.float32), [ROWS, PAIRS, 2]))
    b_turned = tl.join(b_even * b_cos + b_odd * b_sin, b_odd * b_cos - b_even * b_sin)
    return tl.reshape(b_turned, [ROWS, D_PADDED]).to(b_values.dtype)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    p_partial,
    p_partial_max,
    p_partial_sum,
    p_sink,
    p_cos,
    p_sin,
    p_out,
    num_heads,
    num_splits,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)  # of all rows
    o_d = tl.arange(0, D_PADDED)
    m_d = o_d < D
    o_s = tl.arange(0, SPLITS_PADDED)
    p_partial_max += i_head * num_splits
    p_partial_sum += i_head * num_splits
    p_partial += i_head * num_splits * D
    b_sink = tl.load(p_sink + i_head % num_heads) * 1.4426950408889634  # log2(e)
    b_all_max = tl.load(p_partial_max + o_s, mask=o_s < num_splits, other=float("-inf"))
    b_largest = tl.maximum(tl.max(b_all_max, 0), b_sink)

    b_total = tl.exp2(b_sink - b_largest)
    b_values = tl.zeros([D_PADDED], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        o_b = first + tl.arange(0, BLOCK_S)
        b_max = tl.load(p_partial_max + o_b, mask=o_b < num_splits, other=float("-inf"))
        m_b = b_max > float("-inf")  # without a key a split wrote no values
        b_weight = tl.exp2(b_max - b_largest)
        b_total += tl.sum(tl.load(p_partial_sum + o_b, mask=m_b, other=0.0) * b_weight, 0)
        b_partial = tl.load(p_partial + o_b[:, None] * D + o_d[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0)
        b_values += tl.sum(b_partial * b_weight[:, None], 0)
    b_values = (b_values / b_total).to(p_out.dtype.element_ty)
    if ROTARY > 0:
        b_values = tl.reshape(b_values, [1, D_PADDED])
        b_values = _rotated_back(b_values, p_cos, p_sin, i_head // num_heads, D, D_PADDED, ROTARY, 1)
        b_values = tl.reshape(b_values, [D_PADDED])
    tl.store(p_out + i_head * D + o_d, b_values, mask=m_d)
