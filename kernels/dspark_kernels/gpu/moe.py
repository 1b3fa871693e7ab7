"""Routed experts: pairs (row, chosen expert) sorted by expert, two products over them, and a sum per row.

`_plan_kernel` lists each expert's pairs and cuts the lists into tiles of rows. With quantised weights it also
rounds hidden rows to FP8, and `_round_kernel` rounds the rows between the products. A program of a
product takes one tile and some output channels: an expert's weights are read once per tile, and not at all if no row
chose it. The grid cannot depend on the choices; programs without a tile return at once. A pair has a row of its
own until `_combine_kernel` adds up a row's pairs, first choice first: results do not depend on the order of programs.

If experts have few pairs each, most time goes into reading weights, and the warps of a program split the input
channels instead of the rows (`weights.multiply_add`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.formats import ACTIVATION_GROUP
from dspark_kernels.reference import check_expert_range

from .weights import (
    FP4,
    FP8,
    PLAIN,
    load_rows,
    multiply_add,
    scale_bytes,
    store_rounded,
    whole_sum,
    zero_sum,
)

_GROUP = tl.constexpr(ACTIVATION_GROUP)
_PLAIN = tl.constexpr(PLAIN)
_TILE_NUMBERS = 3
_TILE = tl.constexpr(_TILE_NUMBERS)
"""Integers per tile: expert, first pair in the sorted list, end of the expert's pairs in it."""


_PLAN_PAIRS, _ROUND_GROUPS, _COMBINE_CHANNELS = 1024, 16, 512
"""Most pairs, groups of channels and channels per step of the small kernels."""


@dataclass(frozen=True)
class _Tiling:
    """Tiling of one program of a product."""

    rows: int
    channels: int
    columns: int
    slices: int
    warps: int
    stages: int = 3


_FEW_PAIRS = 6
"""Up to so many pairs per expert, the pairs of most experts fit in a tile of 8 rows."""
_FEW_TILINGS = {
    FP4: _Tiling(rows=8, channels=64, columns=128, slices=8, warps=4),
    FP8: _Tiling(rows=8, channels=64, columns=128, slices=4, warps=4),
    PLAIN: _Tiling(rows=8, channels=64, columns=128, slices=8, warps=8),
}
_MANY_TILINGS = {
    FP4: _Tiling(rows=64, channels=128, columns=64, slices=1, warps=8),
    FP8: _Tiling(rows=64, channels=64, columns=128, slices=1, warps=4),
    PLAIN: _Tiling(rows=64, channels=128, columns=64, slices=1, warps=8),
}
# Without tensor cores, and for tests only.
_FLOAT32_TILING = _Tiling(rows=16, channels=64, columns=32, slices=1, warps=8, stages=2)


@triton.jit
def _local_experts(p_experts, o_pairs, num_pairs, first_expert, E: tl.constexpr):
    """This rank's numbers of the experts of pairs; E for experts of other ranks."""
    b_local = tl.load(p_experts + o_pairs, mask=o_pairs < num_pairs, other=-1) - first_expert
    return tl.where((o_pairs < num_pairs) & (b_local >= 0) & (b_local < E), b_local, E).to(tl.int32)


