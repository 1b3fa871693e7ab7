"""The two storage formats of quantised weights (layout specification, section 3).

FP8   E4M3, one power-of-two scale per block of 128 x 128 (output x input channels)
FP4   two E2M1 codes per byte, low nibble first, one power-of-two scale per output channel and 32 inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_BLOCK = (128, 128)
FP4_BLOCK = (1, 32)
"""(output, input) channels under one scale."""

_FP8_LARGEST = 448.0
_FP4_LARGEST = 6.0
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as float32: E8M0 bytes b mean 2^(b-127) and 255 is NaN; other dtypes are plain numbers."""
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    # The bytes, because arithmetic on this dtype is missing on several devices.
    exponent = scale.view(torch.uint8).to(torch.int32) - _E8M0_BIAS
    value = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return torch.where(exponent == 255 - _E8M0_BIAS, torch.nan, value)


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] of E4M3 [out, in] and scales [ceil(out/128), ceil(in/128)]."""
    return weight.float() * _spread(decode_scale(scale), FP8_BLOCK, weight.shape)


def dequantise_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] of bytes [out, in/2] and scales [out, in/32]."""
    codes = packed.view(torch.uint8).to(torch.int32)
    codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    table = torch.tensor([*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)], device=packed.device)
    values = table[codes]
    return values * _spread(decode_scale(scale), FP4_BLOCK, values.shape)


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 [out, in], E8M0 scales): the nearest values under the smallest scales that do not clip."""
    weight = weight.float()
    exponent = _scale_exponent(_block_maximum(weight, FP8_BLOCK), _FP8_LARGEST)
    scaled = weight * torch.exp2(-_spread(exponent, FP8_BLOCK, weight.shape).float())
    return scaled.to(torch.float8_e4m3fn), _encode_exponent(exponent)


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in/2], E8M0 scales [out, in/32]) of [out, in] with in a multiple of 32."""
    if weight.shape[-1] % FP4_BLOCK[1]:
        raise ValueError(f"FP4 weight {tuple(weight.shape)}: expected a multiple of {FP4_BLOCK[1]} input channels")
    weight = weight.float()
    exponent = _scale_exponent(_block_maximum(weight, FP4_BLOCK), _FP4_LARGEST)
    scaled = weight * torch.exp2(-_spread(exponent, FP4_BLOCK, weight.shape).float())
    magnitudes = torch.tensor(_FP4_MAGNITUDES, device=weight.device)
    between = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(scaled.abs(), between).to(torch.uint8) | (scaled.signbit().to(torch.uint8) << 3)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8), _encode_exponent(exponent)


def _spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """One scale per element of `shape` from one per block."""
    rows, columns = shape
    for dim, size in enumerate(block):
        scale = scale.repeat_interleave(size, dim=dim)
    return scale[:rows, :columns]


def _block_maximum(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of every block; the last blocks may be cut off by the matrix's edge."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax(dim=(1, 3))


def _scale_exponent(maximum: Tensor, largest: float) -> Tensor:
    """ceil(log2(maximum / largest)), exactly; 0 for a block of zeros."""
    mantissa, exponent = torch.frexp(maximum / largest)  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS)


def _encode_exponent(exponent: Tensor) -> Tensor:
    return (exponent + _E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
