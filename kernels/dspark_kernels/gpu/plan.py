"""Choice of drafts to verify, and their rows: small integer work without synchronisation with the host.

`admit_prefixes` is one program that keeps all candidates in registers. Survivals are never negative, so that their
float64 bit patterns, read as integers, are in the same order; the last admitted one is found by bisection.
`pack_rows` spreads over requests; every program adds up the lengths before its own, which costs less than a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_CANDIDATES = 16384
"""Most padded requests times padded positions in the registers of one program."""
_BLOCK_R = 16
_BLOCK_LENGTHS = 1024
_BLOCK_EMPTY = 256


def admit_prefixes(confidences: Tensor, limits: Tensor, thresholds: Tensor, budget: Tensor) -> Tensor:
    """See `reference.admit_prefixes`."""
    num_requests, gamma = confidences.shape
    lengths = torch.empty(num_requests, dtype=torch.int64, device=confidences.device)
    if num_requests == 0:
        return lengths
    block_r, block_g = triton.next_power_of_2(num_requests), triton.next_power_of_2(max(gamma, 1))
    if block_r * block_g > _MAX_CANDIDATES:
        raise ValueError(
            f"confidences {tuple(confidences.shape)}: expected at most {_MAX_CANDIDATES} candidates, "
            "requests and positions each counted as the next power of two"
        )
    _admit_prefixes_kernel[(1,)](
        confidences,
        limits.contiguous(),
        thresholds.contiguous(),
        budget,
        lengths,
        num_requests,
        confidences.stride(0),
        confidences.stride(1),
        G=gamma,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        num_warps=max(1, min(16, block_r * block_g // 512)),
    )
    return lengths


@triton.jit
def _admit_prefixes_kernel(
    p_confidences,
    p_limits,
    p_thresholds,
    p_budget,
    p_lengths,
    R,
    stride_r,
    stride_g,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_g = tl.arange(0, BLOCK_G)[None, :]
    m_r = o_r < R
    b_limit = tl.load(p_limits + o_r, mask=m_r, other=0)
    b_threshold = tl.load(p_thresholds + o_r, mask=m_r, other=0.0).to(tl.float64)
    # Position by position, because a product in another order would differ in the last bit.
    b_survival = tl.full((BLOCK_R,), 1.0, tl.float64)
    b_kept = tl.zeros((BLOCK_R,), tl.int32)
    b_key = tl.full((BLOCK_R, BLOCK_G), -1, tl.int64)  # -1: not allowed
    for i_g in range(G):
        b_confidence = tl.load(p_confidences + o_r * stride_r + i_g * stride_g, mask=m_r, other=0.0)
        b_survival = b_survival * b_confidence.to(tl.float64)
        b_kept += (b_survival >= b_threshold).to(tl.int32)
        b_bits = tl.where((b_limit > i_g) & (b_survival >= 0.0), tl.abs(b_survival).to(tl.int64, bitcast=True), -1)
        b_key = tl.where(o_g == i_g, b_bits[:, None], b_key)

    num_allowed = tl.sum((b_key >= 0).to(tl.int32))
    budget = tl.minimum(tl.maximum(tl.load(p_budget).to(tl.int64), 0), num_allowed.to(tl.int64)).to(tl.int32)

    # low: the largest key that at least `budget` candidates reach. With no or all of them admitted it is known.
    largest = tl.max(b_key)
    low = tl.where(budget > 0, largest * 0, largest)
    high = tl.where(budget < num_allowed, largest, low)
    while low < high:
        middle = high - (high - low) // 2
        num_above = tl.sum((b_key >= middle).to(tl.int32))
        # Exactly the budget: any key between the last one admitted and the next will do.
        high = tl.where(num_above > budget, high, tl.where(num_above == budget, middle, middle - 1))
        low = tl.where(num_above >= budget, middle, low)

    # Those above are admitted; of those equal to it the first in the order of requests.
    b_above = tl.sum((b_key > low).to(tl.int32), axis=1)
    b_equal = tl.sum((b_key == low).to(tl.int32), axis=1)
    b_left = budget - tl.sum(b_above) - (tl.cumsum(b_equal) - b_equal)
    b_admitted = b_above + tl.minimum(tl.maximum(b_left, 0), b_equal)
    tl.store(p_lengths + o_r, tl.minimum(b_admitted, b_kept).to(tl.int64), mask=m_r)


def pack_rows(
    lengths: Tensor, anchors: Tensor, drafts: Tensor, starts: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pack_rows`."""
    num_requests, gamma = drafts.shape
    token_ids, positions, owners = (torch.empty(num_rows, dtype=torch.int64, device=lengths.device) for _ in range(3))
    first_rows = torch.empty(num_requests + 1, dtype=torch.int64, device=lengths.device)
    # Without requests, padding rows and the end of the last request are still written.
    grid = (max(1, triton.cdiv(num_requests, _BLOCK_R)),)
    _pack_rows_kernel[grid](
        lengths.contiguous(),
        anchors.contiguous(),
        drafts,
        starts.contiguous(),
        token_ids,
        positions,
        owners,
        first_rows,
        num_requests,
        num_rows,
        drafts.stride(0),
        drafts.stride(1),
        BLOCK_R=_BLOCK_R,
        BLOCK_G=triton.next_power_of_2(gamma + 1),
        BLOCK_LENGTHS=_BLOCK_LENGTHS,
        BLOCK_EMPTY=_BLOCK_EMPTY,
        num_warps=4,
    )
    return token_ids, positions, owners, first_rows


