"""How many replicas: the speculation-aware policy against Serve's default on ongoing requests, at equal hardware.

Both see averages over 30 seconds, as Serve's look-back has it, and are held to the same bounds and to Serve's default
delays. A new replica takes a minute to start; one that has to go takes no new requests and finishes those it has. Both
are hardware. Nodes do not die here: who replaces them is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from autoscale.presets import load_preset
from autoscale.replicas import ReplicaLoad, ReplicaRule, recommend
from benchmarks.controller.book import Book
from benchmarks.controller.days import ENGINES
from benchmarks.controller.signals import Controlled
from benchmarks.controller.traffic import FaultConfig, Traffic, TrafficConfig
from benchmarks.controller.world import Costs, EngineKind, Fleet, World

PRESETS = ("throughput", "cost", "latency")
HEADLINE = "throughput"
"""Chosen by its name, before any was run."""
ALONE = "throughput_rule_alone"
"""The headline's rule with no threshold policy: what is left of the gain is the rule's."""
OURS = (*PRESETS, ALONE)
TARGETS = (40, 56, 72, 96, 120, 160, 208, 260)
"""Ongoing requests per replica that Serve's default aims at; a replica runs 160."""
FEWEST, MOST, PLACES = 4, 32, 40
"""Bounds on replicas, and room for those that still finish their requests."""
UPSCALE_DELAY, DOWNSCALE_DELAY, LOOK_BACK, START_SECONDS = 30, 600, 30, 60
TRAFFIC = TrafficConfig(day_seconds=14_400.0, nominal_replicas=18.0)
"""At the day's peak 18 replicas would just do; in bursts there are not always enough."""
_FAULTS = FaultConfig(deaths_per_day=0.0)


class Wisher(Protocol):
    """Says how many replicas there should be."""

    def __call__(self, loads: Sequence[ReplicaLoad], num_replicas: int) -> float: ...


@dataclass(frozen=True)
class ServeDefault:
    """Ongoing requests over the target, as Serve's replica_queue_length_autoscaling_policy has it."""

    target_ongoing_requests: float

    def __call__(self, loads: Sequence[ReplicaLoad], num_replicas: int) -> float:
        return sum(load.running + load.waiting for load in loads) / self.target_ongoing_requests


@dataclass(frozen=True)
class SpeculationAware:
    """Ours."""

    rule: ReplicaRule

    def __call__(self, loads: Sequence[ReplicaLoad], num_replicas: int) -> float:
        return recommend(self.rule, loads, num_replicas, 0.0).replicas


@dataclass
class Delay:
    """Serve's: a wish counts when it has pointed the same way for long enough."""

    since: int | None = None
    direction: int = 0

    def target(self, wished: int, now_is: int, now: int) -> int:
        """From what there is now to what there should be."""
        direction = (wished > now_is) - (wished < now_is)
        if direction == 0 or direction != self.direction:
            self.since, self.direction = now, direction
        delay = UPSCALE_DELAY if direction > 0 else DOWNSCALE_DELAY
        if direction == 0 or now - (self.since or 0) < delay:
            return now_is
        self.since, self.direction = None, 0
        return wished


@dataclass
class Scaler:
    """The replicas of one fleet: off, starting, serving, or finishing."""

    world: World
    fleet: int
    wisher: Wisher
    controlled: Controlled | None
    delay: Delay = field(default_factory=Delay)
    ready_at: np.ndarray = field(default_factory=lambda: np.where(np.arange(PLACES) < 2 * FEWEST, 0.0, math.inf))
    """[R] infinite for those that are off"""
    finishing: np.ndarray = field(default_factory=lambda: np.zeros(PLACES, dtype=bool))
    history: list[np.ndarray] = field(default_factory=list)
    """Of the look-back, [3, R]: running, waiting, range_used; not a number where nothing is reported"""

    @property
    def powered(self) -> np.ndarray:
        return np.isfinite(self.ready_at)

    @property
    def wanted(self) -> np.ndarray:
        return self.powered & ~self.finishing

    def second(self, running: np.ndarray, waiting: np.ndarray, now: int) -> None:
        """What was seen of the fleet in a second [R], and what follows from it."""
        serves = self.wanted & (self.ready_at <= now)
        range_used = self.controlled.range_used if self.controlled else np.zeros(PLACES)
        self.history = [*self.history[1 - LOOK_BACK :], np.where(serves, [running, waiting, range_used], np.nan)]
        self._switch_off(running + waiting)
        number = int(self.wanted.sum())
        wished = math.ceil(self.wisher(self._loads(serves), number) - 1e-6)
        self._go_to(self.delay.target(min(max(wished, FEWEST), MOST), number, now), now)
        self.world.accepting[self.fleet] = self.wanted & (self.ready_at <= now + 1)

    def _loads(self, serves: np.ndarray) -> list[ReplicaLoad]:
        with np.errstate(invalid="ignore"):
            known = np.nanmean(np.array(self.history)[:, :, serves], axis=0)
        slots = float(self.world.max_running[self.fleet, 0])
        return [
            ReplicaLoad(
                running=running, waiting=waiting, max_running=slots, range_used=range_used if self.controlled else None
            )
            for running, waiting, range_used in known.T.tolist()
        ]

    def _switch_off(self, requests: np.ndarray) -> None:
        done = self.finishing & (requests == 0)
        self.ready_at[done], self.finishing[done] = math.inf, False
        self.world.thresholds[self.fleet, done & (self.controlled is not None)] = 0.0

    def _go_to(self, target: int, now: int) -> None:
        wanted = np.flatnonzero(self.wanted)
        if target > len(wanted):
            free = np.flatnonzero(~self.powered)[: target - len(wanted)]
            self.ready_at[free] = now + START_SECONDS
        elif target < len(wanted):
            # Those that start have nothing to finish and go first, as in Serve.
            latest = sorted(wanted, key=lambda place: (self.ready_at[place], place))[target - len(wanted) :]
            self.finishing[latest] = True


