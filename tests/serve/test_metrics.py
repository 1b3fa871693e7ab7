"""Metrics of steps and of the load controller, with recorders in place of Ray's metrics."""

from __future__ import annotations

from collections import defaultdict

import pytest

import deployments.replica.metrics
from autoscale.controller import Bounds, Decision
from autoscale.saturation import Saturation
from autoscale.signals import DeviceLoad, NodeLoad
from deployments.replica.heartbeat import LoadWindow
from deployments.replica.metrics import EngineMetrics, LoadMetrics
from dspark_ray.types import SequenceOutput, SpeculationStats, StepOutput, StepRecord


class Recorder:
    """Values of one metric by the tags that were given with them; as strict as Ray about zero and about tags."""

    all: dict[str, Recorder]

    def __init__(self, name: str, description: str, *rest: object, tag_keys: tuple[str, ...]) -> None:
        assert description
        assert ":" not in name
        self.tag_keys = tag_keys
        self.values: dict[tuple[str, ...], float] = defaultdict(float)
        Recorder.all[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tags == {"model_name": "m"}

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        self.values[self._key(tags)] += value

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self._key(tags)] = value

    observe = set

    def _key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        assert {"model_name", *(tags or {})} == set(self.tag_keys)
        return tuple((tags or {}).values())


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.all = {}
    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(deployments.replica.metrics, name, Recorder)


@pytest.fixture
def metrics(recorders: None) -> EngineMetrics:
    return EngineMetrics("m")


def record(**fields: object) -> StepRecord:
    whole = {
        "step": 0,
        "ended_at": 1.7e9,
        "num_decoding": 3,
        "num_prefill_rows": 0,
        "bypass": None,
        "lengths": (3, 1, 0),
        "accepted": (2, 1, 0),
        "expected": 2.5,
        "gamma": 3,
        "predicted_draft_seconds": 0.25,
        "measured_draft_seconds": 0.5,
        "predicted_target_seconds": 1.0,
        "measured_target_seconds": 1.5,
        "schedule_seconds": 0.125,
        "confidence_threshold": 0.75,
        "policy_version": 4,
        "cost_drift": 1.25,
        "calibration_error": (0.0625, None, 0.5),
    }
    return StepRecord(**{**whole, **fields})  # type: ignore[arg-type]


BYPASSED = {"lengths": (), "accepted": (), "expected": 0.0, "bypass": "predicted_loss"}


def step(*records: StepRecord, **fields: object) -> list[StepOutput]:
    return [StepOutput(record=record, num_running=3, **fields) for record in records]  # type: ignore[arg-type]


def values(name: str) -> dict[tuple[str, ...], float]:
    return dict(Recorder.all[f"dspark_{name}"].values)


def value(name: str) -> float:
    return values(name)[()]


def test_drafted_tokens_count_every_position_once_per_request(metrics):
    for output in step(record(), record()):
        metrics.on_step(output)
    assert values("draft_tokens_drafted") == {("1",): 6, ("2",): 6, ("3",): 6}
    assert values("draft_tokens_admitted") == {("1",): 4, ("2",): 2, ("3",): 2}
    assert values("draft_tokens_accepted") == {("1",): 4, ("2",): 2}


def test_the_sums_are_those_of_the_records(metrics):
    for output in step(record(), record(**BYPASSED)):
        metrics.on_step(output)
    assert sum(values("draft_tokens_admitted").values()) == record().budget
    assert value("survival_sum") == 2.5
    assert value("verify_budget_tokens") == 0


def test_what_was_not_finite_is_counted_by_where_it_was(metrics):
    for output in step(record(num_nonfinite_drafts=2), record(num_nonfinite_logits=1), record()):
        metrics.on_step(output)
    assert values("nonfinite") == {("draft",): 2, ("logits",): 1}


def test_seconds_add_up_so_that_measured_over_predicted_can_be_asked_for(metrics):
    for output in step(record(), record()):
        metrics.on_step(output)
    assert value("steps") == 2
    assert values("step_seconds_predicted") == {("draft",): 0.5, ("target",): 2.0}
    assert values("step_seconds_measured") == {("draft",): 1.0, ("target",): 3.0}
    assert value("schedule_seconds") == 0.25


