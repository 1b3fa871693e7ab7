"""Products with tiles of quantised weights, which are decoded in registers to bfloat16, exactly.

A power-of-two scale times an E4M3 or E2M1 number fits in bfloat16, and so does an activation that was rounded to FP8.
Products of the two, summed in float32, are the reference's product up to the order of the sums.

An FP4 byte holds two neighbouring input channels. They are kept in two tiles, low nibbles and high ones, and the rows
they meet are stored in two planes: first all even channels of a row, then all odd ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.formats import FP4_SCALE_TILE, FP8_SCALE_TILE

PLAIN, FP8, FP4 = 0, 1, 2
"""Formats of a weight, as the kernels' FORMAT."""

_FP4 = tl.constexpr(FP4)
_FP8 = tl.constexpr(FP8)
_FP8_ROWS = tl.constexpr(FP8_SCALE_TILE[0])
_FP8_COLUMNS = tl.constexpr(FP8_SCALE_TILE[1])
_FP4_COLUMNS = tl.constexpr(FP4_SCALE_TILE[1] // 2)  # bytes
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_AMAX_FLOOR = tl.constexpr(1e-4)

# Nibbles become the lowest exponent bits of a bfloat16: too small by 2^126. The scale makes up for 2^94 of it, which
# leaves room for scales up to 2^33, and the sum of products for the rest.
_FP4_SCALE_BIAS = tl.constexpr(94)
_FP4_UNIT = tl.constexpr(2.0**32)


@triton.jit
def numbers(b_tile):
    """The tile: the interpreter keeps bfloat16 as integers, and multiplies those."""
    if _INTERPRETED:
        b_tile = b_tile.to(tl.float32)
    return b_tile


@triton.jit
def _nibbles(b_bytes):
    """(low, high) nibbles of bytes as bfloat16: E2M1 numbers times 2^-126."""
    if _INTERPRETED:
        b_bits = b_bytes.to(tl.int32)
        b_low = (((b_bits & 0x07) << 22) | ((b_bits & 0x08) << 28)).to(tl.float32, bitcast=True)
        b_high = (((b_bits & 0x70) << 18) | ((b_bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    else:
        # The same for two bytes at once, spread to the halves of a word: one multiplication makes two copies of a
        # nibble, at bits 15..12 and 9..6, and a mask takes the sign of the former and the rest of the latter.
        b_low, b_high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 first, second, bits;
            prmt.b32 first, $4, 0, 0x4140;
            prmt.b32 second, $4, 0, 0x4342;
            and.b32 bits, first, 0x000F000F;
            mul.lo.u32 bits, bits, 0x1040;
            and.b32 $0, bits, 0x81C081C0;
            and.b32 bits, second, 0x000F000F;
            mul.lo.u32 bits, bits, 0x1040;
            and.b32 $1, bits, 0x81C081C0;
            and.b32 bits, first, 0x00F000F0;
            mul.lo.u32 bits, bits, 0x0104;
            and.b32 $2, bits, 0x81C081C0;
            and.b32 bits, second, 0x00F000F0;
            mul.lo.u32 bits, bits, 0x0104;
            and.b32 $3, bits, 0x81C081C0;
            }
            """,
            "=r,=r,=r,=r,r",
            [b_bytes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    return b_low, b_high


@triton.jit
def _tile_mask(m_rows, o_columns, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of a tile of rows with COLUMNS columns, of which BLOCK are taken at a time."""
    m_tile = m_rows[:, None]
    if COLUMNS % BLOCK:
        m_tile = m_tile & (o_columns < COLUMNS)[None, :]
    return m_tile


@triton.jit
def load_rows(
    p_rows,
    m_rows,
    i_column,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Operands of `multiply_add` for BLOCK columns of a weight, from i_column on: two tiles of rows at p_rows.

    They are [., BLOCK], one for low and one for high nibbles, where there are SLICES of FP4 weights. Otherwise both are
    the same tile, which for FP4 has columns for low nibbles first, [., 2 * BLOCK].
    """
    BOTH: tl.constexpr = FORMAT == _FP4 and SLICES == 1
    o_tile = tl.arange(0, 2 * BLOCK if BOTH else BLOCK)
    o_columns = i_column + o_tile % BLOCK
    m_tile = _tile_mask(m_rows, o_columns, COLUMNS, BLOCK)
    o_columns += o_tile // BLOCK * COLUMNS
    b_x = tl.load(p_rows[:, None] + o_columns[None, :], mask=m_tile, other=0.0)
    b_odd_x = b_x
    if FORMAT == _FP4 and SLICES > 1:
        b_odd_x = tl.load(p_rows[:, None] + (COLUMNS + o_columns)[None, :], mask=m_tile, other=0.0)
    return b_x, b_odd_x


@triton.jit
def _load_exponents(
    p_scale,
    o_rows,
    m_rows,
    i_column,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Biased exponents int32 [ROWS, BLOCK / GROUP] of the scales of a tile, stored for GROUP columns at a time."""
    GROUPS: tl.constexpr = COLUMNS // GROUP
    BLOCK_GROUPS: tl.constexpr = BLOCK // GROUP
    o_groups = i_column // GROUP + tl.arange(0, BLOCK_GROUPS)
    p_scale = p_scale + o_rows[:, None] * GROUPS + o_groups[None, :]
    return tl.load(p_scale, mask=_tile_mask(m_rows, o_groups, GROUPS, BLOCK_GROUPS), other=0).to(tl.int32)


@triton.jit
def _spread(b_scale, GROUP: tl.constexpr):
    """Scales [ROWS, GROUPS] as [ROWS, GROUPS * GROUP]."""
    ROWS: tl.constexpr = b_scale.shape[0]
    GROUPS: tl.constexpr = b_scale.shape[1]
    return tl.reshape(tl.broadcast_to(b_scale[:, :, None], (ROWS, GROUPS, GROUP)), (ROWS, GROUPS * GROUP))


@triton.jit
def slices(b_tile, SLICES: tl.constexpr):
    """[ROWS, COLUMNS] as [SLICES, ROWS, COLUMNS / SLICES]."""
    return tl.permute(tl.reshape(b_tile, (b_tile.shape[0], SLICES, b_tile.shape[1] // SLICES)), (1, 0, 2))


@triton.jit
def _multiply(b_sum, b_x, b_weight, SLICES: tl.constexpr):
    b_x, b_weight = numbers(b_x), numbers(b_weight)
    if SLICES == 1:
        b_sum = tl.dot(b_x, tl.trans(b_weight), b_sum, input_precision="ieee")
    else:
        b_x = tl.permute(slices(b_x, SLICES), (0, 2, 1))
        b_sum = tl.dot(slices(b_weight, SLICES), b_x, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def multiply_add(
    b_sum,
    b_x,
    b_odd_x,
    p_weight,
    p_scale,
    o_rows,
    m_rows,
    i_column,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """b_sum plus tiles of `load_rows` times ROWS rows of a weight that is stored with COLUMNS columns.

    A sum is [M, ROWS]; or [SLICES, ROWS, M], one for each slice of the columns. Slices are what the warps of a program
    share where x has so few rows that there is nothing else: each warp then decodes its own weights and no other's.
    """
    o_columns = i_column + tl.arange(0, BLOCK)
    m_tile = _tile_mask(m_rows, o_columns, COLUMNS, BLOCK)
    b_weight = tl.load(p_weight + o_rows[:, None] * COLUMNS + o_columns[None, :], mask=m_tile, other=0.0)
    if FORMAT == _FP4:
        b_exponents = _load_exponents(p_scale, o_rows, m_rows, i_column, COLUMNS, BLOCK, _FP4_COLUMNS)
        b_exponents = tl.minimum(b_exponents + _FP4_SCALE_BIAS, 255)
        b_scale = _spread((b_exponents << 7).to(tl.int16).to(tl.bfloat16, bitcast=True), _FP4_COLUMNS)
        b_low, b_high = _nibbles(b_weight)
        b_low, b_high = b_low * numbers(b_scale), b_high * numbers(b_scale)
        if SLICES > 1:
            b_sum = _multiply(b_sum, b_x, b_low, SLICES)
            b_sum = _multiply(b_sum, b_odd_x, b_high, SLICES)
        else:
            # One product of both, because for two in a row the compiler would lay out their sums differently.
            b_weight = tl.reshape(tl.permute(tl.join(b_low, b_high), (0, 2, 1)), (ROWS, 2 * BLOCK))
            b_sum = _multiply(b_sum, b_x, b_weight, SLICES)
    elif FORMAT == _FP8:
        b_exponents = _load_exponents(p_scale, o_rows // _FP8_ROWS, m_rows, i_column, COLUMNS, BLOCK, _FP8_COLUMNS)
        b_scale = _spread((b_exponents << 23).to(tl.float32, bitcast=True), _FP8_COLUMNS)
        b_sum = _multiply(b_sum, b_x, (b_weight.to(tl.float32) * b_scale).to(tl.bfloat16), SLICES)
    else:
        b_sum = _multiply(b_sum, b_x, b_weight, SLICES)
    return b_sum


@triton.jit
def zero_sum(M: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr):
    """Initial sum for `multiply_add`."""
    if SLICES == 1:
        b_sum = tl.zeros((M, ROWS), tl.float32)
    else:
        b_sum = tl.zeros((SLICES, ROWS, M), tl.float32)
    return b_sum


@triton.jit
def whole_sum(b_sum, FORMAT: tl.constexpr, SLICES: tl.constexpr):
    """The result [M, ROWS] of a sum of `multiply_add`."""
    if SLICES > 1:
        b_sum = tl.trans(tl.sum(b_sum, axis=0))
    if FORMAT == _FP4:
        b_sum *= _FP4_UNIT
    return b_sum


@triton.jit
def scaled_groups(b_groups):
    """(float32 groups / scales, biased exponents [GROUPS] of the scales) of float32 groups [GROUPS, GROUP].

    Scales are those of `formats.round_fp8`: the exponent is ceil(log2(amax / 448)). As 448 is 1.75 * 2^8 that is the
    exponent of amax, less 8, and one more where its mantissa is above 1.75. Nothing exceeds 448 then, and nothing has
    to be clipped.
    """
    b_bits = tl.maximum(tl.max(tl.abs(b_groups), axis=1), _AMAX_FLOOR).to(tl.int32, bitcast=True)
    b_exponents = ((b_bits + 0x1FFFFF) >> 23) - 8
    # Multiplying by the reciprocal of a power of two is exact.
    b_reciprocals = ((254 - b_exponents) << 23).to(tl.float32, bitcast=True)
    return b_groups * b_reciprocals[:, None], b_exponents


@triton.jit
def round_activations(b_groups):
    """(E4M3 numbers [GROUPS, GROUP], scales [GROUPS]) of groups [GROUPS, GROUP], all float32: `formats.round_fp8`."""
    b_numbers, b_exponents = scaled_groups(b_groups)
    # Adding 1.5 * 2^23 steps leaves float32 no room for fractions of a step. There are 8 steps between a power of two
    # and the next, and as many below the lowest one. Not a cast to FP8: the interpreter rounds that wrong.
    b_bits = tl.maximum(tl.abs(b_numbers), 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
    b_shift = b_bits.to(tl.float32, bitcast=True) * 1572864.0  # 1.5 * 2^23 / 8
    b_numbers = (b_numbers + b_shift) - b_shift
    return b_numbers, (b_exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_rounded(p_rows, b_groups, m_groups, i_channel, FORMAT: tl.constexpr, CHANNELS: tl.constexpr):
    """Round float32 groups of 128 channels to FP8, and store their values in the layout of `load_rows`.

    Group g [128] has the channels from i_channel[g] on of row p_rows[g], which has CHANNELS of them.
    """
    GROUP: tl.constexpr = b_groups.shape[1]
    b_values, b_scale = round_activations(b_groups)
    b_values = (b_values * b_scale[:, None]).to(p_rows.dtype.element_ty)
    if FORMAT == _FP4:
        b_even, b_odd = tl.split(tl.reshape(b_values, (b_values.shape[0], GROUP // 2, 2)))
        p_rows = (p_rows + i_channel // 2)[:, None] + tl.arange(0, GROUP // 2)[None, :]
        tl.store(p_rows, b_even, mask=m_groups[:, None])
        tl.store(p_rows + CHANNELS // 2, b_odd, mask=m_groups[:, None])
    else:
        p_rows = (p_rows + i_channel)[:, None] + tl.arange(0, GROUP)[None, :]
        tl.store(p_rows, b_values, mask=m_groups[:, None])


def scale_bytes(scale: Tensor) -> Tensor:
    """E8M0 scales as bytes."""
    if scale.dtype != torch.float8_e8m0fnu:
        raise ValueError(f"scales are {scale.dtype}: expected torch.float8_e8m0fnu")
    return scale.contiguous().view(torch.uint8)
