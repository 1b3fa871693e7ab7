"""Who is drafted in the next round, decided before drafting from what earlier rounds of each request looked like.

The draft pass is paid whether or not anything of it is worth verifying (the paper's stated limitation). So a request
has a forecast: how many drafts of which survival its rounds bring. The requests are ranked by what their forecast is
worth, and for every number of them the best expected tokens per second is computed from the cost curves; drafting for
nobody is one of the candidates.

Letters: S slots of the engine, R requests that could be drafted, G gamma, B bins of survival.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NUM_BINS = 10
_MAX_CANDIDATES = 32


@dataclass(frozen=True)
class DraftSelection:
    """Which of R requests to draft for, and what the round is expected to bring."""

    chosen: np.ndarray
    """[R] bool"""
    tokens_per_second: float
    """The best that the forecasts promise."""


class DraftSelector:
    """Forecasts by slot, and the choice that they lead to.

    What is left out is never seen, so it could be left out for ever. A purse fills with a small share of the time of
    every step, and is spent on drafts for those who have been left out for longest.
    """

    _GAIN = 0.1
    """Weight of the newest round in a request's forecast."""
    _TRAFFIC_GAIN = 0.02
    """Weight of the newest round of one request in the forecast of all traffic."""
    _MOST_TRAFFIC_GAIN = 0.3
    _TRAFFIC_ROUNDS = 4.0
    """Rounds of its own after which a request counts as much as the traffic does."""
    _STEPS_TO_FORGET = 16.0
    """After so many steps without a draft a request's own rounds begin to count less, and after twice as many a third:
    few rounds can be wrong about it, and while it is left out there are no others."""
    _MEMORY, _TRAFFIC_MEMORY = 0.98, 0.998
    """How much of what came of expectations is remembered from round to round."""
    _PRIOR_DRAFTS = 16.0
    _LEAST_GAIN, _HYSTERESIS, _DOUBT = 0.005, 0.01, 0.05
    """Drafting for nobody ends where drafts gain the first share and half of the second, and begins where they gain
    less than the first without that half. Before it begins they must lose the third over the requests as well: the
    forecasts of few are doubtful, and once nobody is drafted they do not get better."""
    _ADVANTAGE_GAIN, _MOST_ADVANTAGE = 0.5, 0.1
    """Weight of the newest decision in what drafting is worth, and the share beyond which it is simply much:
    forecasts of few rounds scatter by more than the hysteresis, and a bypass that begins by chance lasts, because
    nothing is seen during it. Where the difference is large, two decisions turn it."""
    _SAME_LOAD = 1.25
    """Another number of requests, by more than this factor, is another question, and has no past."""
    _EXPLORATION = 0.005
    """Share of the time that may go into drafts whose forecast is against them."""
    _PROBED_SHARE = 0.25
    """Of the requests, at least, when everybody is left out: the first draft is dear, the others are cheap."""

    def __init__(self, num_slots: int, gamma: int, steps_per_decision: int = 8) -> None:
        """Forecasts move slowly, so a decision holds for some steps, as long as there are as many requests."""
        self._steps_per_decision = steps_per_decision
        self._forecasts = np.zeros((num_slots, 2, NUM_BINS))
        """Drafts per round in each bin of survival, and their summed survival."""
        self._rounds = np.zeros(num_slots)
        self._seen_at = np.zeros(num_slots)
        self._outcomes = np.zeros((num_slots, 2))
        """Drafts that were expected to stand and that did, of late."""
        self._traffic_outcomes = np.zeros(2)
        self._news: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """Rounds since the last decision, of which nothing has been learned yet."""
        self._chosen = np.ones(num_slots, dtype=bool)
        self._tokens_per_second = 0.0
        self._num_requests = 0
        """Of the last decision"""
        self._clock = self._decided_at = self._traffic_seen_at = 0
        self._purse = 0.0
        self._is_bypassing = False
        self._advantage = 0.0
        """Of the best rate over that of no draft, a share, smoothed."""
        # Nothing is known of the first requests: they count as certain.
        self._traffic = np.zeros((2, NUM_BINS))
        self._traffic[:, -1] = gamma

    def admit(self, slot: int) -> None:
        """Forget whoever had the slot before."""
        self._take_in()
        self._rounds[slot] = 0
        self._outcomes[slot] = 0
        self._seen_at[slot] = self._clock
        self._chosen[slot] = not self._is_bypassing

    def observe(self, slots: np.ndarray, survival: np.ndarray, expected: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from the drafts of a round.

        survival [R, G], 0 where a draft could not have been verified; expected and accepted [R] are the summed
        survival of the verified drafts and what came of them.
        """
        self._seen_at[slots] = self._clock
        self._news.append((slots, survival, np.stack((expected, accepted), axis=-1)))

    def _take_in(self) -> None:
        for news in self._news:
            self._learn(*news)
        self._news.clear()

    def _learn(self, slots: np.ndarray, survival: np.ndarray, outcomes: np.ndarray) -> None:
        self._outcomes[slots] = self._MEMORY * self._outcomes[slots] + outcomes
        self._traffic_outcomes = self._TRAFFIC_MEMORY ** len(slots) * self._traffic_outcomes + outcomes.sum(0)
        seen, known, rounds = _histograms(survival), self._forecasts[slots], self._rounds[slots]
        gain = np.maximum(1 / (rounds + 1), self._GAIN)[:, None, None]
        self._forecasts[slots] = known + gain * (seen - known)
        self._rounds[slots] = rounds + 1
        keep = (1 - self._traffic_gain()) ** len(slots)
        self._traffic = keep * self._traffic + (1 - keep) / len(slots) * seen.sum(0)

    def _traffic_gain(self) -> float:
        """The longer nothing was seen of the traffic, the more weighs what is seen now."""
        gap, self._traffic_seen_at = self._clock - self._traffic_seen_at, self._clock
        return min(self._MOST_TRAFFIC_GAIN, self._TRAFFIC_GAIN * max(1, gap - self._steps_per_decision))

    def select(
        self,
        slots: np.ndarray,
        certain_tokens: int,
        base_rows: int,
        target_seconds: np.ndarray,
        draft_seconds: np.ndarray,
        step_seconds: float,
    ) -> DraftSelection:
        """Choose among the requests in `slots` [R]; `step_seconds` is what the step before took."""
        self._clock += 1
        self._purse += self._EXPLORATION * step_seconds
        is_due = self._clock - self._decided_at >= self._steps_per_decision
        if not is_due and len(slots) == self._num_requests:
            return DraftSelection(self._chosen[slots], self._tokens_per_second)
        self._decide(slots, certain_tokens, base_rows, target_seconds, draft_seconds)
        chosen = self._chosen[slots]
        self._explore(slots, chosen, draft_seconds)
        return DraftSelection(chosen, self._tokens_per_second)

    def _decide(
        self,
        slots: np.ndarray,
        certain_tokens: int,
        base_rows: int,
        target_seconds: np.ndarray,
        draft_seconds: np.ndarray,
    ) -> None:
        """Rank the requests, find the number of them with the best rate, and compare it with that of none."""
        self._take_in()
        forecasts = self._forecast(slots)
        plain = certain_tokens / target_seconds[base_rows]
        order = np.argsort(-_worth(forecasts, plain * _row_seconds(target_seconds, base_rows)), kind="stable")
        numbers = self._numbers(len(slots))
        rates = _best_rates(forecasts[order], numbers, certain_tokens, base_rows, target_seconds, draft_seconds)
        best = int(rates.argmax())
        half = self._HYSTERESIS / 2
        margin = self._LEAST_GAIN + (half if self._is_bypassing else -half - self._DOUBT / len(slots))
        self._is_bypassing = self._smoothed_advantage(rates[best] / plain - 1, len(slots)) < margin
        self._chosen[slots] = False
        if not self._is_bypassing:
            self._chosen[slots[order[: numbers[best]]]] = True
        self._tokens_per_second = float(max(plain, rates[best]))
        self._num_requests, self._decided_at = len(slots), self._clock

    def _smoothed_advantage(self, newest: float, num_requests: int) -> float:
        low, high = sorted((num_requests, self._num_requests))
        gain = self._ADVANTAGE_GAIN if high <= self._SAME_LOAD * low else 1.0
        bounded = min(max(newest, -self._MOST_ADVANTAGE), self._MOST_ADVANTAGE)
        self._advantage += gain * (bounded - self._advantage)
        return self._advantage

    def _numbers(self, num_requests: int) -> np.ndarray:
        """How many requests to consider drafting: every number of a few, steps of some of many."""
        return _steps_up_to(num_requests)

    def _forecast(self, slots: np.ndarray) -> np.ndarray:
        """[R, 2, B] of each request, and the less of its own it has, the more of the traffic.

        Expected tokens are taken as what of late came of expectations, of the request and of the traffic: another
        temperature than that of the calibration, for one, makes confidences wrong for a whole request.
        """
        rounds, age = self._rounds[slots], self._clock - self._seen_at[slots]
        forgotten = np.maximum(age / self._STEPS_TO_FORGET - 1, 0)
        own = (rounds / (rounds + self._TRAFFIC_ROUNDS) * np.exp(-forgotten))[:, None, None]
        forecasts = own * self._forecasts[slots] + (1 - own) * self._traffic
        forecasts[:, 1] *= self._truth(slots)[:, None]
        return forecasts

    def _truth(self, slots: np.ndarray) -> np.ndarray:
        """[R] accepted over expected drafts; that of the traffic weighs as much as a few drafts of its own."""
        weight = self._PRIOR_DRAFTS
        traffic = (self._traffic_outcomes[1] + weight) / (self._traffic_outcomes[0] + weight)
        expected, accepted = self._outcomes[slots].T
        return (accepted + weight * traffic) / (expected + weight)

    def _explore(self, slots: np.ndarray, chosen: np.ndarray, draft_seconds: np.ndarray) -> None:
        """Add those left out for longest for this one step, as far as the purse goes."""
        num_chosen, num_requests = int(np.count_nonzero(chosen)), len(slots)
        prices = draft_seconds[num_chosen : num_requests + 1] - draft_seconds[num_chosen]
        self._purse = min(self._purse, float(prices[-1]))
        affordable = int(np.searchsorted(prices, self._purse * (1 + 1e-9), side="right")) - 1
        if affordable == 0 or (num_chosen == 0 and affordable < self._PROBED_SHARE * num_requests):
            return
        age = np.where(chosen, -1, self._clock - self._seen_at[slots])
        chosen[np.argsort(-age, kind="stable")[:affordable]] = True
        self._purse -= float(prices[affordable])


@lru_cache
def _steps_up_to(most: int) -> np.ndarray:
    return np.unique(np.linspace(1, most, min(most, _MAX_CANDIDATES)).round().astype(np.int64))


def _histograms(survival: np.ndarray) -> np.ndarray:
    """[R, 2, B] counts and sums of survival [R, G] by bin."""
    num_requests = len(survival)
    bins = np.minimum((survival * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    places = (bins + np.arange(num_requests)[:, None] * NUM_BINS).ravel()
    size = num_requests * NUM_BINS
    histograms = np.empty((num_requests, 2, NUM_BINS))
    histograms[:, 0] = np.bincount(places, minlength=size).reshape(num_requests, NUM_BINS)
    histograms[:, 1] = np.bincount(places, weights=survival.ravel(), minlength=size).reshape(num_requests, NUM_BINS)
    return histograms


def _row_seconds(target_seconds: np.ndarray, base_rows: int) -> float:
    """What one more row costs, on average over as many more as there are."""
    last = min(2 * base_rows, len(target_seconds) - 1)
    return float(target_seconds[last] - target_seconds[base_rows]) / max(1, last - base_rows)


def _worth(forecasts: np.ndarray, price: float) -> np.ndarray:
    """[R] expected tokens of each request above what their rows cost."""
    counts, sums = forecasts[:, 0], forecasts[:, 1]
    return np.maximum(sums - price * counts, 0).sum(-1)


def _best_rates(
    forecasts: np.ndarray,
    numbers: np.ndarray,
    certain_tokens: int,
    base_rows: int,
    target_seconds: np.ndarray,
    draft_seconds: np.ndarray,
) -> np.ndarray:
    """Expected tokens per second when the first `numbers` are drafted and the best bins of theirs are verified."""
    totals = forecasts.cumsum(0)[numbers - 1, :, ::-1].cumsum(-1)
    rows, tokens = base_rows + totals[:, 0], certain_tokens + totals[:, 1]
    rows = np.minimum(rows, len(target_seconds) - 1)
    low = rows.astype(np.int64)
    high = np.minimum(low + 1, len(target_seconds) - 1)
    seconds = target_seconds[low] + (rows - low) * (target_seconds[high] - target_seconds[low])
    return (tokens / (seconds + draft_seconds[numbers, None])).max(-1)
