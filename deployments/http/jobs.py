"""Turns the body of an HTTP request into requests of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deployments.http.chat_requests import ChatRequest, Conversation
from deployments.http.errors import CONTEXT_LENGTH_EXCEEDED, ApiError, invalid
from deployments.http.requests import CompletionRequest, GenerationRequest, choice_seed
from deployments.http.service import Service
from deployments.http.tokenizing import too_long
from deployments.http.writers import AnswerWriter, ChatWriter, CompletionWriter
from dspark_ray.text.messages.deepseek_v4 import render_parts
from dspark_ray.text.stream import TextStream
from dspark_ray.types import MAX_CHOICES, Request, SamplingParams


@dataclass(frozen=True)
class Job:
    """One HTTP request, ready to run, with an engine Request per choice."""

    request_id: str
    """Of the HTTP request; the id of every engine Request begins with it, so that the engine's log shows it."""
    body: GenerationRequest
    requests: list[Request]
    seed: int
    num_prompt_tokens: int
    writer: AnswerWriter

    def text(self, service: Service, request: Request) -> TextStream:
        """A new TextStream for one choice."""
        return TextStream(
            service.tokenizer,
            request.sampling.stop,
            self.body.include_stop_str_in_output,
            show_special=not self.body.skip_special_tokens,
            min_tokens=request.sampling.min_tokens,
        )


async def chat_job(service: Service, body: ChatRequest, request_id: str) -> Job:
    """Raises ApiError and RequestError."""
    check_model(service, body.model)
    prompt = await conversation_ids(service, body)
    writer = ChatWriter(service.model_name, service.tokenizer, body.return_token_ids)
    return _job(service, body, request_id, [prompt], writer, default_tokens=None)


async def completion_job(service: Service, body: CompletionRequest, request_id: str) -> Job:
    """Raises ApiError and RequestError."""
    check_model(service, body.model)
    prompts = body.prompts()
    if len(prompts) * body.num_choices > MAX_CHOICES:
        raise invalid("n", f"{len(prompts)} prompts with n={body.num_choices}: expected at most {MAX_CHOICES} in all")
    prompt_ids = await prompts_ids(service, prompts, body.add_special_tokens)
    writer = CompletionWriter(
        service.model_name, service.tokenizer, body.return_token_ids, special=not body.skip_special_tokens
    )
    default_tokens = SamplingParams().max_tokens
    return _job(service, body, request_id, prompt_ids, writer, default_tokens)


def check_model(service: Service, name: str | None) -> None:
    """Raises ApiError (404) for a model that is not served; None stands for the one that is."""
    if name is not None and name != service.model_name:
        message = f"model={name!r:.200}: this server serves {service.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def conversation_ids(service: Service, conversation: Conversation) -> list[int]:
    """Token ids of a conversation's prompt; control markers in messages are encoded as text."""
    parts = render_parts(conversation.message_dicts(), **conversation.chat_options())
    return await service.pool.encode_parts(parts, "messages")


async def prompts_ids(
    service: Service, prompts: Sequence[str] | Sequence[list[int]], adds_bos: bool
) -> Sequence[list[int]]:
    """Token ids of raw prompts; prompts of token ids are returned unchanged."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return prompts  # type: ignore[return-value]
    encoded = await service.pool.encode(texts, "prompt")
    return [_with_bos(service, token_ids) if adds_bos else token_ids for token_ids in encoded]


def _with_bos(service: Service, token_ids: list[int]) -> list[int]:
    """With the begin-of-sequence token in front, unless it is there already."""
    begins = token_ids[:1] == [service.bos_token_id]
    return token_ids if begins else [service.bos_token_id, *token_ids]


def _job(
    service: Service,
    body: GenerationRequest,
    request_id: str,
    prompts: Sequence[list[int]],
    writer: AnswerWriter,
    default_tokens: int | None,
) -> Job:
    """`default_tokens` is max_tokens where the body has none; None allows all that fit the model."""
    requests: list[Request] = []
    seed = body.seed
    for prompt in prompts:
        max_tokens = _max_tokens(service, body, len(prompt), default_tokens)
        sampling, speculative = body.sampling(max_tokens), body.speculation()
        seed = sampling.seed if seed is None else seed
        for choice in range(body.num_choices):
            requests.append(
                Request(
                    request_id=f"{request_id}/{writer.id}-{len(requests)}",
                    prompt_token_ids=tuple(prompt),
                    sampling=replace(sampling, seed=choice_seed(seed, choice)),
                    speculative=speculative,
                )
            )
    writer.prompts = [request.prompt_token_ids for request in requests]
    return Job(request_id, body, requests, seed or 0, sum(map(len, prompts)), writer)


def _max_tokens(service: Service, body: GenerationRequest, num_prompt_tokens: int, default: int | None) -> int:
    asked, room = body.asked_tokens(), service.max_model_len - num_prompt_tokens
    if room < 1:
        raise too_long(body.prompt_field, f"the prompt has {num_prompt_tokens} tokens", service.max_model_len)
    if asked is not None and asked > room:
        raise invalid(
            body.length_field,
            f"This model's maximum context length is {service.max_model_len} tokens:"
            f" {body.length_field}={asked} behind a prompt of {num_prompt_tokens} tokens: expected at most {room}",
            CONTEXT_LENGTH_EXCEEDED,
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)
