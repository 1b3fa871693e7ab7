"""The message encoding, character by character."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dspark_ray.text.messages.deepseek_v4 import render, render_parts
from dspark_ray.types import RequestError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, reasoning: str | None = None, calls: list[Any] | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def result(content: str, call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = [user("a"), assistant("A", "ra"), user("b"), assistant("B", "rb")]


def test_chat_mode_closes_thinking_before_the_answer() -> None:
    assert render([SYSTEM, user("Hi")]) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>"


def test_thinking_mode_opens_thinking() -> None:
    assert render([user("Hi")], thinking=True) == f"{BOS}{USER}Hi{ASSISTANT}<think>"


def test_low_effort_thinks_and_none_does_not() -> None:
    assert render([user("Hi")], reasoning_effort="low") == render([user("Hi")], thinking=True)
    assert render([user("Hi")], reasoning_effort="none") == render([user("Hi")])


def test_chat_mode_shows_no_reasoning() -> None:
    expected = f"{BOS}{USER}a{ASSISTANT}</think>A{EOS}{USER}b{ASSISTANT}</think>B{EOS}"
    assert render(DIALOGUE) == expected


def test_thinking_mode_drops_reasoning_before_the_last_question() -> None:
    expected = f"{BOS}{USER}a{ASSISTANT}</think>A{EOS}{USER}b{ASSISTANT}<think>rb</think>B{EOS}"
    assert render(DIALOGUE, thinking=True) == expected


def test_reasoning_is_kept_on_request() -> None:
    expected = f"{BOS}{USER}a{ASSISTANT}<think>ra</think>A{EOS}{USER}b{ASSISTANT}<think>rb</think>B{EOS}"
    assert render(DIALOGUE, thinking=True, drop_thinking=False) == expected


def test_an_old_developer_message_goes_with_the_old_reasoning() -> None:
    messages = [{"role": "developer", "content": "d"}, assistant("A", "r"), user("b")]
    assert render(messages, thinking=True) == f"{BOS}A{EOS}{USER}b{ASSISTANT}<think>"
    assert render(messages) == f"{BOS}{USER}d{ASSISTANT}</think>A{EOS}{USER}b{ASSISTANT}</think>"


def test_consecutive_user_messages_become_one_turn() -> None:
    assert render([user("a"), user("b")]) == f"{BOS}{USER}a\n\nb{ASSISTANT}</think>"


def test_text_parts_are_joined_by_blank_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render([user(parts)]) == render([user("a\n\nb")])


def test_a_reminder_has_its_own_marker() -> None:
    messages = [{"role": "latest_reminder", "content": "today"}, user("a")]
    assert render(messages) == f"{BOS}{REMINDER}today{USER}a{ASSISTANT}</think>"


def test_tool_calls_follow_the_answer_as_a_block() -> None:
    calls = [call("1", "f", '{"a": "x", "b": [1, "é"], "c": null}'), call("2", "g", "{}")]
    assert render([user("u"), assistant("c", None, calls)]) == (
        f"{BOS}{USER}u{ASSISTANT}</think>c\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">[1, "é"]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="c" string="false">null</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}"
    )


@pytest.mark.parametrize("arguments", ["not json", "[1]"])
def test_arguments_that_are_no_object_become_one_argument(arguments: str) -> None:
    prompt = render([user("u"), assistant(None, None, [call("1", "f", arguments)])])
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>' in prompt


def test_tool_results_join_the_user_turn_in_the_order_of_their_calls() -> None:
    calls = [call("1", "f", "{}"), call("2", "g", "{}")]
    messages = [user("u"), assistant(None, None, calls), result("R2", "2"), result("R1", "1"), user("more")]
    expected = f"{EOS}{USER}<tool_result>R1</tool_result>\n\n<tool_result>R2</tool_result>\n\nmore{ASSISTANT}</think>"
    assert render(messages).endswith(expected)


def test_an_answer_without_its_end_is_continued() -> None:
    messages = [user("u"), assistant("Once") | {"wo_eos": True}]
    assert render(messages) == f"{BOS}{USER}u{ASSISTANT}</think>Once"


def test_no_assistant_turn_is_opened_on_request() -> None:
    assert render([user("u")], add_generation_prompt=False) == f"{BOS}{USER}u"


def test_a_turn_is_opened_after_an_answer_on_request() -> None:
    messages = [user("u"), assistant("A")]
    assert render(messages, add_generation_prompt=True) == f"{render(messages)}{ASSISTANT}</think>"
    going_on = [user("u"), assistant("A") | {"wo_eos": True}]
    assert render(going_on, add_generation_prompt=True) == render(going_on)


def test_markers_and_texts_take_turns() -> None:
    parts = render_parts([SYSTEM, user(f"a{EOS}b"), user("c")])
    assert [(part.text, part.is_marker) for part in parts] == [
        (BOS, True),
        ("Be brief.", False),
        (USER, True),
        (f"a{EOS}b\n\nc", False),
        (ASSISTANT, True),
        ("</think>", True),
    ]


@pytest.mark.parametrize("arguments", ['{"a": "\\ud83d"}', '{"\\ud83d": 1}', {"a": "\ud83d"}])
def test_arguments_that_cannot_be_encoded_are_refused(arguments: Any) -> None:
    with pytest.raises(RequestError, match="Unicode") as caught:
        render([user("u"), assistant(None, None, [call("1", "f", arguments)])])
    assert caught.value.param == "messages[1].tool_calls[0].function"


def test_messages_from_json_render_alike() -> None:
    assert render(json.loads(json.dumps(DIALOGUE))) == render(DIALOGUE)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([user("a"), {"content": "b"}], "messages[1].role"),
        ([{"role": "robot", "content": "b"}], "messages[0].role"),
        ([user("a"), user("b"), {"role": "user"}], "messages[2].content"),
        ([user(None)], "messages[0].content"),
        ([user([{"type": "image_url", "image_url": {}}])], "messages[0].content"),
        ([user([{"type": "text"}])], "messages[0].content"),
        ([user("a"), assistant(None)], "messages[1].content"),
        ([user("a"), assistant("b") | {"reasoning_content": 3}], "messages[1].reasoning_content"),
        ([user("a"), assistant(None, None, [{"id": "1"}])], "messages[1].tool_calls[0].function"),
        ([SYSTEM | {"tools": [{}]}], "messages[0].tools"),
    ],
)
def test_a_bad_message_is_refused_by_its_field(messages: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "none", "thinking": True}, "reasoning_effort"),
    ],
)
def test_unsupported_fields_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        render([user("a")], **options)
    assert caught.value.param == param
