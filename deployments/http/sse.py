"""Runs a job and writes its HTTP response: JSON, or server-sent events.

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
from deployments.http.generation import TextChunk, generate_text, merge
from deployments.http.jobs import Job
from deployments.http.service import Service
from dspark_ray.types import SpeculationStats

Chunks = AsyncGenerator[tuple[int, TextChunk]]

# When the server stops, streams may end first, as Serve allows, instead of being cut.
AppStatus.disable_automatic_graceful_drain()


async def respond(service: Service, job: Job) -> Response:
    """Run a job. Raises ApiError for failures before the response has begun."""
    chunks = merge(
        [
            generate_text(service.client, job.text(service, request), request, service.resubmission)
            for request in job.requests
        ]
    )
    tally = _Tally(job, service.gamma)
    if job.body.stream:
        return await _stream(service, job, tally, chunks)
    return await _collect(service, job, tally, chunks)


class _Tally:
    """Adds up tokens and speculation statistics over all choices."""

    def __init__(self, job: Job, gamma: int) -> None:
        self._job, self._gamma = job, gamma
        self._num_open, self._num_tokens = len(job.requests), 0
        self._stats: list[SpeculationStats] = []

    def add(self, chunk: TextChunk) -> None:
        self._num_tokens += chunk.num_tokens
        if chunk.finish_reason is not None:
            self._num_open -= 1
        if chunk.stats is not None:
            self._stats.append(chunk.stats)

    @property
    def is_complete(self) -> bool:
        return self._num_open == 0

    def usage(self) -> Usage:
        return Usage.of(self._job.num_prompt_tokens, self._num_tokens)

    def metrics(self) -> Metrics:
        stats = join_stats(self._stats)
        speculation = None if stats is None else SpeculationMetrics.of(stats, self._gamma)
        return Metrics(seed=self._job.seed, speculative_decoding=speculation)


async def _collect(service: Service, job: Job, tally: _Tally, chunks: Chunks) -> Response:
    choices: list[list[TextChunk]] = [[] for _ in job.requests]
    with as_api_errors(job.request_id, service.retry_after_s):
        async with aclosing(chunks):
            async for index, chunk in chunks:
                tally.add(chunk)
                choices[index].append(chunk)
    whole = job.writer.write_whole([TextChunk.join(choice) for choice in choices])
    return Response(_to_json(whole, usage=tally.usage(), metrics=tally.metrics()), media_type="application/json")


async def _stream(service: Service, job: Job, tally: _Tally, chunks: Chunks) -> Response:
    """Wait until the engine has accepted every choice, so that a refusal still gets its own HTTP status."""
    early: list[tuple[int, TextChunk]] = []
    try:
        with as_api_errors(job.request_id, service.retry_after_s):
            while len({index for index, _ in early}) < len(job.requests):
                early.append(await anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(_events(service, job, tally, early, chunks), chunks, service.keep_alive_s)


async def _events(
    service: Service, job: Job, tally: _Tally, early: list[tuple[int, TextChunk]], rest: Chunks
) -> AsyncGenerator[ServerSentEvent]:
    """Server-sent events; a failure after the first of them becomes an event with an error."""
    try:
        with as_api_errors(job.request_id, service.retry_after_s):
            for index, chunk in early:
                for event in _chunk_events(job, tally, index, chunk):
                    yield event
            async for index, chunk in rest:
                for event in _chunk_events(job, tally, index, chunk):
                    yield event
    except ApiError as error:
        yield _event(json.dumps(error.body(job.request_id)))
        return
    if job.body.usage_at_end:
        yield _event(_to_json(job.writer.write_last_chunk(), usage=tally.usage(), metrics=tally.metrics()))
    yield _event("[DONE]")


def _chunk_events(job: Job, tally: _Tally, index: int, chunk: TextChunk) -> Iterator[ServerSentEvent]:
    tally.add(chunk)
    if chunk.is_empty and not (job.body.return_token_ids and chunk.token_ids):
        return
    extra: dict[str, Any] = {}
    if job.body.usage_in_chunks:
        extra["usage"] = tally.usage()
    if tally.is_complete and not job.body.usage_at_end:
        extra["metrics"] = tally.metrics()
    yield _event(_to_json(job.writer.write_chunk(index, chunk), **extra))


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data, sep="\n")


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


def _to_json(written: BaseModel, **extra: Any) -> str:
    for name, value in extra.items():
        setattr(written, name, value)
    return written.model_dump_json(exclude_unset=True)


class EventStream(EventSourceResponse):
    """Closes its source when it ends, so that sequences are freed as soon as the client disconnects."""

    def __init__(self, events: AsyncGenerator[Any], source: AsyncGenerator[Any], keep_alive_s: float) -> None:
        super().__init__(events, ping=keep_alive_s, ping_message_factory=_ping, sep="\n")
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A generator that was never started does not run its own `finally`.
        async with aclosing(self._source), aclosing(self._events):
            await super().__call__(scope, receive, send)
