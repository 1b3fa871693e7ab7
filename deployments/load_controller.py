"""The load controller as a deployment: heartbeats in, limits of verification out, and a probe per node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import LoggingConfig

from autoscale.controller import Bounds, ControllerConfig, Decision, LoadController
from autoscale.errors import PolicyError
from autoscale.signals import LoadSample
from deployments.args import LoadControllerArgs
from deployments.probes import Probes, living_nodes
from deployments.replica.metrics import LoadMetrics, failure_counter

logger = logging.getLogger("ray.serve")

POLL_SECONDS = 1.0
VIEWER_SECONDS = 30.0
"""How long devices are read after the last call of `view`."""
_FIRST_POLL_SECONDS = 2.0
"""How long `view` waits for the first probes to start."""


# Its calls are heartbeats: a line of the access log for each would bury the decisions.
@serve.deployment(name="LoadController", logging_config=LoggingConfig(enable_access_log=False))
class LoadControllerReplica:
    """Answers every replica's heartbeat with limits of verification; a single one serves the whole application.

    When it dies, policies expire in the engines, and its successor continues from the thresholds that replicas report.
    Only an operator's overrides are lost with it: heartbeats and probes restore everything else.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: LoadControllerArgs, own_threshold: float, model_name: str
    ) -> None:
        """`own_threshold`, the engines', is the lowest threshold."""
        check_alone(serve.get_replica_context()._deployment_config)
        self._settings, self._own_threshold = settings, own_threshold
        self._is_running = False
        self._problem: str | None = None
        self._controller = LoadController(settings.config(own_threshold))
        self._metrics = LoadMetrics(model_name)
        self._count_failure = failure_counter(model_name)
        self._probes = Probes()
        self._viewed_at = -math.inf
        self._is_wanted = asyncio.Event()
        self._has_polled = asyncio.Event()
        self._watching = asyncio.create_task(self._watch())

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: Any) -> None:
        """Decide by `user_config`, which replaces `args.load_controller`; None restores the args.

        Serve calls this at the start and after every `serve deploy` that changes `user_config`; because of `rank`, also
        with None. Raises ValueError at the start. Later, an invalid `user_config` is logged and shown by `view`, and
        the settings in force are kept.
        """
        try:
            config = self._config_of(user_config)
        except ValueError as error:
            if not self._is_running:
                raise
            self._problem = str(error)
            logger.error("the load controller keeps its settings: %s", error)
            return
        before = self._controller.config
        if (config, config.preset) != (before, before.preset):
            logger.info("the load controller decides by %s", config)
            self._controller.reconfigure(config)
        self._problem = None

    def _config_of(self, user_config: dict[str, Any] | None) -> ControllerConfig:
        if user_config is None:
            return self._settings.config(self._own_threshold)
        settings = LoadControllerArgs.model_validate(user_config)
        return settings.config(self._own_threshold, path="LoadController.user_config")

    async def heartbeat(self, sample: LoadSample) -> Decision:
        """The replica's limits of verification until its next heartbeat, with a margin."""
        decision = self._controller.on_sample(sample, time.monotonic())
        self._metrics.on_decision(sample, decision)
        if decision.before is not None:
            logger.info(_sentence(sample, decision.before, decision))
        return decision

    async def view(self) -> dict[str, Any]:
        """The state of nodes and replicas, as JSON values. Devices are read for VIEWER_SECONDS after a call."""
        self._viewed_at = time.monotonic()
        if not len(self._probes):
            await self._first_poll()
        return {
            "application": serve.get_replica_context().app_name,
            "policy": self._controller.config.policy.kind,
            "preset": self._controller.config.preset,
            "lowest_threshold": self._controller.config.lowest_threshold,
            "problem": self._problem,
            "heartbeat_seconds": self._controller.heartbeat_seconds,
            "num_probes": len(self._probes),
            "probe_errors": self._probes.errors,
            **self._controller.view(time.monotonic()),
        }

    async def _first_poll(self) -> None:
        """Wake the watch, and wait for the answers of the first probes."""
        self._has_polled.clear()
        self._is_wanted.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_polled.wait(), _FIRST_POLL_SECONDS)

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        """Replace the policy's bounds by an operator's; returns the replicas concerned, none for an unknown one."""
        if replica is not None and replica not in self._controller.replicas:
            return []
        self._controller.override(bounds, seconds, time.monotonic(), replica)
        logger.info("an operator set %s for %s, for %s s", bounds, replica or "all replicas", seconds)
        return self._controller.replicas if replica is None else [replica]

    async def end_override(self, replica: str | None) -> None:
        """Return to the policy's bounds."""
        self._controller.end_override(replica)
        logger.info("an operator ended the override of %s", replica or "all replicas")

    def check_health(self) -> None:
        """Raises what ended the watch, if it has ended."""
        self._is_running = True  # Serve asks for the first time after the first `reconfigure`.
        if self._watching.done():
            self._watching.result()

    async def _watch(self) -> None:
        """Poll probes while a policy or a viewer needs them, and drop silent replicas, until cancelled.

        Ray does not list its nodes while its head restarts, which operators' overrides have to survive: a failed round
        is logged and counted, and the next one is tried.
        """
        while True:
            self._is_wanted.clear()
            started = time.monotonic()
            try:
                await self._poll()
            except Exception:
                logger.exception("nodes could not be polled")
                self._count_failure("watch")
                await asyncio.sleep(POLL_SECONDS)
            rest = max(0.0, POLL_SECONDS - (time.monotonic() - started))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_wanted.wait(), rest)

    async def _poll(self) -> None:
        now = time.monotonic()
        for replica in self._controller.forget_silent(now):
            logger.info("replica %s is silent: forgotten", replica)
        if not self._controller.wants_devices and now - self._viewed_at > VIEWER_SECONDS:
            for node_id in self._probes.end():
                self._controller.forget_node(node_id)
            return
        loads, ended = await self._probes.poll(await living_nodes(), self._controller.node_ids)
        for load in loads:
            self._controller.on_node(load, time.monotonic())
        for node_id in ended:
            logger.info("node %s has left the cluster or no longer runs an actor of a replica", node_id)
            self._controller.forget_node(node_id)
        self._metrics.on_nodes(loads)
        if loads or not self._controller.node_ids:
            self._has_polled.set()


