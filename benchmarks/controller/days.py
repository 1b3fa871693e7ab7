"""Thresholds over a day on fixed hardware: every fleet has the same replicas, requests and faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoscale.goodput import GoodputSearch
from autoscale.thresholds import LoadCurve, ThresholdPolicy
from benchmarks.controller.bandit import DiscountedBandit, Memory
from benchmarks.controller.figures import FleetFigures
from benchmarks.controller.signals import Controlled
from benchmarks.controller.traffic import FaultConfig, Traffic, TrafficConfig
from benchmarks.controller.world import Costs, EngineKind, Fleet, World

FIXED = tuple(number / 10 for number in range(9))
"""Constant thresholds."""
SHIPPED: dict[str, Callable[[], ThresholdPolicy]] = {"load_curve": LoadCurve, "goodput": GoodputSearch}
BANDITS: dict[str, Callable[[], ThresholdPolicy]] = {
    "bandit": DiscountedBandit,
    "bandit_shared": lambda: DiscountedBandit(width=0.01, memory=Memory(discount=0.999)),
}
ENGINES: tuple[EngineKind, ...] = ("fixed", "full")


@dataclass(frozen=True, kw_only=True)
class Day:
    """One kind of day."""

    traffic: TrafficConfig
    max_running: int = 160


_SECONDS = 10_800.0
DAYS = {
    "open": Day(traffic=TrafficConfig(day_seconds=_SECONDS)),
    "closed": Day(traffic=TrafficConfig(day_seconds=_SECONDS, kind="closed")),
    "beyond_graphs": Day(traffic=TrafficConfig(day_seconds=_SECONDS), max_running=256),
}
MAIN = ("open", "closed")
"""Days of the headline figures: the drafts of all requests fit into captured graphs, as in a sensible configuration."""
NUM_REPLICAS, REPLICAS_PER_NODE = 24, 4


def run_day(day: Day, seed: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Figures of every arm by engine, and the course of the day."""
    adaptive = [(engine, name, make()) for engine in ENGINES for name, make in (SHIPPED | BANDITS).items()]
    fixed = [(engine, threshold) for engine in ENGINES for threshold in FIXED]
    fleets = [Fleet(f"{threshold:g}", engine, day.max_running) for engine, threshold in fixed]
    fleets += [Fleet(name, engine, day.max_running) for engine, name, _ in adaptive]
    traffic = Traffic(day.traffic, FaultConfig(), NUM_REPLICAS, REPLICAS_PER_NODE, seed)
    world = World(Costs.load(), fleets, traffic, seed)
    world.thresholds[: len(fixed)] = np.array([threshold for _, threshold in fixed])[:, None]
    controlled = [Controlled(world, len(fixed) + place, policy, seed) for place, (*_, policy) in enumerate(adaptive)]
    fleet_figures = FleetFigures(world)
    seconds = int(day.traffic.day_seconds)
    for now in range(seconds):
        second, seen = world.step()
        for each in controlled:
            each.second(seen, second.dead)
        fleet_figures.add(second, seen)
        if now % 1800 == 0:
            progress(now / seconds)
    arms: dict[str, dict[str, Any]] = {engine: {} for engine in ENGINES}
    for fleet, each in zip(fleets, fleet_figures.figures()):
        arms[fleet.engine][fleet.name] = each
    return {"arms": arms, "course": _course(fleet_figures, fleets, traffic)}


def _course(fleet_figures: FleetFigures, fleets: list[Fleet], traffic: Traffic) -> dict[str, Any]:
    """Data of the picture: load, and thresholds of a few replicas of the shipped policies."""
    shown = _typical(traffic)
    thresholds = {
        f"{fleet.engine} {fleet.name}": {
            kind: [round(float(each[place, replica]), 3) for _, _, each in fleet_figures.trace]
            for kind, replica in shown.items()
        }
        for place, fleet in enumerate(fleets)
        if fleet.name in SHIPPED
    }
    return {"load": [round(load, 3) for load, _, _ in fleet_figures.trace], "thresholds": thresholds}


def _typical(traffic: Traffic) -> dict[str, int]:
    """One replica of each kind: the first that is of no other kind."""
    capped = traffic.capped_node[traffic.node_of]
    slow, neighbour = traffic.device_factor > 1, traffic.has_neighbour
    kinds = {
        "healthy": ~capped & ~slow & ~neighbour,
        "slow GPU": slow & ~capped,
        "noisy neighbour": neighbour & ~capped,
        "shared power budget": capped & ~slow & ~neighbour,
    }
    return {name: int(np.flatnonzero(which)[0]) for name, which in kinds.items() if which.any()}


# Figures of all days.


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By engine and day: every arm over the best single fixed threshold of that day, averaged over seeds."""
    days = dict.fromkeys(run["day"] for run in runs)
    return {
        engine: {day: _over_fixed([run["arms"][engine] for run in runs if run["day"] == day]) for day in days}
        for engine in ENGINES
    }


def _over_fixed(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(name: str, key: str) -> float:
        return float(np.mean([arms[name][key] for arms in seeds]))

    names = list(seeds[0])
    fixed = [f"{threshold:g}" for threshold in FIXED]
    best = max(fixed, key=lambda name: mean(name, "tokens_per_second"))
    arms = {name: _ratios(seeds, name, best) for name in names}
    ours = max(SHIPPED, key=lambda name: mean(name, "tokens_per_second"))
    return {"best_fixed": best, "better_shipped": ours, "arms": arms}


def _ratios(seeds: list[dict[str, Any]], name: str, best: str) -> dict[str, Any]:
    """Of one arm; every ratio is of the same seed's day."""

    def ratio(key: str, of: str) -> float:
        return float(np.mean([arms[name][key] / arms[of][key] for arms in seeds]))

    phases = {
        phase: float(np.mean([_phase(arms[name], phase) / _phase(arms[best], phase) for arms in seeds]))
        for phase in seeds[0][name]["phases"]
    }
    return {
        "tokens_over_best_fixed": ratio("tokens_per_second", best),
        "tokens_over_no_threshold": ratio("tokens_per_second", "0"),
        "tokens_over_best_fixed_by_seed": [
            arms[name]["tokens_per_second"] / arms[best]["tokens_per_second"] for arms in seeds
        ],
        "slowest_percent_over_best_fixed": ratio("slowest_percent", best),
        "slowest_percent_over_no_threshold": ratio("slowest_percent", "0"),
        "tokens_over_best_fixed_by_phase": phases,
        "tokens_over_best_fixed_mean_of_phases": float(np.mean(list(phases.values()))),
        "tokens_per_second": float(np.mean([arms[name]["tokens_per_second"] for arms in seeds])),
        "slowest_percent": float(np.mean([arms[name]["slowest_percent"] for arms in seeds])),
        "refused_share": float(np.mean([arms[name]["refused_share"] for arms in seeds])),
        "wait_seconds": float(np.mean([arms[name]["wait_seconds"] for arms in seeds])),
    }


def _phase(arm: dict[str, Any], phase: str) -> float:
    return float(arm["phases"][phase]["tokens_per_second"])
