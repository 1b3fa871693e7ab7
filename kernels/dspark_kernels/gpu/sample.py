"""Sampling by argmax(x + Gumbel noise) in one pass over the logits; most exact noise need not be computed.

The noise is defined in float64, but most of it need not be computed. For each row a program keeps a leader, the best
token of its tiles so far. A tile is examined only if, by a bound without logarithms, one of its tokens can reach the
leader; then float32 noise decides, or float64 noise between tokens closer than the error of float32 noise.
The tiles of a row are distributed over programs, and the exact values of their leaders are compared.

Filters need full rows before a token is drawn: `markov_sample` with filters writes its logits, one step at a time.

Letters: n or R rows, S splits of a row, V vocabulary, G gamma, r rank of the Markov head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import num_processors
from .logits import apply_temperature, filter_threshold, inverse_temperature
from .matmul import linear_float32
from .noise import gumbel, least_exponential, philox_bits, philox_tile, rough_gumbel

_TILE = 2048
"""Tokens of a row per step of `gumbel_argmax`, eight per thread.

Half as many for 2-byte logits, because registers would spill.
"""
_REDUCED_ROWS, _REDUCED_SPLITS = 4, 128
"""Rows per program of the kernel that reduces partial results, and splits per step."""


@triton.jit
def _margin(value):
    """Largest distance below `value` of another rough value x + noise whose exact value is larger, in float32.

    Each of the two has an error of 2^-18 from rough noise, and is rounded twice, by 2^-24 of itself each time.
    """
    return 1.52587890625e-05 + 4.76837158203125e-07 * tl.abs(value)  # 2^-16, 2^-21


@triton.jit
def _log(b_sum):
    """Logarithm of a sum that is 0 only if its scale is."""
    return tl.log(tl.where(b_sum == 0, 1.0, b_sum))


@triton.jit
def _exact(b_x, b_ids, b_seeds, b_positions, b_sampled, STREAM: tl.constexpr):
    return b_x + tl.where(b_sampled, gumbel(philox_bits(b_seeds, b_positions, STREAM, b_ids)), 0.0)


@triton.jit
def _contest(
    b_kept,
    b_y,
    m_near,
    b_rough,
    b_ids,
    b_at,
    b_seeds,
    b_positions,
    b_sampled,
    first_block,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The leader after the columns m_near of a tile, by exact values: leader first, then column by column."""
    o_columns = tl.arange(0, BLOCK)[None, :]
    b_next, b_next_rough, b_next_ids, b_next_at = b_ids * 0 - 1, b_rough, b_ids, b_at
    b_value = tl.full([b_kept.shape[0]], float("-inf"), tl.float32)
    contested = True
    while contested:
        b_exact = _exact(b_next_at, b_next_ids, b_seeds, b_positions, b_sampled, STREAM)
        # Ids ascend, so of equal values the earlier one stays.
        m_wins = (b_next < BLOCK) & (b_next_rough > float("-inf")) & (b_exact > b_value)
        b_value = tl.where(m_wins, b_exact, b_value)
        b_rough = tl.where(m_wins, b_next_rough, b_rough)
        b_ids = tl.where(m_wins, b_next_ids, b_ids)
        b_at = tl.where(m_wins, b_next_at, b_at)
        # Without noise values are exact, and equal ones need no comparison.
        m_near = m_near & (o_columns > b_next[:, None]) & (b_sampled[:, None] | (b_y > b_value[:, None]))
        b_next = tl.min(tl.where(m_near, o_columns, BLOCK), 1)
        m_next = o_columns == b_next[:, None]
        b_next_ids = 4 * first_block + b_next
        b_next_at = tl.sum(tl.where(m_next, b_kept, 0.0), 1)
        b_next_rough = tl.sum(tl.where(m_next, b_y, 0.0), 1)
        contested = tl.min(b_next) < BLOCK
    return b_rough, b_ids, b_at


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
    """The state [R] of rows after a tile b_x [R, BLOCK] of scaled logits; b_kept is -inf for excluded tokens.

    State: the leader's rough value, its id and its x, the largest x, and the sum of exp(x - largest). Tiles come with
    ascending ids, the first one being 4 * first_block.
    """
    # Always true, which the compiler cannot know: it would keep ten round keys per row in registers.
    b_seeds = tl.where(b_sum >= 0, b_seeds, 0)
    b_top = tl.maximum(b_max, tl.max(b_x, 1))
    b_shift = tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)
    b_weights = tl.exp(b_x - b_shift[:, None])
    b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(b_weights, 1)

    b_bits = tl.zeros([b_x.shape[0], BLOCK], tl.uint32)
    if any_sampled:
        b_bits = philox_tile(b_seeds, b_positions, STREAM, first_block, BLOCK)
    # exp(x + noise) against exp(leader), both over exp(shift): a thousandth more than the margin covers their rounding.
    # What underflows is 87 below the largest x and cannot win, as noise spans 27 and a filter keeps the largest.
    b_bar = tl.exp(b_rough - b_shift - _margin(b_rough) - 1e-3)
    b_least = tl.where(b_sampled[:, None], least_exponential(b_bits), 1.0)
    m_hopeful = b_weights > b_bar[:, None] * b_least
    if tl.max(m_hopeful.to(tl.int32)) > 0:
        o_columns = tl.arange(0, BLOCK)[None, :]
        b_y = b_kept + tl.where(b_sampled[:, None], rough_gumbel(b_bits), 0.0)
        b_highest = tl.max(b_y, 1)
        b_best = tl.maximum(b_rough, b_highest)
        b_floor = tl.where(b_sampled, b_best - _margin(b_best), b_best)
        # No value is near -inf, which cannot win, and only inf is near inf.
        b_floor = tl.where(tl.abs(b_best) == float("inf"), float("inf"), b_floor)
        m_near = b_y >= b_floor[:, None]
        b_rivals = tl.sum(m_near.to(tl.int32), 1) + (b_rough >= b_floor).to(tl.int32)
        if tl.max(tl.where(b_sampled, b_rivals, 0)) > 1:
            b_rough, b_ids, b_at = _contest(
                b_kept,
                b_y,
                m_near,
                b_rough,
                b_ids,
                b_at,
                b_seeds,
                b_positions,
                b_sampled,
                first_block,
                STREAM,
                BLOCK,
            )
        else:
            # Of equal tokens without noise the first wins.
            b_first = tl.min(tl.where(m_near, o_columns, BLOCK), 1)
            b_first_at = tl.sum(tl.where(o_columns == b_first[:, None], b_kept, 0.0), 1)
            m_wins = b_highest > b_rough
            b_rough = tl.where(m_wins, b_highest, b_rough)
            b_ids = tl.where(m_wins, 4 * first_block + b_first, b_ids)
            b_at = tl.where(m_wins, b_first_at, b_at)
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
    tl.store(p_sums + o_partials, b_max + _log(b_sum), mask=m_rows)


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
    ANY_ID: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_rows = o_rows < num_rows
    b_values, b_ids = _winners(p_values, p_ids, o_rows, m_rows, num_rows, num_splits, BLOCK_R, BLOCK_S)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        o_splits = start + tl.arange(0, BLOCK_S)
        o_partials = o_splits[:, None].to(tl.int64) * num_rows + o_rows[None, :]
        m_partials = (o_splits < num_splits)[:, None] & m_rows[None, :]
        b_sums = tl.load(p_sums + o_partials, mask=m_partials, other=float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_sums, 0))
        b_shift = tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_sums - b_shift[None, :]), 0)
        b_max = b_top
    b_total = b_max + _log(b_sum)
    # NaN and inf show in the sum, but not in comparisons.
    b_values = tl.where(b_total < float("inf"), b_values, float("nan"))
    if not ANY_ID:
        b_ids = tl.where(b_values > float("-inf"), b_ids, -1)
    tl.store(p_best_values + o_rows, b_values, mask=m_rows)
    tl.store(p_best_ids + o_rows, b_ids.to(tl.int64), mask=m_rows)
    tl.store(p_total_sums + o_rows, b_total, mask=m_rows)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _gumbel_argmax_kernel(
    p_logits,
    p_temperatures,
    p_seeds,
    p_positions,
    p_threshold,
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
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # One row, as a tile of rows for _advance.
    o_row = i_row + tl.arange(0, 1)
    b_temperature = tl.load(p_temperatures + o_row)
    b_seed, b_position = tl.load(p_seeds + o_row), tl.load(p_positions + o_row)
    b_sampled, b_inverse = b_temperature > 0, inverse_temperature(b_temperature)
    any_sampled = tl.max(b_sampled.to(tl.int32)) > 0
    if HAS_THRESHOLD:
        b_threshold = tl.load(p_threshold + o_row)

    b_rough = tl.full([1], float("-inf"), tl.float32)
    b_ids = tl.full([1], -1, tl.int32)
    b_at = tl.zeros([1], tl.float32)
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    for i_tile in range(i_split, tl.cdiv(num_columns + OFFSET, BLOCK), num_splits):
        o_columns = (i_tile * BLOCK - OFFSET + tl.arange(0, BLOCK))[None, :]
        m_columns = (o_columns >= 0) & (o_columns < num_columns)
        b_logits = tl.load(p_logits + o_row[:, None] * row_stride + o_columns, mask=m_columns, other=float("-inf"))
        b_x = apply_temperature(b_logits.to(tl.float32), b_inverse[:, None])
        b_kept = b_x
        if HAS_THRESHOLD:
            b_kept = tl.where(b_x < b_threshold[:, None], float("-inf"), b_x)
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
        # Loaded one tile ahead, because the compiler pipelines only W2.
        b_base = b_next_base
        o_next = o_tokens + num_splits * BLOCK_V
        m_next = m_requests[:, None] & (o_next < vocab_size)[None, :]
        b_next_base = tl.load(p_rows + o_next[None, :], mask=m_next, other=float("-inf"))
        p_columns = p_w2 + o_tokens[:, None].to(tl.int64) * RANK + o_rank[None, :]
        if BLOCK_K >= RANK:
            b_w2 = tl.load(p_columns, mask=m_tokens[:, None] & (o_rank < RANK)[None, :], other=0.0)
            b_bias = tl.dot(b_embeddings, tl.trans(b_w2), input_precision="ieee")
        else:
            b_bias = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
            for start in range(0, RANK, BLOCK_K):
                m_rank = (start + o_rank < RANK)[None, :]
                b_part = tl.load(p_embeddings + start + o_rank[None, :], mask=m_requests[:, None] & m_rank, other=0.0)
                b_w2 = tl.load(p_columns + start, mask=m_tokens[:, None] & m_rank, other=0.0)
                b_bias = tl.dot(b_part, tl.trans(b_w2), b_bias, input_precision="ieee")
        b_x = apply_temperature(b_base.to(tl.float32) + b_bias, b_inverse[:, None])
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


@dataclass(frozen=True)
class _Tiles:
    """Tiling of a step of `markov_sample`."""

    requests: int
    vocabulary: int
    rank: int
    """Channels per product; if these are all, W2 is prefetched to shared memory."""
    splits: int
    """Partial results of the previous step that are reduced at once."""
    per_processor: int
    """Programs that are resident at once."""
    num_stages: int = 3


def _markov_tiles(num_requests: int, weight: Tensor) -> _Tiles:
    """W2 is read from memory once per step: programs of a column tile run together, each with few requests."""
    rank = max(16, triton.next_power_of_2(weight.shape[1]))
    if weight.dtype == torch.float32:
        # Without tensor cores: correct, but slow.
        return _Tiles(16, 32, min(rank, 32), splits=128, per_processor=4, num_stages=2)
    rank = min(rank, 512)
    # 32 KiB of W2 at a time, or 16 if more requests need shared memory and registers.
    if num_requests <= 16:
        return _Tiles(16, min(64, 16384 // rank), rank, splits=512, per_processor=2)
    if num_requests <= 32:
        return _Tiles(32, min(32, 8192 // rank), rank, splits=64, per_processor=2)
    return _Tiles(64, 32, rank, splits=32, per_processor=2 if rank <= 256 else 1)


def _reduce(values: Tensor, ids: Tensor, sums: Tensor, any_id: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The three results [n] of partial ones [S, n]; with `any_id` a valid id also for rows without a distribution."""
    num_splits, num_rows = values.shape
    best_values, total_sums = values.new_empty(num_rows), sums.new_empty(num_rows)
    best_ids = ids.new_empty(num_rows, dtype=torch.int64)
    grid = (triton.cdiv(num_rows, _REDUCED_ROWS),)
    block_s = min(triton.next_power_of_2(num_splits), _REDUCED_SPLITS)
    _reduce_kernel[grid](
        values, ids, sums, best_values, best_ids, total_sums, num_rows, num_splits, any_id, _REDUCED_ROWS, block_s
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
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gumbel_argmax`."""
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return logits.new_empty(0, dtype=torch.float32), seeds.new_empty(0), logits.new_empty(0, dtype=torch.float32)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    offset = first_id % 4
    tile = _TILE if logits.dtype == torch.float32 else _TILE // 2
    # Four programs per processor hide the latency of a tile; a row has no more splits than tiles.
    num_splits = 4 * num_processors(logits) // num_rows
    num_splits = max(1, min(triton.cdiv(num_columns + offset, tile), num_splits))
    values, ids, sums = _partials(num_splits, num_rows, logits)
    draws = [tensor.contiguous() for tensor in (temperatures, seeds, positions)]
    _gumbel_argmax_kernel[(num_rows, num_splits)](
        logits,
        *draws,
        None if threshold is None else threshold.contiguous(),
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
        HAS_THRESHOLD=threshold is not None,
        BLOCK=tile,
        num_warps=8,
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
    filters: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.markov_sample`."""
    num_requests, num_positions, vocab_size = base_logits.shape
    shape = (num_requests, num_positions)
    if num_requests == 0 or num_positions == 0:
        return seeds.new_empty(shape), base_logits.new_empty(shape, dtype=torch.float32)
    if w1.dtype != w2.dtype:
        raise ValueError(f"w1 is {w1.dtype} and w2 {w2.dtype}: expected one dtype")
    assert w1.is_contiguous() and w2.is_contiguous(), "w1 and w2 are too large to be copied at every call"
    if base_logits.stride(2) != 1:
        base_logits = base_logits.contiguous()
    if filters is not None:
        return _markov_sample_filtered(base_logits, anchors, w1, w2, temperatures, seeds, positions, stream, filters)
    tiles = _markov_tiles(num_requests, w2)
    row_tiles = triton.cdiv(num_requests, tiles.requests)
    num_splits = tiles.per_processor * num_processors(base_logits) // row_tiles
    num_splits = max(1, min(triton.cdiv(vocab_size, tiles.vocabulary), num_splits))
    values, ids, sums = _partials(num_splits, num_requests * num_positions, base_logits)
    anchors, *draws = (tensor.contiguous() for tensor in (anchors, temperatures, seeds, positions))
    for k in range(num_positions):
        _markov_step_kernel[(row_tiles, num_splits)](
            base_logits,
            anchors,
            w1,
            w2,
            *draws,
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
            RANK=w2.shape[1],
            BLOCK_R=tiles.requests,
            BLOCK_V=tiles.vocabulary,
            BLOCK_K=tiles.rank,
            BLOCK_S=tiles.splits,
            num_warps=4,
            num_stages=tiles.num_stages,
        )
    _, tokens, log_sums = _reduce(values, ids, sums, any_id=True)
    return tokens.view(shape), log_sums.view(shape)


def _markov_sample_filtered(
    base_logits: Tensor,
    anchors: Tensor,
    w1: Tensor,
    w2: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    filters: tuple[Tensor, Tensor, Tensor, int],
) -> tuple[Tensor, Tensor]:
    shape = base_logits.shape[:2]
    tokens, log_sums = seeds.new_empty(shape), base_logits.new_empty(shape, dtype=torch.float32)
    previous = anchors
    for k in range(shape[1]):
        logits = linear_float32(w1[previous], w2).add_(base_logits[:, k])
        threshold = filter_threshold(logits, temperatures, *filters)
        _, previous, sums = gumbel_argmax(logits, temperatures, seeds, positions + k, stream, threshold=threshold)
        previous = previous.clamp_min(0)
        tokens[:, k], log_sums[:, k] = previous, sums
    return tokens, log_sums
