"""Rotary angles: plain in sliding layers and draft stages, YaRN in compressed layers (docs/model.md, Attention)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_ray.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Angles:
    """cos and sin [N, Dr/2], float32, of N positions."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(rotary_dims: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Frequencies [Dr/2] in radians per position, float32."""
    frequencies = theta ** (-torch.arange(0, rotary_dims, 2, dtype=torch.float32) / rotary_dims)
    if scaling is None:
        return frequencies

    def correction_dim(rotations: float) -> float:
        positions = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotary_dims * math.log(positions) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(scaling.beta_fast)), 0)
    high = min(math.ceil(correction_dim(scaling.beta_slow)), rotary_dims - 1)
    ramp = (torch.arange(rotary_dims // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


class Rope:
    """The two frequency tables of a model: `main` for sliding layers, `compressed` for all others."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        dims = config.qk_rope_head_dim
        self.main = inverse_frequencies(dims, config.rope_theta, None).to(device)
        self.compressed = inverse_frequencies(dims, config.compress_rope_theta, config.rope_scaling).to(device)

    def angles(self, positions: Tensor, *, compressed: bool) -> Angles:
        """Angles of int positions [N]."""
        frequencies = self.compressed if compressed else self.main
        phase = positions.float().unsqueeze(1) * frequencies
        return Angles(phase.cos(), phase.sin())
