"""How much of each draft the target will see."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dspark_ray.drafters.protocol import DraftProposal


@dataclass(frozen=True)
class VerifyPlan:
    """Drafted tokens to verify, one length in 0..gamma per decoding request."""

    lengths: tuple[int, ...]

    @property
    def budget(self) -> int:
        """Drafted tokens verified in the step, all requests."""
        return sum(self.lengths)


class PrefixSchedule(Protocol):
    """Turns a proposal into lengths. `limits` are the most each request may have verified."""

    def plan(self, proposal: DraftProposal, limits: SequenceOf[int]) -> VerifyPlan: ...


class FixedSchedule:
    """Every drafted token, up to the limit."""

    def plan(self, proposal: DraftProposal, limits: SequenceOf[int]) -> VerifyPlan:
        return VerifyPlan(tuple(limits))


def survival(confidences: np.ndarray) -> np.ndarray:
    """P(the whole prefix is accepted) [R, G] from confidences [R, G] (paper 3.2.1)."""
    return np.cumprod(confidences, axis=-1)


def cut_at_threshold(plan: VerifyPlan, proposal: DraftProposal, thresholds: SequenceOf[float]) -> VerifyPlan:
    """Drop positions whose survival is below the request's threshold; survival never rises along a request."""
    if not any(thresholds):
        return plan
    survivors = (survival(proposal.confidences) >= np.asarray(thresholds)[:, None]).sum(-1)
    return VerifyPlan(tuple(min(length, int(n)) for length, n in zip(plan.lengths, survivors, strict=True)))
