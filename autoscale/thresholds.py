"""From saturation to a confidence threshold, for one replica at a time. Seconds are those of the caller's clock."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, cast

from autoscale.saturation import check
from autoscale.signals import LoadSample


class Regulator(Protocol):
    """One replica's threshold over time."""

    @property
    def spent(self) -> float | None:
        """How much of what it may take away from verification it takes, 0 to 1; None where it may take nothing."""
        ...

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        """The threshold from `now` on, 0 to 1."""
        ...


class ThresholdPolicy(Protocol):
    """How thresholds are found; makes a regulator for every replica."""

    kind: ClassVar[str]
    """Its name in YAML."""

    def regulator(self, threshold: float, floor: float = 0.0) -> Regulator:
        """One that starts at the threshold in force, so that a restarted controller does not jump.

        What it finds below `floor` is raised to it before it reaches the replica.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FixedThreshold:
    """The same threshold at any load."""

    kind: ClassVar[str] = "fixed"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check(0.0 <= self.threshold <= 1.0, "threshold", self.threshold, "a number in [0, 1]")

    def regulator(self, threshold: float, floor: float = 0.0) -> Regulator:
        return _Constant(self.threshold)


@dataclass(frozen=True)
class _Constant:
    threshold: float
    spent: None = None

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        return self.threshold


@dataclass(frozen=True, kw_only=True)
class LoadCurve:
    """The threshold is a function of the smoothed saturation, followed slowly and not at every whim."""

    kind: ClassVar[str] = "load_curve"
    curve: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 0.3))
    """(saturation, threshold), straight lines between; saturation rises strictly, the threshold does not fall."""
    dead_band: float = 0.05
    """The curve may be so far from the threshold before the threshold follows, and it follows no closer than this:
    noise narrower than twice the band moves nothing. An end that the curve stays at is reached exactly."""
    slew_per_second: float = 0.02
    """Most that the threshold moves in a second."""
    smoothing_seconds: float = 5.0
    """Time constant of the saturation's exponential average; 0 does not smooth."""

    def __post_init__(self) -> None:
        check(len(self.curve) > 0, "curve", self.curve, "at least one (saturation, threshold)")
        check(all(0.0 <= s <= 1.0 for s, _ in self.curve), "curve", self.curve, "saturations in [0, 1]")
        check(all(0.0 <= t <= 1.0 for _, t in self.curve), "curve", self.curve, "thresholds in [0, 1]")
        pairs = list(zip(self.curve, self.curve[1:], strict=False))
        check(all(a[0] < b[0] for a, b in pairs), "curve", self.curve, "saturations that rise")
        check(all(a[1] <= b[1] for a, b in pairs), "curve", self.curve, "thresholds that do not fall")
        check(0.0 <= self.dead_band <= 1.0, "dead_band", self.dead_band, "a number in [0, 1]")
        check(self.slew_per_second > 0, "slew_per_second", self.slew_per_second, "a positive number")
        check(self.smoothing_seconds >= 0, "smoothing_seconds", self.smoothing_seconds, "0 or more seconds")

    @property
    def lowest(self) -> float:
        return self.curve[0][1]

    @property
    def highest(self) -> float:
        return self.curve[-1][1]

    def threshold_at(self, saturation: float) -> float:
        """Constant before the first point and behind the last."""
        if saturation <= self.curve[0][0]:
            return self.lowest
        for (left, low), (right, high) in zip(self.curve, self.curve[1:], strict=False):
            if saturation <= right:
                return low + (high - low) * (saturation - left) / (right - left)
        return self.highest

    def regulator(self, threshold: float, floor: float = 0.0) -> CurveFollower:
        return CurveFollower(self, threshold)


