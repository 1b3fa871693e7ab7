"""What the routes need, none of it Ray's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from autoscale.controller import Bounds
from deployments.http.generation import EngineClient
from deployments.http.readiness import Readiness
from deployments.http.resubmission import ResubmissionPolicy
from deployments.http.tokenizing import TokenizerPool
from dspark_ray.text.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")


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


@dataclass(frozen=True, kw_only=True)
class Service:
    """One model behind HTTP."""

    client: EngineClient
    controller: ControllerClient | None = None
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    gamma: int
    bos_token_id: int
    created: int = 0
    retry_after_s: int = 1
    resubmission: ResubmissionPolicy = field(default_factory=ResubmissionPolicy)
    api_keys: Sequence[str] = ()
    admin_api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 16 * 2**20
    keep_alive_s: float = 15.0
    """Between comments in a stream that has nothing else to say."""
    tokenizer_threads: int = 2
    max_waiting_prompts: int = 64
    """Prompts that may wait for a thread of the tokenizer."""
    adds_request_id: bool = True
    """Whether answers get their X-Request-Id here; Serve's proxy adds it itself."""
    sees_clients: bool = True
    """Whether the peer of a connection is the client, and no proxy that does not say so."""

    @cached_property
    def pool(self) -> TokenizerPool:
        return TokenizerPool(
            self.tokenizer,
            self.max_model_len,
            num_threads=self.tokenizer_threads,
            max_waiting=self.max_waiting_prompts,
            retry_after_s=self.retry_after_s,
        )

    @cached_property
    def readiness(self) -> Readiness:
        return Readiness(self.client.is_healthy)
