"""Judges many blocks of equal length at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark_kernels.reference import accept_rejection


def accept_equal_blocks(
    draft_tokens: Tensor,
    target_logits: Tensor,
    q_ids: Tensor,
    q_probabilities: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """(num_accepted [B], next_anchor [B]) of draft_tokens [B, k] with logits [B, k+1, V], q [B, k, K], positions."""
    num_blocks, k = draft_tokens.shape
    return accept_rejection(
        pad(draft_tokens, (1, 0)).flatten(),
        target_logits.flatten(0, 1),
        pad(q_ids, (0, 0, 0, 1)).flatten(0, 1),
        pad(q_probabilities, (0, 0, 0, 1)).flatten(0, 1),
        seeds,
        positions.flatten(),
        (k + 1) * torch.arange(num_blocks + 1),
    )
