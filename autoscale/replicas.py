"""How many replicas a load needs when thresholds rise before replicas are added. Arithmetic: no clock, no state.

A recommendation is raw: the caller applies delays and bounds, as Ray Serve does to the result of a policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass as settings

from autoscale.settings import SETTINGS, Number, Positive, Share

Reason = Literal[
    "idle: no request runs or waits",
    "start: requests wait and there is no replica",
    "hold: no replica has reported yet",
    "scale up: thresholds have risen",
    "scale up: overload",
    "scale up: no threshold policy is in force",
    "hold: thresholds rise first",
    "hold: replicas are starting",
    "scale down: thresholds are low",
    "scale down: no threshold policy is in force",
    "hold: thresholds are still raised",
    "hold: the load fits",
]
"""The action and its reason."""

_EPSILON = 1e-6
"""Averages of equal numbers may differ by as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLoad:
    """Load of one replica as it reports it; counts may be averages over a window."""

    running: float
    """Requests that hold cache."""
    waiting: float
    """Requests inside the replica that do not run yet."""
    max_running: float
    """Slots for running requests; above 0."""
    range_used: float | None
    """Position of its threshold in the range of its policy: 0 at the lowest, 1 at the highest. None where no policy is
    in force, and for a policy with a single threshold."""
    cache_usage: float | None = None
    """Share of cache pages in use, 0 to 1; with None, slots alone limit the number of requests."""


@settings(frozen=True, kw_only=True, config=SETTINGS)
class ReplicaRule:
    """When replicas are added and removed.

    Occupancy is running and waiting requests, queued ones included, over slots. Where the cache holds fewer requests
    of the current size than a replica has slots, that number counts as its slots.
    """

    target_occupancy: Positive = 0.8
    """Occupancy above which replicas are added. A target above 1 keeps a queue."""
    spend_first: Share = 0.7
    """Thresholds rise first: a replica is added once the mean `range_used` of all replicas is at least this.
    `range_used` is the position of a threshold in its policy's range, 0 at the lowest and 1 at the highest."""
    overload_occupancy: Positive = 2.0
    """Occupancy from which replicas are added without waiting for thresholds to rise or for replicas to start."""
    waiting_per_slot: Annotated[Number, Field(ge=1)] = 4.0
    """Waiting requests that one slot serves one after the other, which determines how many replicas are added at once.
    With 1, all waiting requests start together, and most of the added replicas are idle once the queue is gone."""
    release_below: Share = 0.3
    """A replica is removed only while the mean `range_used` of all replicas is at most this."""
    full_slowdown: Annotated[Number, Field(ge=1)] = 4.0
    """Seconds per token in a full replica over those in an empty one, from a load test. Fewer replicas are fuller and
    therefore slower, which leaves more requests in flight: with too small a number, a replica is removed and added
    again at once."""
    headroom: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Share of the target (of the slots, where the target is above 1) that must stay free after a replica is
    removed."""

    @field_validator("overload_occupancy")
    @classmethod
    def _is_above_the_target(cls, occupancy: float, others: ValidationInfo) -> float:
        target = others.data.get("target_occupancy", 0.0)
        if occupancy < target:
            raise ValueError(f"expected at least target_occupancy={target}")
        return occupancy

    @field_validator("release_below")
    @classmethod
    def _is_not_above_spend_first(cls, share: float, others: ValidationInfo) -> float:
        most = others.data.get("spend_first", 1.0)
        if share > most:
            raise ValueError(f"expected at most spend_first={most}")
        return share

    def slowdown(self, occupancy: float) -> float:
        """Seconds per token over those in an empty replica; `occupancy` counts running requests alone."""
        return 1.0 + (self.full_slowdown - 1.0) * occupancy


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Number of replicas, and the reason."""

    replicas: float
    reason: Reason


def recommend(rule: ReplicaRule, loads: Sequence[ReplicaLoad], num_replicas: int, num_queued: float) -> Recommendation:
    """Number of replicas for the `loads` of those that have reported and `num_queued` requests outside of replicas.

    `num_replicas` is the current target and includes replicas that are starting. A replica that has not reported
    counts as empty when replicas might be added and as full when some might be removed, so that no step is taken twice
    while it starts.
    """
    if num_replicas <= 0:
        return _start(rule, loads, num_queued)
    if not loads:
        return Recommendation(float(num_replicas), "hold: no replica has reported yet")
    fleet = _fleet(loads, num_replicas, num_queued)
    if fleet.demand < _EPSILON and not fleet.num_silent:
        return Recommendation(0.0, "idle: no request runs or waits")
    if fleet.demand > rule.target_occupancy * fleet.slots * num_replicas * (1.0 + _EPSILON):
        return _scale_up(rule, fleet)
    remaining = _remaining(rule, fleet)
    if remaining < num_replicas:
        return _scale_down(rule, fleet, remaining)
    return Recommendation(float(num_replicas), "hold: the load fits")


