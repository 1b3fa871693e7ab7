"""The text of one request: asks an engine for tokens, decodes them, and ends at stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from deployments.http.interfaces import EngineClient
from deployments.http.resubmission import ResubmissionPolicy, events_of
from deployments.replica.messages import Accepted
from dspark_ray.text.stream import TextStream
from dspark_ray.types import Request, SequenceOutput, SpeculationStats, TokenLogprobs

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """Text and tokens that one step of the engine added to one choice."""

    text: str = ""
    num_tokens: int = 0
    """Generated tokens, including an end-of-sequence token."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One per token; None where the request does not ask for them."""
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    """The stop string, or the id from stop_token_ids, that ended the text."""
    stats: SpeculationStats | None = None
    """Set with finish_reason; where a stop string ended the text, the engine's totals at that step."""

    @property
    def is_empty(self) -> bool:
        """Whether a stream can leave it out."""
        return not self.text and not self.logprobs and self.finish_reason is None

    @staticmethod
    def join(chunks: Sequence[TextChunk]) -> TextChunk:
        """All chunks of a choice as one; the last one has its finish_reason."""
        last = chunks[-1]
        return replace(
            last,
            text="".join(chunk.text for chunk in chunks),
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
            token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
            logprobs=None if last.logprobs is None else sum((chunk.logprobs or () for chunk in chunks), ()),
        )


async def generate_text(
    client: EngineClient, text: TextStream, request: Request, resubmission: ResubmissionPolicy
) -> AsyncGenerator[TextChunk]:
    """The chunks of one choice, the last of them with a finish_reason; an empty one as soon as an engine accepts it.

    `text` must be new. Raises RequestRefused, EngineBusy, EngineFailed, and EngineLost where resubmission did not help.
    """
    async with aclosing(events_of(client, request, resubmission)) as events:
        async for event in events:
            if isinstance(event, Accepted):
                yield TextChunk()
                continue
            chunk = _chunk(text, request, event)
            yield chunk
            if chunk.finish_reason is not None:
                return


def _chunk(text: TextStream, request: Request, output: SequenceOutput) -> TextChunk:
    is_hidden = output.stop_token_id is not None and not text.include_stop
    delta = text.push(output.token_ids[:-1] if is_hidden else output.token_ids)
    if delta.stopped:
        return TextChunk(
            text=delta.text,
            num_tokens=delta.num_tokens_kept,
            logprobs=_logprobs(request, output, delta.num_tokens_kept),
            token_ids=output.token_ids[: delta.num_tokens_kept],
            finish_reason="stop",
            stop_reason=delta.stop,
            stats=output.stats,
        )
    ended = output.finish_reason is not None
    return TextChunk(
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
    """Items of all streams as they arrive, each with its stream's index. The first error ends all streams."""
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
