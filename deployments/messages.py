"""What the engine replica and verifier rank 0 say to each other, over ZeroMQ on the loopback of one node.

Messages are JSON, so that whatever connects to the port can be refused but never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from dspark_ray.types import Request, StepOutput, StepRecord, VerificationPolicy

MAX_STEPS = 1000
"""Steps whose records a replica keeps."""

RefusalReason = Literal["invalid", "queue_full"]


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Replica to rank 0: serve this."""

    request: Request
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Replica to rank 0: nobody waits for this request any more."""

    request_id: str
    kind: Literal["abort"] = "abort"


@dataclass(frozen=True, kw_only=True)
class SetPolicy:
    """Replica to rank 0: let this bound what is verified, from the next step on."""

    policy: VerificationPolicy
    kind: Literal["set_policy"] = "set_policy"


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


ToRank0 = Submit | Abort | SetPolicy | Close
FromRank0 = Ready | Heartbeat | Outputs | Refusal | Failed
Message = ToRank0 | FromRank0

_ADAPTER: TypeAdapter[Message] = TypeAdapter(
    Annotated[Message, Field(discriminator="kind")], config=ConfigDict(ser_json_inf_nan="constants")
)


def encode(message: Message) -> bytes:
    """One ZeroMQ frame."""
    return _ADAPTER.dump_json(message)


def decode(data: bytes) -> Message:
    """Raises pydantic.ValidationError for anything that `encode` did not write."""
    return _ADAPTER.validate_json(data)
