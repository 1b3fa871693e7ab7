"""OpenAI's HTTP schema: what a request may say, and how answers and errors are written.

Requests are models of our own, because they carry vLLM's and our fields too; responses are the `openai` package's
types.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_choice import Logprobs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from deployments.generation import Piece
from deployments.messages import MAX_STEPS, StepLog
from dspark_ray.records import to_json
from dspark_ray.types import (
    MAX_CHOICES,
    MAX_STOP_STRINGS,
    RequestError,
    SamplingParams,
    SpeculationStats,
    SpeculativeParams,
    TokenLogprobs,
    VerificationPolicy,
)

_LOWEST_LOGPROB = -9999.0


# Errors.


class ApiError(Exception):
    """An answer in OpenAI's error schema."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str) -> ApiError:
    """400: the field `param` can never be served as it is."""
    return ApiError(400, message, param=param, code="invalid_value")


def overloaded(status: int, message: str, retry_after: int) -> ApiError:
    """429 or 503: the same request may be accepted in `retry_after` seconds."""
    kind = "rate_limit_error" if status == 429 else "service_unavailable_error"
    return ApiError(status, message, kind=kind, code="overloaded", retry_after=retry_after)


# Requests.

# These do not change the text, so they are accepted and not looked at.
_HINTS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# These would change the answer in ways that are not implemented: only the values that ask for nothing pass.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


def _writable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no text encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected valid Unicode, got half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_writable)]
TokenIds = list[int]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    include_usage: bool = False


class Speculative(_Model):
    """Ours: what this request asks of speculation."""

    enabled: bool | None = None
    max_draft_tokens: int | None = None
    confidence_threshold: float | None = None

    def params(self) -> SpeculativeParams:
        """Raises RequestError."""
        return SpeculativeParams(**self.model_dump(exclude_none=True))


class GenerationRequest(_Model):
    """The fields that both endpoints share; null means absent, as in OpenAI's API."""

    model: str
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # vLLM's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    speculative: Speculative | None = None

    _PLAIN: ClassVar[set[str]] = {
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
    }

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for name in _NOT_SUPPORTED.keys() & data.keys():
            if data[name] not in _NOT_SUPPORTED[name]:
                raise RequestError(name, f"{name}={data[name]!r:.200}: this server does not support it")
        return {key: value for key, value in data.items() if key not in _HINTS | _NOT_SUPPORTED.keys()}

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def num_logprobs(self) -> int | None:
        """Alternatives per token, None for no logprobs at all. Raises RequestError."""
        raise NotImplementedError

    def asked_tokens(self) -> int | None:
        """The longest answer that was asked for."""
        return self.max_tokens

    def check(self) -> None:
        """What no single field can tell. Raises RequestError."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "stream_options: expected only together with stream=true")
        if len(self._stop_strings()) > MAX_STOP_STRINGS:
            raise RequestError(
                "stop", f"stop has {len(self._stop_strings())} strings: expected at most {MAX_STOP_STRINGS}"
            )

    def sampling(self, max_tokens: int) -> SamplingParams:
        """With a random seed where the request names none. Raises RequestError."""
        fields = self.model_dump(include=self._PLAIN, exclude_none=True)
        if self.top_k is not None:
            # vLLM and its clients write "all" as -1.
            fields["top_k"] = 0 if self.top_k == -1 else self.top_k
        return SamplingParams(
            **fields,
            max_tokens=max_tokens,
            seed=self.seed if self.seed is not None else secrets.randbits(63),
            stop=tuple(self._stop_strings()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=self._logit_bias(),
            logprobs=self.num_logprobs(),
        )

    def speculation(self) -> SpeculativeParams:
        """Raises RequestError."""
        return (self.speculative or Speculative()).params()

    def _stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def _logit_bias(self) -> dict[int, float]:
        bias = self.logit_bias or {}
        for key in bias:
            if not (key.isascii() and key.isdigit()):
                raise RequestError("logit_bias", f"logit_bias has key {key!r:.50}: expected token ids")
        return {int(key): value for key, value in bias.items()}


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of n choices: the next numbers, wrapped to 64 bits."""
    return (seed + choice + 2**63) % 2**64 - 2**63


