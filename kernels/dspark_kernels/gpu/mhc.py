"""Hyper-connections: collapse the residual streams, mix them, and write a sublayer's output back; one launch each.

A read has two steps, and the second needs the sums of the first. Step one projects tiles of rows, with the long axis
[m*d] split over many processors. In step two one program per row collapses it, and a few more make `comb` of
several rows. Both are programs of one grid:

    [project tiles 0 .. lag-1] [project lag | follow 0] [project lag+1 | follow 1] ... [follow the last lag]

A program that follows waits for the projections of its tile. A wait always ends: they come earlier in the grid,
programs start in the order of the grid (CUB's scans rely on it too), and a projection does not wait. When rows are
read for the second time they should still be in L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import num_processors

_MOST_TILES = 1 << 15
_MOST_ROW_BYTES = 128 * 1024
"""A row is held in registers."""

_counters: dict[torch.device, Tensor] = {}
"""Arrivals per tile of rows, zero between launches: the last program of a tile resets them, which needs no launch.

All calls share them, so on a device they must follow one another, as on one stream.
"""


def _tile_counters(device: torch.device) -> Tensor:
    if device not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Inside a capture the zeros would be written only when that graph runs.
            raise RuntimeError(f"mhc_read or mhc_head must have run on {device} before a graph is captured")
        _counters[device] = torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)
    return _counters[device]


@dataclass(frozen=True)
class _Tiling:
    """Tiling of a read, by number of rows and of processors."""

    rows: int
    """Rows per tile; `fn` is read once per tile."""
    columns: int
    """Columns of [m*d] per step of a projection."""
    splits: int
    """Number of projections of a tile."""
    mixed_rows: int
    """Rows per program that computes `comb`."""
    mixed_splits: int
    """Splits that it adds at once: all for one row; few for many rows, so that threads have rows of their own."""
    lag: int
    """Tiles between a projection and what follows it: as many as run at once."""

    @classmethod
    def of(cls, num_rows: int, width: int, dtype: torch.dtype, processors: int) -> _Tiling:
        rows, columns = _tile_of(num_rows, dtype)
        tiles, steps = triton.cdiv(num_rows, rows), triton.cdiv(width, columns)
        # With few tiles every processor takes part. With many, a split has about eight steps, so that tiles end soon.
        splits = max(min(processors // tiles, steps), triton.cdiv(steps, 8))
        splits = 1 << (splits.bit_length() - 1)
        mixed_rows = 1 if num_rows <= 2 * processors else min(rows, 32)
        mixed_splits = splits if mixed_rows == 1 else max(splits // 32, 1)
        lag = min(tiles, triton.cdiv(2 * processors, splits))
        return cls(rows, columns, splits, mixed_rows, mixed_splits, lag)


def _tile_of(num_rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) that one step of a projection takes, for `num_rows` rows.

    32 rows of 128 columns would spill registers, and so would 16 rows of 64; 128 rows leave no room for 128 columns of
    three loads under way beside another program.
    Looked up at every call of `mhc_read`, so that a benchmark can replace it to measure other tiles.
    """
    rows = min(max(triton.next_power_of_2(num_rows), 16), 128)
    if dtype == torch.float32:
        return min(rows, 32), 32  # operands of these products are kept in registers
    return rows, 128 if rows in (16, 64) else 64