@triton.jit
def _list_pairs(
    i_expert,
    p_experts,
    p_pairs,
    p_tiles,
    p_num_local,
    max_tiles,
    num_pairs,
    first_expert,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write one expert's pairs and tiles after those of the experts before it."""
    o_experts = tl.arange(0, BLOCK_E)
    b_counts = tl.zeros((BLOCK_E,), tl.int32)
    for i_pair in range(0, num_pairs, BLOCK_P):
        o_pairs = i_pair + tl.arange(0, BLOCK_P)
        b_counts += tl.histogram(_local_experts(p_experts, o_pairs, num_pairs, first_expert, E), BLOCK_E)
    b_tiles = (b_counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(o_experts < i_expert, b_counts, 0))
    count = tl.sum(tl.where(o_experts == i_expert, b_counts, 0))
    first_tile = tl.sum(tl.where(o_experts < i_expert, b_tiles, 0))
    num_tiles = (count + BLOCK_M - 1) // BLOCK_M
    for i_tile in range(num_tiles):
        p_tile = p_tiles + (first_tile + i_tile) * _TILE
        tl.store(p_tile, i_expert)
        tl.store(p_tile + 1, first + i_tile * BLOCK_M)
        tl.store(p_tile + 2, first + count)
    if i_expert == E - 1:
        tl.store(p_num_local, first + count)
        for i_tile in range(first_tile + num_tiles, max_tiles, BLOCK_E):
            o_tiles = i_tile + o_experts
            tl.store(p_tiles + o_tiles * _TILE, -1, mask=o_tiles < max_tiles)
    if count > 0:
        place = first
        for i_pair in range(0, num_pairs, BLOCK_P):
            o_pairs = i_pair + tl.arange(0, BLOCK_P)
            m_mine = _local_experts(p_experts, o_pairs, num_pairs, first_expert, E) == i_expert
            b_places = place + tl.cumsum(m_mine.to(tl.int32), 0) - 1
            tl.store(p_pairs + b_places, o_pairs, mask=m_mine)
            place += tl.sum(m_mine.to(tl.int32))


@triton.jit
def _round_groups(
    p_x, p_rounded, i_block, num_rows, FORMAT: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr
):
    """Round some of the groups of rows [num_rows, CHANNELS]."""
    GROUPS_PER_ROW: tl.constexpr = CHANNELS // _GROUP
    o_groups = i_block * GROUPS + tl.arange(0, GROUPS)
    m_groups = o_groups < num_rows * GROUPS_PER_ROW
    o_rows = (o_groups // GROUPS_PER_ROW).to(tl.int64) * CHANNELS
    o_channels = o_groups % GROUPS_PER_ROW * _GROUP
    p_x = p_x + (o_rows + o_channels)[:, None] + tl.arange(0, _GROUP)[None, :]
    b_groups = tl.load(p_x, mask=m_groups[:, None], other=0.0).to(tl.float32)
    store_rounded(p_rounded + o_rows, b_groups, m_groups, o_channels, FORMAT, CHANNELS)


@triton.jit(do_not_specialize=["num_rows", "max_tiles", "num_pairs", "first_expert"])
def _plan_kernel(
    p_hidden,
    p_experts,
    p_rounded,
    p_pairs,
    p_tiles,
    p_num_local,
    num_rows,
    max_tiles,
    num_pairs,
    first_expert,
    FORMAT: tl.constexpr,
    HIDDEN: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    i_program = tl.program_id(0)
    if i_program < E:
        _list_pairs(
            i_program,
            p_experts,
            p_pairs,
            p_tiles,
            p_num_local,
            max_tiles,
            num_pairs,
            first_expert,
            E,
            BLOCK_E,
            BLOCK_P,
            BLOCK_M,
        )
    elif FORMAT != _PLAIN:
        _round_groups(p_hidden, p_rounded, i_program - E, num_rows, FORMAT, HIDDEN, GROUPS)


@triton.jit
def _round_kernel(p_inner, p_rounded, p_num_local, FORMAT: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr):
    _round_groups(p_inner, p_rounded, tl.program_id(0), tl.load(p_num_local), FORMAT, INNER, GROUPS)


@triton.jit
def _load_tile(p_tiles, i_tile, BLOCK_M: tl.constexpr):
    """Expert of a tile, -1 for an unused tile, and places of its pairs in the sorted list with their mask."""
    p_tile = p_tiles + i_tile * _TILE
    i_expert, first, end = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    o_places = first + tl.arange(0, BLOCK_M)
    return i_expert.to(tl.int64), o_places, o_places < end


@triton.jit
def _gate_up_kernel(
    p_x,
    p_weights,
    p_pairs,
    p_tiles,
    p_w13,
    p_scale,
    p_inner,
    limit,
    FORMAT: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICES: tl.constexpr,
):
    CHANNEL_BLOCKS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) // CHANNEL_BLOCKS
    i_channel = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_N
    i_expert, o_places, m_rows = _load_tile(p_tiles, i_tile, BLOCK_M)
    if i_expert < 0:
        return
    o_pairs = tl.load(p_pairs + o_places, mask=m_rows, other=0)

    o_channels = i_channel + tl.arange(0, BLOCK_N)
    m_channels = o_channels < INNER
    p_w13 += i_expert * (2 * INNER * COLUMNS)
    if FORMAT != _PLAIN:
        p_scale += i_expert * SCALES
    p_x += (o_pairs // TOP_K).to(tl.int64) * HIDDEN
    b_gate = zero_sum(BLOCK_M, BLOCK_N, SLICES)
    b_up = b_gate
    for i_column in range(0, COLUMNS, BLOCK_C):
        b_x, b_odd_x = load_rows(p_x, m_rows, i_column, FORMAT, COLUMNS, BLOCK_C, SLICES)
        b_gate = multiply_add(
            b_gate,
            b_x,
            b_odd_x,
            p_w13,
            p_scale,
            o_channels,
            m_channels,
            i_column,
            FORMAT,
            COLUMNS,
            BLOCK_N,
            BLOCK_C,
            SLICES,
        )
        b_up = multiply_add(
            b_up,
            b_x,
            b_odd_x,
            p_w13,
            p_scale,
            INNER + o_channels,
            m_channels,
            i_column,
            FORMAT,
            COLUMNS,
            BLOCK_N,
            BLOCK_C,
            SLICES,
        )
    b_gate = whole_sum(b_gate, FORMAT, SLICES)
    b_up = whole_sum(b_up, FORMAT, SLICES)

    DTYPE: tl.constexpr = p_inner.dtype.element_ty
    if FORMAT == _PLAIN:
        b_gate, b_up = b_gate.to(DTYPE).to(tl.float32), b_up.to(DTYPE).to(tl.float32)
    b_gate = tl.minimum(b_gate, limit)
    b_up = tl.minimum(tl.maximum(b_up, -limit), limit)
    b_weights = tl.load(p_weights + o_pairs, mask=m_rows, other=0.0)
    b_inner = (b_gate * tl.sigmoid(b_gate) * b_up * b_weights[:, None]).to(DTYPE)
    p_inner = p_inner + o_places.to(tl.int64)[:, None] * INNER + o_channels[None, :]
    tl.store(p_inner, b_inner, mask=m_rows[:, None] & m_channels[None, :])


@triton.jit
def _down_kernel(
    p_inner,
    p_pairs,
    p_tiles,
    p_w2,
    p_scale,
    p_out,
    FORMAT: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICES: tl.constexpr,
):
    CHANNEL_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) // CHANNEL_BLOCKS
    i_expert, o_places, m_rows = _load_tile(p_tiles, i_tile, BLOCK_M)
    if i_expert < 0:
        return
    o_pairs = tl.load(p_pairs + o_places, mask=m_rows, other=0)

    o_channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    m_channels = o_channels < HIDDEN
    p_w2 += i_expert * (HIDDEN * COLUMNS)
    if FORMAT != _PLAIN:
        p_scale += i_expert * SCALES
    p_inner += o_places.to(tl.int64) * INNER
    b_sum = zero_sum(BLOCK_M, BLOCK_N, SLICES)
    for i_column in range(0, COLUMNS, BLOCK_C):
        b_x, b_odd_x = load_rows(p_inner, m_rows, i_column, FORMAT, COLUMNS, BLOCK_C, SLICES)
        b_sum = multiply_add(
            b_sum,
            b_x,
            b_odd_x,
            p_w2,
            p_scale,
            o_channels,
            m_channels,
            i_column,
            FORMAT,
            COLUMNS,
            BLOCK_N,
            BLOCK_C,
            SLICES,
        )
    b_sum = whole_sum(b_sum, FORMAT, SLICES)
    p_out = p_out + o_pairs.to(tl.int64)[:, None] * HIDDEN + o_channels[None, :]
    tl.store(p_out, b_sum, mask=m_rows[:, None] & m_channels[None, :])


@triton.jit(do_not_specialize=["first_expert"])
def _combine_kernel(
    p_pairs_out,
    p_experts,
    p_out,
    first_expert,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_choice in tl.static_range(TOP_K):
        i_pair = i_row * TOP_K + i_choice
        i_expert = tl.load(p_experts + i_pair) - first_expert
        num_channels = tl.where((i_expert >= 0) & (i_expert < E), HIDDEN, 0)
        b_sum += tl.load(p_pairs_out + i_pair * HIDDEN + o_channels, mask=o_channels < num_channels, other=0.0)
    tl.store(p_out + i_row * HIDDEN + o_channels, b_sum, mask=o_channels < HIDDEN)


@dataclass(frozen=True)
class _Weight:
    """A weight of all experts."""

    stored: Tensor
    scale: Tensor | None
    format: int

    def sizes(self) -> dict[str, int]:
        """Arguments of a product that depend on the storage format."""
        scales = 0 if self.scale is None else self.scale[0].numel()
        return {"FORMAT": self.format, "COLUMNS": self.stored.shape[2], "SCALES": scales}


def _weight_of(weight: Tensor, scale: Tensor | None) -> _Weight:
    assert weight.is_contiguous(), "experts' weights have to be contiguous"
    if scale is None:
        return _Weight(weight, None, PLAIN)
    if weight.dtype == torch.float8_e4m3fn:
        return _Weight(weight, scale_bytes(scale), FP8)
    return _Weight(weight.view(torch.uint8), scale_bytes(scale), FP4)


def _tiling_of(weight_format: int, dtype: torch.dtype, num_pairs: int, num_experts: int) -> _Tiling:
    """Tiling for `num_pairs` pairs of `num_experts` experts, both counted over all ranks.

    Looked up at every call of `moe`, so that a benchmark can replace it to measure other tilings.
    """
    if weight_format == PLAIN and dtype == torch.float32:
        return _FLOAT32_TILING
    return (_FEW_TILINGS if num_pairs <= _FEW_PAIRS * num_experts else _MANY_TILINGS)[weight_format]


def _check(hidden: Tensor, w13: _Weight, w2: _Weight, inner: int) -> None:
    if w13.format != w2.format:
        raise ValueError(f"experts' weights are {w13.stored.dtype} and {w2.stored.dtype}: expected one format")
    if w13.format == PLAIN and not hidden.dtype == w13.stored.dtype == w2.stored.dtype:
        raise ValueError(f"rows are {hidden.dtype}, experts {w13.stored.dtype}: expected one dtype")
    channels = (hidden.shape[1], inner)
    if w13.format != PLAIN and any(width % ACTIVATION_GROUP for width in channels):
        raise ValueError(f"quantised experts of {channels} channels: expected multiples of {ACTIVATION_GROUP}")


def moe(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    num_experts: int,
    first_expert: int = 0,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
) -> Tensor:
    """See `reference.moe`."""
    num_rows, d = hidden.shape
    num_local_experts, inner, top_k = len(w13), w13.shape[1] // 2, experts.shape[1]
    up_weight, down_weight = _weight_of(w13, w13_scale), _weight_of(w2, w2_scale)
    check_expert_range(num_experts, first_expert, num_local_experts)
    _check(hidden, up_weight, down_weight, inner)
    hidden, weights, experts = hidden.contiguous(), weights.contiguous(), experts.contiguous()
    out = hidden.new_empty(num_rows, d, dtype=torch.float32)
    if num_rows == 0:
        return out

    quantised = up_weight.format != PLAIN
    num_pairs = num_rows * top_k
    tiling = _tiling_of(up_weight.format, hidden.dtype, num_pairs, num_experts)
    max_tiles = min(num_pairs, num_local_experts) + num_pairs // tiling.rows
    pairs = hidden.new_empty(num_pairs, dtype=torch.int32)
    tiles = hidden.new_empty(max_tiles, _TILE_NUMBERS, dtype=torch.int32)
    num_local = hidden.new_empty(1, dtype=torch.int32)
    x = torch.empty_like(hidden, dtype=torch.bfloat16) if quantised else hidden
    rounding_programs = triton.cdiv(num_rows * d, _ROUND_GROUPS * ACTIVATION_GROUP) if quantised else 0
    _plan_kernel[(num_local_experts + rounding_programs,)](
        hidden,
        experts,
        x,
        pairs,
        tiles,
        num_local,
        num_rows,
        max_tiles,
        num_pairs,
        first_expert,
        FORMAT=up_weight.format,
        HIDDEN=d,
        E=num_local_experts,
        BLOCK_E=triton.next_power_of_2(num_local_experts + 1),
        BLOCK_P=min(_PLAN_PAIRS, max(128, triton.next_power_of_2(num_pairs))),
        BLOCK_M=tiling.rows,
        GROUPS=_ROUND_GROUPS,
    )

    launch = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    sizes = {
        "HIDDEN": d,
        "INNER": inner,
        "BLOCK_M": tiling.rows,
        "BLOCK_N": tiling.channels,
        "BLOCK_C": tiling.columns,
        "SLICES": tiling.slices,
    }
    activated = hidden.new_empty(num_pairs, inner)
    _gate_up_kernel[(max_tiles * triton.cdiv(inner, tiling.channels),)](
        x,
        weights,
        pairs,
        tiles,
        up_weight.stored,
        up_weight.scale,
        activated,
        limit,
        TOP_K=top_k,
        **sizes,
        **up_weight.sizes(),
        **launch,
    )
    if quantised:
        rounded = torch.empty_like(activated, dtype=torch.bfloat16)
        _round_kernel[(triton.cdiv(num_pairs * inner, _ROUND_GROUPS * ACTIVATION_GROUP),)](
            activated, rounded, num_local, FORMAT=down_weight.format, INNER=inner, GROUPS=_ROUND_GROUPS
        )
        activated = rounded
    pairs_out = out.new_empty(num_pairs, d)
    _down_kernel[(max_tiles * triton.cdiv(d, tiling.channels),)](
        activated,
        pairs,
        tiles,
        down_weight.stored,
        down_weight.scale,
        pairs_out,
        **sizes,
        **down_weight.sizes(),
        **launch,
    )
    _combine_kernel[(num_rows, triton.cdiv(d, _COMBINE_CHANNELS))](
        pairs_out, experts, out, first_expert, E=num_local_experts, TOP_K=top_k, HIDDEN=d, BLOCK=_COMBINE_CHANNELS
    )
    return out
