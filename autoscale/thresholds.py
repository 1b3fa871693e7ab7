"""Confidence thresholds from saturation, for one replica at a time. Seconds are those of the caller's clock."""

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
    def range_used(self) -> float | None:
        """Position of the threshold in the policy's range, 0 at the lowest and 1 at the highest; None where the policy
        has a single threshold."""
        ...

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        """The threshold from `now` on, 0 to 1."""
        ...


class ThresholdPolicy(Protocol):
    """How thresholds are chosen; makes one regulator per replica."""

    @property
    def kind(self) -> str:
        """Its name in YAML."""
        ...

    def regulator(self, threshold: float, floor: float = 0.0) -> Regulator:
        """A regulator that starts at the threshold in force, so that a restarted controller changes nothing abruptly.

        The caller raises thresholds below `floor` to it before they reach the replica.
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
    range_used = None

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        return self.threshold


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class LoadCurve:
    """The threshold follows a function of the smoothed saturation, with a dead band and a limited rate."""

    kind: Literal["load_curve"] = "load_curve"
    curve: tuple[Point, ...] = ((0.0, 0.0), (1.0, 0.3))
    """Points (saturation, threshold), linear in between. Saturations rise strictly; thresholds do not fall."""
    dead_band: Share = 0.05
    """Distance between curve and threshold up to which the threshold does not move, and which remains when it follows:
    noise narrower than twice the band moves nothing. Where the curve stays at its lowest or highest threshold, that
    value is reached exactly."""
    slew_per_second: Positive = 0.02
    """Largest change of the threshold per second."""
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
        self._goal = self._curve_threshold = self.threshold = threshold
        self.saturation: float | None = None
        """Smoothed; None before the first sample."""
        self._updated_at = -math.inf
        self._at_limit_since: float | None = None

    @property
    def range_used(self) -> float | None:
        lowest, band = self._curve.lowest, self._curve.dead_band
        span = self._curve.highest - lowest
        # The curve's value, as far as the threshold has followed it up to the dead band.
        followed = min(max(self._curve_threshold, self.threshold - band), self.threshold + band)
        # The threshold of an earlier controller may lie outside the curve's range.
        return min(max((followed - lowest) / span, 0.0), 1.0) if span > 0 else None

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        elapsed = now - self._updated_at
        self._updated_at = now
        if self.saturation is None:
            self.saturation, elapsed = saturation, 0.0
        else:
            self.saturation += (saturation - self.saturation) * self._weight(elapsed)
        self._curve_threshold = self._curve.threshold_at(self.saturation)
        self._move_goal(self._curve_threshold, now)
        limit = self._curve.slew_per_second * elapsed
        self.threshold += min(max(self._goal - self.threshold, -limit), limit)
        return self.threshold

    def _weight(self, elapsed: float) -> float:
        seconds = self._curve.smoothing_seconds
        return -math.expm1(-elapsed / seconds) if seconds > 0 else 1.0

    def _move_goal(self, wanted: float, now: float) -> None:
        """Keep the goal within the dead band around `wanted`, so that its moves are as small as the curve's."""
        band = self._curve.dead_band
        self._goal = min(max(self._goal, wanted - band), wanted + band)
        limit = min((self._curve.lowest, self._curve.highest), key=lambda each: abs(wanted - each))
        if abs(wanted - limit) > _AT_LIMIT * band:
            self._at_limit_since = None
        elif self._at_limit_since is None:
            self._at_limit_since = now
        elif now - self._at_limit_since >= _SETTLED * self._curve.smoothing_seconds:
            self._goal = limit


_AT_LIMIT = 0.1
"""Share of the dead band within which the curve counts as at its lowest or highest threshold: an average of saturations
approaches these values and never reaches them."""
_SETTLED = 3.0
"""Time constants of the smoothing for which the curve must be there before the threshold is set to that value."""
