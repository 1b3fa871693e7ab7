"""One model behind HTTP: what the routes share, none of it Ray's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import cached_property

from deployments.http.interfaces import ControllerClient, EngineClient
from deployments.http.resubmission import ResubmissionPolicy
from deployments.http.tokenizing import TokenizerPool
from dspark_ray.text.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")


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
    """Seconds without an event after which a stream sends a comment."""
    tokenizer_threads: int = 2
    max_waiting_prompts: int = 64
    """Prompts that may wait for a thread of the tokenizer; one more is refused."""
    adds_request_id: bool = True
    """Whether answers get the header X-Request-Id here; Serve's proxy adds its own."""
    sees_clients: bool = True
    """Whether the peer of a connection is the client itself; false behind a proxy that sends no header of its own."""

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


class Readiness:
    """Whether the engine can serve, asked for in the background and answered from memory.

    `ask` may take long or fail; only one call of it is in progress at a time.
    """

    def __init__(self, ask: Callable[[], Awaitable[bool]], period_s: float = 2.0, patience_s: float = 0.5) -> None:
        """An answer is valid for `period_s` seconds; callers wait at most `patience_s` seconds for a newer one."""
        self._ask, self._period_s, self._patience_s = ask, period_s, patience_s
        self._task: asyncio.Task[None] | None = None
        self._is_ready = False
        self._answered_at: float | None = None

    async def is_ready(self) -> bool:
        """The last known state; False before the first one is known."""
        if self._age() > self._period_s:
            if self._task is None:
                # Outside the request's context: Ray would cancel the call together with the request.
                self._task = asyncio.create_task(self._refresh(), context=Context())
            await asyncio.wait([self._task], timeout=self._patience_s)
        return self._is_ready

    def _age(self) -> float:
        return float("inf") if self._answered_at is None else time.monotonic() - self._answered_at

    async def _refresh(self) -> None:
        try:
            is_ready = await self._ask()
            if is_ready != self._is_ready:
                logger.info("readiness: %s", "ready" if is_ready else "not ready")
            self._is_ready = is_ready
        except Exception:
            # Serve's controller may be restarting, which does not affect requests: the last state is kept.
            logger.warning("the state of the engine could not be read; the last one is kept", exc_info=True)
        finally:
            self._answered_at = time.monotonic()
            self._task = None