class CompletionRequest(GenerationRequest):
    prompt: Text | TokenIds | list[Text] | list[TokenIds]
    logprobs: int | None = None

    def prompts(self) -> list[str] | list[TokenIds]:
        """Raises RequestError where there is none."""
        if not self.prompt:
            raise RequestError("prompt", f"prompt={self.prompt!r}: expected text or token ids")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Model):
    type: Literal["text"]
    text: Text


class Message(_Model):
    """What a message may have; `dspark_ray.chat` checks what each role needs of it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class ChatTemplateArgs(_Model):
    """vLLM's `chat_template_kwargs`, those that DeepSeek-V4's encoder knows."""

    thinking: bool | None = None


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: ChatTemplateArgs | None = None

    def chat_options(self) -> dict[str, Any]:
        """Arguments of `dspark_ray.chat.render`."""
        template = self.chat_template_kwargs or ChatTemplateArgs()
        return {"thinking": template.thinking, "reasoning_effort": self.reasoning_effort}

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", f"top_logprobs={self.top_logprobs}: expected only with logprobs=true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class TokenizeRequest(_Model):
    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None


# Administration.


class StepsQuery(BaseModel):
    """What to see of an engine's latest steps."""

    model_config = ConfigDict(extra="forbid")

    last: int = Field(default=50, ge=1, le=MAX_STEPS)


def steps_answer(log: StepLog) -> dict[str, Any]:
    return {"replica": log.replica, "steps": [to_json(record) for record in log.records]}


class PolicyRequest(_Model):
    """The fields of a VerificationPolicy; absent ones bound nothing."""

    replica: str | None = None
    """None for all of them; only a load controller can reach a particular one."""
    confidence_threshold: float | None = None
    max_draft_tokens: int | None = None
    bypass: bool | None = None
    version: int | None = None
    valid_seconds: float | None = None

    def policy(self) -> VerificationPolicy:
        """Raises RequestError."""
        return VerificationPolicy(**self.model_dump(exclude_none=True, exclude={"replica"}))


class ReplicaQuery(BaseModel):
    """Which Engine replica is meant."""

    model_config = ConfigDict(extra="forbid")

    replica: str | None = None
    """None for all of them."""


# Answers.


@dataclass(frozen=True)
class Totals:
    """What the whole HTTP request came to."""

    prompt_tokens: int
    completion_tokens: int
    stats: SpeculationStats | None
    gamma: int

    def usage(self) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )

    def metrics(self) -> dict[str, Any]:
        """vLLM's field names; admitted is ours: drafted tokens that the target saw."""
        stats = self.stats
        if stats is None:
            return {"speculative_decoding": None}
        rate = stats.num_accepted / stats.num_drafted if stats.num_drafted else 0.0
        return {
            "speculative_decoding": {
                "mean_acceptance_length": stats.mean_accepted_length,
                "draft_acceptance_rate": rate,
                "acceptance_histogram": list(stats.accepted_histogram),
                "num_spec_steps": stats.num_rounds,
                "num_draft_tokens": stats.num_drafted,
                "num_admitted_draft_tokens": stats.num_admitted,
                "num_accepted_draft_tokens": stats.num_accepted,
                "num_spec_tokens": self.gamma,
            }
        }


def join_stats(parts: Sequence[SpeculationStats]) -> SpeculationStats | None:
    """The sum over choices; None where no choice has any."""
    if not parts:
        return None
    width = max(len(part.accepted_histogram) for part in parts)
    histograms = [part.accepted_histogram + (0,) * (width - len(part.accepted_histogram)) for part in parts]
    return SpeculationStats(
        num_rounds=sum(part.num_rounds for part in parts),
        num_drafted=sum(part.num_drafted for part in parts),
        num_admitted=sum(part.num_admitted for part in parts),
        num_accepted=sum(part.num_accepted for part in parts),
        accepted_histogram=tuple(map(sum, zip(*histograms, strict=True))),
    )


@dataclass(frozen=True)
class Token:
    """A token as logprobs show it; its bytes may be a part of a character only."""

    content: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


@dataclass(frozen=True)
class ShownLogprobs:
    token: Token
    top: tuple[Token, ...]


