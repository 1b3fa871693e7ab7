"""Messages between verifier and drafter, one each way per round.

To the drafter: context features of newly committed tokens, then the blocks to draft.
From the drafter: tokens and confidences (and in rejection verification the distributions they were drawn from).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dspark_ray.drafters.draft_sampling import DraftSampling


@dataclass(frozen=True)
class ContextUpdate:
    """Projected context features of committed tokens, addressed by slot and position."""

    slots: np.ndarray
    """[n]"""
    positions: np.ndarray
    """[n]"""
    projected: Tensor
    """[n, d]"""


@dataclass(frozen=True)
class DraftRequest:
    """Update the context, then draft the first positions of a block for each of R requests (R may be 0)."""

    context: ContextUpdate
    slots: np.ndarray
    """[R]"""
    anchors: np.ndarray
    """[R] token ids"""
    starts: np.ndarray
    """[R] position of each anchor; its context are the positions before"""
    sampling: DraftSampling
    num_positions: int
    """At least so many are drafted; a drafter whose cost does not grow with them drafts more."""


@dataclass(frozen=True)
class TruncatedDistributions:
    """The distribution that each drafted token was drawn from: K ids and probabilities per position."""

    ids: np.ndarray
    """[R, G, K]"""
    probabilities: np.ndarray
    """[R, G, K], each row sums to 1"""


@dataclass(frozen=True)
class DraftProposal:
    """Drafted tokens with their confidences and, in rejection verification, their distributions."""

    tokens: np.ndarray
    """[R, G]"""
    confidences: np.ndarray
    """[R, G] P(accepted | all before it accepted)"""
    distributions: TruncatedDistributions | None = None

    def num_usable(self, vocab_size: int) -> np.ndarray:
        """[R] positions before the first invalid token id, or non-finite confidence or distribution."""
        is_usable = (self.tokens >= 0) & (self.tokens < vocab_size) & np.isfinite(self.confidences)
        if self.distributions is not None:
            is_usable &= np.isfinite(self.distributions.probabilities).all(-1)
        return np.logical_and.accumulate(is_usable, axis=1).sum(1)


class Drafter(Protocol):
    """Makes drafts, inside rank 0 or in an actor of its own."""

    def submit(self, request: DraftRequest) -> None:
        """Send one round's request; at most one may be open."""

    def collect(self) -> DraftProposal:
        """Wait for the open request's proposal."""

    def start(self) -> None:
        """Call once, when the engine begins to serve."""

    def keep_alive(self) -> None:
        """Tell the drafter that the verifier lives; call regularly while there is nothing to draft."""

    def close(self) -> None:
        """Let the drafter end."""
