"""A bandit over thresholds, for comparison with the hill climbing of `autoscale.goodput`. Benchmark code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from autoscale.signals import LoadSample

ARMS = tuple(number / 10 for number in range(9))
_TURN_SECONDS = 10.0
_SLOPE = 0.6
"""Slope of log goodput over log running requests within a context, measured on the table of costs."""


@dataclass
class Memory:
    """Discounted counts and rewards by context and threshold."""

    discount: float
    counts: dict[int, list[float]] = field(default_factory=dict)
    sums: dict[int, list[float]] = field(default_factory=dict)

    def learn(self, context: int, arm: int, reward: float) -> None:
        """Older turns of the context count less."""
        counts, sums = self.of(context)
        for place in range(len(ARMS)):
            counts[place] *= self.discount
            sums[place] *= self.discount
        counts[arm] += 1.0
        sums[arm] += reward

    def of(self, context: int) -> tuple[list[float], list[float]]:
        return (
            self.counts.setdefault(context, [0.0] * len(ARMS)),
            self.sums.setdefault(context, [0.0] * len(ARMS)),
        )


@dataclass(frozen=True, kw_only=True)
class DiscountedBandit:
    """Discounted UCB on the logarithm of goodput, in contexts of half an octave of running requests.

    With a shared memory all replicas learn together, which only a controller of the whole cluster can. Widths from
    0.003 to 0.03 and discounts of 0.99, 0.998 and 0.999 were tried on one seed of a short closed day; the best pair
    for separate and for shared memories is compared.
    """

    kind: ClassVar[str] = "bandit"
    discount: float = 0.99
    width: float = 0.005
    """Of the confidence bound."""
    memory: Memory | None = None
    """Shared by all replicas; None gives each its own."""

    def regulator(self, threshold: float, floor: float = 0.0) -> Player:
        return Player(self.memory or Memory(self.discount), self.width)


class Player:
    """One replica's turns."""

    range_used = None
    """A bandit has no range of thresholds."""

    def __init__(self, memory: Memory, width: float) -> None:
        self._memory, self._width = memory, width
        self._arm = 0
        self._tokens = self._busy = self._running = self._seconds = 0.0

    def update(self, sample: LoadSample, saturation: float, now: float) -> float:
        self._tokens += sample.tokens_per_second * sample.seconds
        self._busy += sample.busy_share * sample.seconds
        self._running += sample.num_running * sample.seconds
        self._seconds += sample.seconds
        if self._seconds >= _TURN_SECONDS:
            self._end_turn()
        return ARMS[self._arm]

    def _end_turn(self) -> None:
        running = self._running / self._seconds
        context = round(2 * math.log2(max(1.0, running)))
        if self._tokens > 0 and self._busy > 0:
            reward = math.log(self._tokens / self._busy) - _SLOPE * math.log(max(1.0, running))
            self._memory.learn(context, self._arm, reward)
        self._tokens = self._busy = self._running = self._seconds = 0.0
        self._arm = self._choose(context)

    def _choose(self, context: int) -> int:
        counts, sums = self._memory.of(context)
        untried = [arm for arm, count in enumerate(counts) if count < 0.5]
        if untried:
            return untried[0]
        total = math.log(sum(counts))
        return max(
            range(len(ARMS)),
            key=lambda arm: sums[arm] / counts[arm] + self._width * math.sqrt(2 * total / counts[arm]),
        )
