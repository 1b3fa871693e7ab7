"""How many replicas a load asks for, where verification gives way first. Arithmetic: no clock, no state.

A wish is raw: whoever acts on it adds delays and bounds, as Ray Serve does to what a policy returns.
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
    "nothing runs and nothing waits",
    "requests wait and there is no replica",
    "no replica has reported yet",
    "the load asks for more: thresholds are spent",
    "the load asks for more: overload does not wait for thresholds",
    "the load asks for more: no policy is in force",
    "the load asks for more, but thresholds go first",
    "the load asks for more, but replicas are starting",
    "the load fits fewer: thresholds are low",
    "the load fits fewer: no policy is in force",
    "the load fits fewer, but thresholds are high",
    "the load fits",
]
"""A colon stands before why it is done, a comma before why it is not."""

_EPSILON = 1e-6
"""By which averages of equal numbers may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLoad:
    """What one replica says; counts may be averages over a window."""

    running: float
    """Requests that hold cache."""
    waiting: float
    """Requests inside the replica that do not run yet."""
    max_running: float
    """Requests that it has slots for; above 0."""
    spent: float | None
    """How much of what its threshold policy may take away from verification is taken, 0 to 1. None where no policy is
    in force, and for one that never changes its threshold and so has nothing to say."""
    cache_usage: float | None = None
    """Share of cache pages in use, 0 to 1; None counts slots alone."""


@settings(frozen=True, kw_only=True, config=SETTINGS)
class ReplicaRule:
    """When replicas are added and when they go.

    Occupancy is requests over slots, with those that wait anywhere. Where the cache holds fewer requests of the
    present size than a replica has slots, that number counts as its slots.
    """

    target_occupancy: Positive = 0.8
    """Most that a replica is meant to have: replicas are added for what is above. Over 1 there is always a queue."""
    spend_first: Share = 0.7
    """`spent`, averaged over replicas, that thresholds must have reached before a replica is added."""
    overload_occupancy: Positive = 2.0
    """From here on neither slow thresholds nor starting replicas are waited for."""
    waiting_per_slot: Annotated[Number, Field(ge=1)] = 4.0
    """Waiting requests that one slot may serve in turn, which says how many replicas are added at once: 1 adds enough
    to start all of them together, and most of those are idle once the queue is gone."""
    release_below: Share = 0.3
    """`spent`, averaged over replicas, that must not be exceeded for a replica to go."""
    full_slowdown: Annotated[Number, Field(ge=1)] = 4.0
    """Seconds per token in a full replica over those in an empty one, as a load test measures them. Fewer replicas
    are fuller and so slower, which leaves more requests in flight: too small a number here lets a replica go that is
    called back at once."""
    headroom: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Share of the target, or of the slots where the target is above 1, that must stay free, by that reckoning, for a
    replica to go."""

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
        """Seconds per token over those in an empty replica; `occupancy` is of running requests."""
        return 1.0 + (self.full_slowdown - 1.0) * occupancy


@dataclass(frozen=True, slots=True)
class Wish:
    """How many replicas there should be, and why."""

    replicas: float
    reason: Reason


def wish(rule: ReplicaRule, loads: Sequence[ReplicaLoad], num_replicas: int, num_queued: float) -> Wish:
    """What the `loads` of replicas that have reported, and `num_queued` requests outside of replicas, ask for.

    `num_replicas` counts those that are meant to be there, starting ones too. A replica that has not reported is
    taken for empty where more might be added and for full where some might go, so that nothing is done twice while
    it starts.
    """
    if num_replicas <= 0:
        return _first(rule, loads, num_queued)
    if not loads:
        return Wish(float(num_replicas), "no replica has reported yet")
    fleet = _fleet(loads, num_replicas, num_queued)
    if fleet.demand < _EPSILON and not fleet.num_silent:
        return Wish(0.0, "nothing runs and nothing waits")
    if fleet.demand > rule.target_occupancy * fleet.slots * num_replicas * (1.0 + _EPSILON):
        return _more(rule, fleet)
    remaining = _remaining(rule, fleet)
    if remaining < num_replicas:
        return _fewer(rule, fleet, remaining)
    return Wish(float(num_replicas), "the load fits")


@dataclass(frozen=True, slots=True)
class _Fleet:
    """All replicas together."""

    num_replicas: int
    num_silent: int
    """Of them, that have not reported."""
    running: float
    waiting: float
    """Inside and outside of replicas."""
    slots: float
    """Of one replica, averaged."""
    occupancy: float
    """Running requests per slot of those that have reported."""
    spent: float | None

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
        _mean([load.spent for load in loads if load.spent is not None]),
    )


def _first(rule: ReplicaRule, loads: Sequence[ReplicaLoad], num_queued: float) -> Wish:
    """None is meant to be there; `loads` are of replicas that finish what they have and go."""
    if num_queued < _EPSILON:
        return Wish(0.0, "nothing runs and nothing waits")
    added = num_queued / rule.waiting_per_slot / (rule.target_occupancy * _slots(loads)) if loads else 1.0
    return Wish(float(_whole(added)), "requests wait and there is no replica")


def _more(rule: ReplicaRule, fleet: _Fleet) -> Wish:
    held = float(fleet.num_replicas)
    counted = fleet.running + fleet.waiting / rule.waiting_per_slot
    asked = max(held + 1.0, float(_whole(counted / (rule.target_occupancy * fleet.slots))))
    is_overload = fleet.demand >= rule.overload_occupancy * fleet.slots * fleet.num_replicas
    if fleet.num_silent and not is_overload:
        return Wish(held, "the load asks for more, but replicas are starting")
    if fleet.spent is None:
        return Wish(asked, "the load asks for more: no policy is in force")
    if fleet.spent >= rule.spend_first - _EPSILON:
        return Wish(asked, "the load asks for more: thresholds are spent")
    if is_overload:
        return Wish(asked, "the load asks for more: overload does not wait for thresholds")
    return Wish(held, "the load asks for more, but thresholds go first")


def _fewer(rule: ReplicaRule, fleet: _Fleet, remaining: int) -> Wish:
    if fleet.spent is None:
        return Wish(float(remaining), "the load fits fewer: no policy is in force")
    if fleet.spent <= rule.release_below + _EPSILON:
        return Wish(float(remaining), "the load fits fewer: thresholds are low")
    return Wish(float(fleet.num_replicas), "the load fits fewer, but thresholds are high")


def _remaining(rule: ReplicaRule, fleet: _Fleet) -> int:
    """Fewest replicas that stay within the target, or within their slots: a queue that is there would not go again.

    By Little's law the requests in flight grow by as much as each of them slows down between the occupancy that is
    and the one that would be.
    """
    occupancy = min(1.0, rule.target_occupancy)
    growth = max(1.0, rule.slowdown(occupancy) / rule.slowdown(fleet.occupancy))
    room = occupancy * fleet.slots * (1.0 - rule.headroom)
    return _whole(fleet.demand * growth / room + fleet.num_silent)


def _slots(loads: Sequence[ReplicaLoad]) -> float:
    """Requests that one replica can run: its slots, or as many of the present size as its cache holds."""
    slots = sum(load.max_running for load in loads) / len(loads)
    used = sum(load.cache_usage for load in loads if load.cache_usage is not None)
    if used <= 0.0:
        return slots
    running = sum(load.running for load in loads if load.cache_usage is not None)
    return min(slots, max(1.0, running / used))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _whole(replicas: float) -> int:
    """Rounded up, but not for what an average may be off by."""
    return math.ceil(replicas - _EPSILON)
