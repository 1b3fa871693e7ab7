"""From a job to an HTTP answer: whole, or as server-sent events.

No `from __future__ import annotations` in modules with FastAPI: it reads annotations.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from deployments.http.answers import Metrics, SpeculationMetrics, Usage, join_stats
from deployments.http.errors import ApiError, as_api_errors
from deployments.http.generation import Piece, generate_text, merge
from deployments.http.jobs import Job
from deployments.http.service import Service
from dspark_ray.types import SpeculationStats

Pieces = AsyncGenerator[tuple[int, Piece]]

# A stop of the server lets streams end, as Serve does, instead of cutting them.
AppStatus.disable_automatic_graceful_drain()


async def answer(service: Service, job: Job) -> Response:
    """Run a job. Raises ApiError for what fails before the answer has begun."""
    pieces = merge(
        [
            generate_text(service.client, job.text(service, request), request, service.resubmission)
            for request in job.requests
        ]
    )
    tally = _Tally(job, service.gamma)
    if job.body.stream:
        return await _stream(service, job, tally, pieces)
    return await _collect(service, job, tally, pieces)


class _Tally:
    """Counts what passes, for usage and statistics."""

    def __init__(self, job: Job, gamma: int) -> None:
        self._job, self._gamma = job, gamma
        self._num_open, self._num_tokens = len(job.requests), 0
        self._stats: list[SpeculationStats] = []

    def add(self, piece: Piece) -> None:
        self._num_tokens += piece.num_tokens
        if piece.finish_reason is not None:
            self._num_open -= 1
        if piece.stats is not None:
            self._stats.append(piece.stats)

    @property
    def is_complete(self) -> bool:
        return self._num_open == 0

    def usage(self) -> Usage:
        return Usage.of(self._job.num_prompt_tokens, self._num_tokens)

    def metrics(self) -> Metrics:
        stats = join_stats(self._stats)
        speculation = None if stats is None else SpeculationMetrics.of(stats, self._gamma)
        return Metrics(seed=self._job.seed, speculative_decoding=speculation)


async def _collect(service: Service, job: Job, tally: _Tally, pieces: Pieces) -> Response:
    choices: list[list[Piece]] = [[] for _ in job.requests]
    with as_api_errors(job.request_id, service.retry_after_s):
        async with aclosing(pieces):
            async for index, piece in pieces:
                tally.add(piece)
                choices[index].append(piece)
    whole = job.writer.whole([Piece.join(choice) for choice in choices])
    return Response(_to_json(whole, usage=tally.usage(), metrics=tally.metrics()), media_type="application/json")


async def _stream(service: Service, job: Job, tally: _Tally, pieces: Pieces) -> Response:
    """Waits until the engine has accepted every choice, so that a refusal still gets a status of its own."""
    early: list[tuple[int, Piece]] = []
    try:
        with as_api_errors(job.request_id, service.retry_after_s):
            while len({index for index, _ in early}) < len(job.requests):
                early.append(await anext(pieces))
    except BaseException:
        await pieces.aclose()
        raise
    return EventStream(_events(service, job, tally, early, pieces), pieces, service.keep_alive_s)


async def _events(
    service: Service, job: Job, tally: _Tally, early: list[tuple[int, Piece]], rest: Pieces
) -> AsyncGenerator[ServerSentEvent]:
    """Server-sent events; a failure in the middle becomes an event with an error."""
    try:
        with as_api_errors(job.request_id, service.retry_after_s):
            for index, piece in early:
                for event in _piece_events(job, tally, index, piece):
                    yield event
            async for index, piece in rest:
                for event in _piece_events(job, tally, index, piece):
                    yield event
    except ApiError as error:
        yield _event(json.dumps(error.body(job.request_id)))
        return
    if job.body.usage_at_end:
        yield _event(_to_json(job.writer.last_chunk(), usage=tally.usage(), metrics=tally.metrics()))
    yield _event("[DONE]")


def _piece_events(job: Job, tally: _Tally, index: int, piece: Piece) -> Iterator[ServerSentEvent]:
    tally.add(piece)
    if piece.is_silent and not (job.body.return_token_ids and piece.token_ids):
        return
    extra: dict[str, Any] = {}
    if job.body.usage_in_chunks:
        extra["usage"] = tally.usage()
    if tally.is_complete and not job.body.usage_at_end:
        extra["metrics"] = tally.metrics()
    yield _event(_to_json(job.writer.chunk(index, piece), **extra))


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data, sep="\n")


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


def _to_json(written: BaseModel, **extra: Any) -> str:
    for name, value in extra.items():
        setattr(written, name, value)
    return written.model_dump_json(exclude_unset=True)


class EventStream(EventSourceResponse):
    """Ends its source with itself: when the client leaves, the sequences are freed at once."""

    def __init__(self, events: AsyncGenerator[Any], source: AsyncGenerator[Any], keep_alive_s: float) -> None:
        super().__init__(events, ping=keep_alive_s, ping_message_factory=_ping, sep="\n")
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A generator that was never started does not run its own clean-up.
        async with aclosing(self._source), aclosing(self._events):
            await super().__call__(scope, receive, send)
