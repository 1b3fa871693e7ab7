"""The rule on loads made by hand, then both halves of autoscaling in a closed loop with a load that stays the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
from pydantic import ValidationError

from autoscale.controller import ControllerConfig, LoadController
from autoscale.presets import load_preset
from autoscale.replicas import Recommendation, ReplicaLoad, ReplicaRule, recommend
from autoscale.signals import LoadSample

# 8 of 10 slots are the target; from 20 requests per replica on, replicas are added without waiting.
RULE = ReplicaRule(
    target_occupancy=0.8,
    spend_first=0.7,
    overload_occupancy=2.0,
    waiting_per_slot=4.0,
    release_below=0.3,
    full_slowdown=1.0,
    headroom=0.0,
)


def load(
    running: float, waiting: float = 0.0, range_used: float | None = 0.0, cache: float | None = None
) -> ReplicaLoad:
    return ReplicaLoad(running=running, waiting=waiting, max_running=10, range_used=range_used, cache_usage=cache)


def recommended(
    loads: list[ReplicaLoad], num_replicas: int | None = None, queued: float = 0.0, **rule: float
) -> Recommendation:
    return recommend(replace(RULE, **rule), loads, len(loads) if num_replicas is None else num_replicas, queued)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("target_occupancy", 0.0, "greater than 0"),
        ("target_occupancy", math.nan, "a finite number"),
        ("spend_first", 1.5, "less than or equal to 1"),
        ("release_below", -0.1, "greater than or equal to 0"),
        ("release_below", 0.8, "at most spend_first=0.7"),
        ("overload_occupancy", 0.7, "at least target_occupancy=0.8"),
        ("waiting_per_slot", 0.5, "greater than or equal to 1"),
        ("full_slowdown", 0.9, "greater than or equal to 1"),
        ("headroom", 1.0, "less than 1"),
    ],
)
def test_an_invalid_rule_is_refused(field, value, expected):
    with pytest.raises(ValidationError) as caught:
        replace(RULE, **{field: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (field,)
    assert error["msg"].endswith(expected)


def test_at_most_the_target_is_left_alone():
    assert recommended([load(8, range_used=1.0)]) == Recommendation(1.0, "hold: the load fits")
    assert recommended([load(8.0000001, range_used=1.0)]).replicas == 1


@pytest.mark.parametrize("range_used", [0.0, 0.69])
def test_thresholds_rise_first(range_used):
    assert recommended([load(9, range_used=range_used)]) == Recommendation(1.0, "hold: thresholds rise first")


@pytest.mark.parametrize("range_used", [0.7, 1.0])
def test_replicas_are_added_once_thresholds_have_risen(range_used):
    assert recommended([load(9, range_used=range_used)]) == Recommendation(2.0, "scale up: thresholds have risen")


def test_the_mean_of_range_used_counts():
    assert recommended([load(9, range_used=1.0), load(9, range_used=0.3)]).replicas == 2
    assert recommended([load(9, range_used=1.0), load(9, range_used=0.4)]).replicas == 3


def test_replicas_without_a_policy_do_not_count_for_the_mean():
    assert recommended([load(9, range_used=1.0), load(9, range_used=None)]).replicas == 3
    assert recommended([load(9, range_used=0.5), load(9, range_used=None)]).replicas == 2


def test_without_any_policy_occupancy_alone_decides():
    assert recommended([load(9, range_used=None)]) == Recommendation(2.0, "scale up: no threshold policy is in force")
    assert recommended([load(3, range_used=None)] * 2) == Recommendation(
        1.0, "scale down: no threshold policy is in force"
    )


def test_overload_does_not_wait_for_thresholds():
    reason = "scale up: overload"
    assert recommended([load(10, 9, range_used=0.0)]).replicas == 1
    assert recommended([load(10, 10, range_used=0.0)]) == Recommendation(2.0, reason)


def test_requests_outside_of_replicas_count_as_waiting():
    assert recommended([load(10, range_used=0.0)], queued=9).replicas == 1
    assert recommended([load(10, range_used=0.0)], queued=10).replicas == 2


@pytest.mark.parametrize(("waiting_per_slot", "expected"), [(1.0, 14), (4.0, 5), (100.0, 2)])
def test_a_slot_serves_several_waiting_requests_in_turn(waiting_per_slot, expected):
    assert recommended([load(10, 60)], queued=40, waiting_per_slot=waiting_per_slot).replicas == expected


def test_a_load_that_asks_for_more_gets_at_least_one_more():
    assert recommended([load(7, 2, range_used=1.0)], waiting_per_slot=100.0).replicas == 2


def test_an_average_that_is_hardly_above_a_whole_number_is_that_number():
    assert recommended([load(10, 6.0000001, range_used=1.0)], waiting_per_slot=1.0).replicas == 2


@pytest.mark.parametrize("range_used", [0.0, 0.3])
def test_replicas_go_when_thresholds_are_low_and_the_load_fits_fewer(range_used):
    assert recommended([load(4, range_used=range_used)] * 4) == Recommendation(2.0, "scale down: thresholds are low")


def test_no_replica_goes_while_thresholds_are_high():
    assert recommended([load(4, range_used=0.31)] * 4) == Recommendation(4.0, "hold: thresholds are still raised")


def test_headroom_stays_free():
    assert recommended([load(4)] * 2).replicas == 1
    assert recommended([load(4)] * 2, headroom=0.1).replicas == 2
    assert recommended([load(3.6)] * 2, headroom=0.1).replicas == 1


def test_no_replica_goes_for_a_load_that_would_then_wait():
    """A target above 1 concerns adding alone; fewer replicas would keep their queue."""
    assert recommended([load(5.1)] * 2, target_occupancy=1.5).replicas == 2
    assert recommended([load(5)] * 2, target_occupancy=1.5).replicas == 1


def test_requests_that_slow_each_other_down_need_more_room():
    # Per token, 1 + 2 * 0.3 before and 1 + 2 * 0.8 after: 6 in flight become 9.75, and one replica is meant to have 8.
    assert recommended([load(3)] * 2).replicas == 1
    assert recommended([load(3)] * 2, full_slowdown=3.0).replicas == 2
    # 4 in flight become 1 + 2 * 0.8 over 1 + 2 * 0.2 times as many, 7.4.
    assert recommended([load(2)] * 2, full_slowdown=3.0).replicas == 1


def test_one_of_many_replicas_takes_less_room_than_one_of_two():
    occupancy = [load(7)] * 10
    assert recommended(occupancy, full_slowdown=3.0).replicas == 10
    assert recommended([load(6.5)] * 10, full_slowdown=3.0).replicas == 10
    assert recommended([load(6.2)] * 10, full_slowdown=3.0).replicas == 9


def test_an_idle_deployment_needs_no_replica():
    assert recommended([load(0), load(0, range_used=1.0)]) == Recommendation(0.0, "idle: no request runs or waits")
    assert recommended([load(0)], queued=0.5).replicas == 1


def test_without_replicas_and_requests_none_is_needed():
    assert recommended([]) == Recommendation(0.0, "idle: no request runs or waits")


def test_the_first_replica_comes_with_the_first_request():
    assert recommended([], queued=0.5) == Recommendation(1.0, "start: requests wait and there is no replica")
    assert recommended([], queued=500).replicas == 1


def test_replicas_that_are_on_their_way_out_tell_how_many_slots_one_has():
    assert recommended([load(10)], num_replicas=0, queued=64) == Recommendation(
        2.0, "start: requests wait and there is no replica"
    )
    assert recommended([load(10)], num_replicas=0).replicas == 0


@pytest.mark.parametrize("queued", [0, 500])
def test_nothing_is_known_before_a_replica_reports(queued):
    assert recommended([], num_replicas=3, queued=queued) == Recommendation(3.0, "hold: no replica has reported yet")


def test_starting_replicas_are_room_for_the_load():
    assert recommended([load(10, 5, range_used=1.0)], num_replicas=2) == Recommendation(2.0, "hold: the load fits")


def test_starting_replicas_are_waited_for():
    reason = "hold: replicas are starting"
    assert recommended([load(10, 20, range_used=1.0)], num_replicas=2) == Recommendation(2.0, reason)


def test_overload_does_not_wait_for_starting_replicas():
    """A replica that never starts would block scaling indefinitely."""
    assert recommended([load(10, 30, range_used=1.0)], num_replicas=2).replicas == 3


def test_starting_replicas_may_be_full_when_others_might_go():
    assert recommended([load(1)], num_replicas=2) == Recommendation(2.0, "hold: the load fits")
    assert recommended([load(1)] * 2, num_replicas=4).replicas == 3


def test_replicas_that_never_start_do_not_keep_the_others():
    assert recommended([load(1)] * 4, num_replicas=8).replicas == 5
    assert recommended([load(1)] * 4, num_replicas=5).replicas == 2
    assert recommended([load(0)], num_replicas=2).replicas == 1


def test_a_full_cache_is_as_good_as_full_slots():
    assert recommended([load(4, 1, range_used=1.0)]).replicas == 1
    assert recommended([load(4, 1, range_used=1.0, cache=0.95)]).replicas == 2


def test_a_cache_that_was_full_before_a_replica_came_keeps_it():
    """Two replicas have the requests of one whose cache was full; by slots alone, one could be removed."""
    assert recommended([load(2.2)] * 2).replicas == 1
    assert recommended([load(2.2, cache=0.48)] * 2).replicas == 2


def test_a_cache_with_room_to_spare_changes_nothing():
    assert recommended([load(9, range_used=1.0, cache=0.01)]).replicas == 2
    assert recommended([load(0, cache=0.3)]).replicas == 0


# A closed loop: arrivals fill replicas, heartbeats go to a real controller, its thresholds change what a round costs,
# and Serve's delays stand between recommendations and replicas.

SLOTS = 32
UPSCALE_DELAY, DOWNSCALE_DELAY = 30.0, 120.0
START_SECONDS, REPORT_SECONDS = 60.0, 10.0
AVERAGING_SECONDS = 10.0


@dataclass
class Engine:
    """Many short requests: of a full replica's round, `row_share` over 1 + `row_share` is spent on one row for each."""

    row_share: float
    threshold: float = 0.0
    range_used: float = 0.0
    ready_at: float = 0.0
    load: tuple[float, float, float] | None = None
    """Running, waiting and range_used, averaged."""

    ROUND_SECONDS = 0.05
    TOKENS = 300.0

    def tokens_per_second(self, running: float) -> float:
        kept = 1.0 - min(1.0, self.threshold / 0.6)
        seconds = self.ROUND_SECONDS * (1.0 + self.row_share * running / SLOTS * (1.0 + 5.0 * kept))
        return running * (1.5 + 2.0 * kept) / seconds

    def average(self, running: float, waiting: float) -> None:
        now = running, waiting, self.range_used
        before = self.load or now
        weight = 1.0 / AVERAGING_SECONDS
        self.load = tuple(old + weight * (new - old) for old, new in zip(before, now, strict=True))


