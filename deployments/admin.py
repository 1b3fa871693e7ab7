"""Routes for operators: what engines decided, what the load controller sees, and what replicas may verify.

No `from __future__ import annotations` here: FastAPI reads the routes' annotations.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query

from autoscale.controller import Bounds
from deployments.generation import EngineClient
from deployments.protocol import ApiError, PolicyRequest, ReplicaQuery, StepsQuery, invalid, steps_answer


class ControllerClient(Protocol):
    """The load controller, however far away. Every call raises what `EngineClient.generate` raises."""

    async def view(self) -> dict[str, Any]:
        """All that it knows of nodes and replicas, as JSON has it."""
        ...

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        """Let these bounds stand in for the policy's; the replicas that they are for, none where it is unknown."""
        ...

    async def end_override(self, replica: str | None) -> None:
        """Back to the policy."""
        ...


@dataclass(frozen=True)
class Administration:
    """What the routes need."""

    client: EngineClient
    controller: ControllerClient | None
    as_api_errors: Callable[[], AbstractContextManager[None]]


def add_admin_routes(http: FastAPI, administration: Administration) -> None:
    client, controller = administration.client, administration.controller

    @http.get("/admin/steps")
    async def steps(query: Annotated[StepsQuery, Query()]) -> dict[str, Any]:
        with administration.as_api_errors():
            return steps_answer(await client.steps(query.last))

    @http.get("/admin/load")
    async def load() -> dict[str, Any]:
        with administration.as_api_errors():
            return await _required(controller).view()

    @http.post("/admin/policy")
    async def set_policy(body: PolicyRequest) -> dict[str, Any]:
        with administration.as_api_errors():
            if controller is None:
                return await _set_for_one(client, body)
            return await _set_for_all(controller, body)

    @http.delete("/admin/policy")
    async def end_policy(query: Annotated[ReplicaQuery, Query()]) -> dict[str, Any]:
        with administration.as_api_errors():
            await _required(controller).end_override(query.replica)
            return {"replica": query.replica}


def _required(controller: ControllerClient | None) -> ControllerClient:
    if controller is None:
        raise ApiError(404, "this application runs without a load controller: load_controller is null in its YAML file")
    return controller


async def _set_for_one(client: EngineClient, body: PolicyRequest) -> dict[str, Any]:
    """At once, and at the replica that Serve chooses."""
    if body.replica is not None:
        raise invalid("replica", f"replica={body.replica!r:.200}: without a load controller Serve chooses the replica")
    policy = body.policy()
    return {"replica": await client.set_policy(policy), "policy": asdict(policy)}


async def _set_for_all(controller: ControllerClient, body: PolicyRequest) -> dict[str, Any]:
    """With each replica's next heartbeat."""
    if body.version is not None:
        raise invalid("version", f"version={body.version}: the load controller numbers its policies itself")
    policy = body.policy()
    bounds = Bounds(policy.confidence_threshold, policy.max_draft_tokens, policy.bypass)
    replicas = await controller.override(bounds, policy.valid_seconds, body.replica)
    if not replicas and body.replica is not None:
        raise ApiError(404, f"replica={body.replica!r:.200}: no such replica", param="replica")
    return {"replicas": replicas, "policy": {**asdict(bounds), "valid_seconds": policy.valid_seconds}}
