"""DeepSeek-V4's message encoding: a conversation becomes one prompt of control markers and plain text.

    BOS system <User>question<Assistant></think>answer EOS <User>question<Assistant></think>          chat mode
    BOS system <User>question<Assistant><think>reasoning</think>answer EOS                             thinking mode

The content of a message is plain text, even if it spells a marker: only markers written by this module become control
tokens. The checkpoint has no template file for this layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from typing import Any, Literal

from dspark_ray.types import RequestError


@dataclass(frozen=True)
class SpecialStrings:
    """Strings that are one token each."""

    bos: str = "<｜begin▁of▁sentence｜>"
    eos: str = "<｜end▁of▁sentence｜>"
    user: str = "<｜User｜>"
    assistant: str = "<｜Assistant｜>"
    think_start: str = "<think>"
    think_end: str = "</think>"
    latest_reminder: str = "<｜latest_reminder｜>"
    dsml: str = "｜DSML｜"


SPECIAL = SpecialStrings()
_MARKERS = re.compile("|".join(map(re.escape, astuple(SPECIAL))))


@dataclass(frozen=True)
class PromptPart:
    """A part of a prompt: a control marker or plain text."""

    text: str
    is_marker: bool = False


def _template(text: str) -> list[PromptPart]:
    """Parts of a template string, with its markers as control markers."""
    parts, start = [], 0
    for found in _MARKERS.finditer(text):
        parts += [PromptPart(text[start : found.start()]), PromptPart(found.group(), is_marker=True)]
        start = found.end()
    return [*parts, PromptPart(text[start:])]


Message = Mapping[str, Any]
TurnKind = Literal["system", "user", "developer", "latest_reminder", "assistant"]

_ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
_ASKING: tuple[TurnKind, ...] = ("user", "developer")
_BLANK_LINE = "\n\n"
# Their prompts contain fixed English paragraphs that are not implemented.
_UNSUPPORTED_KEYS = ("tools", "response_format", "task")
_SUPPORTED_EFFORTS = (None, "none", "low")


@dataclass(frozen=True)
class _ToolCall:
    id: str | None
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Turn:
    """One message, or adjacent messages of user and tools merged."""

    kind: TurnKind
    text: str
    reasoning: str = ""
    tool_calls: tuple[_ToolCall, ...] = ()
    ends: bool = True
    """Whether an assistant turn is complete; the model continues an incomplete one."""


def render(messages: Sequence[Message], **options: Any) -> str:
    """The prompt of a conversation as one readable string; see `render_parts`."""
    return "".join(part.text for part in render_parts(messages, **options))


def render_parts(
    messages: Sequence[Message],
    *,
    thinking: bool | None = None,
    reasoning_effort: str | None = None,
    tools: Sequence[Any] | None = None,
    drop_thinking: bool = True,
    add_generation_prompt: bool | None = None,
) -> list[PromptPart]:
    """The prompt of a conversation as markers and plain texts, for `Tokenizer.encode_parts`.

    `thinking` None means thinking with effort "low" and chat mode otherwise. `drop_thinking` drops reasoning (and
    developer messages) before the last question. `add_generation_prompt` opens an assistant turn at the end; None
    does so unless the last message is the assistant's. A last message with `wo_eos` is always continued. Raises
    RequestError that names the invalid field.
    """
    thinks = _thinks(thinking, reasoning_effort)
    if tools:
        raise RequestError("tools", f"tools has {len(tools)} entries: tool schemas are not supported yet")
    turns = list(_turns(messages))
    if thinks and drop_thinking:
        turns = _without_old_developers(turns)
    first_reasoning = _last_asking(turns) if drop_thinking else 0
    parts = _template(SPECIAL.bos)
    for number, turn in enumerate(turns):
        reasons = thinks and number >= first_reasoning
        if turn.kind == "assistant" and number > 0 and turns[number - 1].kind in _ASKING:
            parts += _header(reasons)
        parts += _rendered(turn, reasons)
    if _opens_a_turn(turns[-1], add_generation_prompt):
        parts += _header(thinks)
    return _merged(parts)


def _opens_a_turn(last: _Turn, asked: bool | None) -> bool:
    if last.kind != "assistant":
        return asked is not False
    return bool(asked) and last.ends


def _merged(parts: Sequence[PromptPart]) -> list[PromptPart]:
    """Merge adjacent texts, so that they are tokenised together; drop empty ones."""
    merged = []
    for is_marker, run in groupby((part for part in parts if part.text), key=lambda part: part.is_marker):
        texts = [part.text for part in run]
        merged += [PromptPart(text, is_marker=True) for text in texts] if is_marker else [PromptPart("".join(texts))]
    return merged


def _thinks(thinking: bool | None, effort: str | None) -> bool:
    if effort not in _SUPPORTED_EFFORTS:
        expected = "'none' or 'low', other efforts are not supported yet"
        raise RequestError("reasoning_effort", f"reasoning_effort={effort!r}: expected {expected}")
    if thinking and effort == "none":
        raise RequestError("reasoning_effort", "reasoning_effort='none': expected 'low' with thinking switched on")
    return effort == "low" if thinking is None else thinking


def _header(thinks: bool) -> list[PromptPart]:
    return _template(SPECIAL.assistant + (SPECIAL.think_start if thinks else SPECIAL.think_end))


def _last_asking(turns: Sequence[_Turn]) -> int:
    """Index of the last user or developer turn."""
    return max((number for number, turn in enumerate(turns) if turn.kind in _ASKING), default=0)


def _without_old_developers(turns: list[_Turn]) -> list[_Turn]:
    last = _last_asking(turns)
    return [turn for number, turn in enumerate(turns) if turn.kind != "developer" or number >= last]


def _rendered(turn: _Turn, reasons: bool) -> list[PromptPart]:
    text = PromptPart(turn.text)
    if turn.kind == "system":
        return [text]
    if turn.kind == "latest_reminder":
        return [*_template(SPECIAL.latest_reminder), text]
    if turn.kind in _ASKING:
        return [*_template(SPECIAL.user), text]
    reasoning = [PromptPart(turn.reasoning), *_template(SPECIAL.think_end)] if reasons else []
    end = _template(SPECIAL.eos) if turn.ends else []
    return [*reasoning, text, *_tool_block(turn.tool_calls), *end]


def _tool_block(calls: Sequence[_ToolCall]) -> list[PromptPart]:
    if not calls:
        return []
    parts = _template(f"{_BLANK_LINE}<{SPECIAL.dsml}tool_calls>\n")
    for call in calls:
        parts += [*_template(f'<{SPECIAL.dsml}invoke name="'), PromptPart(call.name), PromptPart('">\n')]
        for name, value in call.arguments.items():
            parts += _parameter(name, value)
        parts += _template(f"</{SPECIAL.dsml}invoke>\n")
    return parts + _template(f"</{SPECIAL.dsml}tool_calls>")


def _parameter(name: str, value: Any) -> list[PromptPart]:
    is_text = isinstance(value, str)
    text = value if is_text else json.dumps(value, ensure_ascii=False)
    kind = "true" if is_text else "false"
    return [
        *_template(f'<{SPECIAL.dsml}parameter name="'),
        PromptPart(f'{name}" string="{kind}">{text}'),
        *_template(f"</{SPECIAL.dsml}parameter>\n"),
    ]


def _turns(messages: Sequence[Message]) -> Iterator[_Turn]:
    """Validate messages, and merge adjacent messages of user and tools."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages", f"messages={messages!r}: expected a list of at least one message")
    calls: tuple[_ToolCall, ...] = ()
    asked: list[_Part] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = _role(message, where)
        if role in ("user", "tool"):
            asked.append(_part(message, role, where))
            continue
        yield from _user_turn(asked, calls)
        asked = []
        turn = _other_turn(message, role, where)
        calls = turn.tool_calls if role == "assistant" else calls
        yield turn
    yield from _user_turn(asked, calls)


