"""Whether this server can serve, asked for in the background and answered from memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

logger = logging.getLogger("ray.serve")


class Readiness:
    """Remembers the last answer of `ask`, which may take as long as it likes or fail; only one call is under way."""

    def __init__(self, ask: Callable[[], Awaitable[bool]], period_s: float = 2.0, patience_s: float = 0.5) -> None:
        """An answer is good for `period_s` seconds; while there is none, a caller waits `patience_s` seconds for it."""
        self._ask, self._period_s, self._patience_s = ask, period_s, patience_s
        self._task: asyncio.Task[None] | None = None
        self._is_ready = False
        self._answered_at: float | None = None

    async def is_ready(self) -> bool:
        """The newest known state; False before there is one. Returns at once, or within the patience."""
        if self._age() > self._period_s:
            if self._task is None:
                # In no request's context: Ray would cancel its calls with that request.
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
            # Serve's controller may be restarting, which does not concern requests: the last state stays.
            logger.warning("the state of the engine is not known", exc_info=True)
        finally:
            self._answered_at = time.monotonic()
            self._task = None
