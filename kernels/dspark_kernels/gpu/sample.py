"""Draws by argmax(x + Gumbel noise) in one pass over the logits, the noise exact but mostly not computed.

Of each row the kernels carry a leader, the best token of the tiles so far. A tile of columns can change it only where
rough float32 noise reaches the leader within a margin, and only where several tokens do is float64 noise needed.
Programs share out the tiles of a row; the exact values of their leaders decide among them.

Letters: n or R rows, S splits of a row, V vocabulary, G gamma, r rank of the Markov head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import num_processors
from .logits import inverse_temperature, temper
from .noise import gumbel, least_exponential, philox_bits, philox_tile, rough_gumbel

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter keeps bfloat16 as integers, and multiplies those."""

_REDUCED_ROWS = 4
"""Per program of the kernel that reduces splits."""


@triton.jit
def _margin(value):
    """How far below `value` another rough value x + noise may lie whose exact value is larger, both in float32.

    Each of the two is off by at most 2^-18 for the rough noise, and rounds twice, by 2^-24 of itself each time.
    """
    return 1.52587890625e-05 + 4.76837158203125e-07 * tl.abs(value)  # 2^-16, 2^-21


@triton.jit
def _exact(b_x, b_ids, b_seeds, b_positions, b_sampled, STREAM: tl.constexpr):
    return b_x + tl.where(b_sampled, gumbel(philox_bits(b_seeds, b_positions, STREAM, b_ids)), 0.0)