class CurveFollower:
    """Follows a LoadCurve."""

    def __init__(self, curve: LoadCurve, threshold: float) -> None:
        self._curve = curve
        self._goal = self._wish = self.threshold = threshold
        self.saturation: float | None = None
        """Smoothed; None before the first sample."""
        self._updated_at = -math.inf
        self._at_an_end_since: float | None = None

    @property
    def spent(self) -> float | None:
        lowest, band = self._curve.lowest, self._curve.dead_band
        span = self._curve.highest - lowest
        # What the curve asks for counts, as far as the threshold is there up to the dead band.
        taken = min(max(self._wish, self.threshold - band), self.threshold + band)
        # A threshold that was taken over may lie outside.
        return min(max((taken - lowest) / span, 0.0), 1.0) if span > 0 else None

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        elapsed = now - self._updated_at
        self._updated_at = now
        if self.saturation is None:
            self.saturation, elapsed = saturation, 0.0
        else:
            self.saturation += (saturation - self.saturation) * self._weight(elapsed)
        self._wish = self._curve.threshold_at(self.saturation)
        self._choose_goal(self._wish, now)
        most = self._curve.slew_per_second * elapsed
        self.threshold += min(max(self._goal - self.threshold, -most), most)
        return self.threshold

    def _weight(self, elapsed: float) -> float:
        seconds = self._curve.smoothing_seconds
        return -math.expm1(-elapsed / seconds) if seconds > 0 else 1.0

    def _choose_goal(self, wish: float, now: float) -> None:
        """Drag the goal along at the distance of the dead band, so that its moves are as small as the curve's."""
        band = self._curve.dead_band
        self._goal = min(max(self._goal, wish - band), wish + band)
        end = min((self._curve.lowest, self._curve.highest), key=lambda each: abs(wish - each))
        if abs(wish - end) > _AT_AN_END * band:
            self._at_an_end_since = None
        elif self._at_an_end_since is None:
            self._at_an_end_since = now
        elif now - self._at_an_end_since >= _STAYS * self._curve.smoothing_seconds:
            self._goal = end


_AT_AN_END = 0.1
"""Of the dead band: so near is as good as at an end, which an average of saturations only approaches."""
_STAYS = 3.0
"""Time constants of the smoothing for which a curve has to be at an end to be met there."""


@dataclass(frozen=True, kw_only=True)
class GoodputSearch:
    """Hill climbing on measured goodput, below what a load curve allows.

    Goodput is committed tokens per second of stepping. Two thresholds, one step apart, take turns; the difference of
    the logarithms is free of any slow drift of the load. The base moves only when the gain is certain, and a base
    that has beaten both its neighbours rests, longer each time, or until the load is another.
    """

    kind: ClassVar[str] = "goodput"
    bound: LoadCurve = field(default_factory=lambda: LoadCurve(curve=((0.0, 0.3), (1.0, 0.6))))
    """The search never goes above this curve's threshold."""
    step: float = 0.1
    """Between neighbours. Smaller ones differ by less than what a turn's goodput is uncertain by."""
    epoch_seconds: float = 5.0
    """One threshold's turn. Short ones meet the same requests."""
    least_gain: float = 0.005
    """Relative; less is not worth a move."""
    num_pairs: int = 24
    """Turns of a neighbour before it counts as no better."""
    rest_seconds: tuple[float, float] = (60.0, 600.0)
    """The first rest and the longest; each is twice the one before."""

    def __post_init__(self) -> None:
        most = self.bound.highest
        check(0.0 < self.step <= most, "step", self.step, f"above 0, at most the bound's highest threshold {most}")
        check(self.epoch_seconds > 0, "epoch_seconds", self.epoch_seconds, "a positive number of seconds")
        check(self.least_gain >= 0, "least_gain", self.least_gain, "0 or more")
        check(self.num_pairs >= _FEWEST_PAIRS, "num_pairs", self.num_pairs, f"at least {_FEWEST_PAIRS}")
        first, longest = self.rest_seconds
        check(
            0 < first <= longest, "rest_seconds", list(self.rest_seconds), "[first, longest] with 0 < first <= longest"
        )

    def regulator(self, threshold: float, floor: float = 0.0) -> HillClimber:
        return HillClimber(self, max(threshold, floor), floor)


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
