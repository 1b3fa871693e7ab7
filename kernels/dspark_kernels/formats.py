"""Storage formats of quantised weights, keys and activations (docs/model.md, Quantisation).

FP8 weight   E4M3, one power-of-two scale per tile of 128 x 128 (output x input channels)
FP4 weight   two E2M1 codes per byte, low nibble first, one power-of-two scale per output channel and 32 inputs
packed key   bytes: E4M3 outside the rotary part, the rotary part as bfloat16, one E8M0 scale per 64 of the former
activation   rounded to E4M3 with one power-of-two scale per row and 128 channels; never stored

Scales are E8M0 bytes. Kernels shift a byte into the exponent of a float32 (or bfloat16), which equals `decode_scale`
for the bytes 1 .. 254 that checkpoints hold. Byte 0 is 2^-127 here and 0 in kernels, byte 255 is NaN here and inf in
kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_SCALE_TILE = (128, 128)
FP4_SCALE_TILE = (1, 32)
"""(output, input) channels under one scale."""

_FP8_LARGEST = 448.0
_FP4_LARGEST = 6.0
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127

KEY_GROUP = 64
"""Channels of a packed key under one scale."""
ACTIVATION_GROUP = 128
_AMAX_FLOOR = 1e-4
_SCALES_ALIGNMENT = 8
"""A packed key's scales are padded to a multiple of this many bytes, so that rows stay aligned."""


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as float32: E8M0 bytes b mean 2^(b-127) and 255 is NaN; other dtypes are plain numbers."""
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    # Via bytes, because several devices lack arithmetic on this dtype.
    exponent = scale.view(torch.uint8).to(torch.int32) - _E8M0_BIAS
    value = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return torch.where(exponent == 255 - _E8M0_BIAS, torch.nan, value)


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] of E4M3 [out, in] and scales [ceil(out/128), ceil(in/128)]."""
    return weight.float() * _spread(decode_scale(scale), FP8_SCALE_TILE, weight.shape)


def dequantise_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] of bytes [out, in/2] and scales [out, in/32]."""
    codes = packed.view(torch.uint8).to(torch.int32)
    codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    table = torch.tensor([*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)], device=packed.device)
    values = table[codes]
    return values * _spread(decode_scale(scale), FP4_SCALE_TILE, values.shape)


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 [out, in], E8M0 scales): the nearest values under the smallest scales that do not clip."""
    weight = weight.float()
    exponent = _scale_exponent(_tile_maximum(weight, FP8_SCALE_TILE), _FP8_LARGEST)
    scaled = weight * torch.exp2(-_spread(exponent, FP8_SCALE_TILE, weight.shape).float())
    return scaled.to(torch.float8_e4m3fn), _encode_exponent(exponent)


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in/2], E8M0 scales [out, in/32]) of [out, in] with in a multiple of 32."""
    if weight.shape[-1] % FP4_SCALE_TILE[1]:
        raise ValueError(f"FP4 weight {tuple(weight.shape)}: expected a multiple of {FP4_SCALE_TILE[1]} input channels")
    weight = weight.float()
    exponent = _scale_exponent(_tile_maximum(weight, FP4_SCALE_TILE), _FP4_LARGEST)
    scaled = weight * torch.exp2(-_spread(exponent, FP4_SCALE_TILE, weight.shape).float())
    magnitudes = torch.tensor(_FP4_MAGNITUDES, device=weight.device)
    between = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(scaled.abs(), between).to(torch.uint8) | (scaled.signbit().to(torch.uint8) << 3)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8), _encode_exponent(exponent)


def _spread(scale: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """One scale per element of `shape` from one per tile."""
    rows, columns = shape
    for dim, size in enumerate(tile):
        scale = scale.repeat_interleave(size, dim=dim)
    return scale[:rows, :columns]


def _tile_maximum(weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """Largest magnitude of every tile; the last tiles may be cut off by the matrix's edge."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % tile[1], 0, -rows % tile[0]))
    return padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).amax(dim=(1, 3))


def _scale_exponent(maximum: Tensor, largest: float) -> Tensor:
    """ceil(log2(maximum / largest)), exactly; 0 for a tile of zeros."""
    mantissa, exponent = torch.frexp(maximum / largest)  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS)


def _encode_exponent(exponent: Tensor) -> Tensor:
    return (exponent + _E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def round_fp8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(E4M3 values [..., groups, group_size], float32 scales [..., groups, 1]) of x, as in the official program.

    Scales are powers of two, of at least 1e-4 / 448.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(_AMAX_FLOOR)
    scale = torch.exp2(torch.ceil(torch.log2(amax / _FP8_LARGEST)))
    return (groups / scale).clamp(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn), scale


def packed_key_bytes(head_dim: int, rotary_dims: int) -> int:
    """Bytes of one packed key; 584 for DeepSeek-V4 (448 + 2 * 64 + 8)."""
    plain = head_dim - rotary_dims
    return plain + 2 * rotary_dims + _padded_scales(plain)


def _padded_scales(plain: int) -> int:
    return -(-(plain // KEY_GROUP) // _SCALES_ALIGNMENT) * _SCALES_ALIGNMENT


def pack_keys(keys: Tensor, rotary_dims: int) -> Tensor:
    """Bytes uint8 [..., packed_key_bytes] of keys [..., D] whose last `rotary_dims` channels are rotary."""
    plain, rotary = keys.split((keys.shape[-1] - rotary_dims, rotary_dims), dim=-1)
    values, scale = round_fp8(plain, KEY_GROUP)
    exponents = (torch.log2(scale).round() + _E8M0_BIAS).to(torch.uint8).flatten(-2)
    exponents = torch.nn.functional.pad(exponents, (0, _padded_scales(plain.shape[-1]) - exponents.shape[-1]))
    parts = (values.flatten(-2).view(torch.uint8), rotary.to(torch.bfloat16).contiguous().view(torch.uint8), exponents)
    return torch.cat(parts, dim=-1)


def unpack_keys(packed: Tensor, head_dim: int, rotary_dims: int) -> Tensor:
    """float32 keys [..., D] of bytes [..., packed_key_bytes]."""
    plain = head_dim - rotary_dims
    values, rotary, exponents = packed.split((plain, 2 * rotary_dims, _padded_scales(plain)), dim=-1)
    scale = decode_scale(exponents[..., : plain // KEY_GROUP].contiguous().view(torch.float8_e8m0fnu)).unsqueeze(-1)
    values = values.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, KEY_GROUP)) * scale
    return torch.cat((values.flatten(-2), rotary.contiguous().view(torch.bfloat16).float()), dim=-1)
