"""Numbers of replicas: the speculation-aware policy against Serve's default on ongoing requests, at equal hardware.

Both policies see averages over 30 seconds, Serve's look-back, and have the same bounds and Serve's default delays. A
new replica takes a minute to start; a replica that is removed takes no new requests and finishes the others. Both count
as hardware. Nodes do not die here, because Serve replaces them in the same way under both policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from autoscale.presets import load_preset
from autoscale.replicas import ReplicaLoad, ReplicaRule, recommend
from benchmarks.controller.days import ENGINES
from benchmarks.controller.figures import FleetFigures
from benchmarks.controller.signals import Controlled
from benchmarks.controller.traffic import FaultConfig, Traffic, TrafficConfig
from benchmarks.controller.world import Costs, EngineKind, Fleet, World

PRESETS = ("throughput", "cost", "latency")
HEADLINE = "throughput"
"""Chosen before the first run."""
ALONE = "throughput_rule_alone"
"""The headline's rule without a threshold policy, which shows the rule's share of the gain."""
OURS = (*PRESETS, ALONE)
TARGETS = (40, 56, 72, 96, 120, 160, 208, 260)
"""Targets of Serve's default, in ongoing requests per replica; a replica runs 160."""
FEWEST, MOST, PLACES = 4, 32, 40
"""Bounds on replicas, and places, which leave room for replicas that finish their requests."""
UPSCALE_DELAY, DOWNSCALE_DELAY, LOOK_BACK, START_SECONDS = 30, 600, 30, 60
TRAFFIC = TrafficConfig(day_seconds=14_400.0, nominal_replicas=18.0)
"""18 replicas just suffice at the peak of the day; in bursts they do not always."""
_FAULTS = FaultConfig(deaths_per_day=0.0)


class ScalingPolicy(Protocol):
    """Returns the number of replicas."""

    def __call__(self, loads: Sequence[ReplicaLoad], num_replicas: int) -> float: ...


@dataclass(frozen=True)
class ServeDefault:
    """Ongoing requests over the target, as in Serve's replica_queue_length_autoscaling_policy."""

    target_ongoing_requests: float

    def __call__(self, loads: Sequence[ReplicaLoad], num_replicas: int) -> float:
        return sum(load.running + load.waiting for load in loads) / self.target_ongoing_requests


@dataclass(frozen=True)
class SpeculationAware:
    """The rule of autoscale.policies.SpeculationAwarePolicy."""

    rule: ReplicaRule

    def __call__(self, loads: Sequence[ReplicaLoad], num_replicas: int) -> float:
        return recommend(self.rule, loads, num_replicas, 0.0).replicas


@dataclass
class Delay:
    """Serve's delay: a change takes effect once its direction has stayed the same for long enough."""

    since: int | None = None
    direction: int = 0

    def target(self, recommended: int, current: int, now: int) -> int:
        """The number of replicas to have from `now` on."""
        direction = (recommended > current) - (recommended < current)
        if direction == 0 or direction != self.direction:
            self.since, self.direction = now, direction
        delay = UPSCALE_DELAY if direction > 0 else DOWNSCALE_DELAY
        if direction == 0 or now - (self.since or 0) < delay:
            return current
        self.since, self.direction = None, 0
        return recommended


@dataclass
class Scaler:
    """The replicas of one fleet: off, starting, serving, or finishing."""

    world: World
    fleet: int
    policy: ScalingPolicy
    controlled: Controlled | None
    delay: Delay = field(default_factory=Delay)
    ready_at: np.ndarray = field(default_factory=lambda: np.where(np.arange(PLACES) < 2 * FEWEST, 0.0, math.inf))
    """[R] infinite for those that are off"""
    finishing: np.ndarray = field(default_factory=lambda: np.zeros(PLACES, dtype=bool))
    history: list[np.ndarray] = field(default_factory=list)
    """One [3, R] array per second of the look-back: running, waiting, range_used; NaN where nothing is reported"""

    @property
    def powered(self) -> np.ndarray:
        return np.isfinite(self.ready_at)

    @property
    def wanted(self) -> np.ndarray:
        return self.powered & ~self.finishing

    def second(self, running: np.ndarray, waiting: np.ndarray, now: int) -> None:
        """Take the observations of a second [R], and start or stop replicas."""
        serves = self.wanted & (self.ready_at <= now)
        range_used = self.controlled.range_used if self.controlled else np.zeros(PLACES)
        self.history = [*self.history[1 - LOOK_BACK :], np.where(serves, [running, waiting, range_used], np.nan)]
        self._switch_off(running + waiting)
        number = int(self.wanted.sum())
        recommended = math.ceil(self.policy(self._loads(serves), number) - 1e-6)
        self._go_to(self.delay.target(min(max(recommended, FEWEST), MOST), number, now), now)
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
            # Replicas that are starting are removed first, as in Serve.
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
    for fleet, (_, _, scaling, policy) in enumerate(arms):
        controlled = Controlled(world, fleet, policy, seed) if policy else None
        scalers.append(Scaler(world, fleet, scaling, controlled))
    world.accepting = np.array([scaler.wanted for scaler in scalers])
    fleet_figures, powered = FleetFigures(world), []
    seconds = int(TRAFFIC.day_seconds)
    for now in range(seconds):
        second, seen = world.step()
        for fleet, scaler in enumerate(scalers):
            if scaler.controlled:
                scaler.controlled.second(seen, second.dead, scaler.powered & (scaler.ready_at <= now))
            scaler.second(seen.running[fleet], seen.waiting[fleet], now)
        fleet_figures.add(second, seen)
        powered.append([int(scaler.powered.sum()) for scaler in scalers])
        if now % 1800 == 0:
            progress(now / seconds)
    return _results(arms, fleet_figures, np.array(powered))


def _ours(name: str) -> tuple[ScalingPolicy, Any]:
    preset = load_preset(HEADLINE if name == ALONE else name)
    return SpeculationAware(preset.replicas), None if name == ALONE else preset.controller.policy


def _results(arms: Sequence[Any], fleet_figures: FleetFigures, powered: np.ndarray) -> dict[str, Any]:
    """`powered` is [T, F]."""
    figures: dict[str, dict[str, Any]] = {engine: {} for engine in ENGINES}
    course: dict[str, list[float]] = {}
    for fleet, ((engine, name, *_), each) in enumerate(zip(arms, fleet_figures.figures())):
        figures[engine][name] = {**each, "mean_replicas": float(powered[:, fleet].mean())}
        if engine == "full":
            course[name] = powered[:, fleet].reshape(-1, 60).mean(1).round(2).tolist()
    return {
        "arms": figures,
        "course": {"load": [round(load, 3) for load, _, _ in fleet_figures.trace], "replicas": course},
    }


# Figures of all seeds.


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By engine and preset: tokens and slowest users over those of Serve's default on no less hardware."""
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
    """Figures of Serve's default at the same mean number of replicas, interpolated between two targets; better figures
    of a target with fewer replicas count instead. Below the smallest number, those of the target with the fewest."""
    sweep = sorted((arms[f"serve_{target}"] for target in TARGETS), key=lambda each: float(each["mean_replicas"]))
    sizes = [each["mean_replicas"] for each in sweep]

    def at_ours(key: str) -> float:
        values = np.array([each[key] for each in sweep])
        if key in _HIGHER_IS_BETTER:
            values = np.maximum.accumulate(values)
        return float(np.interp(arms[name]["mean_replicas"], sizes, values))

    return {key: at_ours(key) for key in _KEYS}
