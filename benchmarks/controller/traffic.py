"""Requests and faults over a simulated day: the inputs of all fleets.

Every fleet of a world has the same inputs in every second, so that fleets differ by their policies alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.schedule.simulation import ACCEPTANCES

CLASSES = tuple(ACCEPTANCES)
"""math, code, chat"""
MEAN_TOKENS = np.array([3000.0, 2000.0, 1000.0])
"""Mean tokens of an answer by class; lengths are geometric."""

Phase = Literal["night", "day", "peak", "burst"]
PHASES: tuple[Phase, ...] = ("night", "day", "peak", "burst")


@dataclass(frozen=True, kw_only=True)
class TrafficConfig:
    """Arrivals. Load 1 is what `nominal_tokens_per_second` per replica can just serve."""

    day_seconds: float = 21_600.0
    """From one night to the next; a quarter of a real day, so that load changes four times as fast."""
    low: float = 0.1
    high: float = 1.0
    """Load at night and at noon."""
    burst: tuple[float, float] = (1.2, 1.7)
    """Factors of a burst, the smallest and the largest."""
    burst_seconds: tuple[float, float] = (60.0, 300.0)
    seconds_between_bursts: float = 1500.0
    """On average."""
    nominal_tokens_per_second: float = 24_000.0
    """Of a replica: about its rate with all 160 slots in use and every draft verified, on the mean mix."""
    nominal_replicas: float = 24.0
    """Load 1 is the capacity of so many replicas."""
    kind: Literal["open", "closed"] = "open"
    """open: a Poisson stream independent of the answers. closed: users who think, ask, and wait for the answer."""
    think_seconds: float = 10.0
    """Of a closed user, on average, between an answer and the next request."""
    users_per_replica: float = 200.0
    """Closed users at load 1."""


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """Faults. Each replica has one device."""

    slow_share: float = 0.125
    slow_factor: float = 1.3
    """Constant factor on the step seconds of a slow device."""
    neighbour_share: float = 0.25
    """Share of devices that another process uses from time to time."""
    neighbour_factor: float = 1.4
    neighbour_seconds: tuple[float, float] = (180.0, 720.0)
    """With and without the neighbour, on average."""
    capped_share: float = 0.34
    """Share of nodes whose devices have a common power budget that is too small for full load on all of them."""
    deaths_per_day: float = 2.0
    """Nodes that die, one at a time."""
    death_seconds: float = 600.0
    """Until a dead node is back."""


NO_FAULTS = FaultConfig(slow_share=0.0, neighbour_share=0.0, capped_share=0.0, deaths_per_day=0.0)


@dataclass(frozen=True)
class Second:
    """Inputs of a second for every fleet. R replicas, K classes."""

    load: float
    phase: Phase
    requests_per_second: np.ndarray
    """[K] of an open stream"""
    users: float
    """Of closed traffic"""
    shares: np.ndarray
    """[K] of the classes among new requests"""
    slowness: np.ndarray
    """[R] factor of devices by their neighbours"""
    dead: np.ndarray
    """[R]"""


def shares_at(day: float) -> np.ndarray:
    """Classes among requests [K] at a time of day, 0 to 1: code at noon, chat in the evening."""
    angle = 2 * np.pi * day
    chat = 0.4 + 0.2 * np.cos(angle - 2 * np.pi * 0.8)
    code = (1 - chat) * (0.5 - 0.3 * np.cos(angle))
    return np.array([1 - chat - code, code, chat])


class Traffic:
    """The seconds of a day that begins at night."""

    def __init__(
        self, config: TrafficConfig, faults: FaultConfig, num_replicas: int, replicas_per_node: int, seed: int
    ) -> None:
        self.config, self.faults = config, faults
        self._rng = np.random.default_rng((seed, 1))
        self.node_of = np.arange(num_replicas) // replicas_per_node
        self.num_nodes = int(self.node_of[-1]) + 1
        place = self._rng.permutation(num_replicas) / num_replicas
        self.device_factor = np.where(place < faults.slow_share, faults.slow_factor, 1.0)
        """[R] slow devices"""
        self.has_neighbour = place >= 1 - faults.neighbour_share
        self.capped_node = self._rng.permutation(self.num_nodes) < round(faults.capped_share * self.num_nodes)
        self._neighbour = np.zeros(num_replicas, dtype=bool)
        self._burst_ends, self._burst_factor = -1.0, 1.0
        self._death_ends, self._dead_node = -1.0, -1

    def second(self, now: float) -> Second:
        """Call once per second, in order."""
        config = self.config
        day = (now / config.day_seconds) % 1.0
        base = config.low + (config.high - config.low) * (0.5 - 0.5 * np.cos(2 * np.pi * day))
        burst = self._burst(now)
        load, shares = float(base * burst), shares_at(day)
        tokens = load * config.nominal_replicas * config.nominal_tokens_per_second
        requests = tokens * shares / float(shares @ MEAN_TOKENS)
        users = load * config.nominal_replicas * config.users_per_replica
        phase = self._phase(base, burst)
        return Second(load, phase, requests, users, shares, self._slowness(), self._dead(now))

    def _phase(self, base: float, burst: float) -> Phase:
        if burst > 1.0:
            return "burst"
        third = (self.config.high - self.config.low) / 3
        if base < self.config.low + third:
            return "night"
        return "day" if base < self.config.low + 2 * third else "peak"

    def _burst(self, now: float) -> float:
        config = self.config
        begins = self._rng.random() < 1 / config.seconds_between_bursts
        seconds, factor = self._rng.uniform(*config.burst_seconds), self._rng.uniform(*config.burst)
        if begins and now >= self._burst_ends and config.burst[1] > 1.0:
            self._burst_ends, self._burst_factor = now + seconds, factor
        return self._burst_factor if now < self._burst_ends else 1.0

    def _slowness(self) -> np.ndarray:
        on, off = self.faults.neighbour_seconds
        changes = self._rng.random(len(self._neighbour)) < np.where(self._neighbour, 1 / on, 1 / off)
        self._neighbour = (self._neighbour ^ changes) & self.has_neighbour
        return np.where(self._neighbour, self.faults.neighbour_factor, 1.0)

    def _dead(self, now: float) -> np.ndarray:
        dies = self._rng.random() < self.faults.deaths_per_day / self.config.day_seconds
        node = int(self._rng.integers(self.num_nodes))
        if dies and now >= self._death_ends:
            self._death_ends, self._dead_node = now + self.faults.death_seconds, node
        return (self.node_of == self._dead_node) & (now < self._death_ends)
