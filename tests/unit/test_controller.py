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
    load_controller = controller()
    load_controller.on_node(node(SATURATED, replace(GPU, index=1, uuid="GPU-1")), 0.0)
    decision = settled(load_controller, on_gpu(name))
    assert decision.bounds == Bounds(pytest.approx(0.4))
    assert (decision.saturation.limiting, decision.range_used) == ("tensor", pytest.approx(1.0))
    other = settled(load_controller, on_gpu("1", replica="other"))
    assert (other.bounds, other.range_used) == (Bounds(0.0), 0.0)


def test_a_mig_instance_is_known_by_its_uuid_and_does_not_stand_for_its_parent():
    load_controller = controller()
    mig = replace(SATURATED, kind="mig", uuid="MIG-7")
    load_controller.on_node(node(replace(GPU, uuid="GPU-0"), mig), 0.0)
    assert settled(load_controller, on_gpu("MIG-7")).bounds.confidence_threshold == pytest.approx(0.4)
    assert settled(load_controller, on_gpu("0", replica="parent")).bounds.confidence_threshold == 0.0


def test_an_actor_without_a_gpu_counts_with_its_node_cpu():
    load_controller = controller()
    cpu = DeviceLoad(kind="cpu", index=0, uuid="cpu", name="2 cores", utilization=1.0)
    load_controller.on_node(node(cpu), 0.0)
    assert settled(load_controller, on_gpu()).saturation.limiting == "cpu"


def test_a_node_that_is_not_read_any_more_counts_as_unknown():
    load_controller = controller(stale_seconds=5.0)
    load_controller.on_node(node(SATURATED), 0.0)
    assert load_controller.on_sample(on_gpu("0"), 5.0).saturation.value == 1.0
    assert load_controller.on_sample(on_gpu("0"), 5.1).saturation.value == 0.0


def test_a_node_that_left_is_unknown_at_once():
    load_controller = controller()
    load_controller.on_node(node(SATURATED), 0.0)
    load_controller.forget_node("n")
    assert load_controller.on_sample(on_gpu("0"), 0.0).saturation.value == 0.0
    assert load_controller.view(0.0)["nodes"] == []


def test_a_lost_gpu_leaves_the_other_signals_to_decide():
    load_controller = controller()
    load_controller.on_node(node(replace(SATURATED, state="lost")), 0.0)
    decision = load_controller.on_sample(replace(on_gpu("0"), num_waiting=8.0), 0.0)
    assert (decision.saturation.limiting, decision.saturation.parts) == ("queue", {"queue": 1.0})


def test_the_version_rises_with_every_change_and_only_then():
    load_controller = controller()
    first = load_controller.on_sample(IDLE, 0.0)
    assert (first.version, first.before) == (1, None)
    assert [load_controller.on_sample(IDLE, t).version for t in (1.0, 2.0)] == [1, 1]
    load_controller.on_node(node(SATURATED), 3.0)
    moved = load_controller.on_sample(on_gpu("0"), 3.1)
    assert (moved.version, moved.before) == (2, Bounds(0.0))


def test_a_restarted_controller_goes_on_from_what_replicas_report():
    load_controller = controller()
    load_controller.on_node(node(replace(GPU, tensor_activity=0.6 * 0.75 + 0.1 * 0.25)), 0.0)
    decision = load_controller.on_sample(replace(on_gpu("0"), threshold=0.23, policy_version=41), 0.0)
    assert decision.bounds.confidence_threshold == pytest.approx(0.23)
    assert decision.version == 42


def test_a_policy_is_valid_for_several_heartbeats():
    decision = controller(heartbeat_seconds=2.0, valid_heartbeats=4.0).on_sample(IDLE, 0.0)
    assert (decision.heartbeat_seconds, decision.valid_seconds) == (2.0, 8.0)


def test_with_many_replicas_the_heartbeat_interval_grows():
    load_controller = controller(max_heartbeats_per_second=10.0)
    for number in range(40):
        decision = load_controller.on_sample(replace(IDLE, replica=str(number)), 0.0)
    assert decision.heartbeat_seconds == 4.0


def test_a_silent_replica_is_forgotten_when_its_policy_has_expired():
    load_controller = controller(heartbeat_seconds=1.0, valid_heartbeats=5.0)
    load_controller.on_sample(IDLE, 0.0)
    assert load_controller.forget_silent(5.0) == []
    assert load_controller.forget_silent(5.1) == ["r"]
    assert load_controller.replicas == []


def test_an_override_replaces_the_policy_until_it_expires():
    load_controller = controller()
    load_controller.override(Bounds(0.9, 2, True), 10.0, now=0.0)
    assert load_controller.on_sample(IDLE, 1.0).bounds == Bounds(0.9, 2, True)
    assert load_controller.on_sample(IDLE, 10.0).bounds == Bounds(0.0)


