"""Norm, rotation, rounding and storage of a key: shared by `store_window` and `compress`.

A key is normed, rotated, and stored as it is, rounded to FP8, or packed (`formats.pack_keys`). It is rounded at the
same points as in the reference, so bytes of a packed row differ only where float32 sums in another order do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.formats import KEY_GROUP, packed_key_bytes

from .norm import check_rotary, load_angles, normed, rows_of, turned
from .weights import scaled_groups


@triton.jit
def make_key(
    b_x,
    p_weight,
    p_cos,
    p_sin,
    i_row,
    eps,
    DTYPE: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Key [BLOCK_D] in DTYPE of float32 channels b_x [BLOCK_D], 0 behind D, with the angles of row i_row."""
    o_rows = tl.arange(0, 1) + i_row
    m_rows = o_rows >= 0
    b_x = normed(b_x[None, :], p_weight, eps, D, BLOCK_D).to(DTYPE).to(tl.float32)
    b_cos = load_angles(p_cos, o_rows, m_rows, D, PAIRS, BLOCK_D)
    b_sin = load_angles(p_sin, o_rows, m_rows, D, PAIRS, BLOCK_D)
    return tl.reshape(turned(b_x, b_cos, b_sin, D - 2 * PAIRS, 1, BLOCK_D), (BLOCK_D,)).to(DTYPE)


@triton.jit
def round_fp8(b_groups):
    """(E4M3 values [GROUPS, GROUP], biased exponents [GROUPS] of their scales) of float32 groups [GROUPS, GROUP].

    As `formats.round_fp8`.
    """
    b_scaled, b_exponents = scaled_groups(b_groups)
    return b_scaled.to(tl.float8e4nv), b_exponents


@triton.jit
def store_key(
    p_row,
    b_key,
    D: tl.constexpr,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTISE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store key [BLOCK_D] at p_row: packed into ROW_BYTES bytes, or in the pool's dtype if ROW_BYTES is 0."""
    o_d = tl.arange(0, BLOCK_D)
    if ROW_BYTES > 0:
        _store_packed(p_row, b_key, D, PLAIN, GROUP, ROW_BYTES, BLOCK_D)
    else:
        if QUANTISE:
            b_values, b_exponents = round_fp8(tl.reshape(b_key.to(tl.float32), (BLOCK_D // GROUP, GROUP)))
            b_scales = (b_exponents << 23).to(tl.float32, bitcast=True)
            b_rounded = tl.reshape(b_values.to(tl.float32) * b_scales[:, None], (BLOCK_D,)).to(b_key.dtype)
            b_key = tl.where(o_d < PLAIN, b_rounded, b_key)
        tl.store(p_row + o_d, b_key.to(p_row.dtype.element_ty), mask=o_d < D)


@triton.jit
def _store_packed(
    p_row,
    b_key,
    D: tl.constexpr,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Rotary channels are groups of their own, whose rounded values are not stored.
    b_values, b_exponents = round_fp8(tl.reshape(b_key.to(tl.float32), (BLOCK_D // GROUP, GROUP)))
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_row + o_d, tl.reshape(b_values, (BLOCK_D,)).to(tl.uint8, bitcast=True), mask=o_d < PLAIN)
    p_rotary = (p_row + PLAIN).to(tl.pointer_type(tl.bfloat16))
    tl.store(p_rotary + (o_d - PLAIN), b_key.to(tl.bfloat16), mask=(o_d >= PLAIN) & (o_d < D))
    SCALES: tl.constexpr = PLAIN + 2 * (D - PLAIN)
    o_groups = tl.arange(0, BLOCK_D // GROUP)
    tl.store(p_row + SCALES + o_groups, b_exponents.to(tl.uint8), mask=o_groups < PLAIN // GROUP)
    # Fewer than eight bytes pad the scales.
    o_padding = SCALES + PLAIN // GROUP + tl.arange(0, 8)
    tl.store(p_row + o_padding, tl.zeros((8,), tl.uint8), mask=o_padding < ROW_BYTES)


@triton.jit
def _store_window_kernel(
    p_kv,
    p_weight,
    p_cos,
    p_sin,
    p_pool,
    p_slot_mapping,
    stride_kv,
    eps,
    STRIDE_POOL: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTISE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    slot = tl.load(p_slot_mapping + i_row).to(tl.int64)
    b_kv = tl.load(p_kv + i_row * stride_kv + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_key = make_key(b_kv, p_weight, p_cos, p_sin, i_row, eps, p_kv.dtype.element_ty, D, PAIRS, BLOCK_D)
    store_key(p_pool + slot * STRIDE_POOL, b_key, D, D - 2 * PAIRS, GROUP, QUANTISE, ROW_BYTES, BLOCK_D)


def packed_row_bytes(pool: Tensor, head_dim: int, rotary_dims: int, quantise: bool) -> int:
    """Bytes of a packed row of `pool`, 0 for an unpacked pool. Raises ValueError if keys do not fit."""
    packed = pool.dtype == torch.uint8
    width = packed_key_bytes(head_dim, rotary_dims) if packed else head_dim
    if pool.shape[1] != width or pool.stride(1) != 1:
        raise ValueError(
            f"pool {pool.dtype} {tuple(pool.shape)}, strides {pool.stride()}: expected rows of {width} numbers, dense"
        )
    plain = head_dim - rotary_dims
    if (packed or quantise) and (plain == 0 or plain % KEY_GROUP):
        raise ValueError(f"{plain} channels to round to FP8: expected a multiple of {KEY_GROUP}")
    return width if packed else 0


def store_window(
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    quantise: bool = False,
) -> None:
    """See `reference.store_window`."""
    num_channels = kv.shape[1]
    check_rotary(num_channels, cos)
    row_bytes = packed_row_bytes(pool, num_channels, 2 * cos.shape[-1], quantise)
    if len(kv) == 0:
        return
    rows = rows_of(kv)
    block = triton.next_power_of_2(num_channels)
    _store_window_kernel[(len(rows),)](
        rows,
        weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        pool,
        slot_mapping.contiguous(),
        rows.stride(0),
        eps,
        STRIDE_POOL=pool.stride(0),
        D=num_channels,
        PAIRS=cos.shape[-1],
        GROUP=KEY_GROUP,
        QUANTISE=quantise,
        ROW_BYTES=row_bytes,
        BLOCK_D=block,
        num_warps=2 if block <= 512 else 4,
    )
