"""The policy as Serve has it: made from what YAML says, sent by value, called with Serve's own context. No cluster."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.schema import DeploymentSchema

from autoscale.errors import PolicyError
from autoscale.policies import SpeculationAwarePolicy, check_kwargs, number_of, preset_of
from autoscale.presets import load_preset
from autoscale.replicas import ReplicaRule
from deployments.args import LoadControllerArgs
from deployments.replica.engine import check_autoscaling, rule_preset

ENGINE = DeploymentID(name="Engine", app_name="dspark")
PATH = "autoscale.policies:SpeculationAwarePolicy"
OLD, NEW = ReplicaID("old", ENGINE), ReplicaID("new", ENGINE)


def stats(**fields: float) -> dict[str, float]:
    return {"running": 10.0, "waiting": 0.0, "max_running": 10.0, "range_used": 1.0, "threshold": 0.4, **fields}


def metrics(by_replica: Mapping[ReplicaID, Mapping[str, float]]) -> dict[str, dict[ReplicaID, float]]:
    """As Serve passes them."""
    names = {name for fields in by_replica.values() for name in fields}
    return {name: {r: fields[name] for r, fields in by_replica.items() if name in fields} for name in names}


def context(
    by_replica: Mapping[ReplicaID, Mapping[str, float]],
    target: int | None = None,
    queued: float | None = 0.0,
    now: float = 0.0,
    **fields: Any,
) -> AutoscalingContext:
    whole: dict[str, Any] = {
        "deployment_id": ENGINE,
        "deployment_name": ENGINE.name,
        "app_name": ENGINE.app_name,
        "current_num_replicas": len(by_replica),
        "target_num_replicas": len(by_replica) if target is None else target,
        "running_replicas": list(by_replica),
        "total_num_requests": lambda: 0.0,
        "total_queued_requests": lambda: queued,
        "aggregated_metrics": lambda: metrics(by_replica),
        "raw_metrics": dict,
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 100,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": now,
        "config": None,
    }
    return AutoscalingContext(**{**whole, **fields})


def policy_in(autoscaling_config: dict[str, Any]) -> Any:
    """The autoscaling policy that Serve's controller makes from a deployment's settings."""
    return _resolve_policy_callable(AutoscalingConfig(**autoscaling_config).policy)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="ray.serve")
    return caplog


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's loggers do not propagate, so caplog would miss their lines."""
    for name in ("ray", "ray.serve"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


def test_serve_makes_it_from_yaml():
    policy = policy_in({"policy": {"policy_function": PATH, "policy_kwargs": {"preset": "latency", "headroom": 0}}})
    assert type(policy).__name__ == "SpeculationAwarePolicy"
    assert policy.rule.headroom == 0.0
    assert policy.rule.target_occupancy == load_preset("latency").replicas.target_occupancy
    assert policy(context({OLD: stats()})) == (2.0, {})


def test_the_whole_deployment_block_is_accepted():
    block = {"max_replicas": 4, "policy": {"policy_function": PATH, "policy_kwargs": {"preset": "cost"}}}
    schema = DeploymentSchema.model_validate({"name": "Engine", "autoscaling_config": block})
    assert schema.autoscaling_config["policy"]["policy_kwargs"] == {"preset": "cost"}


def test_without_a_preset_the_rule_has_its_defaults():
    assert SpeculationAwarePolicy().rule == ReplicaRule()
    assert policy_in({"policy": {"policy_function": PATH}}).rule == ReplicaRule()


BAD_KWARGS = [
    ({"preset": "fast"}, "policy_kwargs.preset='fast': expected one of cost, latency, throughput"),
    (
        {"presett": "cost"},
        "policy_kwargs.presett: unknown key; expected one of target_occupancy, spend_first, overload_occupancy,"
        " waiting_per_slot, release_below, full_slowdown, headroom, preset",
    ),
    ({"heartbeat_seconds": 1}, "policy_kwargs.heartbeat_seconds: unknown key"),
    ({"spend_first": 7}, "policy_kwargs.spend_first=7: expected less than or equal to 1"),
    ({"spend_first": "all"}, "policy_kwargs.spend_first='all': expected a valid number"),
    ({"spend_first": 0.1}, "policy_kwargs.release_below=0.3: expected at most spend_first=0.1"),
]


@pytest.mark.parametrize(("kwargs", "expected"), BAD_KWARGS)
def test_an_invalid_policy_kwarg_is_named(kwargs, expected):
    with pytest.raises(PolicyError) as caught:
        check_kwargs(kwargs)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("kwargs", "expected"), BAD_KWARGS)