def test_an_override_of_one_replica_counts_before_one_of_all():
    load_controller = controller()
    load_controller.override(Bounds(0.5), None, now=0.0)
    load_controller.override(Bounds(0.9), None, now=0.0, replica="r")
    assert load_controller.on_sample(IDLE, 1.0).bounds == Bounds(0.9)
    assert load_controller.on_sample(replace(IDLE, replica="other"), 1.0).bounds == Bounds(0.5)
    load_controller.end_override("r")
    assert load_controller.on_sample(IDLE, 2.0).bounds == Bounds(0.5)
    load_controller.end_override()
    assert load_controller.on_sample(IDLE, 3.0).bounds == Bounds(0.0)


def test_no_policy_and_no_operator_lowers_the_configured_threshold():
    load_controller = controller(lowest_threshold=0.3)
    assert load_controller.on_sample(IDLE, 0.0).bounds == Bounds(0.3)
    load_controller.override(Bounds(0.1, 2), None, now=1.0)
    assert load_controller.on_sample(IDLE, 1.0).bounds == Bounds(0.3, 2)
    load_controller.override(Bounds(0.0, None, True), None, now=2.0)
    assert load_controller.on_sample(IDLE, 2.0).bounds == Bounds(0.3, None, True)
    load_controller.override(Bounds(0.6), None, now=3.0)
    assert load_controller.on_sample(IDLE, 3.0).bounds == Bounds(0.6)


def test_above_the_configured_threshold_a_policy_moves_as_it_does_without():
    load_controller = controller(lowest_threshold=0.3)
    load_controller.on_node(node(SATURATED), 0.0)
    decision = settled(load_controller, on_gpu("0"))
    assert (decision.bounds, decision.range_used) == (Bounds(pytest.approx(0.4)), pytest.approx(1.0))


def test_a_new_configuration_moves_on_from_where_thresholds_are():
    load_controller = controller(policy=FixedThreshold(threshold=0.3))
    load_controller.on_node(node(SATURATED), 0.0)
    before = load_controller.on_sample(on_gpu("0"), 0.0)
    load_controller.override(Bounds(0.8), 10.0, now=0.0, replica="other")
    load_controller.reconfigure(ControllerConfig(policy=replace(CURVE, slew_per_second=0.02)))
    decision = load_controller.on_sample(on_gpu("0"), 1.0)
    assert (decision.bounds, decision.version) == (before.bounds, before.version)
    assert load_controller.on_sample(on_gpu("0"), 2.0).bounds.confidence_threshold == pytest.approx(0.32)
    assert load_controller.on_sample(on_gpu("0", replica="other"), 2.0).bounds == Bounds(0.8)
    load_controller.reconfigure(ControllerConfig(policy=CURVE, signals=SignalScale(tensor=None)))
    assert load_controller.on_sample(on_gpu("0"), 3.0).saturation.limiting is None


def test_during_an_override_there_is_no_range_used():
    load_controller = controller()
    load_controller.on_sample(IDLE, 0.0)
    load_controller.override(Bounds(0.9), 10.0, now=0.0)
    assert load_controller.on_sample(IDLE, 1.0).range_used is None
    assert load_controller.view(1.0)["replicas"][0]["spent"] is None
    assert load_controller.view(11.0)["replicas"][0]["overridden"] is False
    assert load_controller.on_sample(IDLE, 11.0).range_used == 0.0


def test_devices_matter_to_policies_that_follow_the_load():
    assert controller().wants_devices
    assert not controller(policy=FixedThreshold(threshold=0.3)).wants_devices
    assert controller(policy=FixedThreshold(), bypass_above=0.9).wants_devices


def test_the_nodes_of_a_replica_are_known_while_it_is():
    load_controller = controller()
    load_controller.on_sample(on_gpu("0", node_id="a"), 0.0)
    load_controller.on_sample(on_gpu("0", replica="other", node_id="b"), 3.0)
    assert load_controller.node_ids == {"a", "b"}
    load_controller.forget_silent(6.0)
    assert load_controller.node_ids == {"b"}


def test_a_draft_limit_goes_to_every_replica():
    assert controller(max_draft_tokens=3).on_sample(IDLE, 0.0).bounds == Bounds(0.0, 3)


def test_a_bypass_begins_above_its_limit_and_ends_some_way_below():
    load_controller = controller(bypass_above=0.9)
    raised = [
        load_controller.on_sample(replace(IDLE, num_waiting=8.0 * v), t) for t, v in enumerate([0.85, 0.95, 0.85, 0.75])
    ]
    assert [decision.bounds.bypass for decision in raised] == [False, True, True, False]


def test_a_fixed_threshold_takes_nothing_away():
    decision = controller(policy=FixedThreshold(threshold=0.3)).on_sample(IDLE, 0.0)
    assert (decision.bounds.confidence_threshold, decision.range_used) == (0.3, None)


def test_the_view_is_json_and_has_everything():
    load_controller = controller()
    load_controller.on_node(node(SATURATED), 0.0)
    load_controller.on_sample(on_gpu("0"), 1.0)
    load_controller.override(Bounds(0.5), None, now=1.0, replica="r")
    view = json.loads(json.dumps(load_controller.view(3.0)))
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
