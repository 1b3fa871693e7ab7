"""Prometheus metrics: vLLM's names with the prefix `dspark_`, and this project's own for its decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram

from autoscale.controller import Decision
from autoscale.signals import DeviceLoad, LoadSample, NodeLoad
from deployments.replica.channel import Observer
from dspark_ray.types import SequenceOutput, StepOutput, StepRecord

MetricT = TypeVar("MetricT", Gauge, Counter, Histogram)
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_LENGTHS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0]
_MODES = ("speculating", "bypass", "idle")


class EngineMetrics(Observer):
    """Metrics of one engine, updated once per step. Serve adds the tags of the Engine replica."""

    def __init__(self, model_name: str) -> None:
        make = _Maker(model_name)
        self._steps = StepMetrics(make)
        self._running = make.gauge("num_requests_running", "Requests that hold cache.")
        self._waiting = make.gauge("num_requests_waiting", "Requests accepted but not running.")
        self._cache_usage = make.gauge("kv_cache_usage_perc", "Share of cache pages in use, 0 to 1.")
        self._preemptions = make.counter("num_preemptions", "Sequences that lost their cache to older ones.")
        self._prompt_tokens = make.counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generated = make.counter("generation_tokens", "Tokens committed.")
        self._rounds = make.counter("spec_decode_num_drafts", "Rounds of sequences that ended.")
        self._finished = make.counter("request_success", "Requests ended, by reason.", "finished_reason")
        self._first_token = make.histogram("time_to_first_token_seconds", "From arrival here.", _SECONDS)
        self._length = make.histogram("accepted_length", "Mean tokens per round of a request.", _LENGTHS)
        self._num_preemptions = 0

    def on_request(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def on_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def on_step(self, step: StepOutput) -> None:
        self._running.set(step.num_running)
        self._waiting.set(step.num_waiting)
        self._cache_usage.set(step.cache_usage)
        _increase(self._preemptions, step.num_preemptions - self._num_preemptions)
        self._num_preemptions = step.num_preemptions
        _increase(self._generated, sum(len(output.token_ids) for output in step.sequences))
        for output in step.sequences:
            if output.finish_reason is not None:
                self._on_end(output)
        self._steps.on_step(step)

    def _on_end(self, output: SequenceOutput) -> None:
        self._finished.inc(tags={"finished_reason": str(output.finish_reason)})
        stats = output.stats
        if stats is None or stats.num_rounds == 0:
            return
        _increase(self._rounds, stats.num_rounds)
        self._length.observe(stats.mean_accepted_length)


class LoadMetrics:
    """Metrics of the load controller. Serve's tags name the controller's own replica, so the tag `engine` names Engine
    replicas.
    """

    def __init__(self, model_name: str) -> None:
        make = _Maker(model_name)
        self._probes = make.gauge("node_probes", "Probes that answered in the last round.")
        self._utilization = make.gauge("gpu_utilization", "Share of time with any kernel running.", "node", "gpu")
        self._memory = make.gauge("gpu_memory_used", "Bytes.", "node", "gpu")
        self._power = make.gauge("gpu_power", "Watts.", "node", "gpu")
        self._activity = make.gauge(
            "gpu_activity", "Share of cycles (GPM), of sm, tensor or dram.", "node", "gpu", "unit"
        )
        self._state = make.gauge(
            "gpu_ok", "1 where the device answers, 0 where it is lost or unreadable.", "node", "gpu"
        )
        self._heartbeats = make.counter("heartbeats", "Answered.")
        self._changes = make.counter("policy_changes", "Answers that changed what a replica may verify.", "engine")
        self._saturation = make.gauge("saturation", "Of an Engine replica, 0 to 1.", "engine")
        self._threshold = make.gauge(
            "assigned_threshold", "Confidence threshold that was sent to an Engine replica.", "engine"
        )
        self._range_used = make.gauge(
            "verification_spent", "Position of the threshold in its policy's range, 0 to 1.", "engine"
        )

    def on_decision(self, sample: LoadSample, decision: Decision) -> None:
        engine = {"engine": sample.replica}
        self._heartbeats.inc()
        _increase(self._changes, float(decision.before is not None), engine)
        self._saturation.set(decision.saturation.value, engine)
        self._threshold.set(decision.bounds.confidence_threshold, engine)
        _show(self._range_used, decision.range_used, engine)

    def on_nodes(self, loads: Sequence[NodeLoad]) -> None:
        self._probes.set(len(loads))
        for load in loads:
            for device in load.devices:
                self._on_device(device, {"node": load.host, "gpu": device.uuid})

    def _on_device(self, device: DeviceLoad, tags: dict[str, str]) -> None:
        self._state.set(float(device.state == "ok"), tags)
        _show(self._utilization, device.utilization, tags)
        _show(self._memory, device.memory_used, tags)
        _show(self._power, device.power_watts, tags)
        for unit in ("sm", "tensor", "dram"):
            _show(self._activity, getattr(device, f"{unit}_activity"), {**tags, "unit": unit})


def failure_counter(model_name: str) -> Callable[[str], None]:
    """A function that counts a failure of the background task of a given name."""
    counter = _Maker(model_name).counter("background_failures", "Background tasks that raised or ended.", "task")
    return lambda task: counter.inc(tags={"task": task})


class StepMetrics:
    """Metrics of steps: decisions, predictions and results, from their StepRecords.

    Measured over predicted seconds is rate(..._step_seconds_measured_total) / rate(..._step_seconds_predicted_total),
    seconds per step is rate(..._step_seconds_measured_total) / rate(..._steps_total).
    """

    def __init__(self, make: _Maker) -> None:
        self._steps = make.counter("steps", "Steps of the engine.")
        self._budget = make.gauge("verify_budget_tokens", "Drafted tokens verified in the last step.")
        self._drafted = make.counter("draft_tokens_drafted", "Tokens the drafter proposed.", "position")
        self._admitted = make.counter("draft_tokens_admitted", "Drafted tokens that the target verified.", "position")
        self._accepted = make.counter("draft_tokens_accepted", "Drafted tokens that were accepted.", "position")
        self._survival = make.counter("survival_sum", "Drafted tokens that were expected to be accepted.")
        self._predicted = make.counter("step_seconds_predicted", "By the cost table, before the step.", "part")
        self._measured = make.counter("step_seconds_measured", "Of draft and of everything else.", "part")
        self._schedule = make.counter("schedule_seconds", "Deciding what to verify; a part of the target's seconds.")
        self._drift = make.gauge("cost_drift", "Measured over profiled seconds of the target, smoothed.")
        self._ece = make.gauge("confidence_ece", "Running calibration error of the survival, 0 to 1.", "position")
        self._threshold = make.gauge("confidence_threshold", "Lowest survival that the policy lets be verified.")
        self._version = make.gauge("policy_version", "Of the policy in force.")
        self._bypasses = make.counter("bypass", "Steps without a draft although requests ask for one.", "reason")
        self._nonfinite = make.counter(
            "nonfinite", "Drafts cut short by a NaN or infinity, and requests that ended by one.", "what"
        )
        self._mode = make.gauge("mode", "1 for the current mode; idle: no request asks for drafts.", "mode")

    def on_step(self, step: StepOutput) -> None:
        if step.record is not None:
            self._count_tokens(step.record)
            self._count_seconds(step.record)
            self._show_policy(step.record)
        self._show_mode(step)

    def _count_tokens(self, record: StepRecord) -> None:
        self._budget.set(record.budget)
        _increase(self._survival, record.expected)
        _increase(self._nonfinite, record.num_nonfinite_drafts, {"what": "draft"})
        _increase(self._nonfinite, record.num_nonfinite_logits, {"what": "logits"})
        for position in range(1, record.gamma + 1):
            tags = {"position": str(position)}
            _increase(self._drafted, record.num_drafted, tags)
            _increase(self._admitted, sum(length >= position for length in record.lengths), tags)
            _increase(self._accepted, sum(accepted >= position for accepted in record.accepted), tags)

    def _count_seconds(self, record: StepRecord) -> None:
        self._steps.inc()
        _increase(self._predicted, record.predicted_draft_seconds, {"part": "draft"})
        _increase(self._predicted, record.predicted_target_seconds, {"part": "target"})
        _increase(self._measured, record.measured_draft_seconds, {"part": "draft"})
        _increase(self._measured, record.measured_target_seconds, {"part": "target"})
        _increase(self._schedule, record.schedule_seconds)
        self._drift.set(record.cost_drift)

    def _show_policy(self, record: StepRecord) -> None:
        self._threshold.set(record.confidence_threshold)
        self._version.set(record.policy_version)
        for position, error in enumerate(record.calibration_error, start=1):
            if error is not None:
                self._ece.set(error, {"position": str(position)})
        if record.bypass is not None:
            self._bypasses.inc(tags={"reason": record.bypass})

    def _show_mode(self, step: StepOutput) -> None:
        current = _mode(step)
        for mode in _MODES:
            self._mode.set(float(mode == current), {"mode": mode})


def _mode(step: StepOutput) -> str:
    """The label of the gauge dspark_mode after this step."""
    record = step.record
    if record is None or step.num_running + step.num_waiting == 0:
        return "idle"
    if record.num_drafted > 0:
        return "speculating"
    return "bypass" if record.bypass is not None else "idle"


class _Maker:
    """Makes metrics with the tag model_name."""

    def __init__(self, model_name: str) -> None:
        self._tags = {"model_name": model_name}

    def gauge(self, name: str, description: str, *tag_keys: str) -> Gauge:
        return self._tagged(Gauge(f"dspark_{name}", description, tag_keys=("model_name", *tag_keys)))  # type: ignore[arg-type]

    def counter(self, name: str, description: str, *tag_keys: str) -> Counter:
        return self._tagged(Counter(f"dspark_{name}", description, tag_keys=("model_name", *tag_keys)))  # type: ignore[arg-type]

    def histogram(self, name: str, description: str, boundaries: list[float]) -> Histogram:
        return self._tagged(Histogram(f"dspark_{name}", description, boundaries, tag_keys=("model_name",)))

    def _tagged(self, metric: MetricT) -> MetricT:
        metric.set_default_tags(dict(self._tags))  # Serve adds its own tags to the very dictionary it is given.
        return metric


def _show(gauge: Gauge, value: float | None, tags: dict[str, str]) -> None:
    if value is not None:
        gauge.set(value, tags)


def _increase(counter: Counter, amount: float, tags: dict[str, str] | None = None) -> None:
    if amount > 0:  # Ray's counters refuse zero.
        counter.inc(amount, tags or {})
