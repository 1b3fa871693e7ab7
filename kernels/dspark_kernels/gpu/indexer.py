"""The indexer: scores are written to memory, then each row's k-th largest score is found exactly, by bisection.

Rows of one request see the same entries: for two neighbours that do, a program reads the keys once. A row longer than
a program can hold is cut into chunks, whose best entries, in order, make a shorter row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import count_keys
from .device import num_processors

_PROGRAMS_PER_PROCESSOR = 4
_LEAST_SCORES, _MOST_SCORES = 1024, 8192
"""Scores that a program bisects, in registers."""
_SAMPLES = 512


def indexer_topk(query: Tensor, head_weights: Tensor, keys: Tensor, entry_index: Tensor, topk: int) -> Tensor:
    """See `reference.indexer_topk`. Returns entry_index itself if every visible entry is chosen."""
    num_rows, length = entry_index.shape
    if length <= topk:
        return entry_index
    if num_rows == 0 or topk <= 0:
        return entry_index.new_empty(num_rows, max(topk, 0))
    if 2 * topk > _MOST_SCORES:
        raise ValueError(f"topk {topk}: expected at most {_MOST_SCORES // 2}")
    if not keys.is_contiguous() or keys.shape[1] != query.shape[2]:
        raise ValueError(f"keys {tuple(keys.shape)}: expected contiguous [P, {query.shape[2]}]")
    if entry_index.stride(1) != 1:
        entry_index = entry_index.contiguous()
    scores = _scores(query.contiguous(), head_weights.contiguous(), keys, entry_index)
    chunks = 2
    while chunks > 1:
        block = max(_LEAST_SCORES, min(triton.next_power_of_2(entry_index.shape[1]), _MOST_SCORES))
        chunks = triton.cdiv(entry_index.shape[1], block)
        scores, entry_index = _select(scores, entry_index, topk, chunks, block)
    return entry_index


def _scores(query: Tensor, head_weights: Tensor, keys: Tensor, entry_index: Tensor) -> Tensor:
    """float32 [N, K] scores, unwritten after the entries that a row sees."""
    num_rows, num_heads, dim = query.shape
    length = entry_index.shape[1]
    scores = query.new_empty(num_rows, length, dtype=torch.float32)
    exact = query.dtype == torch.float32
    block_k = 16 if exact else 64
    blocks = triton.cdiv(length, block_k)
    programs = _PROGRAMS_PER_PROCESSOR * num_processors(query)
    rows = 2 if num_rows * blocks > programs and not exact else 1
    groups = triton.cdiv(num_rows, rows)
    _score_kernel[(groups, min(blocks, triton.cdiv(programs, groups)))](
        query,
        head_weights,
        keys,
        entry_index,
        scores,
        num_rows,
        length,
        entry_index.stride(0),
        H=num_heads,
        H_PADDED=max(16, triton.next_power_of_2(num_heads)),
        D=dim,
        D_PADDED=max(16, triton.next_power_of_2(dim)),
        ROWS=rows,
        BLOCK_K=block_k,
        SAMPLES=_SAMPLES,
        num_warps=8 if exact else 4,
        num_stages=1 if exact or keys.dtype == torch.float32 else 5,
    )
    return scores


def _select(scores: Tensor, index: Tensor, topk: int, chunks: int, block: int) -> tuple[Tensor, Tensor]:
    """(scores, index) [N, chunks * topk]: the `topk` best of each chunk of `block` scores."""
    num_rows = len(index)
    chosen = index.new_empty(num_rows, chunks * topk)
    chosen_scores = scores.new_empty(num_rows, chunks * topk) if chunks > 1 else scores
    _select_kernel[(num_rows, chunks)](
        scores,
        index,
        chosen_scores,
        chosen,
        index.shape[1],
        index.stride(0),
        topk,
        LAST=chunks == 1,
        BLOCK=block,
        SAMPLES=_SAMPLES,
        num_warps=max(4, min(block // 512, 32)),
    )
    return chosen_scores, chosen


@triton.jit(do_not_specialize=["num_rows", "length", "index_stride"])
def _score_kernel(
    p_query,
    p_weights,
    p_keys,
    p_index,
    p_scores,
    num_rows,
    length,
    index_stride,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    p_index += i_row * index_stride
    p_scores += i_row * length
    p_query += i_row * H * D
    p_weights += i_row * H
    num_first = count_keys(p_index, length, SAMPLES)
    num_second = 0
    if ROWS == 2:
        num_second = count_keys(p_index + index_stride, tl.where(i_row + 1 < num_rows, length, 0), SAMPLES)
    blocks = tl.cdiv(tl.maximum(num_first, num_second), BLOCK_K)
    share = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.minimum(tl.program_id(1) * share, blocks)
    last = tl.minimum(first + share, blocks)

    if ROWS == 1:
        _score(
            p_query, p_weights, p_keys, p_index, p_scores, length, index_stride, num_first, 0, first, last,
            H, H_PADDED, D, D_PADDED, 1, BLOCK_K,
        )  # fmt: skip
    else:
        differing = 0
        for first_key in range(first * BLOCK_K, last * BLOCK_K, SAMPLES):
            o_k = first_key + tl.arange(0, SAMPLES)
            m_k = o_k < tl.minimum(num_first, num_second)
            b_first = tl.load(p_index + o_k, mask=m_k, other=-1)
            b_second = tl.load(p_index + index_stride + o_k, mask=m_k, other=-1)
            differing += tl.sum((b_first != b_second).to(tl.int32), 0)
        if differing == 0:
            _score(
                p_query, p_weights, p_keys, p_index, p_scores, length, index_stride, num_first, num_second, first, last,
                H, H_PADDED, D, D_PADDED, 2, BLOCK_K,
            )  # fmt: skip
        else:
            for i_second in range(2):
                num_keys = tl.where(i_second == 0, num_first, num_second)
                _score(
                    p_query + i_second * H * D, p_weights + i_second * H, p_keys, p_index + i_second * index_stride,
                    p_scores + i_second * length, length, index_stride, num_keys, 0,
                    first, tl.minimum(last, tl.cdiv(num_keys, BLOCK_K)),
                    H, H_PADDED, D, D_PADDED, 1, BLOCK_K,
                )  # fmt: skip


@triton.jit
def _score(
    p_query,
    p_weights,
    p_keys,
    p_index,
    p_scores,
    length,
    index_stride,
    num_first,
    num_second,
    first,
    last,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Score blocks first .. last - 1 of the entries of one row, or of two of which one sees all that the other does."""
    o_d = tl.arange(0, D_PADDED)
    o_h = tl.arange(0, ROWS * H_PADDED) % H_PADDED
    o_r = tl.arange(0, ROWS * H_PADDED) // H_PADDED
    m_h = (o_h < H) & (o_r <= num_second)  # a second row without entries need not exist
    o_h += o_r * H
    o_rows = tl.arange(0, ROWS)[None, :]
    b_query = tl.load(p_query + o_h[:, None] * D + o_d[None, :], mask=m_h[:, None] & (o_d < D)[None, :], other=0.0)
    b_weights = tl.load(p_weights + o_h, mask=m_h, other=0.0).to(tl.float32)
    for i_block in range(first, last):
        o_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
        b_index = tl.load(p_index + o_k, mask=o_k < num_first, other=-1)
        if ROWS == 2:
            b_index = tl.maximum(b_index, tl.load(p_index + index_stride + o_k, mask=o_k < num_second, other=-1))
        b_index = b_index.to(tl.int64)
        m_kd = (b_index >= 0)[:, None]
        if D < D_PADDED:
            m_kd = m_kd & (o_d < D)[None, :]
        b_keys = tl.load(p_keys + b_index[:, None] * D + o_d[None, :], mask=m_kd, other=0.0).to(b_query.dtype)
        b_products = tl.dot(b_keys, tl.trans(b_query), input_precision="ieee")  # [BLOCK_K, ROWS * H_PADDED]
        b_products = tl.maximum(b_products, 0.0) * b_weights[None, :]
        b_scores = tl.sum(tl.reshape(b_products, [BLOCK_K, ROWS, H_PADDED]), 2)
        m_kr = o_k[:, None] < tl.where(o_rows == 0, num_first, num_second)
        tl.store(p_scores + o_rows * length + o_k[:, None], b_scores, mask=m_kr)


