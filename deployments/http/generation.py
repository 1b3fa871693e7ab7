"""From a request to text: asks engines for tokens and finds stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

from deployments.http.resubmission import EngineBusy, EngineFailed, RequestRefused, ResubmissionPolicy, events_of
from deployments.replica.messages import Accepted, EngineEvent, EngineLost, StepLog
from dspark_ray.text.stream import TextStream
from dspark_ray.types import Request, SequenceOutput, SpeculationStats, TokenLogprobs, VerificationPolicy

__all__ = [
    "EngineBusy",
    "EngineClient",
    "EngineFailed",
    "EngineLost",
    "Piece",
    "RequestRefused",
    "ResubmissionPolicy",
    "generate_text",
    "merge",
]

T = TypeVar("T")


class EngineClient(Protocol):
    """An engine, in process or remote."""

    def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        """Accepted, then outputs until one has a finish_reason; or one Refusal. Closing it early aborts the request.

        `on_trial`: no other request that was in flight when an engine died may be in the engine meanwhile. `avoid` is
        the id of the replica to try last. Raises EngineLost, EngineBusy and EngineFailed.
        """
        ...

    async def is_healthy(self) -> bool: ...

    async def steps(self, last: int) -> StepLog:
        """The latest steps of an engine that Serve chooses, at most `last` of them. Raises as `generate`."""
        ...

    async def set_policy(self, policy: VerificationPolicy) -> str:
        """Bound what an engine that Serve chooses verifies; returns its replica's id. Raises as `generate`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step brought to one choice's text."""

    text: str = ""
    num_tokens: int = 0
    """Generated tokens it stands for, an end-of-sequence token included."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One per token; None where the request does not ask."""
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    """The stop string or the request's stop id that ended the text."""
    stats: SpeculationStats | None = None
    """With finish_reason; where a stop string ended the text, the engine's totals at that step."""

    @property
    def is_silent(self) -> bool:
        """Whether a stream can leave it out."""
        return not self.text and not self.logprobs and self.finish_reason is None

    @staticmethod
    def join(pieces: Sequence[Piece]) -> Piece:
        """A whole choice; its last piece knows how it ended."""
        last = pieces[-1]
        return replace(
            last,
            text="".join(piece.text for piece in pieces),
            num_tokens=sum(piece.num_tokens for piece in pieces),
            token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
            logprobs=None if last.logprobs is None else sum((piece.logprobs or () for piece in pieces), ()),
        )


async def generate_text(
    client: EngineClient, text: TextStream, request: Request, resubmission: ResubmissionPolicy
) -> AsyncGenerator[Piece]:
    """The pieces of one choice, the last one with a finish_reason; a silent one as soon as an engine has accepted it.

    `text` is an empty one. Raises RequestRefused, EngineBusy, EngineFailed, and EngineLost when resubmitting did not
    help.
    """
    async with aclosing(events_of(client, request, resubmission)) as events:
        async for event in events:
            if isinstance(event, Accepted):
                yield Piece()
                continue
            piece = _piece(text, request, event)
            yield piece
            if piece.finish_reason is not None:
                return


def _piece(text: TextStream, request: Request, output: SequenceOutput) -> Piece:
    is_hidden = output.stop_token_id is not None and not text.include_stop
    delta = text.push(output.token_ids[:-1] if is_hidden else output.token_ids)
    if delta.stopped:
        return Piece(
            text=delta.text,
            num_tokens=delta.num_tokens_kept,
            logprobs=_logprobs(request, output, delta.num_tokens_kept),
            token_ids=output.token_ids[: delta.num_tokens_kept],
            finish_reason="stop",
            stop_reason=delta.stop,
            stats=output.stats,
        )
    ended = output.finish_reason is not None
    return Piece(
        text=delta.text + (text.flush() if ended else ""),
        num_tokens=len(output.token_ids),
        logprobs=_logprobs(request, output, len(output.token_ids)),
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,  # type: ignore[arg-type]
        stop_reason=output.stop_token_id if output.stop_token_id in request.sampling.stop_token_ids else None,
        stats=output.stats if ended else None,
    )


def _logprobs(request: Request, output: SequenceOutput, num_tokens: int) -> tuple[TokenLogprobs, ...] | None:
    return output.logprobs[:num_tokens] if request.sampling.logprobs is not None else None


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Items of all streams as they come, each with its stream's index; the first error ends them all."""
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncGenerator[T], queue: asyncio.Queue[tuple[int, T] | BaseException | None]
) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait((index, item))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