@triton.jit
def _project(
    p_streams,
    p_fn,
    p_partials,
    i_first,
    i_split,
    N,
    WIDTH: tl.constexpr,
    MIXES: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products with `fn` over a split of the columns, then the sum of squares: partials [N, SPLITS, SUMS]."""
    STEPS: tl.constexpr = tl.cdiv(tl.cdiv(WIDTH, BLOCK_K), SPLITS)
    o_n = i_first + tl.arange(0, BLOCK_N)
    o_sum = tl.arange(0, SUMS)
    m_n = o_n < N
    p_rows = p_streams + o_n.to(tl.int64)[:, None] * WIDTH
    b_z = tl.zeros((BLOCK_N, SUMS), tl.float32)
    b_z_middle = tl.zeros((BLOCK_N, SUMS), tl.float32)
    b_z_low = tl.zeros((BLOCK_N, SUMS), tl.float32)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    for i_step in range(STEPS):
        o_k = (i_split * STEPS + i_step) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < WIDTH
        b_x = tl.load(p_rows + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        p_block = p_fn + o_sum[:, None] * WIDTH + o_k[None, :]
        b_fn = tl.load(p_block, mask=(o_sum < MIXES)[:, None] & m_k[None, :], other=0.0)
        if b_x.dtype == tl.bfloat16:
            # Three bfloat16 numbers hold a float32 one, and their products with the streams are exact. Tensor cores cut
            # off what does not fit into a sum, so over several steps each of the three has its own. Over one step the
            # compiler adds all into one sum, smallest products first, whose error is of the same size.
            b_high = b_fn.to(tl.bfloat16)
            b_rest = b_fn - b_high.to(tl.float32)
            b_middle = b_rest.to(tl.bfloat16)
            b_low = (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)
            b_z = tl.dot(b_x, tl.trans(b_high), b_z)
            b_z_middle = tl.dot(b_x, tl.trans(b_middle), b_z_middle)
            b_z_low = tl.dot(b_x, tl.trans(b_low), b_z_low)
        else:
            b_z = tl.dot(b_x, tl.trans(b_fn), b_z, input_precision="ieee")
        b_x = b_x.to(tl.float32)
        b_squares += tl.sum(b_x * b_x, axis=1)
    b_z += b_z_middle + b_z_low
    b_sums = tl.where(o_sum[None, :] == MIXES, b_squares[:, None], b_z)
    p_sums = p_partials + (o_n.to(tl.int64) * SPLITS + i_split)[:, None] * SUMS + o_sum[None, :]
    tl.store(p_sums, b_sums, mask=m_n[:, None])


@triton.jit
def _wait(p_counter, SPLITS: tl.constexpr):
    """Wait until the projections of a tile are in memory."""
    while tl.atomic_add(p_counter, 0, sem="acquire") < SPLITS:
        pass


@triton.jit
def _leave(p_counter, SPLITS: tl.constexpr, followers):
    """Count a program that has waited; the last one makes the counter ready for the next launch."""
    if tl.atomic_add(p_counter, 1, sem="relaxed") == SPLITS + followers - 1:
        tl.store(p_counter, 0)


@triton.jit
def _collapse(
    p_streams,
    p_partials,
    p_counter,
    p_base,
    p_scale,
    p_norm,
    p_u,
    p_post,
    i_row,
    eps,
    rms_eps,
    M: tl.constexpr,
    D: tl.constexpr,
    MIXES: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """u [D] of one row: the weighted sum of its streams; for a read also normed, and with post [M]."""
    # Loads that do not depend on the projections are started before waiting for them.
    i_row = i_row.to(tl.int64)
    o_d, o_m, o_split = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), tl.arange(0, SPLITS)
    m_d, m_m = o_d < D, o_m < M
    p_row = p_streams + i_row * (M * D) + o_m[:, None] * D + o_d[None, :]
    b_x = tl.load(p_row, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_scale = tl.load(p_scale)
    b_base = tl.load(p_base + o_m, mask=m_m, other=0.0)
    if not IS_HEAD:
        b_norm = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_scale_post = tl.load(p_scale + 1)
        b_base_post = tl.load(p_base + M + o_m, mask=m_m, other=0.0)

    _wait(p_counter, SPLITS)
    p_sums = p_partials + i_row * (SPLITS * SUMS) + o_split * SUMS
    b_squares = tl.load(p_sums + MIXES, cache_modifier=".cg")
    b_z = tl.load(p_sums[:, None] + o_m[None, :], mask=m_m[None, :], other=0.0, cache_modifier=".cg")
    if not IS_HEAD:
        b_post = tl.load(p_sums[:, None] + M + o_m[None, :], mask=m_m[None, :], other=0.0, cache_modifier=".cg")
    b_inverse = tl.rsqrt(tl.sum(b_squares, axis=0) / (M * D) + rms_eps)
    b_weights = tl.sigmoid(tl.sum(b_z, axis=0) * b_inverse * b_scale + b_base) + eps
    b_u = tl.sum(b_weights[:, None] * b_x.to(tl.float32), axis=0).to(p_u.dtype.element_ty)
    if not IS_HEAD:
        b_post = 2 * tl.sigmoid(tl.sum(b_post, axis=0) * b_inverse * b_scale_post + b_base_post)
        tl.store(p_post + i_row * M + o_m, b_post, mask=m_m)
        b_u = b_u.to(tl.float32)
        b_u = b_u * tl.rsqrt(tl.sum(b_u * b_u, axis=0) / D + rms_eps) * b_norm
    tl.store(p_u + i_row * D + o_d, b_u.to(p_u.dtype.element_ty), mask=m_d)


@triton.jit
def _mix(
    p_partials,
    p_counter,
    p_base,
    p_scale,
    p_comb,
    i_first,
    N,
    eps,
    rms_eps,
    M: tl.constexpr,
    D: tl.constexpr,
    MIXES: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    ITERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """comb [M, M] of BLOCK_N rows."""
    o_n = i_first + tl.arange(0, BLOCK_N)
    o_m, o_pair = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_M * BLOCK_M)
    o_from, o_to = o_pair // BLOCK_M, o_pair % BLOCK_M
    o_comb = o_from * M + o_to
    m_n, m_pair = o_n < N, (o_from < M) & (o_to < M)
    b_scale = tl.load(p_scale + 2)
    b_base = tl.load(p_base + 2 * M + o_comb, mask=m_pair, other=0.0)
    # Padding columns get weight 0; padding rows get equal weights, which are removed below.
    b_base = tl.where((o_from < M) & (o_to >= M), float("-inf"), b_base)

    _wait(p_counter, SPLITS)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    b_comb = tl.zeros((BLOCK_N, BLOCK_M * BLOCK_M), tl.float32)
    for i_block in tl.static_range(SPLITS // BLOCK_S):
        o_split = i_block * BLOCK_S + tl.arange(0, BLOCK_S)
        p_sums = p_partials + (o_n.to(tl.int64)[:, None] * SPLITS + o_split[None, :]) * SUMS
        if BLOCK_N > 1:
            b_block_squares = tl.load(p_sums + MIXES, mask=m_n[:, None], other=0.0, cache_modifier=".cg")
        else:
            # One row's sum is a scalar, which has no layout that must agree with the layout of the mixes.
            p_row = p_partials + i_first.to(tl.int64) * (SPLITS * SUMS)
            b_block_squares = tl.load(p_row + o_split * SUMS + MIXES, cache_modifier=".cg")
        p_block, m_block = p_sums[:, :, None] + 2 * M + o_comb, m_n[:, None, None] & m_pair[None, None, :]
        b_block = tl.load(p_block, mask=m_block, other=0.0, cache_modifier=".cg")
        b_squares += tl.sum(b_block_squares, axis=1 if BLOCK_N > 1 else 0)
        b_comb += tl.sum(b_block, axis=1)
    b_inverse = tl.rsqrt(b_squares / (M * D) + rms_eps)
    b_comb = b_comb * b_inverse[:, None] * b_scale + b_base[None, :]
    b_comb = tl.reshape(b_comb, (BLOCK_N, BLOCK_M, BLOCK_M))
    b_comb = tl.exp(b_comb - tl.max(b_comb, axis=2)[:, :, None])
    b_comb = b_comb / tl.sum(b_comb, axis=2)[:, :, None] + eps
    m_square = (o_m < M)[:, None] & (o_m < M)[None, :]
    b_comb = tl.where(m_square[None, :, :], b_comb, 0.0)
    b_comb = b_comb / (tl.sum(b_comb, axis=1) + eps)[:, None, :]
    for _ in range(ITERS - 1):
        b_comb = b_comb / (tl.sum(b_comb, axis=2) + eps)[:, :, None]
        b_comb = b_comb / (tl.sum(b_comb, axis=1) + eps)[:, None, :]
    b_comb = tl.reshape(b_comb, (BLOCK_N, BLOCK_M * BLOCK_M))
    p_out = p_comb + o_n.to(tl.int64)[:, None] * (M * M) + o_comb[None, :]
    tl.store(p_out, b_comb, mask=m_n[:, None] & m_pair[None, :])


@triton.jit(do_not_specialize=["N", "num_tiles", "lag"])
def _mhc_read_kernel(
    p_streams,
    p_fn,
    p_base,
    p_scale,
    p_norm,
    p_partials,
    p_counters,
    p_u,
    p_post,
    p_comb,
    N,
    num_tiles,
    lag,
    eps,
    rms_eps,
    M: tl.constexpr,
    D: tl.constexpr,
    MIXES: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    ITERS: tl.constexpr,
    IS_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIXED_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    MIXERS: tl.constexpr = 0 if IS_HEAD else BLOCK_N // MIXED_ROWS
    FOLLOWERS: tl.constexpr = MIXERS + BLOCK_N
    PER_TILE: tl.constexpr = SPLITS + FOLLOWERS
    i_program = tl.program_id(0)
    i_paired = i_program - lag * SPLITS
    i_last = i_paired - (num_tiles - lag) * PER_TILE
    if i_paired < 0:
        i_tile, i_part = i_program // SPLITS, i_program % SPLITS
    elif i_last < 0:
        i_tile, i_part = i_paired // PER_TILE, i_paired % PER_TILE
        if i_part < SPLITS:
            i_tile += lag
    else:
        i_tile, i_part = num_tiles - lag + i_last // FOLLOWERS, SPLITS + i_last % FOLLOWERS
    p_counter = p_counters + i_tile
    i_first = i_tile * BLOCK_N
    if i_part < SPLITS:
        _project(p_streams, p_fn, p_partials, i_first, i_part, N, M * D, MIXES, SUMS, SPLITS, BLOCK_N, BLOCK_K)
        # The atomic orders the stores of its own thread only: a barrier puts those of other threads before it.
        tl.debug_barrier()
        tl.atomic_add(p_counter, 1, sem="release")
    else:
        i_part -= SPLITS
        num_rows = tl.minimum(N - i_first, BLOCK_N)
        if IS_HEAD:
            followers = num_rows
        else:
            followers = num_rows + tl.cdiv(num_rows, MIXED_ROWS)
        if i_part >= MIXERS:
            if i_part - MIXERS < num_rows:
                _collapse(
                    p_streams,
                    p_partials,
                    p_counter,
                    p_base,
                    p_scale,
                    p_norm,
                    p_u,
                    p_post,
                    i_first + i_part - MIXERS,
                    eps,
                    rms_eps,
                    M,
                    D,
                    MIXES,
                    SUMS,
                    SPLITS,
                    IS_HEAD,
                    BLOCK_M,
                    BLOCK_D,
                )
                _leave(p_counter, SPLITS, followers)
        elif not IS_HEAD:  # noqa: SIM102, conditions of the compiler and of the program cannot be combined
            if i_part * MIXED_ROWS < num_rows:
                i_first += i_part * MIXED_ROWS
                _mix(
                    p_partials,
                    p_counter,
                    p_base,
                    p_scale,
                    p_comb,
                    i_first,
                    N,
                    eps,
                    rms_eps,
                    M,
                    D,
                    MIXES,
                    SUMS,
                    SPLITS,
                    ITERS,
                    BLOCK_M,
                    MIXED_ROWS,
                    BLOCK_S,
                )
                _leave(p_counter, SPLITS, followers)


@triton.jit
def _mhc_write_kernel(
    p_out,
    p_streams,
    p_post,
    p_comb,
    p_written,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCKS: tl.constexpr = tl.cdiv(D, BLOCK_D)
    i_row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, BLOCK_M)
    m_d, m_m = o_d < D, o_m < M
    p_row = p_streams + i_row * (M * D) + o_m[:, None] * D + o_d[None, :]
    b_x = tl.load(p_row, mask=m_m[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_out = tl.load(p_out + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_to in tl.static_range(M):
        b_post = tl.load(p_post + i_row * M + i_to)
        b_comb = tl.load(p_comb + i_row * (M * M) + o_m * M + i_to, mask=m_m, other=0.0)
        b_new = b_post * b_out + tl.sum(b_comb[:, None] * b_x, axis=0)
        p_new = p_written + i_row * (M * D) + i_to * D + o_d
        tl.store(p_new, b_new.to(p_written.dtype.element_ty), mask=m_d)


def _contiguous(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}")
    return tensor.contiguous()


def _read(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mhc_read`, or without `norm` `mhc_head`, whose post and comb are unused."""
    num_rows, m, d = streams.shape
    mixes = m if norm is None else (2 + m) * m
    block_m, block_d = triton.next_power_of_2(m), triton.next_power_of_2(d)
    if streams.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"streams must be float32 or bfloat16, got {streams.dtype}")
    if block_m * block_d * streams.element_size() > _MOST_ROW_BYTES:
        raise ValueError(f"a row must fit in {_MOST_ROW_BYTES} bytes of registers, got {m} streams of {d} channels")
    streams = streams.contiguous()
    fn = _contiguous("fn", fn, (mixes, m * d), torch.float32)
    base = _contiguous("base", base, (mixes,), torch.float32)
    scale = _contiguous("scale", scale, (1 if norm is None else 3,), torch.float32)
    if norm is not None:
        norm = _contiguous("norm", norm, (d,), norm.dtype)
    if iters < 1:
        raise ValueError(f"iters must be 1 or more, got {iters}")

    u = streams.new_empty(num_rows, d)
    mix_rows = 0 if norm is None else num_rows
    post, comb = base.new_empty(mix_rows, m), base.new_empty(mix_rows, m, m)
    if num_rows == 0:
        return u, post, comb
    tiling = _Tiling.of(num_rows, m * d, streams.dtype, num_processors(streams))
    num_tiles = triton.cdiv(num_rows, tiling.rows)
    if num_tiles > _MOST_TILES:
        raise ValueError(f"at most {_MOST_TILES * tiling.rows} rows at once, got {num_rows}")
    sums = max(triton.next_power_of_2(mixes + 1), 16)
    partials = base.new_empty(num_rows, tiling.splits, sums)
    mixers = 0 if norm is None else tiling.rows // tiling.mixed_rows
    _mhc_read_kernel[(num_tiles * (tiling.splits + mixers + tiling.rows),)](
        streams,
        fn,
        base,
        scale,
        base if norm is None else norm,
        partials,
        _tile_counters(streams.device),
        u,
        post,
        comb,
        num_rows,
        num_tiles,
        tiling.lag,
        eps,
        rms_eps,
        M=m,
        D=d,
        MIXES=mixes,
        SUMS=sums,
        SPLITS=tiling.splits,
        ITERS=iters,
        IS_HEAD=norm is None,
        BLOCK_N=tiling.rows,
        BLOCK_K=tiling.columns,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        MIXED_ROWS=tiling.mixed_rows,
        BLOCK_S=tiling.mixed_splits,
        num_warps=8,
        num_stages=3,
    )
    return u, post, comb


def mhc_read(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.mhc_read`."""
    return _read(streams, fn, base, scale, norm, iters, eps, rms_eps)


def mhc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    """See `reference.mhc_head`."""
    return _read(streams, fn, base, scale, None, 1, eps, rms_eps)[0]


def mhc_write(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `reference.mhc_write`."""
    num_rows, m, d = streams.shape
    out = _contiguous("out", out, (num_rows, d), out.dtype)
    post = _contiguous("post", post, (num_rows, m), torch.float32)
    comb = _contiguous("comb", comb, (num_rows, m, m), torch.float32)
    streams = streams.contiguous()
    written = torch.empty_like(streams)
    if num_rows == 0:
        return written
    # Four blocks per processor or more, of 8 channels per thread, as long as a warp has work.
    wanted = triton.next_power_of_2(triton.cdiv(num_rows * d, 4 * num_processors(streams)))
    block_d = min(max(wanted, 256), 2048)
    _mhc_write_kernel[(num_rows * triton.cdiv(d, block_d),)](
        out,
        streams,
        post,
        comb,
        written,
        M=m,
        D=d,
        BLOCK_M=triton.next_power_of_2(m),
        BLOCK_D=block_d,
        num_warps=block_d // 256,
    )
    return written