def check_alone(config: DeploymentConfig) -> None:
    """Raise PolicyError where the YAML file asks for several load controllers."""
    if config.autoscaling_config is not None:
        raise PolicyError("LoadController.autoscaling_config: expected none: one controller decides for all replicas")
    if config.num_replicas not in (None, 1):
        raise PolicyError(
            f"LoadController.num_replicas={config.num_replicas}: expected 1: each would know a part of the replicas"
        )


def _sentence(sample: LoadSample, before: Bounds, decision: Decision) -> str:
    """A log line with a decision and its inputs."""
    bounds, saturation = decision.bounds, decision.saturation
    parts = " ".join(f"{name}={value:.2f}" for name, value in _sorted(saturation.parts.items()))
    return (
        f"policy {decision.version} for {sample.replica}:"
        f" threshold {before.confidence_threshold:.3f} -> {bounds.confidence_threshold:.3f},"
        f" max_draft_tokens={bounds.max_draft_tokens}, bypass={bounds.bypass},"
        f" range_used={_share(decision.range_used)}; saturation={saturation.value:.2f}"
        f" by {saturation.limiting} ({parts}); running={sample.num_running:.1f}/{sample.max_running}"
        f" waiting={sample.num_waiting:.1f}"
        f" cache={sample.cache_usage:.2f} slowness={sample.slowness:.2f}"
        f" budget={sample.budget_per_request:.2f} accepted_length={sample.accepted_length:.2f}"
        f" tokens/s={sample.tokens_per_second:.1f}"
    )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _sorted(parts: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    return sorted(parts, key=lambda part: -part[1])