class Answer:
    """Writes one HTTP request's answer; the two endpoints differ in their schema only."""

    prefix: ClassVar[str]

    def __init__(self, model: str, token_bytes: Callable[[int], bytes]) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.model, self.created = model, int(time.time())
        self._token_bytes = token_bytes

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """One piece of choice `index` in a stream."""
        raise NotImplementedError

    def last_chunk(self, totals: Totals) -> BaseModel:
        """The chunk without choices that carries the usage."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Piece], totals: Totals) -> BaseModel:
        """The answer that is not streamed; each choice is one joined piece."""
        raise NotImplementedError

    def _shown(self, logprobs: Sequence[TokenLogprobs]) -> list[ShownLogprobs]:
        return [
            ShownLogprobs(
                self._token(entry.token_id, entry.logprob),
                tuple(self._token(token_id, logprob) for token_id, logprob in entry.top),
            )
            for entry in logprobs
        ]

    def _token(self, token_id: int, logprob: float) -> Token:
        return Token(self._token_bytes(token_id), max(logprob, _LOWEST_LOGPROB))

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model}


class ChatAnswer(Answer):
    prefix = "chatcmpl"

    def __init__(self, model: str, token_bytes: Callable[[int], bytes]) -> None:
        super().__init__(model, token_bytes)
        self._opened: set[int] = set()

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        delta = ChoiceDelta(content=piece.text)
        if index not in self._opened:
            self._opened.add(index)
            delta = ChoiceDelta(role="assistant", content=piece.text)
        choice = ChunkChoice.model_validate(
            {
                "index": index,
                "delta": delta,
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
            }
        )
        return ChatCompletionChunk(**self._head(), object="chat.completion.chunk", choices=[choice])

    def last_chunk(self, totals: Totals) -> BaseModel:
        return ChatCompletionChunk(**self._head(), object="chat.completion.chunk", choices=[], usage=totals.usage())

    def whole(self, choices: Sequence[Piece], totals: Totals) -> BaseModel:
        return ChatCompletion(
            **self._head(),
            object="chat.completion",
            choices=[
                ChatChoice.model_validate(
                    {
                        "index": index,
                        "message": ChatCompletionMessage(role="assistant", content=piece.text, refusal=None),
                        "logprobs": self._logprobs(piece),
                        "finish_reason": piece.finish_reason,
                    }
                )
                for index, piece in enumerate(choices)
            ],
            usage=totals.usage(),
        )

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if piece.logprobs is None:
            return None
        content = [
            {**_with_bytes(shown.token), "top_logprobs": [_with_bytes(token) for token in shown.top]}
            for shown in self._shown(piece.logprobs)
        ]
        return {"content": content, "refusal": None}


def _with_bytes(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.content)}


class CompletionAnswer(Answer):
    prefix = "cmpl"

    def __init__(self, model: str, token_bytes: Callable[[int], bytes]) -> None:
        super().__init__(model, token_bytes)
        self._text_offsets: dict[int, int] = {}

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        # The type has no name for a stream's chunk, whose finish_reason is null until the last.
        choice = CompletionChoice.model_construct(
            index=index,
            text=piece.text,
            logprobs=self._logprobs(index, piece),
            finish_reason=piece.finish_reason,
        )
        return Completion.model_construct(**self._head(), object="text_completion", choices=[choice])

    def last_chunk(self, totals: Totals) -> BaseModel:
        return Completion(**self._head(), object="text_completion", choices=[], usage=totals.usage())

    def whole(self, choices: Sequence[Piece], totals: Totals) -> BaseModel:
        return Completion(
            **self._head(),
            object="text_completion",
            choices=[
                CompletionChoice.model_validate(
                    {
                        "index": index,
                        "text": piece.text,
                        "logprobs": self._logprobs(index, piece),
                        "finish_reason": piece.finish_reason,
                    }
                )
                for index, piece in enumerate(choices)
            ],
            usage=totals.usage(),
        )

    def _logprobs(self, index: int, piece: Piece) -> Logprobs | None:
        if piece.logprobs is None:
            return None
        shown = self._shown(piece.logprobs)
        offsets = []
        for entry in shown:
            offset = self._text_offsets.get(index, 0)
            offsets.append(offset)
            self._text_offsets[index] = offset + len(entry.token.text)
        return Logprobs(
            tokens=[entry.token.text for entry in shown],
            token_logprobs=[entry.token.logprob for entry in shown],
            top_logprobs=[{token.text: token.logprob for token in entry.top} for entry in shown],
            text_offset=offsets,
        )
