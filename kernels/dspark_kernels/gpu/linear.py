"""Products of rows with an FP8 weight: a kernel for few rows, which streams the weight, and one for many.

Both multiply E4M3 numbers and apply the scales, of a row and of a tile of the weight, once per 128 input channels.
With few rows a program has few output channels and its warps share the input channels, so that small weights occupy the
device too; activations are rounded in registers. With many rows they are rounded once, by a separate kernel.

Many bfloat16 rows are multiplied by FP8 tensor cores, as the official program does. These add up 128 products with some
14 bits. Float32 rows are multiplied as float16, which holds E4M3 numbers, and summed in float32; so are few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.formats import ACTIVATION_GROUP, FP8_SCALE_TILE

from .device import num_processors
from .weights import round_activations, scale_bytes, slices

_GROUP = tl.constexpr(ACTIVATION_GROUP)
_BLOCK_ROWS = tl.constexpr(FP8_SCALE_TILE[0])


@dataclass(frozen=True)
class _Tiling:
    """Rows and output channels of one program."""

    rows: int
    channels: int
    warps: int
    stages: int


_FEW_ROWS = 16
"""Up to so many rows a program that streams the weight takes 8 of them."""
# In order of preference: the first with enough programs for most processors is used.
_FEW_TILINGS = (
    _Tiling(rows=8, channels=64, warps=4, stages=3),
    _Tiling(rows=8, channels=32, warps=8, stages=3),
    _Tiling(rows=8, channels=16, warps=8, stages=4),
)
_MANY_TILINGS = (
    _Tiling(rows=128, channels=128, warps=8, stages=4),
    _Tiling(rows=64, channels=128, warps=4, stages=5),
    _Tiling(rows=64, channels=64, warps=4, stages=6),
    _Tiling(rows=64, channels=32, warps=4, stages=6),
)
_ROUND_GROUPS = 16
"""Groups of channels per step of the rounding kernel."""


@triton.jit
def _scale_of(p_scale, i_channel, o_groups, GROUPS: tl.constexpr):
    """float32 scales of groups of input channels, for the scale tile of output channel i_channel."""
    b_bytes = tl.load(p_scale + i_channel // _BLOCK_ROWS * GROUPS + o_groups, mask=o_groups < GROUPS, other=0)
    return (b_bytes.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def _few_kernel(
    p_x,
    p_weight,
    p_scale,
    p_out,
    num_rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    GROUPS: tl.constexpr = IN // _GROUP
    i_channel = tl.program_id(0) * BLOCK_N
    o_channels = i_channel + tl.arange(0, BLOCK_N)
    m_channels = o_channels < OUT
    o_rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < num_rows
    p_weight += o_channels.to(tl.int64)[:, None] * IN
    p_x += o_rows.to(tl.int64)[:, None] * IN
    b_sum = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for i_group in range(0, GROUPS, SLICES):
        o_columns = i_group * _GROUP + tl.arange(0, SLICES * _GROUP)[None, :]
        m_columns = o_columns < IN
        b_weight = tl.load(p_weight + o_columns, mask=m_channels[:, None] & m_columns, other=0.0)
        b_x = tl.load(p_x + o_columns, mask=m_rows[:, None] & m_columns, other=0.0).to(tl.float32)
        b_x, b_x_scale = round_activations(tl.reshape(b_x, (BLOCK_M * SLICES, _GROUP)))
        b_x = tl.permute(tl.reshape(b_x.to(tl.float16), (BLOCK_M, SLICES, _GROUP)), (1, 2, 0))
        b_x_scale = tl.permute(tl.reshape(b_x_scale, (BLOCK_M, SLICES)), (1, 0))  # [SLICES, BLOCK_M]
        b_scale = _scale_of(p_scale, i_channel, i_group + tl.arange(0, SLICES), GROUPS)
        b_products = tl.dot(slices(b_weight.to(tl.float16), SLICES), b_x)  # [SLICES, BLOCK_N, BLOCK_M]
        b_sum += b_products * (b_scale[:, None] * b_x_scale)[:, None, :]
    b_out = tl.trans(tl.sum(b_sum, axis=0)).to(p_out.dtype.element_ty)
    p_out += o_rows.to(tl.int64)[:, None] * OUT + o_channels[None, :]
    tl.store(p_out, b_out, mask=m_rows[:, None] & m_channels[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _round_kernel(p_x, p_numbers, p_x_scale, num_rows, IN: tl.constexpr, BLOCK: tl.constexpr):
    """E4M3 numbers [num_rows, IN], and scales [IN / 128, num_rows]; a program takes some groups of x's channels."""
    GROUPS: tl.constexpr = IN // _GROUP
    o_groups = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_groups = o_groups < num_rows * GROUPS
    o_x = o_groups.to(tl.int64)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    b_x = tl.load(p_x + o_x, mask=m_groups[:, None], other=0.0).to(tl.float32)
    b_numbers, b_scale = round_activations(b_x)
    tl.store(p_numbers + o_x, b_numbers.to(p_numbers.dtype.element_ty), mask=m_groups[:, None])
    tl.store(p_x_scale + o_groups % GROUPS * num_rows + o_groups // GROUPS, b_scale, mask=m_groups)


@triton.jit(do_not_specialize=["num_rows"])
def _many_kernel(
    p_numbers,
    p_x_scale,
    p_weight,
    p_scale,
    p_out,
    num_rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    GROUPS: tl.constexpr = IN // _GROUP
    DTYPE: tl.constexpr = p_numbers.dtype.element_ty
    # Consecutive programs share a tile of the weight: all rows fit in L2, the weight may not.
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    i_channel = tl.program_id(0) // row_blocks * BLOCK_N
    o_channels = i_channel + tl.arange(0, BLOCK_N)
    m_channels = o_channels < OUT
    o_rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < num_rows
    o_columns = tl.arange(0, _GROUP)
    p_weight += o_channels.to(tl.int64)[:, None] * IN + o_columns[None, :]
    p_numbers += o_rows.to(tl.int64)[:, None] * IN + o_columns[None, :]
    p_x_scale += o_rows
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_next_scale = tl.load(p_x_scale, mask=m_rows, other=0.0) * _scale_of(p_scale, i_channel, 0, GROUPS)
    for i_group in range(GROUPS):
        # The next scales are loaded during this product.
        b_scale, i_next = b_next_scale, i_group + 1
        b_next_scale = tl.load(p_x_scale + i_next * num_rows, mask=m_rows & (i_next < GROUPS), other=0.0)
        b_next_scale *= _scale_of(p_scale, i_channel, i_next, GROUPS)
        b_numbers = tl.load(p_numbers + i_group * _GROUP, mask=m_rows[:, None], other=0.0)
        b_weight = tl.load(p_weight + i_group * _GROUP, mask=m_channels[:, None], other=0.0)
        b_sum += tl.dot(b_numbers, tl.trans(b_weight.to(DTYPE))) * b_scale[:, None]
    p_out += o_rows.to(tl.int64)[:, None] * OUT + o_channels[None, :]
    m_out = m_rows[:, None] & m_channels[None, :]
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), mask=m_out)