@dataclass(frozen=True, slots=True)
class _Fleet:
    """All replicas together."""

    num_replicas: int
    num_silent: int
    """Those that have not reported."""
    running: float
    waiting: float
    """Inside and outside of replicas."""
    slots: float
    """Per replica, averaged."""
    occupancy: float
    """Running requests per slot of the replicas that have reported."""
    range_used: float | None

    @property
    def demand(self) -> float:
        return self.running + self.waiting


def _fleet(loads: Sequence[ReplicaLoad], num_replicas: int, num_queued: float) -> _Fleet:
    running, slots = sum(load.running for load in loads), _slots(loads)
    return _Fleet(
        num_replicas,
        max(0, num_replicas - len(loads)),
        running,
        num_queued + sum(load.waiting for load in loads),
        slots,
        running / (slots * len(loads)),
        _mean([load.range_used for load in loads if load.range_used is not None]),
    )


def _start(rule: ReplicaRule, loads: Sequence[ReplicaLoad], num_queued: float) -> Recommendation:
    """From a target of no replica; `loads` are those of replicas that finish their requests and stop."""
    if num_queued < _EPSILON:
        return Recommendation(0.0, "idle: no request runs or waits")
    added = num_queued / rule.waiting_per_slot / (rule.target_occupancy * _slots(loads)) if loads else 1.0
    return Recommendation(float(_rounded_up(added)), "start: requests wait and there is no replica")


def _scale_up(rule: ReplicaRule, fleet: _Fleet) -> Recommendation:
    current = float(fleet.num_replicas)
    counted = fleet.running + fleet.waiting / rule.waiting_per_slot
    more = max(current + 1.0, float(_rounded_up(counted / (rule.target_occupancy * fleet.slots))))
    is_overload = fleet.demand >= rule.overload_occupancy * fleet.slots * fleet.num_replicas
    if fleet.num_silent and not is_overload:
        return Recommendation(current, "hold: replicas are starting")
    if fleet.range_used is None:
        return Recommendation(more, "scale up: no threshold policy is in force")
    if fleet.range_used >= rule.spend_first - _EPSILON:
        return Recommendation(more, "scale up: thresholds have risen")
    if is_overload:
        return Recommendation(more, "scale up: overload")
    return Recommendation(current, "hold: thresholds rise first")


def _scale_down(rule: ReplicaRule, fleet: _Fleet, remaining: int) -> Recommendation:
    if fleet.range_used is None:
        return Recommendation(float(remaining), "scale down: no threshold policy is in force")
    if fleet.range_used <= rule.release_below + _EPSILON:
        return Recommendation(float(remaining), "scale down: thresholds are low")
    return Recommendation(float(fleet.num_replicas), "hold: thresholds are still raised")


def _remaining(rule: ReplicaRule, fleet: _Fleet) -> int:
    """Fewest replicas that stay within the target, and within their slots, as an existing queue would not drain.

    By Little's law the number of requests in flight grows by the factor by which each request slows down between the
    present occupancy and the higher one.
    """
    occupancy = min(1.0, rule.target_occupancy)
    growth = max(1.0, rule.slowdown(occupancy) / rule.slowdown(fleet.occupancy))
    room = occupancy * fleet.slots * (1.0 - rule.headroom)
    return _rounded_up(fleet.demand * growth / room + fleet.num_silent)


def _slots(loads: Sequence[ReplicaLoad]) -> float:
    """Requests that one replica can run: its slots, or as many of the current size as its cache holds."""
    slots = sum(load.max_running for load in loads) / len(loads)
    used = sum(load.cache_usage for load in loads if load.cache_usage is not None)
    if used <= 0.0:
        return slots
    running = sum(load.running for load in loads if load.cache_usage is not None)
    return min(slots, max(1.0, running / used))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded_up(replicas: float) -> int:
    """Rounded up, except from a whole number that an average exceeds by rounding alone."""
    return math.ceil(replicas - _EPSILON)
