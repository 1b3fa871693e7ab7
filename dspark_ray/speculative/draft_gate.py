"""Whether to draft in the next round: for every request that can use a draft, or for none (bypass).

A draft is paid for before it is known how much of it is worth verifying. So the gate forecasts, from recent rounds,
what drafts a request brings: how many, and with which survival. With the cost curves this gives the best expected
tokens per second of a drafted round, which is compared with the rate of the target alone.

Letters: R drafted requests, G gamma, B bins of survival.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BINS = 10


@dataclass(frozen=True)
class GateDecision:
    """Whether to draft, and the rate to expect with the better of the two choices."""

    drafts: bool
    tokens_per_second: float


class DraftGate:
    """The forecast of a request's drafts, averaged over recent rounds, and the decision that follows from it.

    During a bypass nothing is observed, so a bypass that was a mistake would never end. Therefore a small share of the
    time is saved up during a bypass, and one round is drafted as a probe whenever the savings pay for it.
    """

    LEAVE_BYPASS_ABOVE = 0.01
    """Drafting resumes when it gains more than this share of the rate without drafts."""
    ENTER_BYPASS_BELOW = 0.0
    """Drafting stops when it gains less than this share, less SMALL_BATCH_MARGIN / R."""
    SMALL_BATCH_MARGIN = 0.05
    """Forecasts from few requests are noisy, and a bypass that begins by chance lasts."""
    PROBE_SHARE = 0.005
    """Share of the time of a bypass that is spent on probes."""

    _GAIN = 0.1
    """Weight of the newest step in the forecast."""
    _PROBE_GAIN = 0.3
    """Weight of every request of a probe: much may have changed since the one before."""
    _OUTCOME_DECAY = 0.98
    """Per step, of the sums from which the acceptance ratio is computed."""
    _PRIOR_DRAFTS = 16.0
    """Accepted drafts, of as many expected ones, that the acceptance ratio starts with."""
    _ADVANTAGE_GAIN, _MAX_ADVANTAGE = 0.5, 0.1
    """Weight of the newest decision in the smoothed advantage of drafting, and the bound of what enters it: forecasts
    scatter by more than the hysteresis, but two decisions are enough where the difference is large."""
    _SAME_LOAD = 1.25
    """The smoothed advantage starts anew when the number of requests changes by more than this factor."""

    def __init__(self, gamma: int, steps_per_decision: int = 8) -> None:
        """A decision holds for `steps_per_decision` steps or until the number of requests changes."""
        self._steps_per_decision = steps_per_decision
        # Nothing is known about the first requests: all their drafts count as certain.
        self._forecast = np.zeros((2, NUM_BINS))
        self._forecast[:, -1] = gamma
        """Per request and round: drafts in each bin of survival, and their summed survival."""
        self._outcomes = np.zeros(2)
        """Drafts that were expected to be accepted, and that were, recently."""
        self._pending: list[tuple[np.ndarray, float, float, float]] = []
        """Observed rounds that are not part of the forecast yet."""
        self._steps_since_decision = steps_per_decision
        self._num_requests = 0
        """Of the last decision"""
        self._drafts = True
        self._tokens_per_second = 0.0
        self._advantage = 0.0
        """Smoothed gain of drafting over the rate of the target alone, as a share of the latter."""
        self._probe_seconds = 0.0
        """Saved up for the next probe."""

    def observe(self, survival: np.ndarray, expected: float, accepted: float) -> None:
        """Learn from a drafted round.

        survival [R, G], 0 where a draft could not have been verified; `expected` is the summed survival of all
        verified drafts, `accepted` how many of them the target accepted.
        """
        gain = self._GAIN if self._drafts else 1 - (1 - self._PROBE_GAIN) ** len(survival)
        self._pending.append((survival, expected, accepted, gain))

    def decide(
        self,
        num_requests: int,
        certain_tokens: int,
        base_rows: int,
        target_seconds: np.ndarray,
        draft_seconds: np.ndarray,
        step_seconds: float,
    ) -> GateDecision:
        """Decide for `num_requests` (at least 1) that can use a draft.

        A round without drafts brings `certain_tokens` and runs `base_rows`. target_seconds [rows + 1] and
        draft_seconds [requests + 1] are the cost curves, `step_seconds` is the duration of the step before.
        """
        self._steps_since_decision += 1
        if self._steps_since_decision >= self._steps_per_decision or num_requests != self._num_requests:
            self._update_forecast()
            self._compare(num_requests, certain_tokens, base_rows, target_seconds, float(draft_seconds[num_requests]))
            self._num_requests, self._steps_since_decision = num_requests, 0
        drafts = self._drafts or self._can_probe(step_seconds, float(draft_seconds[num_requests]))
        return GateDecision(drafts, self._tokens_per_second)

    def _update_forecast(self) -> None:
        for survival, expected, accepted, gain in self._pending:
            self._forecast += gain * (_histogram(survival) / len(survival) - self._forecast)
            self._outcomes = self._OUTCOME_DECAY * self._outcomes + (expected, accepted)
        self._pending.clear()

    def _compare(
        self,
        num_requests: int,
        certain_tokens: int,
        base_rows: int,
        target_seconds: np.ndarray,
        draft_seconds: float,
    ) -> None:
        """Open or close the gate by the smoothed advantage of drafting."""
        counts, expected = num_requests * self._forecast
        plain = float(certain_tokens / target_seconds[base_rows])
        drafted = _best_rate(
            counts, self._acceptance_ratio() * expected, certain_tokens, base_rows, target_seconds, draft_seconds
        )
        self._smooth_advantage(drafted / plain - 1, num_requests)
        if self._drafts:
            self._drafts = self._advantage >= self.ENTER_BYPASS_BELOW - self.SMALL_BATCH_MARGIN / num_requests
            self._probe_seconds = 0.0
        else:
            self._drafts = self._advantage >= self.LEAVE_BYPASS_ABOVE
        self._tokens_per_second = max(plain, drafted)

    def _acceptance_ratio(self) -> float:
        """Accepted over expected drafts; a sampling temperature, for one, can make all confidences too high."""
        expected, accepted = self._outcomes
        return float((accepted + self._PRIOR_DRAFTS) / (expected + self._PRIOR_DRAFTS))

    def _smooth_advantage(self, newest: float, num_requests: int) -> None:
        low, high = sorted((num_requests, self._num_requests))
        gain = self._ADVANTAGE_GAIN if high <= self._SAME_LOAD * low else 1.0
        bounded = min(max(newest, -self._MAX_ADVANTAGE), self._MAX_ADVANTAGE)
        self._advantage += gain * (bounded - self._advantage)

    def _can_probe(self, step_seconds: float, price: float) -> bool:
        """Whether the time saved up in this bypass pays for a draft, which is then spent."""
        self._probe_seconds += self.PROBE_SHARE * step_seconds
        if self._probe_seconds < price:
            return False
        self._probe_seconds = 0.0
        return True


def _histogram(survival: np.ndarray) -> np.ndarray:
    """[2, B] drafts and summed survival by bin, of survival [R, G]."""
    values = survival.ravel()
    bins = np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    return np.stack((counts, np.bincount(bins, weights=values, minlength=NUM_BINS)))


def _best_rate(
    counts: np.ndarray,
    expected: np.ndarray,
    certain_tokens: int,
    base_rows: int,
    target_seconds: np.ndarray,
    draft_seconds: float,
) -> float:
    """Highest expected tokens per second over all numbers of verified drafts, likely ones first.

    counts [B] drafts and expected [B] accepted drafts, by bin of survival in ascending order.
    """
    most = min(int(np.ceil(counts.sum())), len(target_seconds) - 1 - base_rows)
    totals = np.concatenate(([0.0], counts[::-1].cumsum())), np.concatenate(([0.0], expected[::-1].cumsum()))
    tokens = certain_tokens + np.interp(np.arange(most + 1), *totals)
    return float((tokens / (draft_seconds + target_seconds[base_rows : base_rows + most + 1])).max())