@dataclass
class Loop:
    """One second per step."""

    controller: ControllerConfig
    rule: ReplicaRule
    row_share: float
    engines: dict[str, Engine] = field(default_factory=dict)
    target: int = 1
    requests: float = 0.0
    now: float = 0.0
    changes: list[tuple[float, int, Recommendation, float]] = field(default_factory=list)
    """(time, replicas before, recommendation, mean range_used)"""

    def __post_init__(self) -> None:
        self._load_controller = LoadController(self.controller)
        self._names = iter(range(10**6))
        self._pending: tuple[int, float] = (0, 0.0)
        self._add(1, ready_at=0.0)

    def run(self, seconds: int, arrivals: float) -> None:
        """`arrivals` are in units of what one full replica does without verifying anything."""
        bare = Engine(self.row_share, threshold=1.0)
        per_second = arrivals * bare.tokens_per_second(SLOTS) / Engine.TOKENS
        for _ in range(seconds):
            self._step(per_second)

    def _step(self, arrivals: float) -> None:
        self.now += 1.0
        self.requests += arrivals
        live = {name: engine for name, engine in self.engines.items() if engine.ready_at <= self.now}
        share = self.requests / max(1, len(live))
        running, waiting = min(SLOTS, share), max(0.0, share - SLOTS)
        for name, engine in live.items():
            tokens = engine.tokens_per_second(running)
            self.requests = max(0.0, self.requests - tokens / Engine.TOKENS)
            decision = self._load_controller.on_sample(sample(name, engine, running, waiting, tokens), self.now)
            engine.threshold, engine.range_used = decision.bounds.confidence_threshold, decision.range_used
            engine.average(running, waiting)
        self._scale([engine.load for engine in live.values() if engine.ready_at + REPORT_SECONDS <= self.now])

    def _scale(self, loads: list[tuple[float, float, float]]) -> None:
        """As Serve does it, with one replica at least."""
        reported = [ReplicaLoad(running=r, waiting=w, max_running=SLOTS, range_used=s) for r, w, s in loads]
        recommended = recommend(self.rule, reported, self.target, 0.0)
        wanted = max(1, math.ceil(recommended.replicas))
        direction = (wanted > self.target) - (wanted < self.target)
        if direction != self._pending[0]:
            self._pending = direction, self.now
        delay = UPSCALE_DELAY if direction > 0 else DOWNSCALE_DELAY
        if direction and self.now - self._pending[1] >= delay:
            range_used = sum(s for _, _, s in loads) / len(loads)
            self.changes.append((self.now, self.target, recommended, range_used))
            self._add(wanted - self.target, self.now + START_SECONDS)
            while len(self.engines) > wanted:
                self.engines.popitem()
            self.target, self._pending = wanted, (0, self.now)

    def _add(self, count: int, ready_at: float) -> None:
        for _ in range(count):
            self.engines[str(next(self._names))] = Engine(self.row_share, ready_at=ready_at)

    def changes_after(self, seconds: float) -> int:
        return sum(change[0] > seconds for change in self.changes)


