"""The interfaces of the routes over Serve: the Engine and the load controller as deployment handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from autoscale.controller import Bounds
from deployments.http.interfaces import EngineBusy, EngineFailed
from deployments.replica.messages import EngineEvent, EngineLost, StepLog
from dspark_ray.types import Request, VerificationPolicy

_CONTROLLER_SECONDS = 5.0
"""Timeout for an answer of the load controller, which may be restarting."""


class HandleClient:
    """An EngineClient over Serve: any replica of the Engine deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._stream_handle = handle, handle.options(stream=True)
        # Calls to Serve's controller have no timeout, so they get a thread on which nothing else waits.
        self._status_thread = ThreadPoolExecutor(1, thread_name_prefix="serve-status")

    async def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        stream = self._stream_handle.generate.remote(request, on_trial=on_trial, avoid=avoid)
        try:
            with _translating():
                async for output in stream:  # type: ignore[union-attr]
                    yield output
        finally:
            # Cancelling closes the generator in the replica, which then aborts the sequence.
            stream.cancel()

    async def is_healthy(self) -> bool:
        """Whether the Engine deployment has a running replica, or is scaled to zero: a request then starts one."""
        name = self._handle.deployment_id
        all_applications = await asyncio.get_running_loop().run_in_executor(self._status_thread, serve.status)
        status = all_applications.applications[name.app_name].deployments[name.name]
        running = status.replica_states.get("RUNNING", 0)  # type: ignore[call-overload]  # a str enum
        return running > 0 or status.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")

    async def steps(self, last: int) -> StepLog:
        with _translating():
            return await self._handle.steps.remote(last)

    async def set_policy(self, policy: VerificationPolicy) -> str:
        with _translating():
            return await self._handle.set_policy.remote(policy)


class HandleController:
    """A ControllerClient over Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def view(self) -> dict[str, Any]:
        return await self._answer(self._handle.view.remote())

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        return await self._answer(self._handle.override.remote(bounds, seconds, replica))

    async def end_override(self, replica: str | None) -> None:
        await self._answer(self._handle.end_override.remote(replica))

    async def _answer(self, asked: Awaitable[Any]) -> Any:
        try:
            with _translating():
                return await asyncio.wait_for(asked, _CONTROLLER_SECONDS)
        except TimeoutError as error:
            raise EngineBusy(f"the load controller did not answer in {_CONTROLLER_SECONDS} s") from error


@contextmanager
def _translating() -> Iterator[None]:
    """Map Ray's exceptions to those that an EngineClient raises."""
    try:
        yield
    except (RayError, RayServeException) as error:
        raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    """EngineLost for a process that died, EngineFailed for code that raised."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EngineLost):
        return EngineLost(cause.reason, cause.in_flight, cause.on_trial)
    if isinstance(error, BackPressureError):
        return EngineBusy(error.message)
    if isinstance(error, (DeploymentUnavailableError, ReplicaUnavailableError)):
        return EngineLost(str(error))
    died = isinstance(error, RayActorError)
    raised = isinstance(error, (RayTaskError, TaskCancelledError, RayServeException))
    return EngineLost(str(error)) if died or not raised else EngineFailed(str(error))