@triton.jit
def _advance(
    b_x,
    b_kept,
    b_rough,
    b_ids,
    b_at,
    b_max,
    b_sum,
    b_seeds,
    b_positions,
    b_sampled,
    any_sampled,
    first_block,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a tile b_x [R, BLOCK] of tempered logits into the state [R] of its rows; b_kept has -inf for what may not win.

    State: the leader's rough value, its id, its x, and maximum and scaled sum of the log-sum-exp. Tiles come with
    ascending ids, the first one being 4 * first_block.
    """
    b_top = tl.maximum(b_max, tl.max(b_x, 1))
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_weights = tl.exp(b_x - b_shift[:, None])
    b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(b_weights, 1)

    b_bits = tl.zeros([b_x.shape[0], BLOCK], tl.uint32)
    if any_sampled:
        b_bits = philox_tile(b_seeds, b_positions, STREAM, first_block, BLOCK)
    # exp(x + noise) against exp(leader), both over exp(shift): a thousandth more than the margin covers their rounding.
    # Weights that underflow lose nothing: noise spans 27, and x of the leader, or another token's, is that close to the top.
    b_bar = tl.exp(b_rough - b_shift - _margin(b_rough) - 1e-3)
    b_least = tl.where(b_sampled[:, None], least_exponential(b_bits), 1.0)
    m_hopeful = (b_weights > b_bar[:, None] * b_least) & (b_kept > float("-inf"))
    if tl.max(m_hopeful.to(tl.int32)) > 0:
        o_columns = tl.arange(0, BLOCK)[None, :]
        b_y = b_kept + tl.where(b_sampled[:, None], rough_gumbel(b_bits), 0.0)
        b_best = tl.maximum(b_rough, tl.max(b_y, 1))
        b_floor = tl.where(b_sampled, b_best - _margin(b_best), b_best)
        m_near = (b_y >= b_floor[:, None]) & (b_kept > float("-inf"))
        b_rivals = tl.sum(m_near.to(tl.int32), 1) + (b_rough >= b_floor).to(tl.int32)
        contested = tl.max(tl.where(b_sampled, b_rivals, 0)) > 1
        b_value = b_rough
        if contested:
            b_value = tl.where(
                b_rough > float("-inf"), _exact(b_at, b_ids, b_seeds, b_positions, b_sampled, STREAM), b_rough
            )
        while tl.max(m_near.to(tl.int32)) > 0:
            # The next column of every row that has one left; of equal values the earlier stays.
            b_next = tl.min(tl.where(m_near, o_columns, BLOCK), 1)
            m_next = o_columns == b_next[:, None]
            b_next_ids = 4 * first_block + b_next
            b_next_at = tl.sum(tl.where(m_next, b_kept, 0.0), 1)
            b_next_rough = tl.sum(tl.where(m_next, b_y, 0.0), 1)
            b_next_value = b_next_rough
            if contested:
                b_next_value = _exact(b_next_at, b_next_ids, b_seeds, b_positions, b_sampled, STREAM)
            m_wins = (b_next < BLOCK) & (b_next_value > b_value)
            b_value = tl.where(m_wins, b_next_value, b_value)
            b_rough = tl.where(m_wins, b_next_rough, b_rough)
            b_ids = tl.where(m_wins, b_next_ids, b_ids)
            b_at = tl.where(m_wins, b_next_at, b_at)
            # Without noise values are exact: equal ones need no second look.
            m_near = m_near & (o_columns > b_next[:, None]) & (b_sampled[:, None] | (b_y > b_value[:, None]))
    return b_rough, b_ids, b_at, b_top, b_sum


@triton.jit
def _store_partials(
    p_values,
    p_ids,
    p_sums,
    o_partials,
    m_rows,
    b_rough,
    b_ids,
    b_at,
    b_max,
    b_sum,
    b_seeds,
    b_positions,
    b_sampled,
    STREAM: tl.constexpr,
):
    b_values = _exact(b_at, b_ids, b_seeds, b_positions, b_sampled, STREAM)
    tl.store(p_values + o_partials, tl.where(b_rough > float("-inf"), b_values, b_rough), mask=m_rows)
    tl.store(p_ids + o_partials, b_ids, mask=m_rows)
    # -inf where all x are; a float32 logarithm is exact enough for a sum of at most V.
    tl.store(p_sums + o_partials, b_max + tl.log(b_sum), mask=m_rows)


@triton.jit
def _winners(p_values, p_ids, o_rows, m_rows, num_rows, num_splits, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Best value and its id of rows o_rows [BLOCK_R] over their splits, the lowest id of equal ones."""
    none: tl.constexpr = 2147483647
    b_values = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_ids = tl.full([BLOCK_R], none, tl.int32)
    for start in range(0, num_splits, BLOCK_S):
        o_splits = start + tl.arange(0, BLOCK_S)
        o_partials = o_splits[:, None].to(tl.int64) * num_rows + o_rows[None, :]
        m_partials = (o_splits < num_splits)[:, None] & m_rows[None, :]
        b_new = tl.load(p_values + o_partials, mask=m_partials, other=float("-inf"))
        b_new_ids = tl.load(p_ids + o_partials, mask=m_partials, other=none)
        b_best = tl.maximum(b_values, tl.max(b_new, 0))
        b_best_ids = tl.min(tl.where(b_new == b_best[None, :], b_new_ids, none), 0)
        b_ids = tl.where(b_values == b_best, tl.minimum(b_ids, b_best_ids), b_best_ids)
        b_values = b_best
    return b_values, b_ids


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _reduce_kernel(
    p_values,
    p_ids,
    p_sums,
    p_best_values,
    p_best_ids,
    p_total_sums,
    num_rows,
    num_splits,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_rows = o_rows < num_rows
    b_values, b_ids = _winners(p_values, p_ids, o_rows, m_rows, num_rows, num_splits, BLOCK_R, BLOCK_S)
    tl.store(p_best_values + o_rows, b_values, mask=m_rows)
    tl.store(p_best_ids + o_rows, b_ids.to(tl.int64), mask=m_rows)

    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        o_splits = start + tl.arange(0, BLOCK_S)
        o_partials = o_splits[:, None].to(tl.int64) * num_rows + o_rows[None, :]
        m_partials = (o_splits < num_splits)[:, None] & m_rows[None, :]
        b_sums = tl.load(p_sums + o_partials, mask=m_partials, other=float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_sums, 0))
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_sums - b_shift[None, :]), 0)
        b_max = b_top
    tl.store(p_total_sums + o_rows, b_max + tl.log(b_sum), mask=m_rows)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _gumbel_argmax_kernel(
    p_logits,
    p_temperatures,
    p_seeds,
    p_positions,
    p_lowest,
    p_values,
    p_ids,
    p_sums,
    row_stride,
    num_rows,
    num_columns,
    num_splits,
    first_block,
    OFFSET: tl.constexpr,
    STREAM: tl.constexpr,
    HAS_LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # One row, as the tile of rows that _advance wants.
    o_row = i_row + tl.arange(0, 1)
    b_temperature = tl.load(p_temperatures + o_row)
    b_seed, b_position = tl.load(p_seeds + o_row), tl.load(p_positions + o_row)
    b_sampled, b_inverse = b_temperature > 0, inverse_temperature(b_temperature)
    any_sampled = tl.max(b_sampled.to(tl.int32)) > 0
    if HAS_LOWEST:
        b_lowest = tl.load(p_lowest + o_row)

    b_rough = tl.full([1], float("-inf"), tl.float32)
    b_ids = tl.full([1], OFFSET, tl.int32) + 4 * first_block
    b_at = tl.zeros([1], tl.float32)
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    for i_tile in range(i_split, tl.cdiv(num_columns + OFFSET, BLOCK), num_splits):
        o_columns = (i_tile * BLOCK - OFFSET + tl.arange(0, BLOCK))[None, :]
        m_columns = (o_columns >= 0) & (o_columns < num_columns)
        b_logits = tl.load(p_logits + o_row[:, None] * row_stride + o_columns, mask=m_columns, other=float("-inf"))
        b_x = temper(b_logits.to(tl.float32), b_inverse[:, None])
        b_kept = b_x
        if HAS_LOWEST:
            b_kept = tl.where(b_x < b_lowest[:, None], float("-inf"), b_x)
        b_rough, b_ids, b_at, b_max, b_sum = _advance(
            b_x,
            b_kept,
            b_rough,
            b_ids,
            b_at,
            b_max,
            b_sum,
            b_seed,
            b_position,
            b_sampled,
            any_sampled,
            first_block + i_tile * (BLOCK // 4),
            STREAM,
            BLOCK,
        )
    _store_partials(
        p_values,
        p_ids,
        p_sums,
        i_split.to(tl.int64) * num_rows + o_row,
        o_row < num_rows,
        b_rough,
        b_ids,
        b_at,
        b_max,
        b_sum,
        b_seed,
        b_position,
        b_sampled,
        STREAM,
    )


@triton.jit(do_not_specialize=["k", "num_requests", "num_splits"])
def _markov_step_kernel(
    p_base,
    p_anchors,
    p_w1,
    p_w2,
    p_temperatures,
    p_seeds,
    p_positions,
    p_values,
    p_ids,
    p_sums,
    k,
    request_stride,
    position_stride,
    num_requests,
    num_positions,
    vocab_size,
    num_splits,
    FIRST: tl.constexpr,
    STREAM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_split = tl.program_id(1)
    o_requests = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_requests = o_requests < num_requests
    # Of the partial results, which are stored split by split.
    o_rows, num_rows = o_requests * num_positions + k, num_requests * num_positions
    if FIRST:
        b_previous = tl.load(p_anchors + o_requests, mask=m_requests, other=0)
    else:
        _, b_winners = _winners(p_values, p_ids, o_rows - 1, m_requests, num_rows, num_splits, BLOCK_R, BLOCK_S)
        b_previous = b_winners.to(tl.int64)
    p_embeddings = p_w1 + b_previous[:, None] * RANK
    o_rank = tl.arange(0, BLOCK_K)
    if BLOCK_K >= RANK:
        m_embeddings = m_requests[:, None] & (o_rank < RANK)[None, :]
        b_embeddings = tl.load(p_embeddings + o_rank[None, :], mask=m_embeddings, other=0.0)

    b_temperatures = tl.load(p_temperatures + o_requests, mask=m_requests, other=0.0)
    b_seeds = tl.load(p_seeds + o_requests, mask=m_requests, other=0)
    b_positions = tl.load(p_positions + o_requests, mask=m_requests, other=0) + k
    b_sampled, b_inverse = b_temperatures > 0, inverse_temperature(b_temperatures)
    any_sampled = tl.max(b_sampled.to(tl.int32)) > 0

    b_rough = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_ids = tl.zeros([BLOCK_R], tl.int32)
    b_at = tl.zeros([BLOCK_R], tl.float32)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    p_rows = p_base + o_requests[:, None].to(tl.int64) * request_stride + k * position_stride
    o_tokens = i_split * BLOCK_V + tl.arange(0, BLOCK_V)
    m_next = m_requests[:, None] & (o_tokens < vocab_size)[None, :]
    b_next_base = tl.load(p_rows + o_tokens[None, :], mask=m_next, other=float("-inf"))
    for i_tile in range(i_split, tl.cdiv(vocab_size, BLOCK_V), num_splits):
        o_tokens = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        m_tokens = o_tokens < vocab_size
        # A tile ahead: unlike W2 the compiler does not pipeline it.
        b_base = b_next_base
        o_next = o_tokens + num_splits * BLOCK_V
        m_next = m_requests[:, None] & (o_next < vocab_size)[None, :]
        b_next_base = tl.load(p_rows + o_next[None, :], mask=m_next, other=float("-inf"))
        p_columns = p_w2 + o_tokens[:, None].to(tl.int64) * RANK + o_rank[None, :]
        if BLOCK_K >= RANK:
            b_w2 = tl.load(p_columns, mask=m_tokens[:, None] & (o_rank < RANK)[None, :], other=0.0)
            if _INTERPRETED:
                b_bias = tl.dot(b_embeddings.to(tl.float32), tl.trans(b_w2.to(tl.float32)), input_precision="ieee")
            else:
                b_bias = tl.dot(b_embeddings, tl.trans(b_w2), input_precision="ieee")
        else:
            b_bias = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
            for start in range(0, RANK, BLOCK_K):
                m_rank = (start + o_rank < RANK)[None, :]
                b_part = tl.load(p_embeddings + start + o_rank[None, :], mask=m_requests[:, None] & m_rank, other=0.0)
                b_w2 = tl.load(p_columns + start, mask=m_tokens[:, None] & m_rank, other=0.0)
                b_bias = tl.dot(b_part, tl.trans(b_w2), b_bias, input_precision="ieee")
        b_x = temper(b_base.to(tl.float32) + b_bias, b_inverse[:, None])
        b_rough, b_ids, b_at, b_max, b_sum = _advance(
            b_x,
            b_x,
            b_rough,
            b_ids,
            b_at,
            b_max,
            b_sum,
            b_seeds,
            b_positions,
            b_sampled,
            any_sampled,
            i_tile * (BLOCK_V // 4),
            STREAM,
            BLOCK_V,
        )
    _store_partials(
        p_values,
        p_ids,
        p_sums,
        i_split.to(tl.int64) * num_rows + o_rows,
        m_requests,
        b_rough,
        b_ids,
        b_at,
        b_max,
        b_sum,
        b_seeds,
        b_positions,
        b_sampled,
        STREAM,
    )


def _reduce(values: Tensor, ids: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three results [n] of partial ones [S, n]."""
    num_splits, num_rows = values.shape
    best_values, total_sums = values.new_empty(num_rows), sums.new_empty(num_rows)
    best_ids = ids.new_empty(num_rows, dtype=torch.int64)
    grid = (triton.cdiv(num_rows, _REDUCED_ROWS),)
    block_s = min(triton.next_power_of_2(num_splits), 128)
    _reduce_kernel[grid](
        values, ids, sums, best_values, best_ids, total_sums, num_rows, num_splits, _REDUCED_ROWS, block_s
    )
    return best_values, best_ids, total_sums


def _partials(num_splits: int, num_rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, ids and log-sum-exps [S, n] of every program."""
    shape = (num_splits, num_rows)
    values, sums = (like.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return values, like.new_empty(shape, dtype=torch.int32), sums


def gumbel_argmax(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    first_id: int = 0,
    lowest: Tensor | None = None,
    *,
    block: int = 2048,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gumbel_argmax`."""
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return logits.new_empty(0, dtype=torch.float32), seeds.new_empty(0), logits.new_empty(0, dtype=torch.float32)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    offset = first_id % 4
    num_tiles = triton.cdiv(num_columns + offset, block)
    # Four programs per processor hide the latency of a tile; a row has no more splits than tiles.
    num_splits = max(1, min(num_tiles, 4 * num_processors(logits) // num_rows))
    values, ids, sums = _partials(num_splits, num_rows, logits)
    _gumbel_argmax_kernel[(num_rows, num_splits)](
        logits,
        temperatures,
        seeds,
        positions,
        lowest,
        values,
        ids,
        sums,
        logits.stride(0),
        num_rows,
        num_columns,
        num_splits,
        first_id // 4,
        OFFSET=offset,
        STREAM=stream,
        HAS_LOWEST=lowest is not None,
        BLOCK=block,
        num_warps=4,
    )
    return _reduce(values, ids, sums)


def markov_sample(
    base_logits: Tensor,
    anchors: Tensor,
    w1: Tensor,
    w2: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """See `reference.markov_sample`."""
    num_requests, num_positions, vocab_size = base_logits.shape
    shape = (num_requests, num_positions)
    rank = w2.shape[1]
    if num_requests == 0 or num_positions == 0:
        return seeds.new_empty(shape), base_logits.new_empty(shape, dtype=torch.float32)
    if base_logits.stride(2) != 1:
        base_logits = base_logits.contiguous()
    block_r, block_v, block_k, block_s, num_warps, per_processor, num_stages = (16, 64, 256, 512, 4, 2, 3) if num_requests <=16 else __import__("ast").literal_eval(__import__("os").environ.get("CFG","(128,64,256,64,8,1,3)"))
    row_tiles = triton.cdiv(num_requests, block_r)
    num_splits = max(
        1, min(triton.cdiv(vocab_size, block_v), per_processor * num_processors(base_logits) // row_tiles)
    )
    values, ids, sums = _partials(num_splits, num_requests * num_positions, base_logits)
    for k in range(num_positions):
        _markov_step_kernel[(row_tiles, num_splits)](
            base_logits,
            anchors,
            w1,
            w2,
            temperatures,
            seeds,
            positions,
            values,
            ids,
            sums,
            k,
            base_logits.stride(0),
            base_logits.stride(1),
            num_requests,
            num_positions,
            vocab_size,
            num_splits,
            FIRST=k == 0,
            STREAM=stream,
            RANK=rank,
            BLOCK_R=block_r,
            BLOCK_V=block_v,
            BLOCK_K=block_k,
            BLOCK_S=block_s,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    _, tokens, log_sums = _reduce(values, ids, sums)
    return tokens.view(shape), log_sums.view(shape)
