"""The Engine deployment: one replica owns one gang of workers and needs no accelerator itself."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve._private.config import DeploymentConfig
from ray.serve.handle import DeploymentHandle

from autoscale.policies import SpeculationAwarePolicy, check_kwargs
from deployments.args import AppArgs
from deployments.channel import EngineChannel
from deployments.gang import start_gang
from deployments.heartbeat import HeartbeatLoop, LoadWindow
from deployments.messages import Refusal, StepLog
from deployments.metrics import EngineMetrics
from dspark_ray.types import Request, SequenceOutput, VerificationPolicy

logger = logging.getLogger("ray.serve")

_POLICY = f"{SpeculationAwarePolicy.__module__}:{SpeculationAwarePolicy.__name__}"
"""As a YAML file names it."""
_WATCH_SECONDS = 1.0
_SETTLE_SECONDS = 0.3
"""A dead process makes its peers raise; wait this long to see which came first."""
_FAREWELL_SECONDS = 1.0
"""For errors to reach clients before the process ends."""


@serve.deployment(name="Engine")
class EngineReplica:
    """Starts a gang, hands its outputs to requests, and dies with it.

    Whatever ends a member ends this process, Ray ends the rest, and Serve builds a new replica in a new
    placement group.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: AppArgs, controller: DeploymentHandle | None
    ) -> None:
        check_autoscaling(serve.get_replica_context()._deployment_config)
        self._args = args
        self._id = serve.get_replica_context().replica_tag
        self._tasks: list[asyncio.Task[None]] = []
        self._window = LoadWindow(self._id, args.engine.max_num_seqs)
        self._channel = EngineChannel(EngineMetrics(args.model_name), self._window)
        args.resolve()
        self._tasks.append(asyncio.create_task(self._channel.listen()))
        self._gang = await start_gang(args, self._channel.requests_address, self._channel.outputs_address)
        await self._until_ready()
        self._tasks.append(asyncio.create_task(self._watch()))
        self._heartbeats = self._start_heartbeats(controller)

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput | Refusal]:
        """Stream a request's outputs; when the caller leaves, the sequence is freed within a round."""
        async for output in self._channel.generate(request):
            yield output

    async def steps(self, last: int) -> StepLog:
        """What this replica's engine decided in its latest steps, at most `last` of them."""
        return StepLog(self._id, self._channel.steps(last))

    async def set_policy(self, policy: VerificationPolicy) -> str:
        """Let `policy` bound what this replica's engine verifies; returns the replica's id."""
        self._channel.set_policy(policy)
        return self._id

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscale.policies.SpeculationAwarePolicy looks at."""
        return self._window.stats() | (self._heartbeats.stats() if self._heartbeats is not None else {})

    def check_health(self) -> None:
        """The second net behind `_watch`."""
        self._gang.raise_end()

    def __del__(self) -> None:
        """Serve's graceful stop."""
        for task in self._tasks:
            task.cancel()
        self._channel.close()

    def _start_heartbeats(self, controller: DeploymentHandle | None) -> HeartbeatLoop | None:
        config = self._args.controller_config()
        if controller is None or config is None:
            return None
        self._window.places = tuple(dict.fromkeys(self._gang.places))
        loop = HeartbeatLoop(
            self._window, controller.heartbeat.remote, self._channel.set_policy, config.heartbeat_seconds
        )
        self._tasks.append(asyncio.create_task(loop.run()))
        return loop

    async def _until_ready(self) -> None:
        """Raises the error of the first member that could not start."""
        ready = asyncio.create_task(self._channel.ready.wait())
        timeout = self._args.health.startup_timeout_s
        either: list[asyncio.Future[Any]] = [ready, *self._gang.runs.values()]
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._gang.raise_end()
        if not ready.done():
            raise TimeoutError(f"the engine was not ready after health.startup_timeout_s={timeout}")

    async def _watch(self) -> None:
        """End this process when a member has ended or rank 0 is silent for too long."""
        while not await self._gang.first_end(_WATCH_SECONDS):
            if self._channel.seconds_of_silence > self._args.health.step_timeout_s:
                self._exit(f"rank 0 was silent for {self._channel.seconds_of_silence:.0f} s")
        await asyncio.sleep(_SETTLE_SECONDS)
        words, died = self._gang.end()
        if not died:
            # An exception would follow the requests to the next gang, so they end here.
            self._channel.fail_all(self._channel.failure or words)
            await asyncio.sleep(_FAREWELL_SECONDS)
        self._exit(words)

    def _exit(self, reason: str) -> None:
        logger.critical("the gang is lost, this replica ends: %s", reason)
        os._exit(1)


def check_autoscaling(config: DeploymentConfig) -> None:
    """Raise saturation.ConfigError for kwargs of our autoscaling policy that cannot be meant.

    Serve makes the policy in its controller, where an error is a line in a log; in a replica it ends the deployment.
    """
    policy = config.autoscaling_config and config.autoscaling_config.policy
    if policy and policy.policy_function == _POLICY:
        check_kwargs(policy.policy_kwargs)
