"""From pieces of text to answers: the two endpoints differ in their schema alone."""

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
from deployments.http.generation import Piece
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import TokenLogprobs

_LOWEST_LOGPROB = -9999.0


class AnswerWriter:
    """Writes one HTTP request's answer."""

    prefix: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer, returns_token_ids: bool = False) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}
        self._tokenizer, self._returns_token_ids = tokenizer, returns_token_ids
        self.prompts: Sequence[Sequence[int]] = ()
        """Token ids of the prompt of each choice, for return_token_ids."""
        self._opened: set[int] = set()

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """One piece of choice `index` in a stream."""
        raise NotImplementedError

    def last_chunk(self) -> BaseModel:
        """The chunk without choices that carries the usage."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Piece]) -> BaseModel:
        """The answer that is not streamed; each choice is one joined piece."""
        raise NotImplementedError

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "index": index,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._returns_token_ids:
            fields["token_ids"] = list(piece.token_ids)
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

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        is_first = self._is_first(index)
        delta = Delta(role="assistant", content=piece.text) if is_first else Delta(content=piece.text)
        choice = ChunkChoice(**self._choice(index, piece), delta=delta, logprobs=self._logprobs(piece))
        return ChatChunk(
            **self._head, object="chat.completion.chunk", choices=[choice], **self._prompt_ids(index, is_first)
        )

    def last_chunk(self) -> BaseModel:
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[])

    def whole(self, choices: Sequence[Piece]) -> BaseModel:
        written = [
            ChatChoice(
                **self._choice(index, piece),
                message=AssistantMessage(role="assistant", content=piece.text, refusal=None),
                logprobs=self._logprobs(piece),
            )
            for index, piece in enumerate(choices)
        ]
        return ChatCompletion(
            **self._head, object="chat.completion", choices=written, **self._prompt_ids(0, is_first=True)
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if piece.logprobs is None:
            return None
        content = [
            ShownToken(
                **self._chance(entry.token_id, entry.logprob),
                top_logprobs=[TokenChance(**self._chance(*likely)) for likely in entry.top],
            )
            for entry in piece.logprobs
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
        """`special` tells whether special tokens are a part of the text."""
        super().__init__(model, tokenizer, returns_token_ids)
        self._special = special
        self._offsets: dict[int, _Offset] = {}

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        return self._completion([self._completion_choice(index, piece, self._is_first(index))])

    def last_chunk(self) -> BaseModel:
        return self._completion([])

    def whole(self, choices: Sequence[Piece]) -> BaseModel:
        return self._completion([self._completion_choice(index, piece, True) for index, piece in enumerate(choices)])

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(**self._head, object="text_completion", choices=choices)

    def _completion_choice(self, index: int, piece: Piece, is_first: bool) -> CompletionChoice:
        return CompletionChoice(
            **self._choice(index, piece),
            text=piece.text,
            logprobs=self._logprobs(index, piece),
            **self._prompt_ids(index, is_first),
        )

    def _logprobs(self, index: int, piece: Piece) -> CompletionLogprobs | None:
        if piece.logprobs is None:
            return None
        offset = self._offsets.setdefault(index, _Offset())
        return CompletionLogprobs(
            tokens=[self._name(entry.token_id) for entry in piece.logprobs],
            token_logprobs=[_finite(entry.logprob) for entry in piece.logprobs],
            top_logprobs=[self._top(entry) for entry in piece.logprobs],
            text_offset=[
                offset.before(self._tokenizer.token_bytes(entry.token_id, self._special)) for entry in piece.logprobs
            ],
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the one that was drawn."""
        chances = {self._name(token_id): _finite(logprob) for token_id, logprob in entry.top}
        return chances | {self._name(entry.token_id): _finite(entry.logprob)}

    def _name(self, token_id: int) -> str:
        """A token's text, or as OpenAI spells a part of a character: bytes:\\xe2\\x80."""
        content = self._tokenizer.token_bytes(token_id, special=True)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclass
class _Offset:
    """Counts the characters of one text, a token at a time."""

    num_characters: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def before(self, content: bytes) -> int:
        """Where the character stands that this token begins or goes on with."""
        begin = self.num_characters
        self.num_characters += len(self._decoder.decode(content))
        return begin


def _finite(logprob: float) -> float:
    """JSON knows no infinity."""
    return max(logprob, _LOWEST_LOGPROB)
