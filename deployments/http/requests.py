"""Fields of generation requests: OpenAI's, vLLM's, and this project's."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from deployments.http.fields import (
    DECIMAL,
    ENCODABLE,
    INTEGRAL,
    INTEGRAL_ITEMS,
    Finite,
    LimitsSchema,
    Schema,
    Seed,
    Share,
    Text,
    TokenId,
    note_ignored,
)
from dspark_ray.types import (
    MAX_BIAS,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_MAX_TOKENS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
    SamplingParams,
    VerificationLimits,
)

MAX_PROMPT_TOKENS = 2**20
"""Of a prompt of token ids; max_model_len is usually lower."""

_IGNORED = frozenset(
    {
        "cache_salt",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "user",
    }
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True), INTEGRAL_ITEMS]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True), INTEGRAL_ITEMS]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_LENGTH), ENCODABLE]
Bias = Annotated[Finite, Field(ge=-MAX_BIAS, le=MAX_BIAS), DECIMAL]
Repetition = Annotated[Finite, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY), DECIMAL]
Penalty = Annotated[Finite, Field(ge=-MAX_PENALTY, le=MAX_PENALTY), DECIMAL]


class StreamOptions(Schema):
    _IGNORED = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: every chunk carries the usage so far."""


class Speculative(LimitsSchema):
    """Speculation of one request. It changes the speed, and in coupled verification never the text."""

    enabled: bool | None = None

    def limits(self) -> VerificationLimits:
        fields = self.model_dump(exclude_none=True, exclude={"enabled"})
        return VerificationLimits(**fields, bypass=self.enabled is False)


def _stop_form(value: Any) -> str:
    return "strings" if isinstance(value, list) else "string"


class GenerationRequest(Schema):
    """The fields that both endpoints share."""

    _IGNORED = _IGNORED
    _ONLY = _ONLY

    model: Text | None = None
    """The served model where absent."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    seed: Seed | None = None
    """Choice i of a prompt uses seed + i. Where absent, a seed is drawn; `metrics.seed` of the answer has it."""
    stop: (
        Annotated[
            Annotated[StopString, Tag("string")]
            | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("strings")],
            Discriminator(_stop_form),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_MAX_TOKENS), INTEGRAL] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=MAX_TEMPERATURE), DECIMAL] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1), DECIMAL] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern="^[0-9]{1,10}$")],
                Annotated[Finite, Field(ge=-MAX_BIAS, le=MAX_BIAS), DECIMAL],
            ],
            Field(max_length=MAX_LOGIT_BIASES, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    # vLLM's.
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K), INTEGRAL] | None = None
    """0 and -1 keep all tokens."""
    min_p: Share | None = None
    repetition_penalty: (
        Annotated[Finite, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY), DECIMAL] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_MAX_TOKENS), INTEGRAL] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    # This project's.
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

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def length_field(self) -> str:
        """The name of the field that limits the answer's length, for errors."""
        return "max_tokens"

    @property
    def prompt_field(self) -> str:
        raise NotImplementedError

    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no logprobs. Raises RequestError."""
        raise NotImplementedError

    def asked_tokens(self) -> int | None:
        """The requested maximum length of the answer."""
        return self.max_tokens

    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, max_tokens: int) -> SamplingParams:
        """With a random seed where the request has none. Raises RequestError."""
        if self.stream_options is not None and not self.stream:
            note_ignored("stream_options without stream=true")
        fields = self.model_dump(include=self._PLAIN, exclude_none=True)
        if self.top_k is not None:
            fields["top_k"] = max(self.top_k, 0)
        return SamplingParams(
            **fields,
            max_tokens=max_tokens,
            seed=self.seed if self.seed is not None else secrets.randbits(53),
            stop=tuple(self.stop_strings()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            logprobs=self.num_logprobs(),
        )

    def speculation(self) -> VerificationLimits:
        return (self.speculative or Speculative()).limits()


def choice_seed(seed: int, choice: int) -> int:
    """seed + choice, wrapped to 64 bits."""
    return (seed + choice + 2**63) % 2**64 - 2**63


def _prompt_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    if isinstance(first, str):
        return "texts"
    return "lists" if isinstance(first, list) else "token_ids"


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        Annotated[str, Field(min_length=1), ENCODABLE, Tag("text")]
        | Annotated[TokenIds, Tag("token_ids")]
        | Annotated[
            list[Annotated[str, Field(min_length=1), ENCODABLE]],
            Field(max_length=MAX_CHOICES, fail_fast=True),
            Tag("texts"),
        ]
        | Annotated[list[TokenIds], Field(max_length=MAX_CHOICES, fail_fast=True), Tag("lists")],
        Discriminator(
            _prompt_form,
            custom_error_type="prompt_form",
            custom_error_message="expected text, a list of texts, a list of token ids, or a list of such lists",
        ),
    ]
    """The model's raw input: control markers in it become control tokens."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), INTEGRAL] | None = None
    add_special_tokens: bool = True
    """Whether to put the model's begin-of-sequence token before a text, unless it is there already."""

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def prompt_field(self) -> str:
        return "prompt"

    def num_logprobs(self) -> int | None:
        return self.logprobs
