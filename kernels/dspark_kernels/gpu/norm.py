"""RMS norm, rotation and gated activation: every row is loaded once, in full width, and stored once.

A row is one block of the next power of two, so its sum of squares needs no second read. The channels of a
rotated pair are neighbours in that block, and a split takes them apart in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import num_processors

_MAX_CHANNELS = 32768
"""Most channels of a row that one program can hold."""


@triton.jit
def normed(b_x, p_weight, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32 rows [ROWS, BLOCK_D], 0 behind channel D, divided by their RMS, times weight [D] if there is one."""
    b_mean = tl.sum(b_x * b_x, axis=1) * (1.0 / D)
    b_x = b_x * tl.rsqrt(b_mean + eps)[:, None]
    if p_weight is not None:
        o_d = tl.arange(0, BLOCK_D)
        b_x = b_x * tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    return b_x


@triton.jit
def load_angles(p_angles, o_rows, m_rows, D: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines or sines [., PAIRS] of rows o_rows at the places of their pairs among BLOCK_D / 2, 0 elsewhere."""
    o_pairs = tl.arange(0, BLOCK_D // 2) - (D // 2 - PAIRS)
    m_pairs = (o_pairs >= 0) & (o_pairs < PAIRS)
    o_angles = o_rows.to(tl.int64)[:, None] * PAIRS + o_pairs[None, :]
    return tl.load(p_angles + o_angles, mask=m_rows[:, None] & m_pairs[None, :], other=0.0)


@triton.jit
def turned(b_x, b_cos, b_sin, FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32 rows [ROWS, BLOCK_D], each pair of neighbours from channel FIRST on turned by its angle."""
    b_even, b_odd = tl.split(tl.reshape(b_x, (ROWS, BLOCK_D // 2, 2)))
    b_turned = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    # Rotating by 0 would keep the numbers before FIRST, but not the sign of every zero.
    return tl.where((tl.arange(0, BLOCK_D) >= FIRST)[None, :], tl.reshape(b_turned, (ROWS, BLOCK_D)), b_x)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    p_x, p_weight, p_out, num_rows, stride_x, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_x = (o_rows < num_rows)[:, None] & (o_d < D)[None, :]
    o_rows = o_rows.to(tl.int64)[:, None]
    b_x = tl.load(p_x + o_rows * stride_x + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_x = normed(b_x, p_weight, eps, D, BLOCK_D)
    tl.store(p_out + o_rows * D + o_d[None, :], b_x.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_kernel(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_out,
    num_rows,
    stride_x,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_rows = o_rows < num_rows
    m_x = m_rows[:, None] & (o_d < D)[None, :]
    o_long = o_rows.to(tl.int64)[:, None]
    b_x = tl.load(p_x + o_long * stride_x + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_cos = load_angles(p_cos, o_rows // HEADS, m_rows, D, PAIRS, BLOCK_D)
    b_sin = load_angles(p_sin, o_rows // HEADS, m_rows, D, PAIRS, BLOCK_D)
    if NORM:
        # Two operations in one pass: the result of the first is rounded as if it were stored.
        b_x = normed(b_x, p_weight, eps, D, BLOCK_D).to(p_out.dtype.element_ty).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin
    b_x = turned(b_x, b_cos, b_sin, D - 2 * PAIRS, ROWS, BLOCK_D)
    tl.store(p_out + o_long * D + o_d[None, :], b_x.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit
def _swiglu_kernel(p_gate, p_up, p_out, num_columns, stride_gate, stride_up, limit, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_columns = o_columns < num_columns
    b_gate = tl.load(p_gate + i_row * stride_gate + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * stride_up + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    # Comparisons, because they let NaN through.
    b_gate = tl.where(b_gate > limit, limit, b_gate)
    b_up = tl.where(b_up > limit, limit, tl.where(b_up < -limit, -limit, b_up))
    b_gate = (b_gate / (1.0 + tl.exp(-b_gate))).to(p_out.dtype.element_ty).to(tl.float32)
    b_out = (b_gate * b_up).to(p_out.dtype.element_ty)
    tl.store(p_out + i_row * num_columns + o_columns, b_out, mask=m_columns)


def rows_of(x: Tensor) -> Tensor:
    """x as [rows, channels] with contiguous channels; a view if x's strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tile(rows: Tensor) -> tuple[int, int, int]:
    """(rows of a program, channels of its block, warps) for rows [., D]."""
    num_rows, num_channels = rows.shape
    if num_channels > _MAX_CHANNELS:
        raise ValueError(f"rows of {num_channels} channels: expected at most {_MAX_CHANNELS}")
    block = triton.next_power_of_2(num_channels)
    # 4096 numbers keep eight warps busy with wide loads; few rows are spread over more programs instead.
    many = max(1, 4096 // block)
    rows_per_program = many if num_rows >= 4 * many * num_processors(rows) else max(1, many // 4)
    size = rows_per_program * block
    return rows_per_program, block, 4 if size <= 1024 else 8 if size <= 8192 else 16


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = rows_of(x)
    rows_per_program, block, num_warps = _tile(rows)
    _rms_norm_kernel[(triton.cdiv(len(rows), rows_per_program),)](
        rows,
        None if weight is None else weight.contiguous(),
        out,
        len(rows),
        rows.stride(0),
        eps,
        D=rows.shape[1],
        ROWS=rows_per_program,
        BLOCK_D=block,
        num_warps=num_warps,
    )
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """See `reference.rope`."""
    return _rotated(x, None, 0.0, cos, sin, norm=False, inverse=inverse)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.norm_rope`."""
    return _rotated(x, weight, eps, cos, sin, norm=True, inverse=False)


def _rotated(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, *, norm: bool, inverse: bool
) -> Tensor:
    check_rotary(x.shape[-1], cos)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = rows_of(x)
    rows_per_program, block, num_warps = _tile(rows)
    _rope_kernel[(triton.cdiv(len(rows), rows_per_program),)](
        rows,
        None if weight is None else weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        out,
        len(rows),
        rows.stride(0),
        eps,
        HEADS=len(rows) // len(x),
        D=rows.shape[1],
        PAIRS=cos.shape[-1],
        NORM=norm,
        INVERSE=inverse,
        ROWS=rows_per_program,
        BLOCK_D=block,
        num_warps=num_warps,
    )
    return out


def check_rotary(num_channels: int, cos: Tensor) -> None:
    """Raise ValueError unless `num_channels` is even and cos [., Dr/2] fits into its pairs."""
    rotary_dims = 2 * cos.shape[-1]
    if num_channels % 2 or rotary_dims > num_channels:
        raise ValueError(
            f"{num_channels} channels, {rotary_dims} of them rotary: expected an even number, at least that"
        )


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """See `reference.swiglu`."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)}, up {up.dtype} {tuple(up.shape)}: expected two alike")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    # Halves of one product are the usual inputs, so rows may have gaps between them.
    gate_rows, up_rows = rows_of(gate), rows_of(up)
    num_rows, num_columns = gate_rows.shape
    block = min(1024, triton.next_power_of_2(num_columns))
    _swiglu_kernel[(num_rows, triton.cdiv(num_columns, block))](
        gate_rows,
        up_rows,
        out,
        num_columns,
        gate_rows.stride(0),
        up_rows.stride(0),
        float(limit),
        BLOCK=block,
        num_warps=4,
    )
    return out
