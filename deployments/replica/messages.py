"""Messages between the Engine replica and verifier rank 0, over ZeroMQ on one node.

Messages are JSON and not pickle, so that no frame can execute code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dspark_ray.types import Request, SequenceOutput, StepOutput, StepRecord, VerificationPolicy

MAX_STEPS = 1000
"""The number of step records that a replica keeps."""

TRIAL_TOKENS = 16
"""The trial of a suspect, a request that was in flight when an engine died, ends after this many tokens."""

RefusalReason = Literal["invalid", "queue_full", "failed"]
"""invalid: the request is wrong. queue_full: the engine has no room for it now. failed: the engine's code raised."""


class EngineLost(Exception):
    """The request's engine died or cannot be reached; another engine can continue the request."""

    def __init__(self, reason: str, in_flight: bool = False, on_trial: bool | None = None) -> None:
        """`in_flight`: the engine had the request, which may be why it died. `on_trial`: whether the request was the
        suspect whose trial was in progress; None where the engine could not report it."""
        super().__init__(reason, in_flight, on_trial)
        self.reason, self.in_flight, self.on_trial = reason, in_flight, on_trial

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Replica to rank 0: generate for this request."""

    request: Request
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Replica to rank 0: end this request, its caller has disconnected."""

    request_id: str
    kind: Literal["abort"] = "abort"


@dataclass(frozen=True, kw_only=True)
class SetPolicy:
    """Replica to rank 0: apply this policy from the next step on."""

    policy: VerificationPolicy
    kind: Literal["set_policy"] = "set_policy"


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Replica to rank 0, once a second: the replica's event loop is running."""

    kind: Literal["ping"] = "ping"


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """Replica to rank 0: end the gang in good order."""

    kind: Literal["shutdown"] = "shutdown"


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Rank 0 to replica: all ranks are connected and weights are loaded."""

    gamma: int
    num_pages: int
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Rank 0 to replica while idle: the step loop is running."""

    kind: Literal["heartbeat"] = "heartbeat"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Rank 0 to replica: the result of one step."""

    step: StepOutput
    kind: Literal["outputs"] = "outputs"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Rank 0 to replica to Ingress: the engine has accepted this request."""

    request_id: str
    replica: str | None = None
    """The id of the Engine replica, which sets it."""
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Rank 0 to replica to Ingress: the engine has not accepted this request."""

    request_id: str
    reason: RefusalReason
    message: str
    param: str | None = None
    kind: Literal["refusal"] = "refusal"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Rank 0 to replica: the step loop raised, and all requests in flight are lost."""

    message: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class StepLog:
    """Replica to Ingress, over Serve: the latest steps of one engine, oldest first."""

    replica: str
    """The replica's id; every replica has a log of its own."""
    records: list[StepRecord]


ToRank0 = Submit | Abort | SetPolicy | Ping | Shutdown
FromRank0 = Ready | Heartbeat | Accepted | Outputs | Refusal | Failed
ChannelMessage = ToRank0 | FromRank0
EngineEvent = Accepted | SequenceOutput | Refusal
"""An event of one request."""

_ADAPTER: TypeAdapter[ChannelMessage] = TypeAdapter(
    Annotated[ChannelMessage, Field(discriminator="kind")], config=ConfigDict(ser_json_inf_nan="constants")
)


def encode(message: ChannelMessage) -> bytes:
    """One ZeroMQ frame."""
    return _ADAPTER.dump_json(message)


def decode(data: bytes) -> ChannelMessage:
    """Raises pydantic.ValidationError for a frame that is not a message."""
    return _ADAPTER.validate_json(data)


class _RequestId(BaseModel):
    request_id: str


class _FrameWithRequest(BaseModel):
    request: _RequestId


def request_id_of(frame: bytes) -> str | None:
    """The id of the request in a Submit that `decode` refuses; None where there is none."""
    try:
        return _FrameWithRequest.model_validate_json(frame).request.request_id
    except ValidationError:
        return None