def _role(message: Message, where: str) -> str:
    if not isinstance(message, Mapping):
        raise RequestError(where, f"{where}={message!r}: expected an object with role and content")
    for key in _UNSUPPORTED_KEYS:
        if message.get(key):
            raise RequestError(f"{where}.{key}", f"{where}.{key}: {key} in a message is not supported yet")
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(f"{where}.role", f"{where}.role={role!r}: expected one of {', '.join(_ROLES)}")
    return str(role)


@dataclass(frozen=True)
class _Part:
    """One message inside a user turn."""

    text: str
    is_tool_result: bool
    tool_call_id: str | None = None


def _part(message: Message, role: str, where: str) -> _Part:
    text = _text(message, where)
    if role == "user":
        return _Part(text, is_tool_result=False)
    return _Part(f"<tool_result>{text}</tool_result>", True, message.get("tool_call_id"))


def _user_turn(parts: Sequence[_Part], calls: Sequence[_ToolCall]) -> Iterator[_Turn]:
    """One turn of all parts, with tool results sorted into the order of their calls."""
    if not parts:
        return
    order = {call.id: number for number, call in enumerate(calls)}
    results = iter(
        sorted(
            (part for part in parts if part.is_tool_result),
            key=lambda part: order.get(part.tool_call_id, len(order)),
        )
    )
    ordered = [next(results) if part.is_tool_result else part for part in parts]
    yield _Turn("user", _BLANK_LINE.join(part.text for part in ordered))


