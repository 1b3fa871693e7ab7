"""Writes generated text as answers in the schemas of the two endpoints."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from deployments.http.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    ShownToken,
    TokenChance,
)
from deployments.http.generation import TextChunk
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import TokenLogprobs

_LOWEST_LOGPROB = -9999.0


class AnswerWriter:
    """Writes the answer to one HTTP request."""

    prefix: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer, returns_token_ids: bool = False) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}
        self._tokenizer, self._returns_token_ids = tokenizer, returns_token_ids
        self.prompts: Sequence[Sequence[int]] = ()
        """Token ids of the prompt of each choice, for return_token_ids."""
        self._opened: set[int] = set()

    def write_chunk(self, index: int, chunk: TextChunk) -> BaseModel:
        """The chunk of a stream that adds to choice `index`."""
        raise NotImplementedError

    def write_last_chunk(self) -> BaseModel:
        """The chunk without choices that carries the usage."""
        raise NotImplementedError

    def write_whole(self, choices: Sequence[TextChunk]) -> BaseModel:
        """The answer without `stream`, from one joined chunk per choice."""
        raise NotImplementedError

    def _choice(self, index: int, chunk: TextChunk) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "index": index,
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }
        if self._returns_token_ids:
            fields["token_ids"] = list(chunk.token_ids)
        return fields

    def _is_first(self, index: int) -> bool:
        """Whether nothing of this choice has been written yet."""
        is_first = index not in self._opened
        self._opened.add(index)
        return is_first

    def _prompt_ids(self, index: int, is_first: bool) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.prompts[index])} if self._returns_token_ids and is_first else {}


class ChatWriter(AnswerWriter):
    prefix = "chatcmpl"

    def write_chunk(self, index: int, chunk: TextChunk) -> BaseModel:
        is_first = self._is_first(index)
        delta = Delta(role="assistant", content=chunk.text) if is_first else Delta(content=chunk.text)
        choice = ChunkChoice(**self._choice(index, chunk), delta=delta, logprobs=self._logprobs(chunk))
        return ChatChunk(
            **self._head, object="chat.completion.chunk", choices=[choice], **self._prompt_ids(index, is_first)
        )

    def write_last_chunk(self) -> BaseModel:
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[])

    def write_whole(self, choices: Sequence[TextChunk]) -> BaseModel:
        written = [
            ChatChoice(
                **self._choice(index, chunk),
                message=AssistantMessage(role="assistant", content=chunk.text, refusal=None),
                logprobs=self._logprobs(chunk),
            )
            for index, chunk in enumerate(choices)
        ]
        return ChatCompletion(
            **self._head, object="chat.completion", choices=written, **self._prompt_ids(0, is_first=True)
        )

    def _logprobs(self, chunk: TextChunk) -> ChatLogprobs | None:
        if chunk.logprobs is None:
            return None
        content = [
            ShownToken(
                **self._chance(entry.token_id, entry.logprob),
                top_logprobs=[TokenChance(**self._chance(*likely)) for likely in entry.top],
            )
            for entry in chunk.logprobs
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _chance(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token_id, special=True)
        return {"token": content.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(content)}


class CompletionWriter(AnswerWriter):
    prefix = "cmpl"

    def __init__(
        self, model: str, tokenizer: Tokenizer, returns_token_ids: bool = False, special: bool = False
    ) -> None:
        """`special` tells whether the text contains special tokens."""
        super().__init__(model, tokenizer, returns_token_ids)
        self._special = special
        self._offsets: dict[int, _Offset] = {}

    def write_chunk(self, index: int, chunk: TextChunk) -> BaseModel:
        return self._completion([self._completion_choice(index, chunk, self._is_first(index))])

    def write_last_chunk(self) -> BaseModel:
        return self._completion([])

    def write_whole(self, choices: Sequence[TextChunk]) -> BaseModel:
        return self._completion([self._completion_choice(index, chunk, True) for index, chunk in enumerate(choices)])

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(**self._head, object="text_completion", choices=choices)

    def _completion_choice(self, index: int, chunk: TextChunk, is_first: bool) -> CompletionChoice:
        return CompletionChoice(
            **self._choice(index, chunk),
            text=chunk.text,
            logprobs=self._logprobs(index, chunk),
            **self._prompt_ids(index, is_first),
        )

    def _logprobs(self, index: int, chunk: TextChunk) -> CompletionLogprobs | None:
        if chunk.logprobs is None:
            return None
        offset = self._offsets.setdefault(index, _Offset())
        return CompletionLogprobs(
            tokens=[self._name(entry.token_id) for entry in chunk.logprobs],
            token_logprobs=[_finite(entry.logprob) for entry in chunk.logprobs],
            top_logprobs=[self._top(entry) for entry in chunk.logprobs],
            text_offset=[
                offset.before(self._tokenizer.token_bytes(entry.token_id, self._special)) for entry in chunk.logprobs
            ],
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the one that was drawn."""
        chances = {self._name(token_id): _finite(logprob) for token_id, logprob in entry.top}
        return chances | {self._name(entry.token_id): _finite(entry.logprob)}

    def _name(self, token_id: int) -> str:
        """A token's text, or bytes:\\xe2\\x80 for a part of a character, as OpenAI spells it."""
        content = self._tokenizer.token_bytes(token_id, special=True)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclass
class _Offset:
    """Counts the characters of a text, token by token."""

    num_characters: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def before(self, content: bytes) -> int:
        """The offset of the character to which the token's first byte belongs."""
        begin = self.num_characters
        self.num_characters += len(self._decoder.decode(content))
        return begin


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, _LOWEST_LOGPROB)
