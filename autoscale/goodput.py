"""Experimental: a threshold policy that searches for the highest measured goodput. No preset uses it.

In the simulation `python -m benchmarks.controller` it is as good as a load curve where engines schedule every step,
which is the default, and better where engines verify everything above the threshold and their batches exceed the
captured graphs.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass as settings

from autoscale.settings import SETTINGS, NotNegative, Positive, Whole
from autoscale.signals import LoadSample
from autoscale.thresholds import LoadCurve

_FEWEST_PAIRS = 5
_DEVIATIONS = 2.5
"""Standard errors by which a gain must exceed `least_gain`. The gain is tested after every pair, and one false positive
is enough for a wrong move."""
_SAME_LOAD = 1.2
"""Turns are compared when their numbers of running requests differ by at most this factor."""
_NEW_LOAD = 1.5
"""A larger factor between numbers of running requests is a new load and ends a rest."""
_LEAST_BUSY = 0.2
"""Share of a turn in which the engine must step for the turn to count."""
_SAME_THRESHOLD = 1e-6
"""Difference up to which a reported threshold is the one that was sent."""


@settings(frozen=True, kw_only=True, config=SETTINGS)
class GoodputSearch:
    """Experimental: hill climbing on measured goodput, below the threshold of a load curve.

    Goodput is committed tokens per second of stepping. A base threshold and a neighbour one step away take turns; the
    difference of their log goodputs cancels slow drifts of the load. The base moves only when the gain is significant.
    A base that is better than both neighbours rests, each time longer, until the load changes.
    """

    kind: Literal["goodput"] = "goodput"
    bound: LoadCurve = field(default_factory=lambda: LoadCurve(curve=((0.0, 0.3), (1.0, 0.6))))
    """Upper bound of the search at every load."""
    step: Positive = 0.1
    """Distance between neighbours. Smaller steps change goodput by less than the noise of one turn."""
    epoch_seconds: Positive = 5.0
    """Length of a turn. Successive short turns run the same requests."""
    least_gain: NotNegative = 0.005
    """Smallest relative gain that moves the base."""
    num_pairs: Annotated[Whole, Field(ge=_FEWEST_PAIRS)] = 24
    """Pairs of turns after which a neighbour counts as no better."""
    rest_seconds: tuple[Positive, Positive] = (60.0, 600.0)
    """First and longest rest; each rest is twice as long as the one before."""

    @field_validator("step")
    @classmethod
    def _is_within_the_bound(cls, step: float, others: ValidationInfo) -> float:
        bound = others.data.get("bound")
        if bound is not None and step > bound.highest:
            raise ValueError(f"expected at most the bound's highest threshold {bound.highest}")
        return step

    @field_validator("rest_seconds")
    @classmethod
    def _grows(cls, seconds: tuple[float, float]) -> tuple[float, float]:
        if seconds[0] > seconds[1]:
            raise ValueError("expected [first, longest] with first <= longest")
        return seconds

    def regulator(self, threshold: float, floor: float = 0.0) -> HillClimber:
        return HillClimber(self, max(threshold, floor), floor)


@dataclass(slots=True)
class _Turn:
    """Sums over the turn of one threshold."""

    tokens: float = 0.0
    busy: float = 0.0
    running: float = 0.0
    seconds: float = 0.0

    def add(self, sample: LoadSample) -> None:
        self.tokens += sample.tokens_per_second * sample.seconds
        self.busy += sample.busy_share * sample.seconds
        self.running += sample.num_running * sample.seconds
        self.seconds += sample.seconds

    @property
    def log_goodput(self) -> float | None:
        """None where the engine was idle for most of the turn."""
        if self.tokens <= 0 or self.busy < _LEAST_BUSY * self.seconds:
            return None
        return math.log(self.tokens / self.busy)

    def is_within(self, factor: float, other: _Turn) -> bool:
        """Whether the numbers of running requests differ by at most `factor`."""
        low, high = sorted((self.running / self.seconds, other.running / other.seconds))
        return high <= factor * low


def _gain(before: _Turn, trial: _Turn, after: _Turn) -> float | None:
    """Log goodput of the trial over the mean of the turns around it; None where the loads differ too much."""
    goodputs = before.log_goodput, trial.log_goodput, after.log_goodput
    if None in goodputs or not (trial.is_within(_SAME_LOAD, before) and trial.is_within(_SAME_LOAD, after)):
        return None
    first, middle, last = cast(tuple[float, float, float], goodputs)
    return middle - (first + last) / 2


class HillClimber:
    """Searches one replica's threshold."""

    def __init__(self, search: GoodputSearch, threshold: float, floor: float) -> None:
        self._search, self._floor = search, floor
        self._bound = search.bound.regulator(threshold)
        self._base = threshold
        self._direction = 1.0
        self._failed_before = False
        """Whether the base's other neighbour was no better."""
        self._rest = search.rest_seconds[0]
        self._rests_until = -math.inf
        self._bound_at_rest = 0.0
        self._turn_at_rest = _Turn()
        self._turn, self._is_trial = _Turn(), False
        self._turns: list[_Turn] = []
        self._gains: list[float] = []

    @property
    def range_used(self) -> float | None:
        """That of the bound, to which the load can raise the threshold."""
        return self._bound.range_used

    @property
    def threshold(self) -> float:
        return self._trial if self._is_trial else self._base

    @property
    def _trial(self) -> float:
        return self._base + self._direction * self._search.step

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        # Thresholds below the floor are never in force, so their goodput cannot be measured.
        bound = max(self._bound.update(sample, saturation, now), self._floor)
        if self._base > bound:
            self._base = bound
            self._start_over()
        # A sample at another threshold, an operator's or an earlier one, measures nothing of this one.
        if abs(sample.threshold - self.threshold) <= _SAME_THRESHOLD:
            if self._is_resting(bound, now):
                self._check_load(sample)
            else:
                self._search_on(sample, bound, now)
        return self.threshold

    def _is_resting(self, bound: float, now: float) -> bool:
        return now < self._rests_until and abs(bound - self._bound_at_rest) <= self._search.step

    def _check_load(self, sample: LoadSample) -> None:
        """End the rest when the number of running requests has changed, even if the bound has not."""
        self._turn.add(sample)
        if self._turn.seconds >= self._search.epoch_seconds:
            if not self._turn.is_within(_NEW_LOAD, self._turn_at_rest):
                self._wake()
            self._turn = _Turn()

    def _wake(self) -> None:
        self._rests_until, self._rest = -math.inf, self._search.rest_seconds[0]

    def _search_on(self, sample: LoadSample, bound: float, now: float) -> None:
        self._rests_until = -math.inf
        directions = [
            d for d in (self._direction, -self._direction) if self._floor <= self._base + d * self._search.step <= bound
        ]
        if self._direction not in directions:
            self._forget_turns()
            if not directions:
                return
            self._direction = directions[0]
        self._turn.add(sample)
        if self._turn.seconds >= self._search.epoch_seconds:
            self._end_turn()
            self._judge(is_last=self._failed_before or len(directions) == 1, bound=bound, now=now)

    def _end_turn(self) -> None:
        """A trial and the turns of the base before and after it make a pair."""
        self._turns = [*self._turns[-2:], self._turn]
        self._turn = _Turn()
        self._is_trial = not self._is_trial
        if self._is_trial and len(self._turns) == 3:
            before, trial, after = self._turns
            gain = _gain(before, trial, after)
            if gain is not None:
                self._gains.append(gain)

    def _judge(self, is_last: bool, bound: float, now: float) -> None:
        """`is_last`: the base has no other neighbour to try."""
        count = len(self._gains)
        if count < _FEWEST_PAIRS:
            return
        mean, error = statistics.fmean(self._gains), statistics.stdev(self._gains) / math.sqrt(count)
        if mean - _DEVIATIONS * error > self._search.least_gain:
            self._base = self._trial
            self._start_over()
        elif mean + _DEVIATIONS * error < self._search.least_gain or count >= self._search.num_pairs:
            self._direction = -self._direction
            self._failed_before = not is_last
            if is_last:
                self._begin_rest(bound, now)
            self._forget_turns()

    def _begin_rest(self, bound: float, now: float) -> None:
        """A bound that moves is a new load and ends the rest early."""
        self._rests_until, self._bound_at_rest = now + self._rest, bound
        self._turn_at_rest = self._turns[-1]
        self._rest = min(2 * self._rest, self._search.rest_seconds[1])

    def _start_over(self) -> None:
        """Search from a new base in the same direction."""
        self._failed_before = False
        self._rest = self._search.rest_seconds[0]
        self._forget_turns()

    def _forget_turns(self) -> None:
        self._turn, self._is_trial = _Turn(), False
        self._turns, self._gains = [], []
