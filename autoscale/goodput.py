"""Experimental: a threshold policy that searches for the goodput it measures. No preset uses it.

In the simulation of benchmarks.controller it is no better than a load curve with the engine's default schedule.
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
"""Standard errors by which a gain has to be certain: it is looked at after every pair, and luck needs only one look."""
_SAME_LOAD = 1.2
"""Turns are compared when their numbers of running requests differ by no more than this factor."""
_OTHER_LOAD = 1.5
"""Factor between numbers of running requests by which a load is another than the one that was searched."""
_LEAST_BUSY = 0.2
"""Share of a turn that must be spent stepping for it to count."""
_OURS = 1e-6
"""By which the threshold that a replica reports may be off the one it was told."""


@settings(frozen=True, kw_only=True, config=SETTINGS)
class GoodputSearch:
    """Hill climbing on measured goodput, below what a load curve allows.

    Goodput is committed tokens per second of stepping. Two thresholds, one step apart, take turns; the difference of
    the logarithms is free of any slow drift of the load. The base moves only when the gain is certain, and a base
    that has beaten both its neighbours rests, longer each time, or until the load is another.
    """

    kind: Literal["goodput"] = "goodput"
    bound: LoadCurve = field(default_factory=lambda: LoadCurve(curve=((0.0, 0.3), (1.0, 0.6))))
    """The search never goes above this curve's threshold."""
    step: Positive = 0.1
    """Between neighbours. Smaller ones differ by less than what a turn's goodput is uncertain by."""
    epoch_seconds: Positive = 5.0
    """One threshold's turn. Short ones meet the same requests."""
    least_gain: NotNegative = 0.005
    """Relative; less is not worth a move."""
    num_pairs: Annotated[Whole, Field(ge=_FEWEST_PAIRS)] = 24
    """Turns of a neighbour before it counts as no better."""
    rest_seconds: tuple[Positive, Positive] = (60.0, 600.0)
    """The first rest and the longest; each is twice the one before."""

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
    """What one threshold's turn has brought so far."""

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
        """None where too little ran."""
        if self.tokens <= 0 or self.busy < _LEAST_BUSY * self.seconds:
            return None
        return math.log(self.tokens / self.busy)

    def is_within(self, factor: float, other: _Turn) -> bool:
        """Whether as many requests ran, up to the factor."""
        low, high = sorted((self.running / self.seconds, other.running / other.seconds))
        return high <= factor * low


def _gain(before: _Turn, trial: _Turn, after: _Turn) -> float | None:
    """What the logarithm of the trial's goodput is above its neighbours'; None where they cannot be compared."""
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
        """Whether the other neighbour of this base was no better."""
        self._rest = search.rest_seconds[0]
        self._rests_until = -math.inf
        self._bound_at_rest = 0.0
        self._turn_at_rest = _Turn()
        self._turn, self._is_trial = _Turn(), False
        self._turns: list[_Turn] = []
        self._gains: list[float] = []

    @property
    def spent(self) -> float | None:
        """The bound's: a search that stays below it could be pushed up to it."""
        return self._bound.spent

    @property
    def threshold(self) -> float:
        return self._trial if self._is_trial else self._base

    @property
    def _trial(self) -> float:
        return self._base + self._direction * self._search.step

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        # A threshold below the floor would never be seen in force, and nothing could be learned of it.
        bound = max(self._bound.update(sample, saturation, now), self._floor)
        if self._base > bound:
            self._base = bound
            self._start_over()
        # At another threshold than ours, an operator's or one that is still to be replaced, nothing is learned of ours.
        if abs(sample.threshold - self.threshold) <= _OURS:
            if self._is_resting(bound, now):
                self._look_around(sample)
            else:
                self._search_on(sample, bound, now)
        return self.threshold

    def _is_resting(self, bound: float, now: float) -> bool:
        return now < self._rests_until and abs(bound - self._bound_at_rest) <= self._search.step

    def _look_around(self, sample: LoadSample) -> None:
        """Another load ends a rest, also where the bound does not move."""
        self._turn.add(sample)
        if self._turn.seconds >= self._search.epoch_seconds:
            if not self._turn.is_within(_OTHER_LOAD, self._turn_at_rest):
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
        """A trial between two turns of the base makes a pair."""
        self._turns = [*self._turns[-2:], self._turn]
        self._turn = _Turn()
        self._is_trial = not self._is_trial
        if self._is_trial and len(self._turns) == 3:
            before, trial, after = self._turns
            gain = _gain(before, trial, after)
            if gain is not None:
                self._gains.append(gain)

    def _judge(self, is_last: bool, bound: float, now: float) -> None:
        """`is_last` says that this base has no other neighbour to try."""
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
        """Ended early by a bound that moves, which is another load."""
        self._rests_until, self._bound_at_rest = now + self._rest, bound
        self._turn_at_rest = self._turns[-1]
        self._rest = min(2 * self._rest, self._search.rest_seconds[1])

    def _start_over(self) -> None:
        """From a new base, in the same direction."""
        self._failed_before = False
        self._rest = self._search.rest_seconds[0]
        self._forget_turns()

    def _forget_turns(self) -> None:
        self._turn, self._is_trial = _Turn(), False
        self._turns, self._gains = [], []
