"""The Engine deployment: one replica owns one gang of workers and needs no accelerator itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any

from ray import serve
from ray.serve._private.config import DeploymentConfig
from ray.serve.handle import DeploymentHandle

from autoscale.errors import PolicyError
from autoscale.policies import SpeculationAwarePolicy, check_kwargs
from deployments.args import AppArgs, LoadControllerArgs
from deployments.replica.channel import MAX_FRAMES, EngineChannel
from deployments.replica.gang import start_gang
from deployments.replica.heartbeat import HeartbeatLoop, LoadWindow
from deployments.replica.messages import Accepted, EngineEvent, StepLog
from deployments.replica.metrics import EngineMetrics, failure_counter
from deployments.replica.supervision import BackgroundTasks, Watchdog
from dspark_ray.types import Request, VerificationPolicy

logger = logging.getLogger("ray.serve")

_POLICY = f"{SpeculationAwarePolicy.__module__}:{SpeculationAwarePolicy.__name__}"
"""As in a YAML file."""
_END_STREAMS_SECONDS = 1.0
"""Timeout for ending all streams with EngineLost before the process ends."""
_TRANSPORT_SECONDS = 0.2
"""Time for these errors to leave the process."""


@serve.deployment(name="Engine")
class EngineReplica:
    """Starts a gang of actors, streams its outputs, and ends with it.

    When a member of the gang ends, so does this process. Ray then ends the other members, and Serve starts a new
    replica in a new placement group.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: AppArgs, controller: DeploymentHandle | None
    ) -> None:
        check_autoscaling(serve.get_replica_context()._deployment_config, args.load_controller)
        self._args = args
        self._id = serve.get_replica_context().replica_tag
        self._watchdog = Watchdog(partial(self._end_streams, asyncio.get_running_loop()))
        self._tasks = BackgroundTasks(failure_counter(args.model_name), self._watchdog.lose)
        self._window = LoadWindow(self._id, args.engine.max_num_seqs)
        max_frames = max(MAX_FRAMES, 4 * args.max_ongoing_requests)
        self._channel = EngineChannel(EngineMetrics(args.model_name), self._window, max_frames=max_frames)
        args.resolve()
        self._watchdog.start()
        self._tasks.start("listen", self._channel.listen, is_essential=True)
        self._gang = await start_gang(args, self._channel.address)
        await self._until_ready()
        self._tasks.start("ping", self._channel.ping, is_essential=True)
        self._watch()
        self._heartbeats = self._start_heartbeats(controller)

    async def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        """Stream a request's outputs; when the caller disconnects, the sequence is freed within a round.

        `on_trial`: the request was in flight when an engine died. `avoid`, that engine's replica, is for the router.
        """
        async for event in self._channel.generate(request, on_trial):
            yield replace(event, replica=self._id) if isinstance(event, Accepted) else event

    async def steps(self, last: int) -> StepLog:
        """At most `last` of the latest steps of this replica's engine."""
        return StepLog(self._id, self._channel.steps(last))

    async def set_policy(self, policy: VerificationPolicy) -> str:
        """Apply `policy` to this replica's engine; returns the replica's id."""
        self._channel.set_policy(policy)
        return self._id

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Statistics for autoscale.policies.SpeculationAwarePolicy."""
        return self._window.stats() | (self._heartbeats.stats() if self._heartbeats is not None else {})

    def check_health(self) -> None:
        """Raises the error of a member that has ended, should the watchdog have missed it."""
        self._gang.raise_end()

    def __del__(self) -> None:
        """Called by Serve to stop this replica."""
        self._watchdog.stop()
        self._tasks.cancel()
        self._channel.close()

    def _start_heartbeats(self, controller: DeploymentHandle | None) -> HeartbeatLoop | None:
        config = self._args.controller_config()
        if controller is None or config is None:
            return None
        self._window.places = tuple(dict.fromkeys(self._gang.places))
        loop = HeartbeatLoop(
            self._window,
            controller.heartbeat.remote,
            self._channel.set_policy,
            config.heartbeat_seconds,
            rule_preset=rule_preset(serve.get_replica_context()._deployment_config),
        )
        self._tasks.start("heartbeat", loop.run, is_essential=False)
        return loop

    async def _until_ready(self) -> None:
        """Wait until rank 0 is ready. Raises TimeoutError, or the error of a member that could not start."""
        ready = asyncio.create_task(self._channel.ready.wait())
        timeout = self._args.health.startup_timeout_s
        either: list[asyncio.Future[Any]] = [ready, *map(asyncio.wrap_future, self._gang.runs.values())]
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._gang.raise_end()
        if not ready.done():
            raise TimeoutError(f"the engine was not ready after health.startup_timeout_s={timeout}")

    def _watch(self) -> None:
        """End this process when a member ends, from now on; before, the member's error is raised by the constructor."""
        for name, run in self._gang.runs.items():
            self._watchdog.watch(name, run)
        self._watchdog.check(partial(find_silence, self._channel, self._args.health.step_timeout_s))

    def _end_streams(self, loop: asyncio.AbstractEventLoop, reason: str) -> None:
        """Called by the watchdog, in its thread."""
        asyncio.run_coroutine_threadsafe(end_streams(self._channel, reason), loop).result(_END_STREAMS_SECONDS)


def find_silence(channel: EngineChannel, limit_seconds: float) -> str | None:
    """A sentence on rank 0 or this event loop where one has been silent for too long. Callable from any thread."""
    if channel.seconds_without_ping > limit_seconds:
        return f"the event loop was blocked for {channel.seconds_without_ping:.0f} s"
    if channel.seconds_of_silence > limit_seconds:
        return f"rank 0 was silent for {channel.seconds_of_silence:.0f} s"
    return None


async def end_streams(channel: EngineChannel, reason: str) -> None:
    """End all streams with EngineLost, and wait until their callers have it."""
    channel.lose(channel.failure or reason)
    await channel.until_all_read()
    await asyncio.sleep(_TRANSPORT_SECONDS)


def check_autoscaling(config: DeploymentConfig, load_controller: LoadControllerArgs | None) -> None:
    """Raise PolicyError for invalid kwargs of our autoscaling policy, and for a preset that is not the
    load controller's.

    Serve makes the policy in its controller, where an error is a line in a log; in a replica it ends the deployment.
    """
    policy = config.autoscaling_config and config.autoscaling_config.policy
    if not policy or policy.policy_function != _POLICY:
        return
    check_kwargs(policy.policy_kwargs)
    ours, theirs = load_controller and load_controller.preset, policy.policy_kwargs.get("preset")
    if ours is not None and theirs is not None and ours != theirs:
        raise PolicyError(
            f"policy_kwargs.preset={theirs!r} of Engine and load_controller.preset={ours!r} among args: expected the"
            " same preset, as its thresholds and its rule for replicas were chosen for each other"
        )
    if theirs is not None and load_controller is None:
        logger.warning("policy_kwargs.preset=%r, but load_controller is null: no threshold gives way first", theirs)


def rule_preset(config: DeploymentConfig) -> str | None:
    """The preset in the policy_kwargs of this deployment; None where the policy follows the load controller's."""
    policy = config.autoscaling_config and config.autoscaling_config.policy
    return policy.policy_kwargs.get("preset") if policy and policy.policy_function == _POLICY else None