def test_gauges_show_the_last_step(metrics):
    for output in step(record(), record(confidence_threshold=0.5, policy_version=5, cost_drift=1.5)):
        metrics.on_step(output)
    assert (value("confidence_threshold"), value("policy_version"), value("cost_drift")) == (0.5, 5, 1.5)
    assert values("confidence_ece") == {("1",): 0.0625, ("3",): 0.5}


def test_bypasses_are_counted_by_reason(metrics):
    for output in step(record(**BYPASSED), record(**BYPASSED), record(**{**BYPASSED, "bypass": "policy"}), record()):
        metrics.on_step(output)
    assert values("bypass") == {("predicted_loss",): 2, ("policy",): 1}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (StepOutput(record=record(), num_running=1), "speculating"),
        (StepOutput(record=record(**BYPASSED), num_running=1), "bypass"),
        (StepOutput(record=record(**{**BYPASSED, "bypass": None}), num_waiting=1), "idle"),
        (StepOutput(record=record()), "idle"),
        (StepOutput(), "idle"),
    ],
)
def test_one_mode_is_current(metrics, output, expected):
    metrics.on_step(StepOutput(record=record(), num_running=1))
    metrics.on_step(output)
    assert {mode for (mode,), is_current in values("mode").items() if is_current} == {expected}
    assert len(values("mode")) == 3


def test_a_step_in_which_nothing_ran_counts_nothing(metrics):
    metrics.on_step(StepOutput())
    assert values("steps") == {}
    assert values("step_seconds_measured") == {}


def test_an_engine_that_never_drafts_is_measured_all_the_same(metrics):
    metrics.on_step(StepOutput(record=record(**{**BYPASSED, "bypass": None}, gamma=0, calibration_error=())))
    assert value("steps") == 1
    assert values("draft_tokens_drafted") == {}


def test_requests_are_still_counted_when_they_end(metrics):
    stats = SpeculationStats(4, 20, 16, 8, (0, 0, 4))
    outputs = (SequenceOutput(request_id="r", token_ids=(1, 2), finish_reason="stop", stats=stats),)
    metrics.on_step(StepOutput(sequences=outputs, record=record(), num_running=2, num_waiting=1))
    assert (value("generation_tokens"), value("spec_decode_num_drafts"), value("accepted_length")) == (2, 4, 3.0)
    assert values("request_success") == {("stop",): 1}
    assert (value("num_requests_running"), value("num_requests_waiting")) == (2, 1)


# The load controller's.


@pytest.fixture
def load(recorders: None) -> LoadMetrics:
    return LoadMetrics("m")


def decision(**fields: object) -> Decision:
    whole = {
        "bounds": Bounds(0.25),
        "version": 3,
        "valid_seconds": 5.0,
        "heartbeat_seconds": 1.0,
        "range_used": 0.5,
        "saturation": Saturation(0.75, "queue", {"queue": 0.75}),
    }
    return Decision(**{**whole, **fields})  # type: ignore[arg-type]


def test_what_an_engine_replica_was_told_is_shown(load):
    sample = LoadWindow("engine-1", 8).take(1.0)
    load.on_decision(sample, decision(before=Bounds(0.125)))
    load.on_decision(sample, decision())
    assert value("heartbeats") == 2
    assert values("policy_changes") == {("engine-1",): 1}
    assert values("assigned_threshold") == {("engine-1",): 0.25}
    assert values("saturation") == {("engine-1",): 0.75}
    assert values("verification_spent") == {("engine-1",): 0.5}


def test_a_policy_with_one_threshold_shows_no_range(load):
    load.on_decision(LoadWindow("engine-1", 8).take(1.0), decision(range_used=None))
    assert values("verification_spent") == {}


def test_of_a_device_only_what_it_says_is_shown(load):
    good = DeviceLoad(kind="gpu", index=0, uuid="GPU-0", name="a", utilization=0.5, tensor_activity=0.25, memory_used=7)
    lost = DeviceLoad(kind="gpu", index=1, uuid="GPU-1", name="a", state="lost")
    load.on_nodes([NodeLoad(node_id="n", host="host", source="nvml", devices=(good, lost))])
    assert value("node_probes") == 1
    assert values("gpu_ok") == {("host", "GPU-0"): 1.0, ("host", "GPU-1"): 0.0}
    assert values("gpu_utilization") == {("host", "GPU-0"): 0.5}
    assert values("gpu_memory_used") == {("host", "GPU-0"): 7}
    assert values("gpu_power") == {}
    assert values("gpu_activity") == {("host", "GPU-0", "tensor"): 0.25}
