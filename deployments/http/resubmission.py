"""Continues a request on another engine when its engine dies."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from deployments.http.interfaces import EngineBusy, EngineClient, EngineFailed, RequestRefused
from deployments.replica.messages import TRIAL_TOKENS, Accepted, EngineEvent, EngineLost, Refusal
from dspark_ray.types import Request, SequenceOutput

logger = logging.getLogger("ray.serve")

_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class ResubmissionPolicy:
    """When a request continues on another engine, and when it is given up."""

    max_losses: int = 3
    """Engines that may die while they serve one request."""
    deadline_seconds: float = 30.0
    """How long a request looks for an engine that it can reach; longer than it takes to notice the loss of a node."""


async def events_of(
    client: EngineClient, request: Request, policy: ResubmissionPolicy, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[Accepted | SequenceOutput]:
    """Yields Accepted, once per engine, and outputs until one has a finish_reason.

    A request that was in flight when an engine died is a suspect: it may be why. The next engine runs it while no other
    suspect is in that engine. If that engine dies too before the suspect has TRIAL_TOKENS more tokens, the request is
    given up. Raises RequestRefused, EngineBusy, EngineFailed, and EngineLost when no engine could be reached in time.
    """
    progress = _Progress(request, policy, clock)
    while True:
        try:
            async with aclosing(client.generate(*progress.next_attempt())) as events:
                async for event in events:
                    event = _usable(event)
                    progress.on_event(event)
                    yield event
                    if isinstance(event, SequenceOutput) and event.finish_reason is not None:
                        return
            raise EngineLost("the engine ended the request without an answer", in_flight=True)
        except EngineLost as error:
            progress.on_loss(error)
        except (EngineBusy, RequestRefused) as error:
            if not progress.must_wait(error):
                raise
        except EngineFailed as error:
            logger.error("request %s failed: %s", request.request_id, error)
            raise EngineFailed(str(error), request.request_id) from error
        await asyncio.sleep(progress.delay())


class _Progress:
    """A request's attempts, losses and tokens so far."""

    def __init__(self, request: Request, policy: ResubmissionPolicy, clock: Callable[[], float]) -> None:
        self._request, self._policy, self._clock = request, policy, clock
        self._produced = request.output_token_ids
        self._num_attempts = self._num_losses = 0
        self._num_delays = 0
        self._is_suspect = False
        self._is_running = False
        """Whether the engine of this attempt has accepted the request."""
        self._was_accepted = False
        """Whether any engine has accepted the request; from then on it waits for room instead of being refused."""
        self._replica: str | None = None
        """The replica that accepted the request last."""
        self._avoid: str | None = None
        self._num_before = 0
        """Tokens generated before this attempt."""
        self._deadline: float | None = None

    def next_attempt(self) -> tuple[Request, bool, str | None]:
        """The arguments of EngineClient.generate."""
        # Each attempt has an id of its own, as an engine may still have the previous attempt.
        request_id = f"{self._request.request_id}.{self._num_attempts}"
        self._num_attempts += 1
        self._num_before = len(self._produced)
        self._is_running = False
        request = replace(self._request, request_id=request_id, output_token_ids=self._produced)
        return request, self._is_suspect, self._avoid

    def on_event(self, event: Accepted | SequenceOutput) -> None:
        self._is_running = self._was_accepted = True
        self._deadline, self._num_delays = None, 0
        if isinstance(event, Accepted):
            self._replica = event.replica
            return
        self._produced += event.token_ids
        if len(self._produced) - self._num_before >= TRIAL_TOKENS:
            self._is_suspect = False

    def on_loss(self, error: EngineLost) -> None:
        """Record a loss. Raises EngineFailed for a suspect whose second engine died, and `error` where the request may
        not be tried again."""
        request_id = self._request.request_id
        if error.in_flight or self._is_running:
            self._num_losses += 1
            logger.warning("request %s lost its engine (loss %d): %s", request_id, self._num_losses, error)
            # What the engine reports takes precedence: tokens that ended the trial may not have arrived here.
            if self._is_suspect and error.on_trial is not False:
                raise EngineFailed("two engines died while they ran this request", request_id) from error
            self._is_suspect = True
            if self._num_losses > self._policy.max_losses:
                raise error
        now = self._clock()
        self._avoid = self._replica or self._avoid
        # An engine that reports on the trial had the request, possibly waiting: the search starts again.
        if self._deadline is None or error.on_trial is not None:
            self._deadline = now + self._policy.deadline_seconds
        if now >= self._deadline:
            raise error

    def must_wait(self, error: EngineBusy | RequestRefused) -> bool:
        """Whether the request, having been accepted before, waits for room, as it would in the engine's own queue."""
        is_full = isinstance(error, EngineBusy) or error.refusal.reason == "queue_full"
        return is_full and self._was_accepted

    def delay(self) -> float:
        """Seconds until the next attempt; random, so that the requests of a dead engine do not return all at once."""
        longest = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**self._num_delays)
        self._num_delays += 1
        return random.uniform(0.5, 1.0) * longest


def _usable(event: EngineEvent) -> Accepted | SequenceOutput:
    if isinstance(event, Refusal):
        if event.reason == "failed":
            raise EngineFailed(event.message)
        raise RequestRefused(event)
    if isinstance(event, SequenceOutput) and event.finish_reason == "error":
        raise EngineFailed(event.error or "the engine failed")
    if isinstance(event, SequenceOutput) and event.finish_reason == "abort":
        raise EngineFailed("the engine aborted the request")
    return event
