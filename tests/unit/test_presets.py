"""Keys and values of presets and YAML blocks, and the errors for others."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import yaml
from test_saturation import IDLE

from autoscale import presets
from autoscale.controller import ControllerConfig
from autoscale.errors import PolicyError
from autoscale.goodput import GoodputSearch
from autoscale.presets import build, controller_config, load_preset, preset_names, replica_rule
from autoscale.replicas import ReplicaRule
from autoscale.saturation import SignalScale, saturation_of
from autoscale.thresholds import FixedThreshold, LoadCurve

NAMES = ["cost", "latency", "throughput"]


def test_there_are_three_presets():
    assert preset_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_packaged_preset_is_valid_and_says_what_it_is_for(name):
    preset = load_preset(name)
    assert preset.replicas != ReplicaRule()
    assert preset.controller.policy != LoadCurve()
    text = (presets._FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert list(yaml.safe_load(text)) == ["controller", "replicas"]


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_can_reach_what_adds_a_replica(name):
    """Full slots alone must do, and before the last one is taken: `slots` is an average, which hardly reaches 1."""
    preset = load_preset(name)
    curve = preset.controller.policy
    assert curve.threshold_at(0.95) == curve.highest
    assert curve.dead_band < 0.2 * (curve.highest - curve.lowest)


def test_without_a_preset_the_defaults_hold():
    assert controller_config(None, {}) == ControllerConfig()
    assert replica_rule(None, {}) == ReplicaRule()


@pytest.mark.parametrize("name", NAMES)
def test_without_overrides_the_preset_holds(name):
    preset = load_preset(name)
    assert controller_config(name, {}) == preset.controller
    assert controller_config(name, {}).preset == name
    assert replica_rule(name, {}) == preset.replicas


def test_a_key_replaces_the_presets():
    latency = load_preset("latency")
    assert replica_rule("latency", {"headroom": 0.4}) == replace(latency.replicas, headroom=0.4)
    changed = controller_config("latency", {"max_draft_tokens": 3, "bypass_above": 0.9})
    assert changed == replace(latency.controller, max_draft_tokens=3, bypass_above=0.9)


def test_overrides_leave_the_preset_as_it_was():
    before = load_preset("latency")
    controller_config("latency", {"policy": {"dead_band": 0.01}, "signals": {"cpu": [0.1, 0.2]}})
    assert load_preset("latency") == before


def test_a_nested_key_leaves_its_neighbours():
    policy = load_preset("latency").controller.policy
    assert controller_config("latency", {"policy": {"dead_band": 0.01}}).policy == replace(policy, dead_band=0.01)
    assert controller_config("latency", {"policy": {"kind": "load_curve", "dead_band": 0.01}}).policy == replace(
        policy, dead_band=0.01
    )
    assert controller_config(None, {"signals": {"cpu": [0.1, 0.2]}}).signals == SignalScale(cpu=(0.1, 0.2))


def test_a_key_nested_twice_leaves_its_neighbours():
    bound = {"curve": [[0.5, 0.2]], "dead_band": 0.07}
    policy = controller_config("throughput", {"policy": {"kind": "goodput", "step": 0.04, "bound": bound}}).policy
    assert policy == GoodputSearch(step=0.04, bound=LoadCurve(curve=((0.5, 0.2),), dead_band=0.07))


def test_another_kind_of_policy_starts_from_its_own_defaults():
    assert controller_config("latency", {"policy": {"kind": "goodput"}}).policy == GoodputSearch()
    fixed = controller_config("cost", {"policy": {"kind": "fixed", "threshold": 0.25}})
    assert fixed.policy == FixedThreshold(threshold=0.25)
    assert replace(fixed, policy=LoadCurve()) == replace(load_preset("cost").controller, policy=LoadCurve())


@pytest.mark.parametrize("preset", [None, *NAMES])
def test_the_keys_of_a_policy_without_a_kind_say_which_it_is(preset):
    assert controller_config(preset, {"policy": {"threshold": 0.3}}).policy == FixedThreshold(threshold=0.3)
    assert controller_config(preset, {"policy": {"step": 0.05}}).policy == GoodputSearch(step=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_without_load_a_preset_takes_nothing_away(name):
    regulator = load_preset(name).controller.policy.regulator(0.3)
    for second in range(120):
        threshold = regulator.update(IDLE, 0.0, float(second))
    assert (threshold, regulator.range_used) == (0.0, 0.0)


def test_null_switches_a_signal_off():
    config = controller_config("latency", {"signals": {"slots": None}})
    assert config.signals == replace(SignalScale(), slots=None)
    full = replace(IDLE, num_running=16.0)
    assert saturation_of(full, [], SignalScale()).limiting == "slots"
    assert saturation_of(full, [], config.signals).limiting is None


def test_a_policy_that_nothing_tells_the_kind_of_is_the_presets_or_fixed():
    assert controller_config(None, {"policy": {}}) == controller_config(None, {}) == ControllerConfig()
    assert controller_config("cost", {"policy": {}}) == load_preset("cost").controller
    assert ControllerConfig().policy == FixedThreshold(threshold=0.0)


def test_no_two_kinds_of_policy_share_a_key():
    keys = [key for kind in presets._KEYS.values() for key in kind]
    assert len(keys) == len(set(keys))


def test_a_curve_makes_a_policy_a_load_curve():
    curve = [[0.0, 0.1], [1, 0.5]]
    assert controller_config(None, {"policy": {"curve": curve}}).policy == LoadCurve(curve=((0.0, 0.1), (1.0, 0.5)))


def test_every_field_can_be_set():
    """As YAML would give it back, so that no type of a field is left out."""
    whole = {
        "policy": {
            "kind": "goodput",
            "step": 0.04,
            "num_pairs": 5,
            "rest_seconds": [1, 2],
            "bound": {"curve": [[0, 0.5]]},
        },
        "signals": {field.name: [0.25, 0.75] for field in fields(SignalScale)},
        "lowest_threshold": 0.2,
        "max_draft_tokens": None,
        "bypass_above": 1,
        "heartbeat_seconds": 2,
        "max_heartbeats_per_second": 50,
        "valid_heartbeats": 3,
        "stale_seconds": 4.5,
    }
    assert {*whole, "preset"} == {field.name for field in fields(ControllerConfig)}
    config = controller_config(None, whole)
    assert config.policy == GoodputSearch(
        step=0.04, num_pairs=5, rest_seconds=(1.0, 2.0), bound=LoadCurve(curve=((0.0, 0.5),))
    )
    assert config.signals.queue == (0.25, 0.75)
    assert (config.max_draft_tokens, config.bypass_above, config.valid_heartbeats) == (None, 1.0, 3.0)
    assert type(config.heartbeat_seconds) is float


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"heartbeats": 1},
            "controller.heartbeats: unknown key; expected one of policy, signals, lowest_threshold, max_draft_tokens,"
            " bypass_above, heartbeat_seconds, max_heartbeats_per_second, valid_heartbeats, stale_seconds, preset",
        ),
        (
            {"policy": {"slew": 1}},
            "controller.policy.slew: unknown key; expected one of kind, threshold",
        ),
        (
            {"policy": {"dead_band": 0.1, "slew": 1}},
            "controller.policy.slew: unknown key; expected one of kind, curve, dead_band, slew_per_second,"
            " smoothing_seconds",
        ),
        (
            {"policy": {"kind": "goodput", "bound": {"threshold": 0.5}}},
            "controller.policy.bound.threshold: unknown key; expected one of kind, curve, dead_band, slew_per_second,"
            " smoothing_seconds",
        ),
        (
            {"policy": {"kind": "fixed", "curve": []}},
            "controller.policy.curve: unknown key; expected one of kind, threshold",
        ),
        ({1: 2}, "controller[1]: unknown key; expected one of policy, signals"),
        ({"policy": "fixed"}, "controller.policy='fixed': expected a mapping of keys to values"),
        ({"policy": None}, "controller.policy=None: expected a mapping of keys to values"),
        ({"policy": {"kind": "best"}}, "controller.policy.kind='best': expected one of fixed, load_curve, goodput"),
        ({"policy": {"kind": []}}, "controller.policy.kind=[]: expected one of fixed, load_curve, goodput"),
        (
            {"policy": {"kind": "fixed", "threshold": 1.5}},
            "controller.policy.threshold=1.5: expected less than or equal to 1",
        ),
        ({"policy": {"kind": "fixed", "threshold": "1"}}, "controller.policy.threshold='1': expected a valid number"),
        ({"policy": {"kind": "fixed", "threshold": True}}, "controller.policy.threshold=True: expected a valid number"),
        ({"policy": {"kind": "fixed", "threshold": None}}, "controller.policy.threshold=None: expected a valid number"),
        ({"policy": {"curve": 0.5}}, "controller.policy.curve=0.5: expected a valid tuple"),
        ({"policy": {"curve": [[0, 0], [1]]}}, "controller.policy.curve[1][1]: missing"),
        ({"policy": {"curve": [[0, "a"]]}}, "controller.policy.curve[0][1]='a': expected a valid number"),
        ({"policy": {"curve": []}}, "controller.policy.curve=[]: expected at least one [saturation, threshold]"),
        (
            {"policy": {"curve": [[0.5, 0.4], [1, 0.2]]}},
            "controller.policy.curve=[[0.5, 0.4], [1, 0.2]]: expected thresholds that do not fall",
        ),
        (
            {"policy": {"kind": "goodput", "bound": {"slew_per_second": 0}}},
            "controller.policy.bound.slew_per_second=0: expected greater than 0",
        ),
        (
            {"policy": {"kind": "goodput", "num_pairs": 4.0}},
            "controller.policy.num_pairs=4.0: expected a valid integer",
        ),
        (
            {"policy": {"kind": "goodput", "rest_seconds": [9, 3]}},
            "controller.policy.rest_seconds=[9, 3]: expected [first, longest] with first <= longest",
        ),
        ({"signals": {"cpu": [1, 0.5]}}, "controller.signals.cpu=[1.0, 0.5]: expected [low, high] with low < high"),
        ({"signals": {"gpu": [0, 1]}}, "controller.signals.gpu: unknown key; expected one of tensor, power"),
        ({"max_draft_tokens": True}, "controller.max_draft_tokens=True: expected a valid integer"),
        ({"max_draft_tokens": -1}, "controller.max_draft_tokens=-1: expected greater than or equal to 0"),
        ({"max_draft_tokens": 2**63}, "expected less than or equal to 1024"),
        ({"lowest_threshold": 1.5}, "controller.lowest_threshold=1.5: expected less than or equal to 1"),
        ({"heartbeat_seconds": 1e6}, "controller.heartbeat_seconds=1000000.0: expected less than or equal to 3600"),
        ({"signals": {"cpu": "off"}}, "controller.signals.cpu='off': expected a valid tuple"),
        ({"bypass_above": "high"}, "controller.bypass_above='high': expected a valid number"),
        ({"heartbeat_seconds": float("inf")}, "controller.heartbeat_seconds=inf: expected a finite number"),
        ({"stale_seconds": float("nan")}, "controller.stale_seconds=nan: expected a finite number"),
        ({"stale_seconds": 10**400}, "expected a valid number"),
        ({"stale_seconds": 0, "bypass_above": 2}, "; controller.stale_seconds=0: expected greater than 0"),
    ],
)
def test_a_bad_key_or_value_is_named(overrides, expected):
    with pytest.raises(PolicyError) as caught:
        controller_config(None, overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"release_below": 0.96}, "mine.release_below=0.96: expected at most spend_first=0.95"),
        ({"overload_occupancy": 1}, "mine.overload_occupancy=1: expected at least target_occupancy=1.25"),
        ({"headroom": "much"}, "mine.headroom='much': expected a valid number"),
        ({"presett": "cost"}, "mine.presett: unknown key; expected one of target_occupancy, spend_first"),
        ({"presett": "cost"}, "headroom, preset"),
        ("cost", "mine='cost': expected a mapping of keys to values"),
    ],
)
def test_errors_call_the_block_what_the_caller_calls_it(overrides, expected):
    with pytest.raises(PolicyError) as caught:
        replica_rule("cost", overrides, path="mine")
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["speed", "", "../presets/cost", ["cost"], 3])
def test_an_unknown_preset_is_named(name):
    for call in (load_preset, lambda name: controller_config(name, {}), lambda name: replica_rule(name, {})):
        with pytest.raises(PolicyError) as caught:
            call(name)
        assert f"preset={name!r}: expected one of cost, latency, throughput" in str(caught.value)


def test_a_preset_from_elsewhere_is_read_as_strictly():
    with pytest.raises(PolicyError) as caught:
        build(presets.Preset, {"controller": {}, "replica": {}}, "mine")
    assert (
        str(caught.value) == "mine.replicas: missing; mine.replica: unknown key; expected one of controller, replicas"
    )
