"""Routing: logits of all experts, summed over parts of the channels, then the choice of experts, one program per row.

With few rows there are few tiles of logits, so the channels of the gate are split too, for more processors to read it.
The parts are added up in a fixed order by the choosing kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import num_processors
from .weights import numbers

_FEW_ROWS = 16
"""Up to so many rows, a program takes all of them; beyond, 64."""
_MAX_SPLITS = 32
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["num_rows", "width"])
def _logits_kernel(
    p_hidden,
    p_gate,
    p_logits,
    num_rows,
    width,
    HIDDEN: tl.constexpr,
    E: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 sums [splits, num_rows, E] over `width` channels each."""
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_experts = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows, m_experts = (o_rows < num_rows)[:, None], (o_experts < E)[:, None]
    i_first = tl.program_id(2) * width
    p_hidden += o_rows.to(tl.int64)[:, None] * HIDDEN
    p_gate += o_experts[:, None] * HIDDEN
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_channel in range(i_first, min(i_first + width, HIDDEN), BLOCK_K):
        o_channels = i_channel + tl.arange(0, BLOCK_K)[None, :]
        b_hidden = tl.load(p_hidden + o_channels, mask=m_rows & (o_channels < HIDDEN), other=0.0).to(DTYPE)
        b_gate = tl.load(p_gate + o_channels, mask=m_experts & (o_channels < HIDDEN), other=0.0).to(DTYPE)
        b_sum = tl.dot(numbers(b_hidden), tl.trans(numbers(b_gate)), b_sum, input_precision="ieee")
    p_logits += (tl.program_id(2).to(tl.int64) * num_rows + o_rows[:, None]) * E + o_experts[None, :]
    tl.store(p_logits, b_sum, mask=m_rows & (o_experts < E)[None, :])


@triton.jit
def _softplus(b_x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + u), u = exp(-|x|), and log(1 + u) = 2 artanh(u / (2 + u)).

    The series of artanh up to the fifteenth power is exact to float32 here, where its argument is at most 1/3; a
    logarithm would lose the small results.
    """
    b_u = tl.exp(-tl.abs(b_x))
    b_s = b_u / (2.0 + b_u)
    b_square = b_s * b_s
    b_series = 1.0 / 13.0 + b_square * (1.0 / 15.0)
    b_series = 1.0 / 11.0 + b_square * b_series
    b_series = 1.0 / 9.0 + b_square * b_series
    b_series = 1.0 / 7.0 + b_square * b_series
    b_series = 1.0 / 5.0 + b_square * b_series
    b_series = 1.0 / 3.0 + b_square * b_series
    return tl.maximum(b_x, 0.0) + 2.0 * b_s * (1.0 + b_square * b_series)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _choose_kernel(
    p_logits,
    p_bias,
    p_hash_experts,
    p_padding,
    p_weights,
    p_experts,
    num_rows,
    num_splits,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_splits, o_experts, o_choices = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    o_logits = (o_splits.to(tl.int64)[:, None] * num_rows + i_row) * E + o_experts[None, :]
    m_logits = (o_splits < num_splits)[:, None] & (o_experts < E)[None, :]
    b_scores = tl.sqrt(_softplus(tl.sum(tl.load(p_logits + o_logits, mask=m_logits, other=0.0), axis=0)))
    b_left = b_scores
    if p_bias is not None:
        b_left += tl.load(p_bias + o_experts, mask=o_experts < E, other=0.0).to(tl.float32)
    # NaN counts as a highest score. Only chosen experts and places beyond E are -inf, so that choices are distinct.
    b_left = tl.where(b_left == b_left, tl.maximum(b_left, _LEAST), float("inf"))
    b_left = tl.where(o_experts < E, b_left, float("-inf"))
    b_weights = tl.zeros((BLOCK_K,), tl.float32)
    if p_padding is not None:
        is_padding = tl.load(p_padding + i_row) != 0
    for i_choice in tl.static_range(TOP_K):
        if p_hash_experts is not None:
            i_expert = tl.load(p_hash_experts + i_row * TOP_K + i_choice)
        else:
            i_expert = tl.argmax(b_left, axis=0)
            b_left = tl.where(o_experts == i_expert, float("-inf"), b_left)
        score = tl.sum(tl.where(o_experts == i_expert, b_scores, 0.0))
        b_weights = tl.where(o_choices == i_choice, score, b_weights)
        if p_padding is not None:
            i_expert = tl.where(is_padding, -1, i_expert)
        tl.store(p_experts + i_row * TOP_K + i_choice, i_expert.to(tl.int64))
    if NORM:
        b_weights /= tl.sum(b_weights)
    tl.store(p_weights + i_row * TOP_K + o_choices, b_weights * scale, mask=o_choices < TOP_K)


def route(
    hidden: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    hash_experts: Tensor | None,
    top_k: int,
    scale: float,
    norm: bool,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    (num_rows, d), num_experts = hidden.shape, len(gate)
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top {top_k} of {num_experts} experts: expected at least one and no more than there are")
    hidden, gate = hidden.contiguous(), gate.contiguous()
    weights = hidden.new_empty(num_rows, top_k, dtype=torch.float32)
    experts = hidden.new_empty(num_rows, top_k, dtype=torch.int64)
    if num_rows == 0:
        return weights, experts

    exact = hidden.dtype == gate.dtype == torch.bfloat16
    block_m = 16 if num_rows <= _FEW_ROWS or not exact else 64
    block_n, block_k = (block_m * 2 if block_m == 16 else 64, 128) if exact else (32, 32)
    tiles = (triton.cdiv(num_rows, block_m), triton.cdiv(num_experts, block_n))
    # At least two steps per part, because a part costs a read and a write of the logits.
    splits = max(1, min(num_processors(hidden) // (tiles[0] * tiles[1]), d // (2 * block_k), _MAX_SPLITS))
    width = triton.cdiv(triton.cdiv(d, splits), block_k) * block_k
    splits = triton.cdiv(d, width)
    logits = hidden.new_empty(splits, num_rows, num_experts, dtype=torch.float32)
    _logits_kernel[(*tiles, splits)](
        hidden,
        gate,
        logits,
        num_rows,
        width,
        HIDDEN=d,
        E=num_experts,
        DTYPE=tl.bfloat16 if exact else tl.float32,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_stages=4 if exact else 2,
    )
    _choose_kernel[(num_rows,)](
        logits,
        None if hash_experts is not None else bias,
        None if hash_experts is None else hash_experts.contiguous(),
        None if padding is None else padding.contiguous().view(torch.uint8),
        weights,
        experts,
        num_rows,
        splits,
        scale,
        E=num_experts,
        TOP_K=top_k,
        NORM=norm,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
    )
    return weights, experts
