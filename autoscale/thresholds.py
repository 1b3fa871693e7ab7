"""From saturation to a confidence threshold, for one replica at a time. Seconds are those of the caller's clock."""

from __future__ import annotations

import itertools
import math
from typing import Literal, Protocol

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from autoscale.settings import SETTINGS, NotNegative, Positive, Share
from autoscale.signals import LoadSample

Point = tuple[Share, Share]
"""(saturation, threshold)"""


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

    @property
    def kind(self) -> str:
        """Its name in YAML."""
        ...

    def regulator(self, threshold: float, floor: float = 0.0) -> Regulator:
        """One that starts at the threshold in force, so that a restarted controller does not jump.

        What it finds below `floor` is raised to it before it reaches the replica.
        """
        ...


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class FixedThreshold:
    """The same threshold at any load."""

    kind: Literal["fixed"] = "fixed"
    threshold: Share = 0.0

    def regulator(self, threshold: float, floor: float = 0.0) -> Regulator:
        return _Constant(self.threshold)


class _Constant:
    spent = None

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        return self.threshold


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class LoadCurve:
    """The threshold is a function of the smoothed saturation, followed slowly and not at every whim."""

    kind: Literal["load_curve"] = "load_curve"
    curve: tuple[Point, ...] = ((0.0, 0.0), (1.0, 0.3))
    """(saturation, threshold), straight lines between; saturation rises strictly, the threshold does not fall."""
    dead_band: Share = 0.05
    """The curve may be so far from the threshold before the threshold follows, and it follows no closer than this:
    noise narrower than twice the band moves nothing. An end that the curve stays at is reached exactly."""
    slew_per_second: Positive = 0.02
    """Most that the threshold moves in a second."""
    smoothing_seconds: NotNegative = 5.0
    """Time constant of the saturation's exponential average; 0 does not smooth."""

    @field_validator("curve")
    @classmethod
    def _rises(cls, curve: tuple[Point, ...]) -> tuple[Point, ...]:
        if not curve:
            raise ValueError("expected at least one [saturation, threshold]")
        pairs = list(itertools.pairwise(curve))
        if not all(before[0] < after[0] for before, after in pairs):
            raise ValueError("expected saturations that rise")
        if not all(before[1] <= after[1] for before, after in pairs):
            raise ValueError("expected thresholds that do not fall")
        return curve

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
        for (left, low), (right, high) in itertools.pairwise(self.curve):
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