def sample(name: str, engine: Engine, running: float, waiting: float, tokens: float) -> LoadSample:
    return LoadSample(
        replica=name,
        places=(),
        seconds=1.0,
        num_steps=20,
        num_running=running,
        num_waiting=waiting,
        max_running=SLOTS,
        cache_usage=0.0,
        rows_per_step=running,
        budget_per_request=1.0,
        accepted_length=2.0,
        tokens_per_second=tokens,
        busy_share=1.0 if running > 0 else 0.0,
        slowness=1.0,
        threshold=engine.threshold,
        policy_version=0,
    )


def loop(preset: str, row_share: float = 0.5, **rule: float) -> Loop:
    chosen = load_preset(preset)
    return Loop(chosen.controller, replace(chosen.replicas, **rule), row_share)


PRESETS = ["latency", "throughput", "cost"]


@pytest.mark.parametrize("arrivals", [0.3, 0.7, 1.1, 2.3, 3.9])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_load_that_stays_the_same_comes_to_rest(preset, arrivals):
    closed = loop(preset)
    closed.run(2400, arrivals)
    assert closed.changes_after(1200) == 0, closed.changes
    assert closed.requests / closed.target <= closed.rule.target_occupancy * SLOTS


def test_a_rule_that_knows_nothing_of_slowing_down_does_not_come_to_rest():
    """The loop can tell: one replica is full with what two have almost no trouble with."""
    closed = loop("latency", row_share=1.0, full_slowdown=1.0, headroom=0.0)
    closed.run(2400, 1.1)
    assert closed.changes_after(1200) > 4
    closed = loop("latency", row_share=1.0, full_slowdown=6.0)
    closed.run(2400, 1.1)
    assert closed.changes_after(1200) == 0, closed.changes