def _tiling_of(choices: Sequence[_Tiling], x: Tensor, out_channels: int) -> tuple[_Tiling, int, int]:
    """(tiling, number of row blocks, number of channel blocks)."""
    for tiling in choices:
        row_blocks, channel_blocks = triton.cdiv(len(x), tiling.rows), triton.cdiv(out_channels, tiling.channels)
        if row_blocks * channel_blocks >= 0.75 * num_processors(x):
            break
    return tiling, row_blocks, channel_blocks


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """See `reference.linear_fp8`."""
    out_channels, in_channels = weight.shape
    if in_channels % ACTIVATION_GROUP:
        raise ValueError(f"{in_channels} input channels: expected a multiple of {ACTIVATION_GROUP}")
    assert weight.is_contiguous(), "an FP8 weight has to be contiguous"
    x, scale = x.contiguous(), scale_bytes(scale)
    num_rows = len(x)
    out = x.new_empty(num_rows, out_channels)
    if num_rows == 0:
        return out
    if num_rows <= _FEW_ROWS:
        tiling, row_blocks, channel_blocks = _tiling_of(_FEW_TILINGS, x, out_channels)
        _few_kernel[(channel_blocks, row_blocks)](
            x,
            weight,
            scale,
            out,
            num_rows,
            OUT=out_channels,
            IN=in_channels,
            BLOCK_M=tiling.rows,
            BLOCK_N=tiling.channels,
            SLICES=tiling.warps,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        return out
    numbers = torch.empty_like(x, dtype=torch.float16 if x.dtype == torch.float32 else torch.float8_e4m3fn)
    x_scale = x.new_empty(in_channels // ACTIVATION_GROUP, num_rows, dtype=torch.float32)
    rounding_programs = triton.cdiv(x.numel(), _ROUND_GROUPS * ACTIVATION_GROUP)
    _round_kernel[(rounding_programs,)](x, numbers, x_scale, num_rows, IN=in_channels, BLOCK=_ROUND_GROUPS)
    choices = [tiling for tiling in _MANY_TILINGS if tiling.rows <= max(num_rows, 64)]
    tiling, row_blocks, channel_blocks = _tiling_of(choices, x, out_channels)
    _many_kernel[(row_blocks * channel_blocks,)](
        numbers,
        x_scale,
        weight,
        scale,
        out,
        num_rows,
        OUT=out_channels,
        IN=in_channels,
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.channels,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out
