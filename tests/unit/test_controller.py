"""The load controller: one heartbeat in, one decision out, on a clock that the test turns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError
from test_saturation import GPU, IDLE

from autoscale.controller import Bounds, ControllerConfig, LoadController
from autoscale.errors import PolicyError
from autoscale.saturation import SignalScale
from autoscale.signals import DeviceLoad, LoadSample, NodeLoad, Place
from autoscale.thresholds import FixedThreshold, LoadCurve

CURVE = LoadCurve(curve=((0.5, 0.0), (1.0, 0.4)), dead_band=0.05, slew_per_second=1.0, smoothing_seconds=0.0)
SATURATED = replace(GPU, tensor_activity=0.9)


def node(*devices: DeviceLoad, node_id: str = "n") -> NodeLoad:
    return NodeLoad(node_id=node_id, host="host", source="nvml", devices=devices)


def on_gpu(*accelerators: str, replica: str = "r", node_id: str = "n") -> LoadSample:
    return replace(IDLE, replica=replica, places=(Place(node_id=node_id, accelerators=accelerators),))


def controller(**fields: object) -> LoadController:
    return LoadController(ControllerConfig(**{"policy": CURVE, **fields}))  # type: ignore[arg-type]


def settled(controller: LoadController, sample: LoadSample, seconds: int = 10, start: float = 0.0):
    """The last of some heartbeats, one a second."""
    return [controller.on_sample(sample, start + second) for second in range(seconds)][-1]


@pytest.mark.parametrize("name", ["0", "GPU-0"])
def test_a_saturated_gpu_raises_the_threshold_of_the_replica_on_it(name):
    boss = controller()
    boss.on_node(node(SATURATED, replace(GPU, index=1, uuid="GPU-1")), 0.0)
    decision = settled(boss, on_gpu(name))
    assert decision.bounds == Bounds(pytest.approx(0.4))
    assert (decision.saturation.limiting, decision.range_used) == ("tensor", pytest.approx(1.0))
    other = settled(boss, on_gpu("1", replica="other"))
    assert (other.bounds, other.range_used) == (Bounds(0.0), 0.0)


def test_a_mig_instance_is_known_by_its_uuid_and_does_not_stand_for_its_parent():
    boss = controller()
    mig = replace(SATURATED, kind="mig", uuid="MIG-7")
    boss.on_node(node(replace(GPU, uuid="GPU-0"), mig), 0.0)
    assert settled(boss, on_gpu("MIG-7")).bounds.confidence_threshold == pytest.approx(0.4)
    assert settled(boss, on_gpu("0", replica="parent")).bounds.confidence_threshold == 0.0


def test_an_actor_without_a_gpu_counts_with_its_node_cpu():
    boss = controller()
    cpu = DeviceLoad(kind="cpu", index=0, uuid="cpu", name="2 cores", utilization=1.0)
    boss.on_node(node(cpu), 0.0)
    assert settled(boss, on_gpu()).saturation.limiting == "cpu"


def test_a_node_that_is_not_read_any_more_counts_as_unknown():
    boss = controller(stale_seconds=5.0)
    boss.on_node(node(SATURATED), 0.0)
    assert boss.on_sample(on_gpu("0"), 5.0).saturation.value == 1.0
    assert boss.on_sample(on_gpu("0"), 5.1).saturation.value == 0.0


def test_a_node_that_left_is_unknown_at_once():
    boss = controller()
    boss.on_node(node(SATURATED), 0.0)
    boss.forget_node("n")
    assert boss.on_sample(on_gpu("0"), 0.0).saturation.value == 0.0
    assert boss.view(0.0)["nodes"] == []


def test_a_lost_gpu_leaves_the_other_signals_to_decide():
    boss = controller()
    boss.on_node(node(replace(SATURATED, state="lost")), 0.0)
    decision = boss.on_sample(replace(on_gpu("0"), num_waiting=8.0), 0.0)
    assert (decision.saturation.limiting, decision.saturation.parts) == ("queue", {"queue": 1.0})


def test_the_version_rises_with_every_change_and_only_then():
    boss = controller()
    first = boss.on_sample(IDLE, 0.0)
    assert (first.version, first.before) == (1, None)
    assert [boss.on_sample(IDLE, t).version for t in (1.0, 2.0)] == [1, 1]
    boss.on_node(node(SATURATED), 3.0)
    moved = boss.on_sample(on_gpu("0"), 3.1)
    assert (moved.version, moved.before) == (2, Bounds(0.0))


def test_a_restarted_controller_goes_on_from_what_replicas_report():
    boss = controller()
    boss.on_node(node(replace(GPU, tensor_activity=0.6 * 0.75 + 0.1 * 0.25)), 0.0)
    decision = boss.on_sample(replace(on_gpu("0"), threshold=0.23, policy_version=41), 0.0)
    assert decision.bounds.confidence_threshold == pytest.approx(0.23)
    assert decision.version == 42


def test_a_policy_is_valid_for_several_heartbeats():
    decision = controller(heartbeat_seconds=2.0, valid_heartbeats=4.0).on_sample(IDLE, 0.0)
    assert (decision.heartbeat_seconds, decision.valid_seconds) == (2.0, 8.0)


def test_many_replicas_are_asked_to_speak_less_often():
    boss = controller(max_heartbeats_per_second=10.0)
    for number in range(40):
        decision = boss.on_sample(replace(IDLE, replica=str(number)), 0.0)
    assert decision.heartbeat_seconds == 4.0


def test_a_silent_replica_is_forgotten_when_its_policy_has_expired():
    boss = controller(heartbeat_seconds=1.0, valid_heartbeats=5.0)
    boss.on_sample(IDLE, 0.0)
    assert boss.forget_silent(5.0) == []
    assert boss.forget_silent(5.1) == ["r"]
    assert boss.replicas == []


def test_an_operator_stands_in_for_the_policy_until_time_is_up():
    boss = controller()
    boss.override(Bounds(0.9, 2, True), 10.0, now=0.0)
    assert boss.on_sample(IDLE, 1.0).bounds == Bounds(0.9, 2, True)
    assert boss.on_sample(IDLE, 10.0).bounds == Bounds(0.0)


def test_an_operator_can_mean_one_replica_and_the_nearer_word_counts():
    boss = controller()
    boss.override(Bounds(0.5), None, now=0.0)
    boss.override(Bounds(0.9), None, now=0.0, replica="r")
    assert boss.on_sample(IDLE, 1.0).bounds == Bounds(0.9)
    assert boss.on_sample(replace(IDLE, replica="other"), 1.0).bounds == Bounds(0.5)
    boss.end_override("r")
    assert boss.on_sample(IDLE, 2.0).bounds == Bounds(0.5)
    boss.end_override()
    assert boss.on_sample(IDLE, 3.0).bounds == Bounds(0.0)


def test_no_policy_and_no_operator_lowers_the_configured_threshold():
    boss = controller(lowest_threshold=0.3)
    assert boss.on_sample(IDLE, 0.0).bounds == Bounds(0.3)
    boss.override(Bounds(0.1, 2), None, now=1.0)
    assert boss.on_sample(IDLE, 1.0).bounds == Bounds(0.3, 2)
    boss.override(Bounds(0.0, None, True), None, now=2.0)
    assert boss.on_sample(IDLE, 2.0).bounds == Bounds(0.3, None, True)
    boss.override(Bounds(0.6), None, now=3.0)
    assert boss.on_sample(IDLE, 3.0).bounds == Bounds(0.6)


def test_above_the_configured_threshold_a_policy_moves_as_it_does_without():
    boss = controller(lowest_threshold=0.3)
    boss.on_node(node(SATURATED), 0.0)
    decision = settled(boss, on_gpu("0"))
    assert (decision.bounds, decision.range_used) == (Bounds(pytest.approx(0.4)), pytest.approx(1.0))


def test_a_new_configuration_moves_on_from_where_thresholds_are():
    boss = controller(policy=FixedThreshold(threshold=0.3))
    boss.on_node(node(SATURATED), 0.0)
    before = boss.on_sample(on_gpu("0"), 0.0)
    boss.override(Bounds(0.8), 10.0, now=0.0, replica="other")
    boss.reconfigure(ControllerConfig(policy=replace(CURVE, slew_per_second=0.02)))
    decision = boss.on_sample(on_gpu("0"), 1.0)
    assert (decision.bounds, decision.version) == (before.bounds, before.version)
    assert boss.on_sample(on_gpu("0"), 2.0).bounds.confidence_threshold == pytest.approx(0.32)
    assert boss.on_sample(on_gpu("0", replica="other"), 2.0).bounds == Bounds(0.8)
    boss.reconfigure(ControllerConfig(policy=CURVE, signals=SignalScale(tensor=None)))
    assert boss.on_sample(on_gpu("0"), 3.0).saturation.limiting is None


def test_while_an_operator_decides_no_threshold_gives_way():
    boss = controller()
    boss.on_sample(IDLE, 0.0)
    boss.override(Bounds(0.9), 10.0, now=0.0)
    assert boss.on_sample(IDLE, 1.0).range_used is None
    assert boss.view(1.0)["replicas"][0]["spent"] is None
    assert boss.view(11.0)["replicas"][0]["overridden"] is False
    assert boss.on_sample(IDLE, 11.0).range_used == 0.0


def test_devices_matter_to_policies_that_follow_the_load():
    assert controller().wants_devices
    assert not controller(policy=FixedThreshold(threshold=0.3)).wants_devices
    assert controller(policy=FixedThreshold(), bypass_above=0.9).wants_devices


def test_the_nodes_of_a_replica_are_known_while_it_is():
    boss = controller()
    boss.on_sample(on_gpu("0", node_id="a"), 0.0)
    boss.on_sample(on_gpu("0", replica="other", node_id="b"), 3.0)
    assert boss.node_ids == {"a", "b"}
    boss.forget_silent(6.0)
    assert boss.node_ids == {"b"}


def test_a_maximum_length_goes_to_everybody():
    assert controller(max_draft_tokens=3).on_sample(IDLE, 0.0).bounds == Bounds(0.0, 3)


def test_a_bypass_begins_above_its_limit_and_ends_some_way_below():
    boss = controller(bypass_above=0.9)
    raised = [boss.on_sample(replace(IDLE, num_waiting=8.0 * v), t) for t, v in enumerate([0.85, 0.95, 0.85, 0.75])]
    assert [decision.bounds.bypass for decision in raised] == [False, True, True, False]


def test_a_fixed_threshold_takes_nothing_away():
    decision = controller(policy=FixedThreshold(threshold=0.3)).on_sample(IDLE, 0.0)
    assert (decision.bounds.confidence_threshold, decision.range_used) == (0.3, None)


def test_the_view_is_json_and_has_everything():
    boss = controller()
    boss.on_node(node(SATURATED), 0.0)
    boss.on_sample(on_gpu("0"), 1.0)
    boss.override(Bounds(0.5), None, now=1.0, replica="r")
    view = json.loads(json.dumps(boss.view(3.0)))
    assert view["nodes"][0]["devices"][0]["tensor_activity"] == 0.9
    assert view["nodes"][0]["age_seconds"] == 3.0
    (replica,) = view["replicas"]
    assert replica["sample"]["replica"] == "r"
    assert replica["saturation"] == {"value": 1.0, "limiting": "tensor", "parts": {"tensor": 1.0}}
    assert replica["overridden"] is True
    assert replica["age_seconds"] == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_draft_tokens", -1),
        ("bypass_above", 0.0),
        ("bypass_above", 1.5),
        ("heartbeat_seconds", 0.0),
        ("max_heartbeats_per_second", 0.0),
        ("valid_heartbeats", 1.0),
        ("stale_seconds", -1.0),
    ],
)
def test_an_invalid_setting_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as caught:
        controller(**{field: value})
    assert [(each["loc"], each["input"]) for each in caught.value.errors()] == [((field,), value)]


def test_a_sample_without_slots_is_refused():
    with pytest.raises(PolicyError, match="max_running=0: expected a positive number"):
        controller().on_sample(replace(IDLE, max_running=0), 0.0)