@triton.jit(do_not_specialize=["length", "index_stride", "width"])
def _select_kernel(
    p_scores,
    p_index,
    p_chosen_scores,
    p_chosen,
    length,
    index_stride,
    width,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_index += i_row * index_stride + i_chunk * BLOCK
    p_scores += i_row * length + i_chunk * BLOCK
    o_chosen = (i_row * tl.num_programs(1) + i_chunk) * width
    p_chosen += o_chosen
    p_chosen_scores += o_chosen
    num_keys = count_keys(p_index, tl.minimum(length - i_chunk * BLOCK, BLOCK), SAMPLES)

    if num_keys <= width:
        for first in range(0, width, SAMPLES):
            o_w = first + tl.arange(0, SAMPLES)
            m_w = o_w < num_keys
            tl.store(p_chosen + o_w, tl.load(p_index + o_w, mask=m_w, other=-1), mask=o_w < width)
            if not LAST:
                tl.store(p_chosen_scores + o_w, tl.load(p_scores + o_w, mask=m_w), mask=m_w)
    else:
        o_k = tl.arange(0, BLOCK)
        # Unsigned integers in the order of the scores: 0 for no key, at least 1 for candidates.
        m_k = o_k < num_keys
        b_scores = tl.load(p_scores + o_k, mask=m_k, other=0.0)
        b_bits = b_scores.to(tl.int32, bitcast=True)
        b_order = (b_bits ^ tl.where(b_bits < 0, -1, -2147483648)).to(tl.uint32, bitcast=True)
        b_order = tl.where(m_k, b_order, 0)

        # The largest number that at least `width` of them reach, from its highest bit down. A smaller one that no
        # more of them reach will do.
        lowest = tl.full([], 0, tl.uint32)
        bit = tl.full([], 2147483648, tl.uint32)
        num_reaching = num_keys
        while (bit > 0) & (num_reaching != width):
            higher = lowest | bit
            num_higher = tl.sum((b_order >= higher).to(tl.int32), 0)
            lowest = tl.where(num_higher >= width, higher, lowest)
            num_reaching = tl.where(num_higher >= width, num_higher, num_reaching)
            bit = bit >> 1

        # All above it, and of those equal to it the earliest, up to `width` in total.
        m_above, m_at = b_order > lowest, (b_order == lowest) & m_k
        room = width - tl.sum(m_above.to(tl.int32), 0)
        # One running count for both, each below 2^15.
        b_counts = tl.cumsum(m_above.to(tl.int32) + (m_at.to(tl.int32) << 16), 0)
        b_num_at = b_counts >> 16
        b_place = (b_counts & 0xFFFF) + tl.minimum(b_num_at, room) - 1
        m_chosen = m_above | (m_at & (b_num_at <= room))
        tl.store(p_chosen + b_place, tl.load(p_index + o_k, mask=m_chosen, other=-1), mask=m_chosen)
        if not LAST:
            tl.store(p_chosen_scores + b_place, b_scores, mask=m_chosen)
