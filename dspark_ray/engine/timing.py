"""Where the seconds of a step go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTiming:
    """Seconds of one step; the loop is what is neither draft nor target."""

    total: float = 0.0
    draft: float = 0.0
    """Requesting proposals and waiting for them; with an inline drafter, drafting."""
    target: float = 0.0
    schedule: float = 0.0
    """Deciding whether to draft and how much to verify, and learning from the result; a part of the loop."""

    @property
    def loop(self) -> float:
        return self.total - self.draft - self.target


class Stopwatch:
    """Seconds of the parts of a step: `with watch.times("draft"): ...`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self.started = clock, clock()
        self._seconds = {"draft": 0.0, "target": 0.0, "schedule": 0.0}
        self._part, self._part_started = "", 0.0

    def times(self, part: str) -> Stopwatch:
        """Add what happens inside to `part`; parts do not nest."""
        self._part = part
        return self

    def __enter__(self) -> None:
        self._part_started = self._clock()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._part] += self._clock() - self._part_started

    def timing(self) -> StepTiming:
        """Up to now."""
        return StepTiming(total=self._clock() - self.started, **self._seconds)
