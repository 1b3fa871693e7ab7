"""How many positions of a block are drafted."""

from __future__ import annotations

import numpy as np

from dspark_ray.speculative.prefix_schedule import PLACES


class DraftDepth:
    """As many positions as were recently worth verifying.

    The backbone computes a whole block in one pass, but the heads run position by position, and positions that no
    request has verified are wasted. Every few steps the whole block is drafted as a probe, because a position that is
    never drafted is never verified either.
    """

    _GAIN = 0.1
    """Weight of the newest step."""
    _MIN_SHARE = 0.08
    """A position is drafted while at least this share of the requests has it verified; below it, the heads of the
    position cost more than its drafts bring."""
    _PROBE_INTERVAL = 16
    """Steps from one draft of the whole block to the next."""
    _UPDATE_INTERVAL = 4
    """Observed steps that are averaged together."""

    def __init__(self, gamma: int) -> None:
        self._gamma = self._depth = gamma
        self._shares = np.ones(gamma)
        """[G] share of the requests that had a position verified, smoothed."""
        self._num_steps = 0
        self._pending: list[tuple[np.ndarray, int]] = []
        """(verify lengths, depth) of steps that are not in the shares yet."""

    def choose(self) -> int:
        """Positions to draft in the next step, 1..gamma."""
        self._num_steps += 1
        return self._gamma if self._num_steps % self._PROBE_INTERVAL == 0 else self._depth

    def observe(self, lengths: np.ndarray, depth: int) -> None:
        """Learn from the verify lengths [R] of a step that drafted `depth` positions."""
        self._pending.append((lengths, depth))
        if len(self._pending) == self._UPDATE_INTERVAL or depth > self._depth:
            self._update()

    def _update(self) -> None:
        depths = np.array([depth for _, depth in self._pending])
        drafted = depths[:, None] > PLACES[: self._gamma]
        sizes = [len(lengths) for lengths, _ in self._pending]
        had = np.repeat(drafted, sizes, axis=0)
        reached = np.concatenate([lengths for lengths, _ in self._pending])[:, None] > PLACES[: self._gamma]
        mean = (reached & had).sum(0) / np.maximum(had.sum(0), 1)
        keep = (1 - self._GAIN) ** drafted.sum(0)
        self._shares = keep * self._shares + (1 - keep) * mean
        self._depth = max(1, int(np.count_nonzero(self._shares > self._MIN_SHARE)))
        self._pending.clear()
