"""Figures of fleets: tokens, speeds of users, waits and refusals, by phase of the day and over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.controller.traffic import PHASES, Second
from benchmarks.controller.world import Observed, World

_SPEEDS = np.geomspace(1.0, 2000.0, 1501)
"""Edges of the bins for tokens per second of a user, half a percent apart."""


class FleetFigures:
    """Figures of every fleet of a world; letters as there, and P phases."""

    def __init__(self, world: World, trace_seconds: int = 60) -> None:
        num_fleets = len(world.fleets)
        self._world, self._trace_seconds = world, trace_seconds
        self._seconds = np.zeros(len(PHASES))
        self._tokens = np.zeros((len(PHASES), num_fleets))
        self._speeds = np.zeros((len(PHASES), num_fleets, len(_SPEEDS) + 1))
        self._waiting = np.zeros(num_fleets)
        self._recent: list[tuple[float, np.ndarray, np.ndarray]] = []
        self.trace: list[tuple[float, np.ndarray, np.ndarray]] = []
        """(load, tokens per second [F], thresholds [F, R]), averages over `trace_seconds`"""

    def add(self, second: Second, seen: Observed) -> None:
        """Count a simulated second."""
        phase = PHASES.index(second.phase)
        tokens = seen.tokens.sum(1)
        self._seconds[phase] += 1
        self._tokens[phase] += tokens
        self._waiting += seen.waiting.sum(1)
        self._count_speeds(phase)
        self._recent.append((second.load, tokens, self._world.thresholds.copy()))
        if len(self._recent) == self._trace_seconds:
            loads, rates, thresholds = zip(*self._recent)
            self.trace.append((float(np.mean(loads)), np.mean(rates, axis=0), np.mean(thresholds, axis=0)))
            self._recent = []

    def _count_speeds(self, phase: int) -> None:
        """A request counts once per second at whose end it runs."""
        world = self._world
        num_fleets = len(world.fleets)
        bins = np.searchsorted(_SPEEDS, world.per_user) + np.arange(num_fleets)[:, None, None] * (len(_SPEEDS) + 1)
        counts = np.bincount(bins.ravel(), world.running.ravel(), num_fleets * (len(_SPEEDS) + 1))
        self._speeds[phase] += counts.reshape(num_fleets, -1)

    def figures(self) -> list[dict[str, Any]]:
        """Figures by name, one mapping per fleet; speeds are tokens per second."""
        return [self._figures_of(fleet) for fleet in range(len(self._world.fleets))]

    def _figures_of(self, fleet: int) -> dict[str, Any]:
        world, speeds = self._world, self._speeds[:, fleet]
        arrived = max(1.0, float(world.arrived[fleet].sum()))
        phases = {
            name: {
                "tokens_per_second": float(self._tokens[phase, fleet] / self._seconds[phase]),
                "slowest_percent": _quantile(speeds[phase], 0.01),
            }
            for phase, name in enumerate(PHASES)
            if self._seconds[phase] > 0
        }
        return {
            "tokens_per_second": float(self._tokens[:, fleet].sum() / self._seconds.sum()),
            "slowest_percent": _quantile(speeds.sum(0), 0.01),
            "median_user": _quantile(speeds.sum(0), 0.5),
            "wait_seconds": float(self._waiting[fleet]) / arrived,
            "refused_share": float(world.refused[fleet].sum()) / arrived,
            "phases": phases,
        }


def _quantile(counts: np.ndarray, share: float) -> float:
    total = counts.sum()
    if total <= 0:
        return 0.0
    place = int(np.searchsorted(counts.cumsum(), share * total))
    return float(_SPEEDS[min(place, len(_SPEEDS) - 1)])