def run_replicas(seed: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Figures of all arms by engine, and replicas over time."""
    defaults = [(engine, f"serve_{target}", ServeDefault(target), None) for engine in ENGINES for target in TARGETS]
    ours = [(engine, name, *_ours(name)) for engine in ENGINES for name in OURS]
    arms = [*defaults, *ours]
    traffic = Traffic(TRAFFIC, _FAULTS, PLACES, 4, seed)
    world = World(Costs.load(), [Fleet(name, engine) for engine, name, *_ in arms], traffic, seed)
    scalers = []
    for fleet, (_, _, wisher, policy) in enumerate(arms):
        controlled = Controlled(world, fleet, policy, seed) if policy else None
        scalers.append(Scaler(world, fleet, wisher, controlled))
    world.accepting = np.array([scaler.wanted for scaler in scalers])
    book, powered = Book(world), []
    seconds = int(TRAFFIC.day_seconds)
    for now in range(seconds):
        second, seen = world.step()
        for fleet, scaler in enumerate(scalers):
            if scaler.controlled:
                scaler.controlled.second(seen, second.dead, scaler.powered & (scaler.ready_at <= now))
            scaler.second(seen.running[fleet], seen.waiting[fleet], now)
        book.add(second, seen)
        powered.append([int(scaler.powered.sum()) for scaler in scalers])
        if now % 1800 == 0:
            progress(now / seconds)
    return _results(arms, book, np.array(powered))


def _ours(name: str) -> tuple[Wisher, Any]:
    preset = load_preset(HEADLINE if name == ALONE else name)
    return SpeculationAware(preset.replicas), None if name == ALONE else preset.controller.policy


def _results(arms: Sequence[Any], book: Book, powered: np.ndarray) -> dict[str, Any]:
    """`powered` is [T, F]."""
    figures: dict[str, dict[str, Any]] = {engine: {} for engine in ENGINES}
    course: dict[str, list[float]] = {}
    for fleet, ((engine, name, *_), each) in enumerate(zip(arms, book.figures())):
        figures[engine][name] = {**each, "mean_replicas": float(powered[:, fleet].mean())}
        if engine == "full":
            course[name] = powered[:, fleet].reshape(-1, 60).mean(1).round(2).tolist()
    return {"arms": figures, "course": {"load": [round(load, 3) for load, _, _ in book.trace], "replicas": course}}


# What follows from the runs of all seeds.


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By engine and preset: tokens and slowest users over what Serve's default does with no less hardware."""
    return {engine: {name: _over_default(runs, engine, name) for name in OURS} for engine in ENGINES}


def _over_default(runs: Sequence[dict[str, Any]], engine: EngineKind, name: str) -> dict[str, Any]:
    pairs = [(run["arms"][engine][name], _equal_hardware(run["arms"][engine], name)) for run in runs]

    def mean(key: str) -> float:
        return float(np.mean([ours[key] for ours, _ in pairs]))

    def ratio(key: str) -> float:
        return float(np.mean([ours[key] / default[key] for ours, default in pairs]))

    return {
        "tokens_over_serve_default": ratio("tokens_per_second"),
        "tokens_over_serve_default_by_seed": [
            ours["tokens_per_second"] / default["tokens_per_second"] for ours, default in pairs
        ],
        "slowest_percent_over_serve_default": ratio("slowest_percent"),
        "mean_replicas_over_serve_default": ratio("mean_replicas"),
        **{key: mean(key) for key in _KEYS},
        "serve_default": {key: float(np.mean([default[key] for _, default in pairs])) for key in _KEYS},
    }


_KEYS = ("mean_replicas", "tokens_per_second", "slowest_percent", "median_user", "wait_seconds", "refused_share")


_HIGHER_IS_BETTER = ("tokens_per_second", "slowest_percent", "median_user")


def _equal_hardware(arms: dict[str, Any], name: str) -> dict[str, float]:
    """Of Serve's default with as many replicas on average, on the line between the two targets around, or what a target
    with fewer replicas does better. Where ours uses fewer than any target does, the one that uses fewest."""
    sweep = sorted((arms[f"serve_{target}"] for target in TARGETS), key=lambda each: float(each["mean_replicas"]))
    sizes = [each["mean_replicas"] for each in sweep]

    def at_ours(key: str) -> float:
        values = np.array([each[key] for each in sweep])
        if key in _HIGHER_IS_BETTER:
            values = np.maximum.accumulate(values)
        return float(np.interp(arms[name]["mean_replicas"], sizes, values))

    return {key: at_ours(key) for key in _KEYS}
