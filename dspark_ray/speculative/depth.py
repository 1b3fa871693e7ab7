"""How many positions of a block are drafted at all."""

from __future__ import annotations

import numpy as np

from dspark_ray.speculative.prefix_schedule import PLACES


class DraftDepth:
    """As many positions as were worth verifying of late.

    The backbone drafts a whole block in one pass, but the heads go from position to position, and what they add behind
    the last one that anybody has verified is only cost. Now and then the whole block is drafted, to see whether more
    would be worth it by now.
    """

    _GAIN = 0.1
    """Weight of the newest step."""
    _LEAST_SHARE = 0.08
    """Of the requests, that have a position verified for it to be drafted: with fewer its head costs more than their
    drafts bring."""
    _STEPS_BETWEEN_LOOKS = 16
    _STEPS_PER_LESSON = 4

    def __init__(self, gamma: int) -> None:
        self._gamma = self._depth = gamma
        self._shares = np.ones(gamma)
        """Of the requests, by position, that had it verified."""
        self._num_steps = 0
        self._news: list[tuple[np.ndarray, int]] = []

    def choose(self) -> int:
        """Positions to draft in the next step, 1..gamma."""
        self._num_steps += 1
        return self._gamma if self._num_steps % self._STEPS_BETWEEN_LOOKS == 0 else self._depth

    def observe(self, lengths: np.ndarray, depth: int) -> None:
        """Learn from the verify lengths [R] of a step that drafted `depth` positions; some steps are taken together."""
        self._news.append((lengths, depth))
        if len(self._news) == self._STEPS_PER_LESSON or depth > self._depth:
            self._learn()

    def _learn(self) -> None:
        depths = np.array([depth for _, depth in self._news])
        drafted = depths[:, None] > PLACES[: self._gamma]
        sizes = [len(lengths) for lengths, _ in self._news]
        had = np.repeat(drafted, sizes, axis=0)
        reached = np.concatenate([lengths for lengths, _ in self._news])[:, None] > PLACES[: self._gamma]
        mean = (reached & had).sum(0) / np.maximum(had.sum(0), 1)
        keep = (1 - self._GAIN) ** drafted.sum(0)
        self._shares = keep * self._shares + (1 - keep) * mean
        self._depth = max(1, int(np.count_nonzero(self._shares > self._LEAST_SHARE)))
        self._news.clear()