def _other_turn(message: Message, role: str, where: str) -> _Turn:
    if role != "assistant":
        return _Turn(role, _text(message, where))  # type: ignore[arg-type]
    turn = _Turn("assistant", "", _reasoning(message, where), _tool_calls(message, where), not message.get("wo_eos"))
    if message.get("content") is None and (turn.tool_calls or turn.reasoning):
        return turn
    return replace(turn, text=_text(message, where))


def _text(message: Message, where: str) -> str:
    """A message's content: a string, or text parts joined by blank lines."""
    content, where = message.get("content"), f"{where}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(where, f"{where}={content!r}: expected a string or a list of text parts")
    return _BLANK_LINE.join(_part_text(part, where) for part in content)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(where, f"{where} has the part {part!r}: expected {{'type': 'text', 'text': ...}}")
    return str(part["text"])


def _reasoning(message: Message, where: str) -> str:
    for key in ("reasoning_content", "reasoning"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{where}.{key}", f"{where}.{key}={value!r}: expected a string")
        if value:
            return str(value)
    return ""


def _tool_calls(message: Message, where: str) -> tuple[_ToolCall, ...]:
    calls, where = message.get("tool_calls") or (), f"{where}.tool_calls"
    if not isinstance(calls, list | tuple):
        raise RequestError(where, f"{where}={calls!r}: expected a list of tool calls")
    return tuple(_tool_call(call, f"{where}[{number}]") for number, call in enumerate(calls))


def _tool_call(call: Any, where: str) -> _ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        where = f"{where}.function"
        raise RequestError(where, f"{where}={function!r}: expected an object with name and arguments")
    arguments = _arguments(function.get("arguments", "{}"))
    if not _is_encodable([function["name"], arguments]):
        where = f"{where}.function"
        raise RequestError(where, f"{where}: expected valid Unicode and moderate nesting")
    return _ToolCall(call.get("id"), function["name"], arguments)


def _arguments(arguments: Any) -> Mapping[str, Any]:
    """Arguments by name; a string that is no JSON object, which a model may have written, is kept as one argument."""
    if isinstance(arguments, Mapping):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def _is_encodable(value: Any) -> bool:
    """Whether UTF-8 JSON can encode the value; JSON escapes can also stand for a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True