def test_in_serves_controller_bad_kwargs_keep_the_number_of_replicas(kwargs, expected):
    """Serve makes the policy there, where an exception would repeat in silence; the Engine replica names it."""
    config = AutoscalingConfig(policy={"policy_function": PATH, "policy_kwargs": kwargs})
    policy = _resolve_policy_callable(config.policy)
    assert expected in str(policy.problem)
    assert policy(context({OLD: stats()})) == (1.0, {})


@pytest.mark.parametrize(("kwargs", "expected"), BAD_KWARGS)
def test_an_engine_replica_refuses_bad_kwargs_of_its_own_deployment(kwargs, expected):
    config = DeploymentConfig(autoscaling_config={"policy": {"policy_function": PATH, "policy_kwargs": kwargs}})
    with pytest.raises(PolicyError) as caught:
        check_autoscaling(config, LoadControllerArgs())
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "block",
    [
        None,
        {"max_replicas": 2},
        {"policy": {"policy_function": PATH, "policy_kwargs": {"preset": "cost"}}},
        {"policy": {"policy_function": "fractions:Fraction", "policy_kwargs": {"anything": 1}}},
    ],
)
def test_an_engine_replica_accepts_good_kwargs_and_other_policies(block):
    check_autoscaling(DeploymentConfig(autoscaling_config=block), LoadControllerArgs(preset="cost"))
    check_autoscaling(DeploymentConfig(autoscaling_config=block), None)


def with_preset(preset: str | None) -> DeploymentConfig:
    kwargs = {} if preset is None else {"preset": preset}
    return DeploymentConfig(autoscaling_config={"policy": {"policy_function": PATH, "policy_kwargs": kwargs}})


def test_an_engine_replica_refuses_another_preset_than_the_load_controllers():
    with pytest.raises(PolicyError) as caught:
        check_autoscaling(with_preset("latency"), LoadControllerArgs(preset="cost"))
    assert "policy_kwargs.preset='latency' of Engine and load_controller.preset='cost' among args" in str(caught.value)
    check_autoscaling(with_preset("cost"), LoadControllerArgs(preset="cost"))
    check_autoscaling(with_preset(None), LoadControllerArgs(preset="cost"))


def test_a_rule_that_waits_for_thresholds_that_do_not_exist_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        check_autoscaling(with_preset("cost"), LoadControllerArgs())
        assert not caplog.records
        check_autoscaling(with_preset("cost"), None)
    assert "load_controller is null: no threshold gives way first" in caplog.text


def test_the_preset_that_a_policy_is_bound_to_is_known():
    assert rule_preset(with_preset("cost")) == "cost"
    assert rule_preset(with_preset(None)) is None
    assert rule_preset(DeploymentConfig()) is None


def test_without_a_preset_the_one_that_replicas_report_is_followed():
    policy = SpeculationAwarePolicy(headroom=0.2)
    before = policy.rule
    policy(context({OLD: stats()}))
    assert policy.rule == before
    policy(context({OLD: stats(preset=number_of("throughput")), NEW: stats(preset=number_of("throughput"))}))
    assert policy.rule == replace(load_preset("throughput").replicas, headroom=0.2)
    policy(context({OLD: stats(preset=number_of("latency"))}))
    assert policy.rule == replace(load_preset("latency").replicas, headroom=0.2)
    policy(context({OLD: stats(preset=99.0)}))
    assert policy.rule == replace(load_preset("latency").replicas, headroom=0.2)


def test_a_preset_among_the_kwargs_stays():
    policy = SpeculationAwarePolicy(preset="cost")
    policy(context({OLD: stats(preset=number_of("latency"))}))
    assert policy.rule == load_preset("cost").replicas


