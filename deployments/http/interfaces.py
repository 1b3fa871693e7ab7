"""What the routes need of the engine and of the load controller, and the errors of both."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from autoscale.controller import Bounds
from deployments.replica.messages import EngineEvent, Refusal, StepLog
from dspark_ray.types import Request, VerificationPolicy


class EngineBusy(Exception):
    """No engine has room for another request."""


class EngineFailed(Exception):
    """The request failed in a way that would repeat on another engine."""

    def __init__(self, reason: str, request_id: str | None = None) -> None:
        """`reason` is for the log only; clients are shown nothing but the id."""
        super().__init__(reason)
        self.request_id = request_id


class RequestRefused(Exception):
    """The engine did not accept the request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class EngineClient(Protocol):
    """An engine, in process or remote."""

    def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        """Yields Accepted and then outputs until one has a finish_reason, or a single Refusal.

        Closing the generator early aborts the request. With `on_trial`, for a request that was in flight when an engine
        died, no other such request runs in the engine meanwhile. `avoid` is the id of the replica to try last. Raises
        EngineLost, EngineBusy and EngineFailed.
        """
        ...

    async def is_healthy(self) -> bool:
        """Whether an engine can take requests."""
        ...

    async def steps(self, last: int) -> StepLog:
        """At most `last` of the latest steps of an engine that Serve chooses. Raises what `generate` raises."""
        ...

    async def set_policy(self, policy: VerificationPolicy) -> str:
        """Apply `policy` to an engine that Serve chooses; returns its replica's id. Raises what `generate` raises."""
        ...


class ControllerClient(Protocol):
    """The load controller, in process or remote. Every call raises what `EngineClient.generate` raises."""

    async def view(self) -> dict[str, Any]:
        """The state of nodes and replicas, as JSON values."""
        ...

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        """Replace the policy's bounds; returns the ids of the replicas concerned, none for an unknown `replica`."""
        ...

    async def end_override(self, replica: str | None) -> None:
        """Return to the policy's bounds."""
        ...
