"""Tokenises prompts in threads beside the event loop, with a bounded queue and a check of the length before."""

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
    """Encodes prompts. Raises ApiError: 400 for texts that are too long, 503 where too many prompts wait."""

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int, *, num_threads: int, max_waiting: int, retry_after_s: int
    ) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._max_jobs, self._retry_after_s = num_threads + max_waiting, retry_after_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._num_jobs = 0
        # Both take seconds for a large vocabulary the first time, and no request should wait for that.
        self._longest_token = tokenizer.longest_token
        tokenizer.encode_parts([PromptPart("")])

    async def encode(self, texts: Sequence[str], param: str) -> list[list[int]]:
        """Token ids of raw texts, in which control markers become control tokens."""
        for text in texts:
            self._check_length(len(text), param)
        return await self._run(lambda: self._tokenizer.encode_batch(texts))

    async def encode_parts(self, parts: Sequence[PromptPart], param: str) -> list[int]:
        """Token ids of a conversation."""
        self._check_length(sum(len(part.text) for part in parts), param)
        return await self._run(lambda: self._tokenizer.encode_parts(parts))

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuse a text that has too many tokens even if each were as long as the longest token."""
        if self._longest_token is None:
            return
        fewest = -(-num_characters // self._longest_token)
        if fewest > self._max_tokens:
            found = f"{param} has {num_characters} characters, at least {fewest} tokens"
            raise too_long(param, found, self._max_tokens)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._num_jobs >= self._max_jobs:
            message = f"{self._num_jobs} prompts wait to be tokenised: expected at most {self._max_jobs}"
            raise overloaded(503, message, self._retry_after_s)
        self._num_jobs += 1
        done = self._threads.submit(work)
        # Counted until the work ends: a client that disconnects does not free the thread.
        loop = asyncio.get_running_loop()
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._finish))
        return await asyncio.wrap_future(done)

    def _finish(self) -> None:
        self._num_jobs -= 1


def too_long(param: str, found: str, max_model_len: int) -> ApiError:
    """400 for a prompt that leaves no room for generated tokens; `found` states its length."""
    # The first sentence is OpenAI's, which clients recognise.
    limit = f"This model's maximum context length is {max_model_len} tokens"
    return invalid(param, f"{limit}: {found}, expected at most {max_model_len - 1}", CONTEXT_LENGTH_EXCEEDED)
