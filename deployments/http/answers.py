"""Bodies of answers: OpenAI's schema with fields of vLLM's and of this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from dspark_ray.types import SpeculationStats

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @staticmethod
    def of(prompt_tokens: int, completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class SpeculationMetrics(BaseModel):
    """vLLM's field names, and num_admitted_draft_tokens: drafted tokens that the target verified."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_draft_tokens: int
    num_admitted_draft_tokens: int
    num_accepted_draft_tokens: int
    num_spec_tokens: int

    @staticmethod
    def of(stats: SpeculationStats, gamma: int) -> SpeculationMetrics:
        return SpeculationMetrics(
            mean_acceptance_length=stats.mean_accepted_length,
            draft_acceptance_rate=stats.num_accepted / stats.num_drafted if stats.num_drafted else 0.0,
            acceptance_histogram=list(stats.accepted_histogram),
            num_spec_steps=stats.num_rounds,
            num_draft_tokens=stats.num_drafted,
            num_admitted_draft_tokens=stats.num_admitted,
            num_accepted_draft_tokens=stats.num_accepted,
            num_spec_tokens=gamma,
        )


def join_stats(parts: Sequence[SpeculationStats]) -> SpeculationStats | None:
    """The sum over choices; None without statistics."""
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


class Metrics(BaseModel):
    """In every answer and in the last chunk of every stream."""

    seed: int
    """Of the first choice; choice i of a prompt has seed + i. Sent with the same request, it gives the same text."""
    speculative_decoding: SpeculationMetrics | None


class TokenChance(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ShownToken(TokenChance):
    top_logprobs: list[TokenChance]


class ChatLogprobs(BaseModel):
    content: list[ShownToken]
    refusal: None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """The offset of each token's first character in the text of its choice."""


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str


class Choice(BaseModel):
    """Fields of a choice that both endpoints share, in answers and chunks. Unset fields are not sent."""

    index: int
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """vLLM's: the stop id or the stop string that ended the text."""
    token_ids: list[int] = []
    """vLLM's, with return_token_ids."""


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChunkChoice(Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = []
    """vLLM's, with return_token_ids."""


class _Generation(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None
    metrics: Metrics | None = None


class ChatCompletion(_Generation):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] = []


class ChatChunk(_Generation):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] = []


class Completion(_Generation):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["dspark-ray"] = "dspark-ray"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Health(BaseModel):
    status: Literal["alive", "ready", "not ready"]


class Version(BaseModel):
    version: str


class StepsAnswer(BaseModel):
    replica: str
    steps: list[dict[str, Any]]
