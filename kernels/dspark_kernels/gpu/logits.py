"""Edits of single logits, and the threshold of top-k, top-p and min-p filters by bisection, without sorting.

Float32 numbers in order have integer keys in order, so 32 steps of bisection (how much is above this key?) find a k-th
largest logit or the end of a nucleus exactly. The largest logits of the lanes, some thousands, bound the result from
below, and only logits at or above the bound are gathered and searched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Lanes of a row, and most gathered logits; if there are more, the full row is searched."""
_BLOCK_LIST = 1024
_EDITS = 128
"""Edits per program."""


@triton.jit
def inverse_temperature(temperature):
    """float64 factor by which `apply_temperature` divides; temperature 0 divides by 1."""
    divisor = tl.where(temperature > 0, temperature, 1.0).to(tl.float32)
    return 1.0 / divisor.to(tl.float64)


@triton.jit
def apply_temperature(b_x, inverse):
    """float32 x / temperature, rounded as a division rounds, for `inverse` as `inverse_temperature` gives it.

    A quotient of two float32 numbers keeps 2^-49 of itself away from where rounding to float32 turns, and this
    product is 2^-52 off. A float32 division would take a branch per element.
    """
    return (b_x.to(tl.float64) * inverse).to(tl.float32)


@triton.jit
def _key(b_x):
    """int32 in the order of float32."""
    bits = b_x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit(key):
    """The float32 of a key in an int64."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(p_list, length, key, inverse, shift, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Number of logits in a list with larger keys, or the sum of their exp(x - shift), as float64."""
    total = shift.to(tl.float64) * 0
    for start in range(0, length, BLOCK):
        o_list = start + tl.arange(0, BLOCK)
        b_logits = tl.load(p_list + o_list, mask=o_list < length, other=float("-inf"))
        b_x = apply_temperature(b_logits.to(tl.float32), inverse)
        m_above = (o_list < length) & (_key(b_x) > key)
        if BY_MASS:
            total += tl.sum(tl.where(m_above, tl.exp(b_x - shift), 0.0).to(tl.float64))
        else:
            total += tl.sum(m_above.to(tl.int32)).to(tl.float64)
    return total


