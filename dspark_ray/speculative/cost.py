"""What a step costs: seconds of the target by rows, and seconds of the drafter by requests.

Seconds rather than steps per second, because durations add. A `Curve` holds measurements, a `CostTable` the curves of
one deployment, and a `CostModel` a table that is corrected by the measured duration of every step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from dspark_ray.speculative.cost_table import CostTable


def lower_hull(seconds: np.ndarray, first: int, last: int) -> np.ndarray:
    """`seconds` by size, with the largest convex curve below it between the sizes `first` and `last`."""
    corners = [first]
    while (corner := corners[-1]) < last:
        slopes = (seconds[corner + 1 : last + 1] - seconds[corner]) / np.arange(1, last - corner + 1)
        # The next corner has the smallest slope; of equal slopes, the farthest size.
        corners.append(last - int(slopes[::-1].argmin()))
    hull = seconds.copy()
    hull[first : last + 1] = np.interp(np.arange(first, last + 1), corners, seconds[corners])
    return hull


class CostModel:
    """A cost table that follows measured steps: a factor common to all sizes quickly, a factor of each size slowly.

    A slower machine is slower at every size, and the common factor leaves the choice between sizes unchanged; the
    factors by size correct single sizes that were profiled wrongly.
    """

    _SCALE_GAIN = 0.05
    _CLIP = (0.5, 2.0)
    """Bounds of measured over expected seconds of one step: a pause of the process is not a cost of its size."""
    _UPDATE_INTERVAL = 8
    """Steps from one recomputation of the tables to the next."""
    _CONTEXT_STEP = 32
    """Tokens; costs are looked up at the nearest multiple."""

    def __init__(self, table: CostTable, max_rows: int, max_requests: int) -> None:
        self.table = table
        self.drift = 1.0
        """Measured over profiled seconds of the target, smoothed."""
        self._scale = 1.0
        self._contexts = np.array(sorted(table.targets))
        self._profiled_targets = np.stack([table.targets[context].table(max_rows) for context in self._contexts])
        self._profiled_draft = table.draft.table(max_requests)
        self._profiled_draft[0] = 0.0
        self._target_factors = _Factors(table.target.sizes, max_rows)
        self._draft_factors = _Factors(table.draft.sizes, max_requests)
        self._pending: list[tuple[int, float, float, int, float]] = []
        self._latest: tuple[int, np.ndarray] | None = None
        self._make_tables()

    def target_seconds(self, context: float) -> np.ndarray:
        """[max_rows + 1] seconds of a forward by rows, where rows see `context` tokens on average."""
        near = round(context / self._CONTEXT_STEP)
        if self._latest is None or self._latest[0] != near:
            self._latest = near, _at_context(self._targets, self._contexts, near * self._CONTEXT_STEP)
        return self._latest[1]

    def draft_seconds(self) -> np.ndarray:
        """[max_requests + 1] seconds of a draft by requests; no request costs nothing."""
        return self._draft

    def observe(self, rows: int, context: float, target: float, num_drafted: int, draft: float) -> None:
        """Learn from a step: `rows` took `target` seconds, and the draft of `num_drafted` requests `draft` seconds."""
        self._pending.append((rows, context, target, num_drafted, draft))
        if len(self._pending) >= self._UPDATE_INTERVAL:
            for step in self._pending:
                self._learn(*step)
            self._pending.clear()
            self._make_tables()

    def _learn(self, rows: int, context: float, target: float, num_drafted: int, draft: float) -> None:
        rows, num_drafted = min(rows, self._targets.shape[1] - 1), min(num_drafted, len(self._draft) - 1)
        expected_target = float(_at_context(self._learned_targets, self._contexts, context)[rows])
        expected_draft = float(self._learned_draft[num_drafted])
        if expected_draft > 0:
            self._draft_factors.learn(num_drafted, _clipped(draft / expected_draft, self._CLIP))
        if expected_target > 0:
            ratio = _clipped(target / expected_target, self._CLIP)
            self._target_factors.learn(rows, ratio)
            self._scale *= ratio**self._SCALE_GAIN
            profiled = float(_at_context(self._profiled_targets, self._contexts, context)[rows])
            self.drift *= _clipped(target / (profiled * self.drift), self._CLIP) ** self._SCALE_GAIN

    def _make_tables(self) -> None:
        # Steps are compared with the estimate before the running maximum, which would otherwise feed back into itself.
        self._learned_targets = self._scale * self._profiled_targets * self._target_factors.by_size()
        self._learned_draft = self._scale * self._profiled_draft * self._draft_factors.by_size()
        self._targets = np.maximum.accumulate(self._learned_targets, axis=-1)
        self._draft = np.maximum.accumulate(self._learned_draft)
        self._latest = None


def _at_context(seconds: np.ndarray, contexts: np.ndarray, context: float) -> np.ndarray:
    """Seconds [C, rows + 1] of contexts [C] at one context: linear between them, level outside."""
    if len(contexts) == 1:
        return seconds[0]
    place = float(np.interp(context, contexts, np.arange(len(contexts))))
    low = min(int(place), len(contexts) - 2)
    return seconds[low] + (place - low) * (seconds[low + 1] - seconds[low])


class _Factors:
    """Measured over profiled seconds at the profiled sizes; linear between them."""

    _GAIN = 0.01
    """Weight of a step."""
    _STEPS_TO_SETTLE = 20
    """The first steps at a size weigh more, up to 1 / 20, in case the profile of that size was disturbed."""

    def __init__(self, sizes: Sequence[int], max_size: int) -> None:
        self._sizes = list(sizes)
        self._factors = np.ones(len(sizes))
        self._num_learned = np.zeros(len(sizes))
        self._wanted = np.arange(max_size + 1)

    def by_size(self) -> np.ndarray:
        """[max_size + 1]"""
        return np.interp(self._wanted, self._sizes, self._factors)

    def learn(self, size: int, ratio: float) -> None:
        """A step took `ratio` of the expected time: adjust both neighbouring profiled sizes, the nearer one more."""
        right = min(bisect_left(self._sizes, size), len(self._sizes) - 1)
        left = max(0, right - 1)
        gap = self._sizes[right] - self._sizes[left]
        share = 1.0 if gap == 0 else min(1.0, max(0.0, (size - self._sizes[left]) / gap))
        for place, weight in ((right, share), (left, 1 - share)):
            gain = max(self._GAIN, 1 / (self._num_learned[place] + self._STEPS_TO_SETTLE))
            self._factors[place] *= ratio ** (weight * gain)
            self._num_learned[place] += weight


def _clipped(ratio: float, limits: tuple[float, float]) -> float:
    return min(max(ratio, limits[0]), limits[1])
