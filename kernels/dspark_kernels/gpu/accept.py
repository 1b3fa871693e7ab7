"""Acceptance: number of accepted drafts, and the token that follows them.

`accept_rejection` takes four launches. The softmax is computed only for rows followed by a draft, and exact noise only
for tokens that can win in the row that predicts the next token:

    parts    grid (parts, rows of a request, R)   maximum and sum of exponentials of every part of a row
    test     grid (R)                             the first rejected draft
    draw     grid (splits, R)                     best of x + noise, without the candidates of the draft
    finish   grid (R)                             the K candidates, weighted by max(p - q, 0); the better of both
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.philox import STREAM_ACCEPT, STREAM_RECOVER, STREAM_SAMPLE

from .device import num_processors
from .noise import gumbel, philox_bits, philox_tile, rough_gumbel, uniform

_BLOCK_REQUESTS = 16
_BLOCK_ROWS = 8
"""Rows of a request that are tested at once; a round has 1 + gamma."""
_MAX_SLOTS = 16
"""Rows of a request whose softmax is computed at the same time."""
_BLOCK_DRAW = 512
"""Tokens whose exact noise is computed together, if one of them can win."""
_BLOCK_Q = 64
_MAX_Q_IDS = 1024
_UNDERFLOW = 745.0
"""For larger x exp(-x) is 0 in float64: such a token has no weight, however small the others' are."""


