"""The training objective of a DSpark drafter (paper, section 3.3; docs/dspark.md, Training)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_DENOMINATOR_FLOOR = 1e-6


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms, and the decay of weights along a block."""

    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    decay: float | None = 4.0
    """Position k has weight exp(-k / decay); None gives all positions the same weight."""


@dataclass(frozen=True)
class DraftLoss:
    """The weighted total and its sums."""

    total: Tensor
    cross_entropy_sum: Tensor
    l1_sum: Tensor
    confidence_sum: Tensor
    weight_sum: Tensor
    accept_rate: Tensor
    """[A, G] 1 - total variation between draft and target, the label of the confidence head."""


def draft_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    confidence_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: LossWeights | None = None,
) -> DraftLoss:
    """Loss of A blocks of G positions.

    draft_logits, target_logits [A, G, V] are for the same positions; confidence_logits, labels, mask [A, G];
    mask is 1 for positions in the loss, else 0.
    """
    weights = weights or LossWeights()
    position_weight = mask.float()
    if weights.decay is not None:
        positions = torch.arange(mask.shape[-1], device=mask.device)
        position_weight = position_weight * torch.exp(-positions / weights.decay)
    target = torch.softmax(target_logits.float(), dim=-1)
    log_draft = torch.log_softmax(draft_logits.float(), dim=-1)
    l1 = (log_draft.exp() - target).abs().sum(-1)
    accept_rate = (1 - 0.5 * l1.detach()).clamp(0, 1)
    cross_entropy = -log_draft.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    confidence = F.binary_cross_entropy_with_logits(confidence_logits.float(), accept_rate, reduction="none")
    weight_sum = position_weight.sum()
    ce_sum, l1_sum, confidence_sum = ((position_weight * x).sum() for x in (cross_entropy, l1, confidence))
    total = (weights.cross_entropy * ce_sum + weights.l1 * l1_sum + weights.confidence * confidence_sum) / (
        weight_sum + _DENOMINATOR_FLOOR
    )
    return DraftLoss(total, ce_sum, l1_sum, confidence_sum, weight_sum, accept_rate)
