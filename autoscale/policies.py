"""The autoscaling policy that a Serve YAML file names: thresholds rise first, then replicas are added.

    autoscaling_config:
      policy:
        policy_function: autoscale.policies:SpeculationAwarePolicy
        policy_kwargs: {preset: latency, target_occupancy: 0.6}

Serve imports this module wherever it reads the file and sends the class to its controller by value, so the package
must be installed there and nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoscale.errors import PolicyError
from autoscale.presets import preset_names, replica_rule
from autoscale.replicas import Recommendation, ReplicaLoad, ReplicaRule, recommend

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

logger = logging.getLogger("ray.serve")

Metrics = Mapping[str, Mapping[Any, float]]
"""By name and replica, as Serve passes them; the names are those of LoadWindow.stats and HeartbeatLoop.stats."""


class SpeculationAwarePolicy:
    """Serve's controller makes one per deployment and calls it ten times a second: nothing here may block.

    `policy_kwargs` are a `preset` and fields of autoscale.replicas.ReplicaRule, which replace the preset's. Without a
    preset the rule is that of the load controller's preset, which replicas report, and changes with it without a
    restart; where the load controller has no preset, fields have their defaults. Serve applies its delays and bounds to
    the recommended number. Leave Serve's upscaling_factor and downscaling_factor at 1: they count from running
    replicas, so while replicas start, other factors change a number that has been acted on.
    """

    SECONDS_BETWEEN_LINES = 1.0
    """A recommendation that changes more often is logged at this interval."""

    def __init__(self, **kwargs: Any) -> None:
        """Raises nothing: with an exception Serve's control loop would stop updating every application, silently.

        With invalid kwargs the number of replicas stays as it is. Engine replicas check the same kwargs when they start
        (`check_kwargs`) and end the deployment with the message.
        """
        self.rule: ReplicaRule | None = None
        self.problem: PolicyError | None = None
        self._kwargs, self._preset = kwargs, kwargs.get("preset")
        try:
            self.rule = check_kwargs(kwargs)
        except PolicyError as error:
            self.problem = error
            logger.error("the autoscaling policy keeps the number of replicas: %s", error)
        self._logged: Recommendation | None = None
        self._logged_at = -math.inf
        self._failures: set[str] = set()

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Raises nothing: with an exception Serve would leave the application in DEPLOYING indefinitely."""
        try:
            return self._decide(ctx), {}
        except Exception as error:
            self._log_failure(error)
            return float(ctx.target_num_replicas), {}

    def _decide(self, ctx: AutoscalingContext) -> float:
        if self.rule is None:
            return float(ctx.target_num_replicas)
        metrics, queued = ctx.aggregated_metrics or {}, _number(ctx.total_queued_requests) or 0.0
        self._follow_preset(metrics)
        loads = loads_of(metrics)
        recommended = recommend(self.rule, loads, ctx.target_num_replicas, max(0.0, queued))
        now = _number(ctx.current_time)
        if recommended != self._logged and (now is None or now - self._logged_at >= self.SECONDS_BETWEEN_LINES):
            self._logged, self._logged_at = recommended, -math.inf if now is None else now
            logger.info("%s", _line(recommended, ctx, loads, queued, metrics))
        return recommended.replicas

    def _follow_preset(self, metrics: Metrics) -> None:
        """Without a preset in the kwargs, take the rule of the preset that most replicas report."""
        if self._kwargs.get("preset") is not None:
            return
        reported = Counter(metrics.get("preset", {}).values()).most_common(1)
        preset = preset_of(reported[0][0]) if reported else None
        if preset is None or preset == self._preset:
            return
        try:
            self.rule, self._preset = check_kwargs({**self._kwargs, "preset": preset}), preset
        except PolicyError as error:
            # The kwargs are invalid with this preset; the rule in force stays.
            self._log_failure(error)
        else:
            logger.info("the rule for replicas is that of preset %s", preset)

    def _log_failure(self, error: Exception) -> None:
        """Once per type of exception: ten times a second would fill the disk."""
        kind = type(error).__name__
        if kind not in self._failures:
            self._failures.add(kind)
            logger.error("the autoscaling policy fails and keeps the number of replicas", exc_info=error)


def check_kwargs(kwargs: Mapping[str, Any]) -> ReplicaRule:
    """The rule that `policy_kwargs` describe. Raises PolicyError."""
    rule = dict(kwargs)
    return replica_rule(rule.pop("preset", None), rule, path="policy_kwargs")


def number_of(preset: str) -> float:
    """A preset as a number: replicas can report nothing else to Serve."""
    return float(preset_names().index(preset))


def preset_of(number: object) -> str | None:
    """The inverse of number_of; None for a number that stands for no preset."""
    names, index = preset_names(), _number(number)
    return names[int(index)] if index is not None and 0 <= index < len(names) and index == int(index) else None


def loads_of(metrics: Metrics) -> list[ReplicaLoad]:
    """Of the replicas that have reported all of running, waiting and max_running."""
    loads = (_load(metrics, replica) for replica in metrics.get("running", {}))
    return [load for load in loads if load is not None]


def _load(metrics: Metrics, replica: object) -> ReplicaLoad | None:
    """A value that is not a finite number counts as not reported."""

    def number(name: str) -> float | None:
        return _number(metrics.get(name, {}).get(replica))

    running, waiting, slots = number("running"), number("waiting"), number("max_running")
    if running is None or waiting is None or slots is None or slots <= 0.0:
        return None
    return ReplicaLoad(
        running=max(0.0, running),
        waiting=max(0.0, waiting),
        max_running=slots,
        range_used=number("range_used"),
        cache_usage=number("cache_usage"),
    )


def _line(
    recommended: Recommendation, ctx: AutoscalingContext, loads: list[ReplicaLoad], queued: float, metrics: Metrics
) -> str:
    """The recommendation, its reason and its inputs."""
    running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
    return (
        f"{ctx.app_name}#{ctx.deployment_name}: {recommended.replicas:g} replicas recommended, {recommended.reason}"
        f" (target={ctx.target_num_replicas} running={ctx.current_num_replicas} reported={len(loads)};"
        f" requests running={running:.1f} waiting={waiting:.1f} queued={queued:.1f};"
        f" mean range_used={_mean_of(metrics, 'range_used')} threshold={_mean_of(metrics, 'threshold')}"
        f" saturation={_mean_of(metrics, 'saturation')})"
    )


def _mean_of(metrics: Metrics, name: str) -> str:
    numbers = [number for number in map(_number, metrics.get(name, {}).values()) if number is not None]
    return f"{sum(numbers) / len(numbers):.2f}" if numbers else "none"


def _number(raw: object) -> float | None:
    """None for a value that is not a finite number."""
    return float(raw) if isinstance(raw, int | float) and math.isfinite(raw) else None
