"""Requests that were in flight when an engine died: each is tried alone before it is trusted again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from deployments.replica.messages import TRIAL_TOKENS, Accepted, EngineEvent, Refusal
from dspark_ray.types import Request


class TrialQueue:
    """Lets suspects into one engine, one at a time.

    The next one goes in when the one before has ended, has left, or has produced TRIAL_TOKENS tokens: whatever killed
    the engine before did so where this request now went on, and it did not happen again. Requests that are no suspects
    run beside them: they lose at most one engine to a guilty one, which is alone among the suspects and so known.
    """

    def __init__(self, submit: Callable[[Request], None]) -> None:
        self._submit = submit
        self._waiting: deque[Request] = deque()
        self._current: str | None = None
        self._num_tokens = 0

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        self._go_on()

    def is_trying(self, request_id: str) -> bool:
        """Whether the request is the suspect that runs now."""
        return request_id == self._current

    def leave(self, request_id: str) -> None:
        """The request needs no trial any more; unknown ids need none."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        if request_id == self._current:
            self._current = None
            self._go_on()

    def on_event(self, event: EngineEvent) -> None:
        if event.request_id != self._current or isinstance(event, Accepted):
            return
        if not isinstance(event, Refusal):
            self._num_tokens += len(event.token_ids)
        if isinstance(event, Refusal) or event.finish_reason is not None or self._num_tokens >= TRIAL_TOKENS:
            self._current = None
            self._go_on()

    def _go_on(self) -> None:
        if self._current is None and self._waiting:
            request = self._waiting.popleft()
            self._current, self._num_tokens = request.request_id, 0
            self._submit(request)