@triton.jit
def _lowest_within(p_list, length, limit, low, high, inverse, shift, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key from low to high with less than `limit` above it; high if there is none.

    The count above changes at keys of logits only, so the result is the key of a logit, or low.
    """
    refused = low - 1
    while high - refused > 1:
        middle = refused + ((high - refused) >> 1)
        fits = _above(p_list, length, middle, inverse, shift, BY_MASS, BLOCK) < limit
        high = tl.where(fits, middle, high)
        refused = tl.where(fits, refused, middle)
    return high


@triton.jit(do_not_specialize=["widest_top_k"])
def _filter_threshold_kernel(
    p_logits,
    p_temperatures,
    p_top_k,
    p_top_p,
    p_min_p,
    p_gathered,
    p_thresholds,
    row_stride,
    num_columns,
    widest_top_k,
    BLOCK: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * row_stride
    inverse = inverse_temperature(tl.load(p_temperatures + i_row))
    top_k = tl.minimum(tl.minimum(tl.load(p_top_k + i_row), widest_top_k), num_columns)
    top_p, min_p = tl.load(p_top_p + i_row).to(tl.float64), tl.load(p_min_p + i_row).to(tl.float64)
    has_top_k, has_top_p = top_k < num_columns, top_p < 1

    # Per lane, so that warps do not wait for each other.
    o_block = tl.arange(0, BLOCK)
    b_tops = tl.full([BLOCK], float("-inf"), tl.float32)
    b_lows = tl.full([BLOCK], float("inf"), tl.float32)
    b_masses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        m_columns = start + o_block < num_columns
        b_x = apply_temperature(
            tl.load(p_row + start + o_block, mask=m_columns, other=float("-inf")).to(tl.float32), inverse
        )
        b_lows = tl.minimum(b_lows, tl.where(m_columns, b_x, float("inf")))
        b_before, b_tops = b_tops, tl.maximum(b_tops, b_x)
        b_shift = tl.where(b_tops == float("-inf"), 0.0, b_tops)
        b_masses = b_masses * tl.exp(b_before - b_shift) + tl.exp(b_x - b_shift)
    top, lowest = tl.max(b_tops), tl.min(b_lows)

    if has_top_k | has_top_p:
        shift = tl.where(top == float("-inf"), 0.0, top)
        b_weights = tl.exp(b_tops - shift)
        mass = tl.sum((b_masses * b_weights).to(tl.float64))

        # A key reached by so many lanes, or by lanes of that mass, is reached by at least as many logits.
        limit = tl.where(has_top_k, top_k.to(tl.float64), top_p * mass)
        b_weights = tl.where(has_top_k, 1.0, b_weights)
        b_keys = _key(b_tops)
        low, high = _key(shift * 0 + float("-inf")).to(tl.int64), _key(top).to(tl.int64)
        refused = low - 1
        while high - refused > 1:
            middle = refused + ((high - refused) >> 1)
            fits = tl.sum(tl.where(b_keys > middle, b_weights, 0.0)) < limit
            high = tl.where(fits, middle, high)
            refused = tl.where(fits, refused, middle)
        low, high = high, _key(top).to(tl.int64)

        length = 0
        for start in range(0, num_columns, BLOCK):
            m_columns = start + o_block < num_columns
            b_logits = tl.load(p_row + start + o_block, mask=m_columns, other=float("-inf"))
            m_left = m_columns & (_key(apply_temperature(b_logits.to(tl.float32), inverse)) >= low)
            num_left = tl.sum(m_left.to(tl.int32))
            if num_left > 0:
                o_left = length + tl.cumsum(m_left.to(tl.int32), 0) - 1
                tl.store(p_gathered + i_row * BLOCK + o_left, b_logits, mask=m_left & (o_left < BLOCK))
            length += num_left
        tl.debug_barrier()

        p_list = p_gathered + i_row * BLOCK
        if length > BLOCK:
            p_list, length = p_row, num_columns
        if has_top_k:
            low = _lowest_within(p_list, length, top_k, low, high, inverse, shift, False, BLOCK_LIST)
            lowest = _logit(low)
            # Not all ties with the last of the k best are among them.
            ties = top_k - _above(p_list, length, low, inverse, shift, False, BLOCK_LIST)
            mass = _above(p_list, length, low, inverse, shift, True, BLOCK_LIST) + ties * tl.exp(lowest - shift)
        if has_top_p:
            low = _lowest_within(p_list, length, top_p * mass, low, high, inverse, shift, True, BLOCK_LIST)
            lowest = tl.maximum(lowest, _logit(low))
    # Not every library returns -inf for log(0).
    ratio = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)).to(tl.float32), float("-inf"))
    # NaN and inf show in the masses, but not in comparisons.
    b_is_number = tl.sum(b_masses) < float("inf")
    tl.store(p_thresholds + i_row, tl.where(b_is_number, tl.maximum(lowest, top + ratio), float("nan")))


def filter_threshold(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, widest_top_k: int
) -> Tensor:
    """See `reference.filter_threshold`."""
    num_rows, num_columns = logits.shape
    lowest = logits.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return lowest
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    _filter_threshold_kernel[(num_rows,)](
        logits,
        temperatures.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        logits.new_empty(num_rows, _BLOCK),
        lowest,
        logits.stride(0),
        num_columns,
        widest_top_k,
        BLOCK=_BLOCK,
        BLOCK_LIST=_BLOCK_LIST,
        num_warps=16,
    )
    return lowest


@triton.jit(do_not_specialize=["num_edits", "first_id"])
def _edit_kernel(
    p_logits,
    p_rows,
    p_token_ids,
    p_factors,
    p_offsets,
    p_edited,
    row_stride,
    num_columns,
    num_edits,
    first_id,
    BLOCK: tl.constexpr,
):
    o_edits = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_edits = o_edits < num_edits
    b_rows = tl.load(p_rows + o_edits, mask=m_edits, other=0).to(tl.int64)
    b_columns = tl.load(p_token_ids + o_edits, mask=m_edits, other=-1).to(tl.int64) - first_id
    m_edits = m_edits & (b_columns >= 0) & (b_columns < num_columns)
    b_factors = tl.load(p_factors + o_edits, mask=m_edits, other=1.0).to(tl.float32)
    b_offsets = tl.load(p_offsets + o_edits, mask=m_edits, other=0.0).to(tl.float32)
    b_old = tl.load(p_logits + b_rows * row_stride + b_columns, mask=m_edits, other=0.0).to(tl.float32)
    b_new = tl.where(b_old > 0, tl.div_rn(b_old, b_factors), b_old * b_factors) + b_offsets
    tl.store(p_edited + b_rows * num_columns + b_columns, b_new, mask=m_edits)


def edit_logits(
    logits: Tensor, rows: Tensor, token_ids: Tensor, factors: Tensor, offsets: Tensor, first_id: int = 0
) -> Tensor:
    """See `reference.edit_logits`."""
    edited = logits.new_empty(logits.shape, dtype=torch.float32).copy_(logits)
    num_edits = len(rows)
    if num_edits == 0:
        return edited
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    # Edited logits are read from the input, so the copy need not be complete. Product and sum are rounded separately.
    _edit_kernel[(triton.cdiv(num_edits, _EDITS),)](
        logits,
        rows.contiguous(),
        token_ids.contiguous(),
        factors.contiguous(),
        offsets.contiguous(),
        edited,
        logits.stride(0),
        logits.shape[1],
        num_edits,
        first_id,
        BLOCK=_EDITS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return edited
