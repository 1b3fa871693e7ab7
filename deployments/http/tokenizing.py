"""Tokenising beside the event loop: threads of its own, a bounded queue, and no work on hopeless texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.http.errors import CONTEXT_LENGTH_EXCEEDED, ApiError, invalid, overloaded
from dspark_ray.text.messages.deepseek_v4 import PromptPart
from dspark_ray.text.tokenizer import Tokenizer

T = TypeVar("T")


class TokenizerPool:
    """Encodes prompts. Raises ApiError: 400 for texts that cannot fit, 503 where too many wait already."""

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int, *, num_threads: int, max_waiting: int, retry_after_s: int
    ) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._most, self._retry_after_s = num_threads + max_waiting, retry_after_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._num_jobs = 0
        # Both take seconds for a large vocabulary, which no request should wait for.
        self._longest_token = tokenizer.longest_token
        tokenizer.encode_parts([PromptPart("")])

    async def encode(self, texts: Sequence[str], param: str) -> list[list[int]]:
        """Token ids of texts in which markers count."""
        for text in texts:
            self._check_length(len(text), param)
        return await self._run(lambda: self._tokenizer.encode_batch(texts))

    async def encode_parts(self, parts: Sequence[PromptPart], param: str) -> list[int]:
        """Token ids of a conversation."""
        self._check_length(sum(len(part.text) for part in parts), param)
        return await self._run(lambda: self._tokenizer.encode_parts(parts))

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuse what is too long however well it is tokenised."""
        if self._longest_token is None:
            return
        fewest = -(-num_characters // self._longest_token)
        if fewest > self._max_tokens:
            found = f"{param} has {num_characters} characters, at least {fewest} tokens"
            raise too_long(param, found, self._max_tokens)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._num_jobs >= self._most:
            message = f"{self._num_jobs} prompts wait to be tokenised: expected at most {self._most}"
            raise overloaded(503, message, self._retry_after_s)
        self._num_jobs += 1
        done = self._threads.submit(work)
        # Counted until the work ends: a client that leaves does not free its thread.
        loop = asyncio.get_running_loop()
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._finish))
        return await asyncio.wrap_future(done)

    def _finish(self) -> None:
        self._num_jobs -= 1


def too_long(param: str, found: str, max_model_len: int) -> ApiError:
    """400: with `found` tokens nothing can be generated."""
    # The first sentence is OpenAI's: clients recognise it.
    limit = f"This model's maximum context length is {max_model_len} tokens"
    return invalid(param, f"{limit}: {found}, expected at most {max_model_len - 1}", CONTEXT_LENGTH_EXCEEDED)
