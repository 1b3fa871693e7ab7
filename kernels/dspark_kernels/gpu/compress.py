"""The compressor: raw rows, and the entries that are pooled from them when a window closes.

Few windows of a batch close, so a program walks over a run of windows and skips the others. Rows of a closing window
are read once, in chunks; each place of the chunk keeps its own running maximum, sum and weighted sum, so nothing is
exchanged between threads before the last chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.formats import KEY_GROUP

from .device import num_processors
from .keys import make_key, packed_row_bytes, store_key
from .norm import check_rotary, rows_of

_CHUNK = 8
"""Raw rows of a window that are processed together: a full window at ratio 4."""
_MAX_CHANNELS = 1024
"""Channels of an entry per program: four chunks of more would not fit into shared memory."""
_WARPS_PER_PROCESSOR = 32
"""Warps per processor of the programs over which `compress` distributes its windows."""


@triton.jit
def _store_raw_kernel(
    p_kv,
    p_gate,
    p_ape,
    p_positions,
    p_pool,
    p_slot_mapping,
    stride_kv,
    stride_gate,
    STRIDE_POOL: tl.constexpr,
    RATIO: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_row = p_pool + tl.load(p_slot_mapping + i_row).to(tl.int64) * STRIDE_POOL
    i_ape = tl.load(p_positions + i_row) % RATIO
    b_kv = tl.load(p_kv + i_row * stride_kv + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_row * stride_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_ape = tl.load(p_ape + i_ape * C + o_c, mask=m_c, other=0.0)
    tl.store(p_row + o_c, b_kv, mask=m_c)
    tl.store(p_row + C + o_c, b_gate + b_ape, mask=m_c)


@triton.jit
def _pooled(
    p_pool,
    p_index,
    STRIDE_POOL: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The window's S raw rows as one [BLOCK_D]: a softmax of gates over rows, channel by channel, 0 behind D."""
    o_d = tl.arange(0, BLOCK_D)
    b_max = tl.full((BLOCK_S, BLOCK_D), -3.0e38, tl.float32)  # below every gate, and finite
    b_sum = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    b_weighted = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for i_s in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        o_s = i_s + tl.arange(0, BLOCK_S)
        b_index = tl.load(p_index + o_s, mask=o_s < S, other=-1).to(tl.int64)
        o_raw = b_index[:, None] * STRIDE_POOL + o_d[None, :]
        if C > D:
            # Windows overlap: series B of the second half of the rows.
            o_raw += ((o_s // (S // 2)) * D)[:, None]
        # An absent row has weight 0; its memory may hold NaN.
        m_raw = (b_index >= 0)[:, None] & (o_d < D)[None, :]
        b_kv = tl.load(p_pool + o_raw, mask=m_raw, other=0.0)
        b_gate = tl.load(p_pool + C + o_raw, mask=m_raw, other=float("-inf"))
        # One of the two factors e^(old - new maximum), e^(gate - new maximum) is 1, so one exponential suffices.
        b_above = b_gate - b_max
        b_smaller = tl.exp(-tl.abs(b_above))
        b_keep = tl.where(b_above > 0, b_smaller, 1.0)
        b_new = tl.where(b_above > 0, 1.0, b_smaller)
        b_max = tl.maximum(b_max, b_gate)
        b_sum = b_sum * b_keep + b_new
        b_weighted = b_weighted * b_keep + b_kv * b_new
    b_share = tl.exp(b_max - tl.max(b_max, axis=0)[None, :])
    b_total = tl.sum(b_sum * b_share, axis=0)
    return tl.sum(b_weighted * b_share, axis=0) / tl.where(o_d < D, b_total, 1.0)


@triton.jit(do_not_specialize=["num_windows", "windows_per_program"])
def _compress_kernel(
    p_pool,
    p_index,
    p_weight,
    p_cos,
    p_sin,
    p_entries,
    p_store_entries,
    num_windows,
    windows_per_program,
    eps,
    STRIDE_POOL: tl.constexpr,
    STRIDE_ENTRIES: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTISE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Packed bytes were rounded from the dtype of the weight.
    DTYPE: tl.constexpr = (p_weight if ROW_BYTES > 0 else p_entries).dtype.element_ty
    first = tl.program_id(0) * windows_per_program
    for i_window in range(first, min(first + windows_per_program, num_windows)):
        entry = tl.load(p_store_entries + i_window).to(tl.int64)
        if entry >= 0:
            i_long = tl.cast(i_window, tl.int64)
            b_pooled = _pooled(p_pool, p_index + i_long * S, STRIDE_POOL, C, S, D, BLOCK_S, BLOCK_D, STAGES)
            b_pooled = b_pooled.to(DTYPE).to(tl.float32)
            b_key = make_key(b_pooled, p_weight, p_cos, p_sin, i_long, eps, DTYPE, D, PAIRS, BLOCK_D)
            p_row = p_entries + entry * STRIDE_ENTRIES
            store_key(p_row, b_key, D, D - 2 * PAIRS, GROUP, QUANTISE, ROW_BYTES, BLOCK_D)


def _check_raw_pool(pool: Tensor, num_channels: int) -> None:
    if pool.dtype != torch.float32 or pool.shape[1] != 2 * num_channels or pool.stride(1) != 1:
        raise ValueError(
            f"pool {pool.dtype} {tuple(pool.shape)}, strides {pool.stride()}: "
            f"expected rows of {2 * num_channels} float32, dense"
        )


def store_raw(kv: Tensor, gate: Tensor, ape: Tensor, positions: Tensor, pool: Tensor, slot_mapping: Tensor) -> None:
    """See `reference.store_raw`."""
    num_channels = kv.shape[1]
    _check_raw_pool(pool, num_channels)
    if len(kv) == 0:
        return
    kv, gate = rows_of(kv), rows_of(gate)
    block = triton.next_power_of_2(num_channels)
    _store_raw_kernel[(len(kv),)](
        kv,
        gate,
        ape.contiguous(),
        positions.contiguous(),
        pool,
        slot_mapping.contiguous(),
        kv.stride(0),
        gate.stride(0),
        STRIDE_POOL=pool.stride(0),
        RATIO=len(ape),
        C=num_channels,
        BLOCK_C=block,
        num_warps=4 if block <= 1024 else 8,
    )


def compress(
    pool: Tensor,
    index: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    entries: Tensor,
    store_entries: Tensor,
    quantise: bool = False,
) -> None:
    """See `reference.compress`."""
    num_windows, rows_per_window = index.shape
    raw_channels, num_channels = pool.shape[1] // 2, len(weight)
    _check_raw_pool(pool, raw_channels)
    if num_channels > _MAX_CHANNELS:
        raise ValueError(f"entries of {num_channels} channels: expected at most {_MAX_CHANNELS}")
    if raw_channels not in (num_channels, 2 * num_channels):
        raise ValueError(f"rows of {pool.shape[1]} numbers: expected 2 or 4 times {num_channels} channels")
    if raw_channels > num_channels and rows_per_window % 2:
        raise ValueError(f"{rows_per_window} rows of overlapping windows: expected an even number")
    check_rotary(num_channels, cos)
    row_bytes = packed_row_bytes(entries, num_channels, 2 * cos.shape[-1], quantise)
    if num_windows == 0:
        return
    block = triton.next_power_of_2(num_channels)
    # A long window is 512 KiB that one program reads: four chunks on their way keep its processor's memory path full.
    num_warps = 4 if block < 512 else 8 if rows_per_window <= _CHUNK else 16
    most_programs = _WARPS_PER_PROCESSOR // num_warps * num_processors(pool)
    windows_per_program = triton.cdiv(num_windows, most_programs)
    _compress_kernel[(triton.cdiv(num_windows, windows_per_program),)](
        pool,
        index.contiguous(),
        weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        entries,
        store_entries.contiguous(),
        num_windows,
        windows_per_program,
        eps,
        STRIDE_POOL=pool.stride(0),
        STRIDE_ENTRIES=entries.stride(0),
        C=raw_channels,
        S=rows_per_window,
        D=num_channels,
        PAIRS=cos.shape[-1],
        GROUP=KEY_GROUP,
        QUANTISE=quantise,
        ROW_BYTES=row_bytes,
        BLOCK_S=_CHUNK,
        BLOCK_D=block,
        STAGES=4,
        num_warps=num_warps,
    )
