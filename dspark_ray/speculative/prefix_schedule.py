"""How much of each draft the target will see (paper 3.2.2 and 5.2).

    survival[r, j] = confidence[r, 1] * ... * confidence[r, j]
    tau(lengths)   = certain tokens + summed survival of the verified drafts
    Theta          = tau / seconds of the whole round

Survival never rises along a request, so the best k drafts of all requests are a prefix of each.
Letters: R drafted requests, G gamma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from dspark_ray.config import ScheduleKind

PLACES = np.arange(1024)
"""0, 1, 2, ...: compared with lengths, they give masks of positions."""


@dataclass(frozen=True)
class VerifyPlan:
    """Drafted tokens to verify, one length in 0..gamma per drafted request."""

    lengths: tuple[int, ...]

    @property
    def budget(self) -> int:
        """Drafted tokens verified in the step, all requests."""
        return sum(self.lengths)


@dataclass(frozen=True)
class RoundView:
    """The inputs of a schedule."""

    survival: np.ndarray
    """[R, G] of the current drafts, calibrated"""
    lagged_survival: np.ndarray | None
    """[R, G] of the drafts of an earlier round, 1 where a request had none; for `lagged` only"""
    limits: np.ndarray
    """[R] most drafts that may be verified"""
    certain_tokens: int
    """Tokens that do not depend on drafts: one per request that samples."""
    base_rows: int
    """Rows of the forward besides drafts: anchors and prompt chunks."""
    target_seconds: np.ndarray
    """By rows, at least base_rows + R * G of them"""
    draft_seconds: float = 0.0
    """Already spent on these drafts, and part of the round's duration."""
    tokens_per_second: float | None = None
    """The expected throughput of the engine; None where it is unknown."""

    @cached_property
    def allowed(self) -> np.ndarray:
        """[R, G] survival, -1 beyond the limits."""
        return within(self.survival, self.limits)


class PrefixSchedule(Protocol):
    """Decides on verify lengths; chosen when the engine is built."""

    def plan(self, view: RoundView) -> VerifyPlan: ...


def survival(confidences: np.ndarray) -> np.ndarray:
    """P(the whole prefix is accepted) [R, G] from confidences [R, G] (paper 3.2.1)."""
    return np.cumprod(confidences, axis=-1)


class CausalSchedule:
    """Algorithm 1: admit drafts in order of survival, stop at the first that does not raise Theta."""

    def plan(self, view: RoundView) -> VerifyPlan:
        ranked = _ranked(view.allowed, view.limits)
        theta = _theta(view, ranked)
        falls = np.flatnonzero(theta[1:] <= theta[:-1])
        return _admitted(view.allowed, ranked, int(falls[0]) if len(falls) else len(ranked))


class LaggedSchedule:
    """Section 5.2: a search over every size with old confidences sets the budget, current confidences distribute it.

    Whether a token is verified never depends on the token itself: the budget is older than it, and its rank depends
    only on the tokens before it.
    """

    def plan(self, view: RoundView) -> VerifyPlan:
        assert view.lagged_survival is not None, "a lagged schedule needs the survival of earlier rounds"
        lagged = _ranked(within(view.lagged_survival, view.limits), view.limits)
        return _admitted(view.allowed, _ranked(view.allowed, view.limits), int(_theta(view, lagged).argmax()))


class FullSchedule:
    """A search over every size with current confidences. It anticipates, so only coupled verification may use it.

    Maximising tokens over seconds in every round does not maximise them over a whole run: a bad round should verify
    less than its own ratio suggests, because better rounds follow. So a draft is verified while it is expected to
    bring more tokens than the engine produces in the same time on average: the ratio of sums is largest where
    tokens - rate * seconds is, for the rate that results (Dinkelbach).
    """

    def plan(self, view: RoundView) -> VerifyPlan:
        ranked = _ranked(view.allowed, view.limits)
        if view.tokens_per_second is None:
            budget = int(_theta(view, ranked).argmax())
        else:
            budget = _worthwhile(view, ranked, view.tokens_per_second)
        return _admitted(view.allowed, ranked, budget)


class FixedSchedule:
    """Verifies every drafted token, up to the limits."""

    def plan(self, view: RoundView) -> VerifyPlan:
        return VerifyPlan(tuple(view.limits.tolist()))


_SCHEDULES: dict[ScheduleKind, Callable[[], PrefixSchedule]] = {
    "causal": CausalSchedule,
    "lagged": LaggedSchedule,
    "full": FullSchedule,
    "fixed": FixedSchedule,
}


def build_schedule(kind: ScheduleKind) -> PrefixSchedule:
    """The schedule that `ResolvedConfig.schedule` names."""
    return _SCHEDULES[kind]()


def cut_at_threshold(plan: VerifyPlan, current: np.ndarray, thresholds: np.ndarray) -> VerifyPlan:
    """Drop positions whose survival [R, G], which never rises along a request, is below the threshold [R]."""
    survivors = (current >= thresholds[:, None]).sum(-1)
    return VerifyPlan(tuple(np.minimum(plan.lengths, survivors).tolist()))


def within(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Survival [R, G], -1 from position limits[r] on."""
    return np.where(PLACES[: values.shape[1]] < limits[:, None], values, -1.0)


def _ranked(allowed: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Survivals of the drafts within the limits, highest first."""
    return np.sort(allowed, axis=None)[::-1][: limits.sum()]


def _tokens(view: RoundView, ranked: np.ndarray) -> np.ndarray:
    """[k + 1] expected tokens of the round when the first 0..k ranked drafts are verified."""
    return np.concatenate(([view.certain_tokens], ranked)).cumsum()


def _target_seconds(view: RoundView, num_drafts: int) -> np.ndarray:
    """[k + 1] seconds of the forward when 0..k drafts are verified."""
    return view.target_seconds[view.base_rows : view.base_rows + num_drafts + 1]


def _theta(view: RoundView, ranked: np.ndarray) -> np.ndarray:
    """[k + 1] expected tokens per second."""
    return _tokens(view, ranked) / (view.draft_seconds + _target_seconds(view, len(ranked)))


def _worthwhile(view: RoundView, ranked: np.ndarray, rate: float) -> int:
    """How many of the ranked drafts maximise tokens - rate * seconds."""
    if not len(ranked):
        return 0
    seconds = _target_seconds(view, len(ranked))
    worth = ranked.cumsum() - rate * (seconds[1:] - seconds[0])
    best = int(worth.argmax())
    return best + 1 if worth[best] > 0 else 0


def _admitted(allowed: np.ndarray, ranked: np.ndarray, budget: int) -> VerifyPlan:
    """The best `budget` drafts of `allowed` [R, G].

    Of equal survivals the earlier request, and within a request the earlier position, comes first, so that the chosen
    drafts of a request are a prefix.
    """
    if budget == 0:
        return VerifyPlan((0,) * len(allowed))
    last = ranked[budget - 1]
    lengths = (allowed >= last).sum(-1)
    surplus = int(lengths.sum()) - budget
    if surplus:
        equal = np.flatnonzero(allowed == last)[-surplus:]
        lengths -= np.bincount(equal // allowed.shape[1], minlength=len(allowed))
    return VerifyPlan(tuple(lengths.tolist()))
