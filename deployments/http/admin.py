"""Routes for operators: steps of engines, load of nodes and replicas, and limits of verification.

No `from __future__ import annotations` in modules with FastAPI: it reads annotations.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field

from autoscale.controller import Bounds
from autoscale.saturation import Saturation
from autoscale.signals import LoadSample, NodeLoad
from deployments.http.answers import StepsAnswer
from deployments.http.errors import ApiError, as_api_errors, documented, invalid, request_id_of
from deployments.http.fields import Finite, LimitsSchema, Seed
from deployments.http.interfaces import ControllerClient, EngineClient
from deployments.http.middleware import BEARER
from deployments.http.service import Service
from deployments.replica.messages import MAX_STEPS
from dspark_ray.engine.records import to_json
from dspark_ray.types import MAX_POLICY_SECONDS, VerificationPolicy

_REPLICA = "^[!-~]{1,256}$"
"""The form of Serve's replica ids. Ids are logged, so others are refused."""


class StepsQuery(BaseModel):
    """How many of an engine's latest steps to show."""

    model_config = ConfigDict(extra="forbid")

    last: int = Field(default=50, ge=1, le=MAX_STEPS)


class PolicyRequest(LimitsSchema):
    """The fields of a VerificationPolicy; absent ones limit nothing."""

    replica: Annotated[str, Field(pattern=_REPLICA)] | None = None
    """All replicas where absent; a single one needs a load controller."""
    bypass: bool | None = None
    version: Seed | None = None
    valid_seconds: Annotated[Finite, Field(gt=0, le=MAX_POLICY_SECONDS)] | None = None

    def policy(self) -> VerificationPolicy:
        """Raises RequestError."""
        return VerificationPolicy(**self.model_dump(exclude_none=True, exclude={"replica"}))


class ReplicaQuery(BaseModel):
    """The Engine replica that a request is about."""

    model_config = ConfigDict(extra="forbid")

    replica: Annotated[str, Field(pattern=_REPLICA)] | None = None
    """All replicas where absent."""


@dataclass(frozen=True, kw_only=True)
class NodeState(NodeLoad):
    """The last answer of a node's probe."""

    age_seconds: float


class ReplicaState(BaseModel):
    """The last heartbeat of a replica, and the load controller's decision for it."""

    sample: LoadSample
    bounds: Bounds
    version: int
    spent: float | None
    saturation: Saturation
    overridden: bool
    """Whether an operator has replaced the policy's bounds."""
    age_seconds: float


class LoadAnswer(BaseModel):
    """The state of nodes and replicas, and the settings by which the load controller decides."""

    application: str
    policy: str
    preset: str | None
    lowest_threshold: float
    problem: str | None
    """Why the last change of its settings was refused."""
    heartbeat_seconds: float
    num_probes: int
    probe_errors: dict[str, str]
    nodes: list[NodeState]
    replicas: list[ReplicaState]


class EnginePolicy(BaseModel):
    """The policy that was applied to one replica, without a load controller."""

    replica: str
    policy: VerificationPolicy


@dataclass(frozen=True)
class Override(Bounds):
    """Bounds set by an operator, for a time or until they are ended."""

    valid_seconds: float | None = None


class OverrideAnswer(BaseModel):
    """The bounds that replace the load controller's for some replicas."""

    replicas: list[str]
    policy: Override


class EndedOverride(BaseModel):
    replica: str | None
    """null for all replicas."""


def admin_routes(service: Service) -> APIRouter:
    client, controller = service.client, service.controller
    router = APIRouter(
        prefix="/admin",
        tags=["administration"],
        dependencies=[Depends(BEARER)],
        responses=documented(400, 403, 404, 500, 503),
    )

    def errors(request: HttpRequest) -> Any:
        return as_api_errors(request_id_of(request.scope), service.retry_after_s)

    @router.get("/steps", summary="The latest steps of one engine")
    async def steps(query: Annotated[StepsQuery, Query()], request: HttpRequest) -> StepsAnswer:
        with errors(request):
            log = await client.steps(query.last)
        return StepsAnswer(replica=log.replica, steps=[to_json(record) for record in log.records])

    @router.get("/load", summary="The load of nodes and replicas")
    async def load(request: HttpRequest) -> LoadAnswer:
        with errors(request):
            return LoadAnswer.model_validate(await _required(controller).view())

    @router.post("/policy", responses=documented(413), summary="Limit what engines verify")
    async def set_policy(body: PolicyRequest, request: HttpRequest) -> EnginePolicy | OverrideAnswer:
        with errors(request):
            if controller is None:
                return await _set_for_one(client, body)
            return await _set_for_all(controller, body)

    @router.delete("/policy", summary="End limits that were set with POST")
    async def end_policy(query: Annotated[ReplicaQuery, Query()], request: HttpRequest) -> EndedOverride:
        with errors(request):
            await _required(controller).end_override(query.replica)
        return EndedOverride(replica=query.replica)

    return router


def _required(controller: ControllerClient | None) -> ControllerClient:
    if controller is None:
        raise ApiError(404, "this application runs without a load controller: load_controller is null in its YAML file")
    return controller


async def _set_for_one(client: EngineClient, body: PolicyRequest) -> EnginePolicy:
    """Takes effect at once, on the replica that Serve chooses."""
    if body.replica is not None:
        raise invalid("replica", f"replica={body.replica!r:.200}: without a load controller Serve chooses the replica")
    policy = body.policy()
    return EnginePolicy(replica=await client.set_policy(policy), policy=policy)


async def _set_for_all(controller: ControllerClient, body: PolicyRequest) -> OverrideAnswer:
    """Takes effect with each replica's next heartbeat."""
    if body.version is not None:
        raise invalid("version", f"version={body.version}: the load controller numbers its policies itself")
    policy = body.policy()
    bounds = Bounds(policy.confidence_threshold, policy.max_draft_tokens, policy.bypass)
    replicas = await controller.override(bounds, policy.valid_seconds, body.replica)
    if not replicas and body.replica is not None:
        raise ApiError(404, f"replica={body.replica!r:.200}: no such replica", param="replica")
    return OverrideAnswer(replicas=replicas, policy=Override(**asdict(bounds), valid_seconds=policy.valid_seconds))