def test_kwargs_that_do_not_fit_a_reported_preset_leave_the_rule_as_it_was(caplog):
    policy = SpeculationAwarePolicy(release_below=0.5)
    before = policy.rule
    for _ in range(3):
        policy(context({OLD: stats(preset=number_of("latency"))}))
    assert policy.rule == before
    assert caplog.text.count("expected at most spend_first=0.1") == 1


@pytest.mark.parametrize("number", [-1.0, 3.0, 0.5, float("nan"), None])
def test_a_number_that_stands_for_no_preset_is_none(number):
    assert preset_of(number) is None


def test_serve_refuses_a_policy_that_is_not_there_when_it_reads_the_file():
    with pytest.raises((AttributeError, ValidationError), match="SpeculationAware"):
        AutoscalingConfig(policy={"policy_function": "autoscale.policies:SpeculationAware"})


def test_the_class_travels_by_value_and_light():
    """Into a process that cannot import its module, which ends up without anything of the engine's."""
    sent = AutoscalingConfig(policy={"policy_function": PATH}).policy.get_serialized_policy_def()
    receive = """
import pickle, sys
sys.modules["autoscale.policies"] = None
policy = pickle.load(sys.stdin.buffer)(preset="cost")
from autoscale.replicas import ReplicaRule
assert type(policy.rule) is ReplicaRule
print(sorted({"torch", "transformers", "deployments", "dspark_ray", "pynvml"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", receive], input=sent, capture_output=True, timeout=60)
    assert (ran.returncode, ran.stdout.decode().strip()) == (0, "[]"), ran.stderr.decode()


# From here on with target_occupancy 0.8 and the rule's other defaults.


def test_metrics_become_loads():
    policy = SpeculationAwarePolicy()
    assert policy(context({OLD: stats()}))[0] == 2.0
    assert policy(context({OLD: stats(range_used=0.1)}))[0] == 1.0
    assert policy(context({OLD: stats(running=7.0)}))[0] == 1.0
    assert policy(context({OLD: stats(running=7.0, waiting=3.0)}))[0] == 2.0
    assert policy(context({OLD: stats(running=5.0, cache_usage=0.9)}))[0] == 2.0
    assert policy(context({OLD: stats(running=0.0)}))[0] == 0.0


def test_a_replica_without_a_policy_says_nothing_of_thresholds():
    """Its stats lack the key; without any, occupancy decides."""
    bare = {"running": 10.0, "waiting": 0.0, "max_running": 10.0}
    policy = SpeculationAwarePolicy()
    assert policy(context({OLD: bare}))[0] == 2.0
    assert policy(context({OLD: bare, NEW: stats(range_used=0.2)}))[0] == 2.0
    assert policy(context({OLD: bare, NEW: stats(range_used=0.9)}))[0] == 3.0


def test_requests_that_wait_at_handles_count():
    policy = SpeculationAwarePolicy()
    assert policy(context({OLD: stats(range_used=0.0)}, queued=9.0))[0] == 1.0
    assert policy(context({OLD: stats(range_used=0.0)}, queued=10.0))[0] == 2.0
    assert policy(context({OLD: stats()}, queued=None))[0] == 2.0
    assert policy(context({}, target=0, queued=1.0))[0] == 1.0


def test_replicas_that_are_starting_count():
    policy = SpeculationAwarePolicy()
    assert policy(context({OLD: stats()}, target=4))[0] == 4.0
    assert policy(context({}, target=3))[0] == 3.0


@pytest.mark.parametrize("missing", ["running", "waiting", "max_running"])
def test_a_replica_that_reports_half_has_not_reported(missing):
    half = {name: value for name, value in stats().items() if name != missing}
    assert SpeculationAwarePolicy()(context({OLD: half}))[0] == 1.0


@pytest.mark.parametrize("field", ["running", "waiting", "max_running"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "8", None])
def test_a_number_that_is_none_counts_as_not_reported(field, value):
    assert SpeculationAwarePolicy()(context({OLD: stats(**{field: value})}))[0] == 1.0


def test_no_slots_count_as_not_reported(lines):
    """Serve gives 0 for a series without points."""
    assert SpeculationAwarePolicy()(context({OLD: stats(max_running=0.0)}))[0] == 1.0
    assert "hold: no replica has reported yet" in lines.text


def test_metrics_may_be_missing(lines):
    policy = SpeculationAwarePolicy()
    assert policy(context({OLD: {}}))[0] == 1.0
    assert policy(context({OLD: {}}, aggregated_metrics=None))[0] == 1.0
    assert {record.levelno for record in lines.records} == {logging.INFO}


def test_nothing_is_raised_and_failures_are_logged_once_per_kind(lines):
    def fail(error: Exception) -> AutoscalingContext:
        def metrics() -> dict[str, dict[ReplicaID, float]]:
            raise error

        return context({OLD: {}}, target=5, aggregated_metrics=metrics)

    policy = SpeculationAwarePolicy()
    for _ in range(3):
        assert policy(fail(KeyError("running"))) == (5.0, {})
        assert policy(fail(ZeroDivisionError())) == (5.0, {})
    errors = [record for record in lines.records if record.levelno == logging.ERROR]
    assert [record.exc_info[0] for record in errors] == [KeyError, ZeroDivisionError]
    assert {record.name for record in errors} == {"ray.serve"}
    assert policy(context({OLD: stats()})) == (2.0, {})


def test_a_recommendation_is_logged_with_its_inputs(lines):
    policy = SpeculationAwarePolicy()
    policy(
        context(
            {OLD: stats(waiting=1.0), NEW: stats(range_used=0.8, threshold=0.3, saturation=0.9)}, target=3, queued=4
        )
    )
    assert [record.getMessage() for record in lines.records] == [
        "dspark#Engine: 3 replicas recommended, hold: replicas are starting"
        " (target=3 running=2 reported=2; requests running=20.0 waiting=1.0 queued=4.0;"
        " mean range_used=0.90 threshold=0.35 saturation=0.90)"
    ]
    assert [(record.name, record.levelno) for record in lines.records] == [("ray.serve", logging.INFO)]


def test_a_recommendation_is_logged_when_it_changes(lines):
    policy = SpeculationAwarePolicy()
    calm, busy, risen = stats(running=7.0), stats(range_used=0.0), stats()
    for second, fields in enumerate([calm, calm, busy, busy, risen, risen]):
        policy(context({OLD: fields}, now=float(second)))
    sentences = [record.getMessage().partition(" (")[0].removeprefix("dspark#Engine: ") for record in lines.records]
    assert sentences == [
        "1 replicas recommended, hold: the load fits",
        "1 replicas recommended, hold: thresholds rise first",
        "2 replicas recommended, scale up: thresholds have risen",
    ]


def test_a_recommendation_that_alternates_is_not_logged_ten_times_a_second(lines):
    policy = SpeculationAwarePolicy()
    for tick in range(100):
        policy(context({OLD: stats(running=7.0 + tick % 2 * 3)}, now=1e9 + tick / 10))
    assert 5 <= len(lines.records) <= 11


def test_the_last_of_two_changes_in_a_row_is_logged_too(lines):
    policy = SpeculationAwarePolicy()
    policy(context({OLD: stats(running=7.0)}, now=0.0))
    for tick in range(1, 15):
        policy(context({OLD: stats()}, now=tick / 10))
    assert len(lines.records) == 2


def test_serve_delays_a_recommendation_and_starts_the_first_replica_at_once():
    """Through Serve's own wrapper: the policy returns what the wrapper can work with."""
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=8,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy={"policy_function": PATH, "policy_kwargs": {"preset": "throughput"}},
    )
    wrapped = _apply_autoscaling_config(_resolve_policy_callable(config.policy))
    assert wrapped(context({OLD: stats(waiting=2.0)}, config=config))[0] == 2
    assert wrapped(context({OLD: stats(running=0.0)}, config=config))[0] == 0
    assert wrapped(context({}, config=config, total_num_requests=3.0))[0] == 1
    slow = config.model_copy(update={"upscale_delay_s": 30.0})
    assert wrapped(context({OLD: stats(waiting=2.0)}, config=slow))[0] == 1