def first_addition(preset: str) -> tuple[float, float]:
    """Arrivals and threshold when a slowly growing load gets its second replica."""
    closed = loop(preset)
    for tenths in range(2, 40):
        closed.run(60, tenths / 10)
        if closed.changes:
            break
    _, before, recommended, range_used = closed.changes[0]
    assert (before, recommended.reason) == (1, "scale up: thresholds have risen")
    assert range_used >= closed.rule.spend_first - 1e-6
    return tenths / 10, closed.engines["0"].threshold


def test_presets_raise_thresholds_by_different_amounts_before_they_add():
    arrivals, thresholds = zip(*map(first_addition, PRESETS), strict=True)
    assert arrivals[0] < arrivals[1] <= arrivals[2], arrivals
    assert thresholds[0] < thresholds[2], thresholds


def test_presets_differ_in_how_many_replicas_a_load_has():
    closed = [loop(preset) for preset in PRESETS]
    for each in closed:
        each.run(2400, 2.6)
    latency, throughput, cost = (each.target for each in closed)
    assert latency > throughput >= cost >= 2


@pytest.mark.parametrize("preset", PRESETS)
def test_replicas_go_when_the_load_does(preset):
    closed = loop(preset)
    closed.run(900, 3.0)
    assert closed.target > 2
    closed.run(600, 0.2)
    assert closed.target == 1
    closed.run(300, 0.0)
    assert closed.requests < 1