def accept_coupled(row_tokens: Tensor, target_tokens: Tensor, first_rows: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.accept_coupled`."""
    num_accepted, next_anchors = _empty_results(first_rows)
    num_requests = len(num_accepted)
    if num_requests == 0:
        return num_accepted, next_anchors
    _accept_coupled_kernel[(triton.cdiv(num_requests, _BLOCK_REQUESTS),)](
        row_tokens.contiguous(),
        target_tokens.contiguous(),
        first_rows.contiguous(),
        num_accepted,
        next_anchors,
        num_requests,
        BLOCK_R=_BLOCK_REQUESTS,
        BLOCK_N=_BLOCK_ROWS,
        num_warps=1,
    )
    return num_accepted, next_anchors


def _empty_results(first_rows: Tensor) -> tuple[Tensor, Tensor]:
    num_requests = len(first_rows) - 1
    num_accepted = torch.empty(num_requests, dtype=torch.int64, device=first_rows.device)
    return num_accepted, torch.empty_like(num_accepted)


@triton.jit
def _accept_coupled_kernel(
    p_row_tokens,
    p_target_tokens,
    p_first_rows,
    p_num_accepted,
    p_next_anchors,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_first = tl.load(p_first_rows + o_r, mask=m_r, other=0)
    b_end = tl.load(p_first_rows + o_r + 1, mask=m_r, other=0)
    longest = tl.max(b_end - b_first).to(tl.int32)
    # The first rejected row, or the end.
    b_stop = b_end
    for start in range(1, longest, BLOCK_N):
        o_row = b_first[:, None] + start + tl.arange(0, BLOCK_N)[None, :]
        m_row = o_row < b_end[:, None]
        b_token = tl.load(p_row_tokens + o_row, mask=m_row, other=0)
        b_before = tl.load(p_target_tokens + o_row - 1, mask=m_row, other=0)
        b_falls = tl.where(m_row & (b_token != b_before), o_row, b_end[:, None])
        b_stop = tl.minimum(b_stop, tl.min(b_falls, axis=1))
    m_rows = b_end > b_first
    tl.store(p_num_accepted + o_r, tl.where(m_rows, b_stop - 1 - b_first, 0), mask=m_r)
    b_next = tl.load(p_target_tokens + b_stop - 1, mask=m_r & m_rows, other=-1)
    tl.store(p_next_anchors + o_r, b_next, mask=m_r)


def accept_rejection(
    row_tokens: Tensor,
    logits: Tensor,
    q_ids: Tensor,
    q_probabilities: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.accept_rejection`."""
    (num_rows, vocab_size), num_q_ids = logits.shape, q_ids.shape[1]
    num_accepted, next_anchors = _empty_results(first_rows)
    num_requests = len(num_accepted)
    if num_requests == 0:
        return num_accepted, next_anchors
    if num_q_ids > _MAX_Q_IDS:
        raise ValueError(f"q over {num_q_ids} ids per row: expected at most {_MAX_Q_IDS}")
    assert vocab_size == 1 or logits.stride(1) == 1, "a row of logits is read in one piece"
    row_tokens, seeds, positions = row_tokens.contiguous(), seeds.contiguous(), positions.contiguous()
    q_ids, q_probabilities, first_rows = q_ids.contiguous(), q_probabilities.contiguous(), first_rows.contiguous()

    # With few rows parts are shorter, so that all processors are used.
    block_v, num_warps = (4096, 4) if num_rows <= 64 else (8192, 8)
    num_parts = triton.cdiv(vocab_size, block_v)
    maxima = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(maxima)
    num_slots = max(1, min(triton.cdiv(num_rows, num_requests), _MAX_SLOTS))
    _softmax_parts_kernel[(num_parts, num_slots, num_requests)](
        logits, first_rows, maxima, sums, vocab_size, logits.stride(0), BLOCK_V=block_v, num_warps=num_warps
    )

    sizes = {"PARTS": num_parts, "BLOCK_P": triton.next_power_of_2(num_parts)}
    _test_kernel[(num_requests,)](
        row_tokens,
        logits,
        q_ids,
        q_probabilities,
        seeds,
        positions,
        first_rows,
        maxima,
        sums,
        num_accepted,
        num_q_ids,
        logits.stride(0),
        **sizes,
        STREAM=STREAM_ACCEPT,
        BLOCK_N=_BLOCK_ROWS,
        BLOCK_K=_BLOCK_Q,
        num_warps=4,
    )

    # Eight programs per processor, or one per block if there are fewer blocks.
    num_blocks = triton.cdiv(vocab_size, _BLOCK_DRAW)
    blocks_each = max(1, min(16, num_requests * num_blocks // (8 * num_processors(logits))))
    num_splits = triton.cdiv(num_blocks, blocks_each)
    best = torch.empty((num_requests, num_splits), dtype=torch.float64, device=logits.device)
    best_ids = torch.empty((num_requests, num_splits), dtype=torch.int32, device=logits.device)
    padded_q_ids = triton.next_power_of_2(max(num_q_ids, 1))
    _draw_kernel[(num_splits, num_requests)](
        logits,
        q_ids,
        seeds,
        positions,
        first_rows,
        maxima,
        num_accepted,
        best,
        best_ids,
        vocab_size,
        num_q_ids,
        logits.stride(0),
        blocks_each,
        **sizes,
        SAMPLE=STREAM_SAMPLE,
        RECOVER=STREAM_RECOVER,
        UNDERFLOW=_UNDERFLOW,
        BLOCK_K=padded_q_ids,
        BLOCK_V=_BLOCK_DRAW,
        num_warps=2,
    )
    _finish_kernel[(num_requests,)](
        logits,
        q_ids,
        q_probabilities,
        seeds,
        positions,
        first_rows,
        maxima,
        sums,
        num_accepted,
        best,
        best_ids,
        next_anchors,
        num_q_ids,
        num_splits,
        logits.stride(0),
        **sizes,
        RECOVER=STREAM_RECOVER,
        BLOCK_S=triton.next_power_of_2(num_splits),
        BLOCK_K=padded_q_ids,
        BLOCK_J=max(1, min(16, 4096 // padded_q_ids)),
        num_warps=4,
    )
    return num_accepted, next_anchors


@triton.jit
def _softmax_parts_kernel(p_logits, p_first_rows, p_maxima, p_sums, V, stride_n, BLOCK_V: tl.constexpr):
    i_part, i_slot, i_request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = tl.load(p_first_rows + i_request), tl.load(p_first_rows + i_request + 1)
    o_v = i_part * BLOCK_V + tl.arange(0, BLOCK_V)
    # No draft follows the last row, whose token needs no softmax.
    for row in range(first + i_slot, end - 1, tl.num_programs(1)):
        b_x = tl.load(p_logits + row * stride_n + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        maximum = tl.max(b_x)
        base = tl.where(maximum > float("-inf"), maximum, 0.0)
        o_part = row * tl.num_programs(0) + i_part
        tl.store(p_maxima + o_part, maximum)
        tl.store(p_sums + o_part, tl.sum(tl.exp(b_x - base)))


@triton.jit
def _joined_parts(b_maxima, b_sums):
    """Maximum and sum of exponentials of rows from those of their parts [rows, parts]; the sum in float64."""
    b_maximum = tl.max(b_maxima, axis=1)
    b_base = tl.where(b_maximum > float("-inf"), b_maximum, 0.0).to(tl.float64)
    b_sum = tl.sum(b_sums.to(tl.float64) * tl.exp(b_maxima.to(tl.float64) - b_base[:, None]), axis=1)
    return b_maximum.to(tl.float64), b_sum


@triton.jit
def _test_kernel(
    p_row_tokens,
    p_logits,
    p_q_ids,
    p_q_probabilities,
    p_seeds,
    p_positions,
    p_first_rows,
    p_maxima,
    p_sums,
    p_num_accepted,
    K,
    stride_n,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_request = tl.program_id(0)
    first, end = tl.load(p_first_rows + i_request), tl.load(p_first_rows + i_request + 1)
    seed = tl.load(p_seeds + i_request)
    o_p = tl.arange(0, BLOCK_P)[None, :]
    # The row before the first rejected draft, or the last row.
    stop = end - 1
    for start in range(first, end - 1, BLOCK_N):
        o_row = start + tl.arange(0, BLOCK_N)
        m_row = o_row < end - 1
        b_draft = tl.load(p_row_tokens + o_row + 1, mask=m_row, other=0)
        b_x = tl.load(p_logits + o_row * stride_n + b_draft, mask=m_row, other=0.0).to(tl.float64)
        m_part = m_row[:, None] & (o_p < PARTS)
        o_part = o_row[:, None] * PARTS + o_p
        b_maxima = tl.load(p_maxima + o_part, mask=m_part, other=float("-inf"))
        b_maximum, b_sum = _joined_parts(b_maxima, tl.load(p_sums + o_part, mask=m_part, other=0.0))

        b_q = tl.zeros((BLOCK_N,), tl.float64)
        for start_k in range(0, K, BLOCK_K):
            o_k = start_k + tl.arange(0, BLOCK_K)[None, :]
            m_k = m_row[:, None] & (o_k < K)
            o_q = o_row[:, None] * K + o_k
            b_ids = tl.load(p_q_ids + o_q, mask=m_k, other=-1)
            b_probabilities = tl.load(p_q_probabilities + o_q, mask=m_k, other=0.0).to(tl.float64)
            # NaN at any id reaches the sum, so the draft is rejected.
            b_q += tl.sum(b_probabilities * (b_ids == b_draft[:, None]).to(tl.float64), axis=1)

        b_position = tl.load(p_positions + o_row, mask=m_row, other=0)
        b_uniform = uniform(philox_bits(seed, b_position, STREAM, tl.zeros((BLOCK_N,), tl.int32)))
        m_stands = b_uniform * b_q < tl.exp(b_x - b_maximum) / b_sum
        stop = tl.minimum(stop, tl.min(tl.where(m_row & (m_stands == 0), o_row, end - 1)))
    tl.store(p_num_accepted + i_request, tl.maximum(stop - first, 0))


@triton.jit
def _draw_kernel(
    p_logits,
    p_q_ids,
    p_seeds,
    p_positions,
    p_first_rows,
    p_maxima,
    p_num_accepted,
    p_best,
    p_best_ids,
    V,
    K,
    stride_n,
    blocks_each,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SAMPLE: tl.constexpr,
    RECOVER: tl.constexpr,
    UNDERFLOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_split, i_request = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(p_first_rows + i_request), tl.load(p_first_rows + i_request + 1)
    if first == end:
        return
    row = first + tl.load(p_num_accepted + i_request)
    recovers = row < end - 1
    b_seed = tl.load(p_seeds + i_request + tl.zeros((1,), tl.int32))
    b_position = tl.load(p_positions + row + tl.zeros((1,), tl.int32))
    o_k, o_p = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    # After the last draft no token is excluded or too improbable.
    b_q_ids = tl.load(p_q_ids + row * K + o_k, mask=o_k < tl.where(recovers, K, 0), other=-1).to(tl.int32)
    m_p = o_p < tl.where(recovers, PARTS, 0)
    b_maxima = tl.load(p_maxima + row * PARTS + o_p, mask=m_p, other=float("-inf"))
    lowest = tl.max(b_maxima) - UNDERFLOW

    best = tl.full((), float("-inf"), tl.float64)
    best_id = tl.full((), -1, tl.int32)
    first_block = i_split * blocks_each
    for i_block in range(first_block, tl.minimum(first_block + blocks_each, tl.cdiv(V, BLOCK_V))):
        first_id = i_block * BLOCK_V
        o_v = first_id + tl.arange(0, BLOCK_V)
        b_x = tl.load(p_logits + row * stride_n + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        # With NaN and inf there is no distribution: no other token is better than inf.
        if tl.min((b_x < float("inf")).to(tl.int32)) == 0:
            best = tl.full((), float("inf"), tl.float64)
            best_id = tl.full((), -1, tl.int32)
        b_x = tl.where(b_x >= lowest, b_x, float("-inf"))
        # Few of the K ids are in one block, so they are removed one after the other.
        m_inside = (b_q_ids >= first_id) & (b_q_ids < first_id + BLOCK_V)
        drafted = first_id - 1
        for _ in range(tl.sum(m_inside.to(tl.int32))):
            drafted = tl.min(tl.where(m_inside & (b_q_ids > drafted), b_q_ids, V))
            b_x = tl.where(o_v == drafted, float("-inf"), b_x)

        if recovers:
            b_bits = philox_tile(b_seed, b_position, RECOVER, first_id // 4, BLOCK_V)
        else:
            b_bits = philox_tile(b_seed, b_position, SAMPLE, first_id // 4, BLOCK_V)
        b_bits = tl.reshape(b_bits, (BLOCK_V,))
        highest = tl.max(b_x + rough_gumbel(b_bits))
        # Far more than the error of the rough noise; the sum is rounded.
        needed = best - 0.001 - 1e-6 * tl.abs(best)
        if (highest > float("-inf")) & (highest.to(tl.float64) >= needed):
            b_score = b_x.to(tl.float64) + gumbel(b_bits).to(tl.float64)
            score = tl.max(b_score)
            token_id = tl.min(tl.where(b_score == score, o_v, V))
            best_id = tl.where(score > best, token_id, best_id)
            best = tl.maximum(score, best)
    o_split = i_request * tl.num_programs(0) + i_split
    tl.store(p_best + o_split, best)
    tl.store(p_best_ids + o_split, best_id)


@triton.jit
def _finish_kernel(
    p_logits,
    p_q_ids,
    p_q_probabilities,
    p_seeds,
    p_positions,
    p_first_rows,
    p_maxima,
    p_sums,
    p_num_accepted,
    p_best,
    p_best_ids,
    p_next_anchors,
    K,
    S,
    stride_n,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RECOVER: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i_request = tl.program_id(0)
    first, end = tl.load(p_first_rows + i_request), tl.load(p_first_rows + i_request + 1)
    if first == end:
        tl.store(p_next_anchors + i_request, -1)
        return
    row = first + tl.load(p_num_accepted + i_request)
    o_s = tl.arange(0, BLOCK_S)
    b_best = tl.load(p_best + i_request * S + o_s, mask=o_s < S, other=float("-inf"))
    b_best_ids = tl.load(p_best_ids + i_request * S + o_s, mask=o_s < S, other=2147483647)
    best = tl.max(b_best)
    best_id = tl.min(tl.where(b_best == best, b_best_ids, 2147483647)).to(tl.int64)

    if row < end - 1:
        o_p = tl.arange(0, BLOCK_P)[None, :]
        o_part = row * PARTS + o_p
        b_maxima = tl.load(p_maxima + o_part, mask=o_p < PARTS, other=float("-inf"))
        b_maximum, b_sum = _joined_parts(b_maxima, tl.load(p_sums + o_part, mask=o_p < PARTS, other=0.0))
        maximum, total = tl.sum(b_maximum), tl.sum(b_sum)  # of one row

        o_k = tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_ids = tl.load(p_q_ids + row * K + o_k, mask=m_k, other=-1)
        b_x = tl.load(p_logits + row * stride_n + b_ids, mask=m_k, other=float("-inf")).to(tl.float64)
        # An id may occur twice.
        b_q = tl.zeros((BLOCK_K,), tl.float64)
        for start in range(0, K, BLOCK_J):
            o_j = start + tl.arange(0, BLOCK_J)
            m_j = o_j < K
            b_others = tl.load(p_q_ids + row * K + o_j, mask=m_j, other=-1)
            b_probabilities = tl.load(p_q_probabilities + row * K + o_j, mask=m_j, other=0.0).to(tl.float64)
            m_same = b_ids[:, None] == b_others[None, :]
            b_q += tl.sum(tl.where(m_same, b_probabilities[None, :], 0.0), axis=1)

        seed, position = tl.load(p_seeds + i_request), tl.load(p_positions + row)
        b_noise = gumbel(philox_bits(seed, position, RECOVER, b_ids)).to(tl.float64)
        b_p = tl.exp(b_x - maximum) / total
        b_left = tl.where(m_k, b_p - b_q, 0.0)
        m_left = b_left > 0.0
        # Other tokens' scores are x + noise: log(weight) is moved to where log(p) is x.
        b_weight = tl.log(tl.where(m_left, b_left, 1.0)) + maximum + tl.log(total)
        b_score = tl.where(m_left, b_weight + b_noise, float("-inf"))
        nothing_left = (best == float("-inf")) & (tl.max(b_score) == float("-inf"))
        if nothing_left | (tl.max((b_q != b_q).to(tl.int32)) > 0):
            # Nothing of p is left, or q is NaN: the token is drawn from p.
            b_score = tl.where(m_k & (b_p > 0.0), b_x + b_noise, float("-inf"))
        score = tl.max(b_score)
        q_id = tl.min(tl.where(m_k & (b_score == score), b_ids, 2147483647))
        best_id = tl.where(score > best, q_id, best_id)
    tl.store(p_next_anchors + i_request, best_id)
