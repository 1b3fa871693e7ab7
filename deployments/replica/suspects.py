"""Trials of requests that were in flight when an engine died: one at a time until each is known to be harmless."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from deployments.replica.messages import TRIAL_TOKENS, Accepted, EngineEvent, Refusal
from dspark_ray.types import Request


class TrialQueue:
    """Submits suspects to one engine, one at a time.

    The next suspect is submitted when the one on trial has ended, was removed, or has generated TRIAL_TOKENS tokens: it
    has then passed the place where the previous engine died. Other requests run beside the suspect. If the engine dies
    again, the suspect on trial is the cause, as no other suspect was in the engine.
    """

    def __init__(self, submit: Callable[[Request], None]) -> None:
        self._submit = submit
        self._waiting: deque[Request] = deque()
        self._current: str | None = None
        self._num_tokens = 0

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        self._submit_next()

    def is_trying(self, request_id: str) -> bool:
        """Whether the request is the suspect on trial."""
        return request_id == self._current

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        if request_id == self._current:
            self._current = None
            self._submit_next()

    def on_event(self, event: EngineEvent) -> None:
        if event.request_id != self._current or isinstance(event, Accepted):
            return
        if not isinstance(event, Refusal):
            self._num_tokens += len(event.token_ids)
        if isinstance(event, Refusal) or event.finish_reason is not None or self._num_tokens >= TRIAL_TOKENS:
            self._current = None
            self._submit_next()

    def _submit_next(self) -> None:
        if self._current is None and self._waiting:
            request = self._waiting.popleft()
            self._current, self._num_tokens = request.request_id, 0
            self._submit(request)
