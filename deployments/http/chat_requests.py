"""Fields of chat requests and their messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.fields import INTEGRAL, Schema, Text
from deployments.http.requests import GenerationRequest
from dspark_ray.types import MAX_LOGPROBS, MAX_MAX_TOKENS, RequestError

MAX_MESSAGES = 10_000
MAX_PARTS = 10_000
MAX_TOOL_CALLS = 1000


class TextPart(Schema):
    _IGNORED = frozenset({"cache_control", "prompt_cache_breakpoint", "annotations"})

    type: Literal["text"]
    text: Text


def _text_part(value: Any) -> Any:
    """Raises PydanticCustomError for a part that is not text, with a message that names its type."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("unsupported_part", f"a part of type {kind!r:.50}: this model reads text only")
    return value


def _content_form(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Content = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[
        list[Annotated[TextPart, BeforeValidator(_text_part)]],
        Field(max_length=MAX_PARTS, fail_fast=True),
        Tag("parts"),
    ],
    Discriminator(_content_form),
]


class FunctionCall(Schema):
    name: Text
    arguments: Text | dict[str, Any] = "{}"
    """JSON, as a string or as an object."""


class ToolCall(Schema):
    _IGNORED = frozenset({"index", "cache_control"})

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _having(properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these fields."""
    return {"properties": properties, "required": list(properties)}


class ChatMessage(Schema):
    """One message; `dspark_ray.text.messages.deepseek_v4` checks what each role needs of it."""

    _IGNORED = frozenset(
        {"annotations", "cache_control", "id", "images", "name", "provider_specific_fields", "thinking_blocks"}
    )
    _ONLY: ClassVar = {"audio": ({},), "function_call": ({},), "refusal": ("",)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """Another name for reasoning_content."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    @classmethod
    def _describe(cls, schema: dict[str, Any]) -> None:
        super()._describe(schema)
        schema["anyOf"] = [
            _having({"content": {"type": ["string", "array"]}}),
            _having({"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}),
            _having({"role": {"const": "assistant"}, "reasoning_content": {"type": "string", "minLength": 1}}),
            _having({"role": {"const": "assistant"}, "reasoning": {"type": "string", "minLength": 1}}),
        ]

    def as_dict(self) -> dict[str, Any]:
        """As dspark_ray.text.messages.deepseek_v4 takes it. OpenAI's role `developer` becomes `system`."""
        message = self.model_dump(exclude_none=True)
        return message | {"role": "system"} if self.role == "developer" else message


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


Effort = Literal["none", "low"]


class ChatTemplateArgs(Schema):
    """The part of vLLM's `chat_template_kwargs` that DeepSeek-V4's encoder knows."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    """Another name for thinking."""
    reasoning_effort: Effort | None = None
    """As the request's field of the same name, which takes precedence."""


class Conversation(Schema):
    """Messages, and how their prompt ends."""

    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    """Whether the prompt opens an assistant turn; by default it does, except with continue_final_message."""
    continue_final_message: bool = False
    """Whether the last message, which must be the assistant's, is left open for the model to continue."""

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> Self:
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt", "add_generation_prompt=True: expected false with continue_final_message"
            )
        if not self.messages or self.messages[-1].role != "assistant":
            raise RequestError(
                "continue_final_message",
                "continue_final_message=True: expected only where the last message is the assistant's",
            )
        return self

    def message_dicts(self) -> list[dict[str, Any]]:
        """For `dspark_ray.text.messages.deepseek_v4`."""
        messages = [message.as_dict() for message in self.messages or ()]
        if self.continue_final_message:
            messages[-1]["wo_eos"] = True
        return messages

    def chat_options(self) -> dict[str, Any]:
        """Arguments of `dspark_ray.text.messages.deepseek_v4.render_parts`."""
        opens = self.add_generation_prompt
        return {"add_generation_prompt": not self.continue_final_message if opens is None else opens}


class ChatRequest(GenerationRequest, Conversation):
    _IGNORED = GenerationRequest._IGNORED | {"include_reasoning"}
    _ONLY: ClassVar = {**GenerationRequest._ONLY, "add_special_tokens": (False,)}

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_MAX_TOKENS), INTEGRAL] | None = None
    """OpenAI's newer name for max_tokens; it takes precedence."""
    logprobs: bool | None = None
    """Whether to report the log-probability of each generated token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), INTEGRAL] | None = None
    """Alternatives to report per token; needs logprobs."""
    reasoning_effort: Effort | None = None
    chat_template_kwargs: ChatTemplateArgs | None = None

    def chat_options(self) -> dict[str, Any]:
        template = self.chat_template_kwargs or ChatTemplateArgs()
        thinking = template.enable_thinking if template.thinking is None else template.thinking
        effort = self.reasoning_effort or template.reasoning_effort
        return {**super().chat_options(), "thinking": thinking, "reasoning_effort": effort}

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", f"top_logprobs={self.top_logprobs}: expected only with logprobs=true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class TokenizeRequest(Conversation):
    """Text or messages. Text is read as by /v1/completions, messages as by /v1/chat/completions."""

    _ONLY: ClassVar = {"return_token_strs": (False,)}

    model: Text | None = None
    prompt: Text | None = None
    add_special_tokens: bool = True

    @classmethod
    def _describe(cls, schema: dict[str, Any]) -> None:
        super()._describe(schema)
        text, messages, nothing = {"type": "string"}, {"type": "array"}, {"type": "null"}
        schema["oneOf"] = [
            {"properties": {"prompt": text, "messages": nothing}, "required": ["prompt"]},
            {"properties": {"messages": messages, "prompt": nothing}, "required": ["messages"]},
        ]

    @model_validator(mode="after")
    def _has_one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", "prompt: expected prompt or messages, and not both")
        return self
