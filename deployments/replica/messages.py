"""Messages between the Engine replica and verifier rank 0, over ZeroMQ on one node.

Messages are JSON, so that a frame can be refused but never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dspark_ray.types import Request, SequenceOutput, StepOutput, StepRecord, VerificationPolicy

MAX_STEPS = 1000
"""Steps whose records a replica keeps."""

TRIAL_TOKENS = 16
"""A suspect, which was in flight when an engine died, is trusted again once it has produced so many tokens alone."""

RefusalReason = Literal["invalid", "queue_full", "failed"]
"""The request is wrong; the engine has no room for it now; the engine's own code failed on it."""


class EngineLost(Exception):
    """The engine that had this request died or cannot be reached; another one can go on with it."""

    def __init__(self, reason: str, in_flight: bool = False, on_trial: bool | None = None) -> None:
        """`in_flight`: the engine had begun with the request, so the request may be why it died. `on_trial`: it was the
        suspect that the engine tried at that moment; None where the engine could not say."""
        super().__init__(reason, in_flight, on_trial)
        self.reason, self.in_flight, self.on_trial = reason, in_flight, on_trial

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Replica to rank 0: serve this."""

    request: Request
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Replica to rank 0: the caller has left."""

    request_id: str
    kind: Literal["abort"] = "abort"


@dataclass(frozen=True, kw_only=True)
class SetPolicy:
    """Replica to rank 0: let this bound what is verified, from the next step on."""

    policy: VerificationPolicy
    kind: Literal["set_policy"] = "set_policy"


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Replica to rank 0, once a second: the replica's event loop runs."""

    kind: Literal["ping"] = "ping"


@dataclass(frozen=True, kw_only=True)
class Close:
    """Replica to rank 0: end the gang in good order."""

    kind: Literal["close"] = "close"


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Rank 0 to replica: weights are loaded and the gang has met."""

    gamma: int
    num_pages: int
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Rank 0 to replica while idle: still here."""

    kind: Literal["heartbeat"] = "heartbeat"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Rank 0 to replica: what one step brought."""

    step: StepOutput
    kind: Literal["outputs"] = "outputs"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Rank 0 to replica to ingress: the engine has this request, and outputs follow."""

    request_id: str
    replica: str | None = None
    """The id of the Engine replica, which the replica fills in."""
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Rank 0 to replica to ingress: this request was not accepted."""

    request_id: str
    reason: RefusalReason
    message: str
    param: str | None = None
    kind: Literal["refusal"] = "refusal"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Rank 0 to replica: the step loop raised, and everything in flight is lost."""

    message: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class StepLog:
    """Replica to ingress, not over ZeroMQ but through Serve: the latest steps of one engine, oldest first."""

    replica: str
    """Its id; several replicas have a log each."""
    records: list[StepRecord]


ToRank0 = Submit | Abort | SetPolicy | Ping | Close
FromRank0 = Ready | Heartbeat | Accepted | Outputs | Refusal | Failed
Message = ToRank0 | FromRank0
EngineEvent = Accepted | SequenceOutput | Refusal
"""What an engine tells of one request."""

_ADAPTER: TypeAdapter[Message] = TypeAdapter(
    Annotated[Message, Field(discriminator="kind")], config=ConfigDict(ser_json_inf_nan="constants")
)


def encode(message: Message) -> bytes:
    """One ZeroMQ frame."""
    return _ADAPTER.dump_json(message)


def decode(data: bytes) -> Message:
    """Raises pydantic.ValidationError for anything that `encode` did not write."""
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
