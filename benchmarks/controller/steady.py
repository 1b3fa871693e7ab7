"""Constant loads, a load that rises and falls in steps, and a large cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from autoscale.goodput import GoodputSearch
from autoscale.thresholds import LoadCurve, ThresholdPolicy
from benchmarks.controller.days import ENGINES, SHIPPED
from benchmarks.controller.signals import Controlled
from benchmarks.controller.traffic import FaultConfig, Traffic, TrafficConfig
from benchmarks.controller.world import Costs, Fleet, World

LOADS: tuple[tuple[str, float], ...] = (
    ("open", 0.3),
    ("open", 0.7),
    ("open", 0.9),
    ("open", 1.0),
    ("open", 1.3),
    ("closed", 0.5),
    ("closed", 1.0),
    ("closed", 1.7),
)
_NO_CHANGE = FaultConfig(neighbour_share=0.0, deaths_per_day=0.0)
"""Slow devices and shared power budgets stay: they are constant in time, and the budgets feed back."""
_STEADY = TrafficConfig(low=0.5, high=0.5, burst=(1.0, 1.0))
_SETTLE_SECONDS, _WATCHED_SECONDS = 1800, 1200
_STEP_SECONDS = 600
_MOVES = 1e-3
"""Smaller changes of a threshold in a second count as none."""


def band_of(policy: ThresholdPolicy) -> float:
    """Range in which thresholds may move at constant load; a search tries both neighbours of its base."""
    if isinstance(policy, GoodputSearch):
        return 2 * policy.step
    assert isinstance(policy, LoadCurve)
    return policy.dead_band


def run_steady(kind: str, load: float, seed: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Movement of thresholds at constant load, by engine and policy."""
    traffic = replace(_STEADY, low=load, high=load, kind=kind)
    world, controlled = _fleets(traffic, seed)
    _run(world, controlled, _SETTLE_SECONDS)
    progress(_SETTLE_SECONDS / (_SETTLE_SECONDS + _WATCHED_SECONDS))
    thresholds = np.array(_run(world, controlled, _WATCHED_SECONDS))
    return {
        f"{fleet.engine} {fleet.name}": _movement(thresholds[:, place], band_of(SHIPPED[fleet.name]()))
        for place, fleet in enumerate(world.fleets)
    }


def _fleets(traffic: TrafficConfig, seed: int) -> tuple[World, list[Controlled]]:
    fleets = [Fleet(name, engine) for engine in ENGINES for name in SHIPPED]
    world = World(Costs.load(), fleets, Traffic(traffic, _NO_CHANGE, 24, 4, seed), seed)
    return world, [Controlled(world, place, SHIPPED[fleet.name](), seed) for place, fleet in enumerate(fleets)]


def _run(world: World, controlled: list[Controlled], seconds: int) -> list[np.ndarray]:
    thresholds = []
    for _ in range(seconds):
        second, seen = world.step()
        for each in controlled:
            each.second(seen, second.dead)
        thresholds.append(world.thresholds.copy())
    return thresholds


def _movement(thresholds: np.ndarray, band: float) -> dict[str, float]:
    """Of one fleet [T, R]."""
    width = thresholds.max(0) - thresholds.min(0)
    return {
        "band": band,
        "peak_to_peak": float(width.max()),
        "peak_to_peak_median": float(np.median(width)),
        "oscillation": max(0.0, float(width.max()) - band),
        "reversals_per_replica_hour": float(np.mean([_reversals(each) for each in thresholds.T]))
        * 3600
        / len(thresholds),
        "threshold": float(thresholds.mean()),
    }


def _reversals(thresholds: np.ndarray) -> int:
    moves = np.diff(thresholds)
    directions = np.sign(moves[np.abs(moves) > _MOVES])
    return int((directions[1:] != directions[:-1]).sum())


def run_step(seed: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Seconds until thresholds stay within the dead band around their final value, after a rise and a fall of load."""
    world, controlled = _fleets(_STEADY, seed)
    config = world.traffic.config
    seconds = {}
    for number, (name, load) in enumerate((("start", 0.3), ("rise", 1.0), ("fall", 0.3))):
        progress(number / 3)
        world.traffic.config = replace(config, low=load, high=load)
        seconds[name] = np.array(_run(world, controlled, _STEP_SECONDS))
    return {
        f"{fleet.engine} {fleet.name}": {
            name: _settling(seconds[name][:, place], band_of(SHIPPED[fleet.name]())) for name in ("rise", "fall")
        }
        for place, fleet in enumerate(world.fleets)
    }


def _settling(thresholds: np.ndarray, band: float) -> dict[str, float]:
    """For one fleet [T, R]; the final value of a threshold is its mean over the last minute."""
    away = np.abs(thresholds - thresholds[-60:].mean(0)) > band
    last = np.where(away.any(0), len(away) - np.argmax(away[::-1], axis=0), 0)
    return {"median_seconds": float(np.median(last)), "longest_seconds": float(last.max())}


# A large cluster.


def run_scale(
    num_replicas: int, policy: str, seconds: int, seed: int, progress: Callable[[float], None]
) -> dict[str, Any]:
    """CPU seconds of the controller per second, with one heartbeat per replica and one report per node of eight."""
    traffic = TrafficConfig(low=0.7, high=0.7, nominal_replicas=float(num_replicas))
    world = World(Costs.load(), [Fleet(policy, "full")], Traffic(traffic, FaultConfig(), num_replicas, 8, seed), seed)
    controlled = Controlled(world, 0, SHIPPED[policy](), seed)
    _run(world, [controlled], 5)
    controlled.seconds = 0.0
    for number in range(seconds):
        second, seen = world.step()
        controlled.second(seen, second.dead)
        if number % 15 == 0:
            progress(number / seconds)
    share = controlled.seconds / seconds
    return {"replicas": num_replicas, "policy": policy, "core_share": share, "per_1000": 1000 * share / num_replicas}