@triton.jit
def _pack_rows_kernel(
    p_lengths,
    p_anchors,
    p_drafts,
    p_starts,
    p_token_ids,
    p_positions,
    p_owners,
    p_first_rows,
    R,
    N,
    stride_r,
    stride_g,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_LENGTHS: tl.constexpr,
    BLOCK_EMPTY: tl.constexpr,
):
    i_block = tl.program_id(0)
    # Rows of the requests before this block, and of all requests.
    b_before = tl.zeros((BLOCK_LENGTHS,), tl.int64)
    b_all = tl.zeros((BLOCK_LENGTHS,), tl.int64)
    for start in range(0, R, BLOCK_LENGTHS):
        o_l = start + tl.arange(0, BLOCK_LENGTHS)
        b_rows = tl.load(p_lengths + o_l, mask=o_l < R, other=-1).to(tl.int64) + 1
        b_before += tl.where(o_l < i_block * BLOCK_R, b_rows, 0)
        b_all += b_rows
    before, num_used = tl.sum(b_before), tl.sum(b_all)

    o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_rows = tl.load(p_lengths + o_r, mask=m_r, other=-1).to(tl.int64) + 1
    b_first = before + tl.cumsum(b_rows) - b_rows
    tl.store(p_first_rows + o_r, b_first, mask=m_r)
    if i_block == 0:
        tl.store(p_first_rows + R, num_used)

    o_g = tl.arange(0, BLOCK_G)[None, :]
    o_row = b_first[:, None] + o_g
    m_row = m_r[:, None] & (o_g < b_rows[:, None]) & (o_row < N)
    b_anchor = tl.load(p_anchors + o_r, mask=m_r, other=0).to(tl.int64)
    b_start = tl.load(p_starts + o_r, mask=m_r, other=0).to(tl.int64)
    p_draft = p_drafts + o_r[:, None].to(tl.int64) * stride_r + (o_g - 1) * stride_g
    b_draft = tl.load(p_draft, mask=m_row & (o_g > 0), other=0).to(tl.int64)
    tl.store(p_token_ids + o_row, tl.where(o_g == 0, b_anchor[:, None], b_draft), mask=m_row)
    tl.store(p_positions + o_row, b_start[:, None] + o_g, mask=m_row)
    tl.store(p_owners + o_row, o_r[:, None].to(tl.int64) + o_g * 0, mask=m_row)

    for start in range(i_block * BLOCK_EMPTY, N, tl.num_programs(0) * BLOCK_EMPTY):
        o_e = start + tl.arange(0, BLOCK_EMPTY)
        m_e = (o_e >= num_used) & (o_e < N)
        b_zero = tl.zeros((BLOCK_EMPTY,), tl.int64)
        tl.store(p_token_ids + o_e, b_zero, mask=m_e)
        tl.store(p_positions + o_e, b_zero, mask=m_e)
        tl.store(p_owners + o_e, b_zero - 1, mask=m_e)
