"""OpenAI's API over an engine that repeats the prompt: one token per byte, three tokens per step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from byte_tokenizer import EOS
from http_server import HTTP, MAX_MODEL_LEN, Server

from deployments.console.cli import main
from deployments.replica.messages import TRIAL_TOKENS
from dspark_ray.text.messages.deepseek_v4 import SPECIAL
from dspark_ray.types import StepRecord, VerificationPolicy


def complete(client: openai.OpenAI, prompt: object = "abc", **options: object) -> openai.types.Completion:
    return client.completions.create(model="echo", prompt=prompt, **options)  # type: ignore[call-overload]


def chat(client: openai.OpenAI, text: str = "hello", **options: object) -> openai.types.chat.ChatCompletion:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="echo", messages=messages, **options)  # type: ignore[call-overload]


def post(server: Server, path: str, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in 10 s"
        time.sleep(0.01)


# The engine echoes <BOS>abc, and BOS is empty in text.


def test_a_completion_has_text_usage_and_an_end(client):
    answer = complete(client, "abc", max_tokens=8)
    assert answer.choices[0].text == "abcabc"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 8, 12)


def test_a_streamed_completion_says_the_same(client):
    chunks = list(complete(client, "abc", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcabc"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_one_step_is_one_chunk(client):
    assert len(list(complete(client, "abcdef", max_tokens=9, stream=True))) == 3


def test_a_chat_runs_through_the_chat_form(client, echo, tokenizer):
    answer = chat(client, "hi", max_tokens=20)
    prompt = tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "hi"}]))
    assert list(echo.seen[0].prompt_token_ids) == prompt
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content.startswith("<｜User｜>hi<｜Assistant｜>")


def test_a_streamed_chat_names_the_role_once(client):
    chunks = list(chat(client, "hi", max_tokens=9, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]


def test_a_chat_without_a_length_takes_the_room_there_is(client, echo):
    answer = chat(client, "hi")
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"


def test_text_parts_are_joined(client, echo, tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    client.chat.completions.create(model="echo", messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert "one\n\ntwo" in tokenizer.decode(echo.seen[0].prompt_token_ids)


def test_the_stream_ends_with_done_and_usage_where_asked(server):
    body = {
        "model": "echo",
        "prompt": "abc",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = [line for line in post(server, "/v1/completions", body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] == 8


def test_speculation_is_reported_in_vllms_field(client):
    metrics = complete(client, "abc", max_tokens=4).metrics["speculative_decoding"]
    assert metrics == {
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.4,
        "acceptance_histogram": [0, 0, 4],
        "num_spec_steps": 4,
        "num_draft_tokens": 20,
        "num_admitted_draft_tokens": 16,
        "num_accepted_draft_tokens": 8,
        "num_spec_tokens": 5,
    }


def test_the_last_chunk_carries_the_metrics(client):
    chunks = list(complete(client, "abc", max_tokens=8, stream=True))
    assert chunks[-1].metrics["speculative_decoding"]["num_draft_tokens"] == 20
    assert not hasattr(chunks[0], "metrics")


def test_an_end_of_sequence_token_is_counted_but_not_shown(client):
    answer = complete(client, [70, 71, EOS], max_tokens=9)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 3
    assert len(answer.choices[0].text) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_frees_the_sequence(client, echo, stream):
    answer = complete(client, "abcdefgh", max_tokens=200, stop=["zz", "ef"], stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcd"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].metrics["speculative_decoding"]["num_accepted_draft_tokens"] == 8
    wait_until(lambda: len(echo.aborted) == 1)


def test_tokens_behind_a_stop_string_are_not_counted(client):
    answer = complete(client, "abcdefgh", max_tokens=200, stop="d", logprobs=0)
    assert answer.usage.completion_tokens == 5  # BOS a b c d
    assert len(answer.choices[0].logprobs.tokens) == 5


def test_chat_logprobs_have_one_entry_per_token(client):
    choice = chat(client, "hi", max_tokens=7, logprobs=True, top_logprobs=2).choices[0]
    assert len(choice.logprobs.content) == 7
    assert choice.logprobs.content[0].logprob == -0.5
    assert [top.logprob for top in choice.logprobs.content[0].top_logprobs] == [-0.5, -1.5]


def test_streamed_chat_logprobs_have_one_entry_per_token(client):
    chunks = chat(client, "hi", max_tokens=7, logprobs=True, stream=True)
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks) == 7


def test_bytes_of_a_token_are_its_own_where_it_is_half_a_character(client):
    content = chat(client, "é", max_tokens=4, logprobs=True).choices[0].logprobs.content
    assert [entry.bytes for entry in content[2:4]] == [[0xC3], [0xA9]]


def test_completion_logprobs_have_offsets(client):
    logprobs = complete(client, "abc", max_tokens=4, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == [SPECIAL.bos, "a", "b", "c"]
    assert logprobs.text_offset == [0, 0, 1, 2]
    assert logprobs.top_logprobs[1] == {"a": -0.5}


def test_a_character_of_two_tokens_is_never_torn(client):
    chunks = list(complete(client, "éèêë", max_tokens=9, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "éèêë"
    assert not any("�" in chunk.choices[0].text for chunk in chunks)


def test_choices_take_consecutive_seeds(client, echo):
    answer = complete(client, "abc", n=3, seed=40, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in echo.seen) == [40, 41, 42]
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 9


def test_the_last_seed_wraps(client, echo):
    complete(client, "abc", n=2, seed=2**63 - 1, max_tokens=1)
    assert sorted(request.sampling.seed for request in echo.seen) == [-(2**63), 2**63 - 1]


def test_without_a_seed_two_requests_differ(client, echo):
    complete(client)
    complete(client)
    assert echo.seen[0].sampling.seed != echo.seen[1].sampling.seed


def test_streamed_choices_carry_their_index(client):
    texts = {0: "", 1: ""}
    for chunk in complete(client, ["ab", "cd"], max_tokens=6, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "abab", 1: "cdcd"}


@pytest.mark.parametrize("prompt", ["a", ["a"], [5], [[5]]])
def test_every_form_of_prompt_is_served(client, prompt):
    assert len(complete(client, prompt, max_tokens=2).choices) == 1


def test_several_prompts_times_n_are_in_order(client):
    answer = complete(client, ["ab", "cd"], n=2, max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["ab", "ab", "cd", "cd"]


def test_sampling_fields_reach_the_engine(client, echo):
    extra = {
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [9],
        "speculative": {"enabled": False, "max_draft_tokens": 2, "confidence_threshold": 0.3},
    }
    chat(
        client,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=1,
        presence_penalty=-1,
        logit_bias={"7": 3},
        seed=1,
        stop="x",
        max_completion_tokens=3,
        extra_body=extra,
    )
    sampling, speculative = echo.seen[0].sampling, echo.seen[0].speculative
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1.0, -1.0, 1.2)
    assert (sampling.logit_bias, sampling.seed, sampling.stop, sampling.stop_token_ids) == ({7: 3.0}, 1, ("x",), (9,))
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (3, 2, True)
    assert (speculative.bypass, speculative.max_draft_tokens, speculative.confidence_threshold) == (True, 2, 0.3)


def test_null_fields_are_absent_fields(client, echo):
    complete(client, temperature=None, stop=None, seed=None, logit_bias=None, max_tokens=None, n=None)
    assert echo.seen[0].sampling.temperature == 1.0


def test_hints_are_accepted(server):
    body = {"model": "echo", "prompt": "a", "user": "me", "best_of": 1, "echo": False, "suffix": None}
    assert post(server, "/v1/completions", body).status_code == 200


BAD_COMPLETIONS = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 100000}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": 99}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"colour": "red"}, "colour"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    ({"speculative": {"max_draft_tokens": -1}}, "speculative.max_draft_tokens"),
    ({"speculative": {"confidence_threshold": 2}}, "speculative.confidence_threshold"),
    ({"speculative": {"gamma": 2}}, "speculative.gamma"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [100000]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "a" * MAX_MODEL_LEN}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS)
def test_a_bad_completion_field_is_named(server, fields, param):
    answer = post(server, "/v1/completions", {"model": "echo", "prompt": "abc", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "pirate", "content": "arr"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS)
def test_a_bad_chat_field_is_named(server, fields, param):
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], **fields}
    answer = post(server, "/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_bad_request(server, body):
    answer = post(server, "/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_missing_field_is_named(server):
    assert post(server, "/v1/completions", {"model": "echo"}).json()["error"]["param"] == "prompt"


def test_a_long_prompt_is_answered_with_numbers(client):
    with pytest.raises(
        openai.BadRequestError, match=rf"the prompt has 301 tokens, expected at most {MAX_MODEL_LEN - 1}"
    ):
        complete(client, "a" * 300)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server serves 'echo'") as caught:
        client.completions.create(model="gpt", prompt="a")
    assert caught.value.code == "model_not_found"


def test_an_unknown_path_answers_in_the_error_schema(server):
    assert "error" in HTTP.get(f"{server.url}/v1/nothing").json()


def test_a_full_queue_is_429_with_a_delay(client, echo):
    echo.max_requests = 0
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client)
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_full_queue_is_429_for_a_stream_too(client, echo):
    echo.max_requests = 0
    with pytest.raises(openai.RateLimitError):
        complete(client, stream=True)


def test_too_many_queued_requests_are_503_with_a_delay(client, server):
    server.client.is_busy = True
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client, stream=True)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_partly_refused_request_leaves_nothing_behind(client, echo):
    echo.max_requests = 2
    with pytest.raises(openai.RateLimitError):
        complete(client, n=5, max_tokens=200)
    wait_until(lambda: not echo.has_unfinished())


def test_a_client_that_leaves_frees_its_sequence(server, echo):
    body = {"model": "echo", "prompt": "abc", "max_tokens": 250, "stream": True}
    with HTTP.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        echo.step_gate.clear()
    echo.step_gate.set()
    wait_until(lambda: not echo.has_unfinished())


def test_a_lost_engine_is_replaced_and_the_stream_goes_on(client, server, echo):
    whole = complete(client, "abcdefg", max_tokens=20, seed=3).choices[0].text
    server.client.num_losses = 1
    chunks = complete(client, "abcdefg", max_tokens=20, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [len(request.output_token_ids) for request in echo.seen] == [0, 0, 3]
    assert server.client.trials == [False, False, True]


def test_a_request_whose_second_engine_dies_at_once_is_given_up_with_its_id(client, server, echo):
    server.client.num_losses = 10
    with pytest.raises(openai.InternalServerError, match=r"internal error \(request id [^ ]+\)") as caught:
        complete(client, max_tokens=200)
    assert caught.value.status_code == 500
    assert len(echo.seen) == 2
    assert "lost on purpose" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_raises_is_in_the_log_and_not_in_the_answer(client, echo, caplog, stream):
    echo.chokes_on = "*"
    with pytest.raises(openai.InternalServerError, match=r"internal error \(request id [^ ]+\)") as caught:
        complete(client, max_tokens=9, stream=stream)
    assert caught.value.status_code == 500
    assert "cannot add it" not in caught.value.response.text
    request_id = str(caught.value.body["message"]).partition("request id ")[2].rstrip(")")
    assert "RuntimeError: cannot add it" in caplog.text
    assert request_id in caplog.text


def test_a_request_that_has_gone_on_for_long_enough_is_trusted_again(client, server, echo):
    whole = complete(client, "abcdefg", max_tokens=60, seed=3).choices[0].text
    server.client.reset()
    server.client.num_losses, server.client.tokens_before_loss = 2, TRIAL_TOKENS
    assert complete(client, "abcdefg", max_tokens=60, seed=3).choices[0].text == whole
    assert len(echo.seen) == 4


def test_an_engine_that_is_lost_too_often_is_503(client, server):
    server.client.num_losses, server.client.tokens_before_loss = 10, TRIAL_TOKENS
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client, max_tokens=200)
    assert caught.value.status_code == 503


def test_a_failure_in_the_middle_of_a_stream_is_an_event(client, server):
    server.client.num_losses, server.client.tokens_before_loss = 10, TRIAL_TOKENS
    with pytest.raises(openai.APIError, match="the engine was lost"):
        list(complete(client, max_tokens=200, stream=True))


def test_many_clients_at_once_get_their_own_text(client):
    prompts = [f"client {number} " for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda prompt: complete(client, prompt, max_tokens=60).choices[0].text, prompts))
    assert all(text.startswith(prompt * 2) for text, prompt in zip(texts, prompts, strict=True))


def test_models_lists_the_one_that_is_served(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").max_model_len == MAX_MODEL_LEN


def test_tokenize_counts(server):
    answer = post(server, "/tokenize", {"prompt": "abc"}).json()
    assert (answer["count"], answer["max_model_len"]) == (4, MAX_MODEL_LEN)


def test_version_is_the_packages(server):
    assert HTTP.get(f"{server.url}/version").json()["version"]


# Administration.


def steps(server: Server, last: object = 50) -> httpx.Response:
    return HTTP.get(f"{server.url}/admin/steps", params={"last": last})


def test_the_latest_steps_are_shown_oldest_first(server, client):
    complete(client, "abc", max_tokens=12)
    answer = steps(server, 3).json()
    assert answer["replica"] == "only"
    first, second, last = answer["steps"]
    assert (second["step"], last["step"]) == (first["step"] + 1, first["step"] + 2)


def test_a_step_has_the_fields_of_its_record_and_their_sums(server, client):
    complete(client, "abc", n=2, max_tokens=3)
    step = steps(server, 1).json()["steps"][0]
    assert step.keys() == {
        *(field.name for field in dataclasses.fields(StepRecord)),
        *("num_drafted", "budget", "num_accepted"),
    }
    assert (step["num_drafted"], step["budget"], step["num_accepted"]) == (
        len(step["lengths"]),
        sum(step["lengths"]),
        sum(step["accepted"]),
    )
    assert step["calibration_error"] == [0.25, None, None, None, None]


def test_fifty_steps_are_shown_where_no_number_is_asked_for(server, client):
    complete(client, "abc", max_tokens=180)
    assert len(HTTP.get(f"{server.url}/admin/steps").json()["steps"]) == 50


@pytest.mark.parametrize("last", [0, -1, 1001, "many", "", 2.5])
def test_a_bad_number_of_steps_is_named(server, last):
    answer = steps(server, last)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == ("last", "invalid_request_error")
    assert error["message"].startswith("last=")


def test_an_unknown_word_in_the_query_is_named(server):
    answer = HTTP.get(f"{server.url}/admin/steps", params={"lats": 5})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lats"


def test_a_policy_reaches_the_engine_and_is_said_back(server, echo):
    policy = {"confidence_threshold": 0.25, "max_draft_tokens": 2, "bypass": True, "version": 7, "valid_seconds": 30}
    answer = post(server, "/admin/policy", policy)
    assert answer.json() == {"replica": "only", "policy": policy}
    wait_until(lambda: echo.policies == [VerificationPolicy(**policy)])


def test_an_empty_policy_bounds_nothing(server, echo):
    assert post(server, "/admin/policy", {"bypass": None}).status_code == 200
    wait_until(lambda: echo.policies == [VerificationPolicy()])


def test_a_policy_shows_in_the_steps_behind_it(server, client, echo):
    text = complete(client, "abc", max_tokens=12).choices[0].text
    post(server, "/admin/policy", {"bypass": True, "version": 7})
    wait_until(lambda: echo.policies)
    assert complete(client, "abc", max_tokens=12).choices[0].text == text
    step = steps(server, 1).json()["steps"][0]
    assert (step["bypass"], step["budget"], step["policy_version"]) == ("policy", 0, 7)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"confidence_threshold": 1.5}, "confidence_threshold"),
        ({"confidence_threshold": "high"}, "confidence_threshold"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold"),
        ({"max_draft_tokens": -1}, "max_draft_tokens"),
        ({"max_draft_tokens": 1.5}, "max_draft_tokens"),
        ({"bypass": "yes"}, "bypass"),
        ({"version": "x"}, "version"),
        ({"valid_seconds": 0}, "valid_seconds"),
        ({"threshold": 0.5}, "threshold"),
        ([], "body"),
    ],
)
def test_a_bad_policy_is_named_and_changes_nothing(server, echo, body, param):
    answer = post(server, "/admin/policy", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert echo.policies == []


def test_a_busy_engine_is_503_for_a_policy_too(server):
    server.client.is_busy = True
    answer = post(server, "/admin/policy", {})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


# `dspark-ray explain`, against this server.


def test_explain_prints_a_line_per_step(server, client, capsys):
    complete(client, "abc", max_tokens=12)
    assert main(["explain", "--url", f"{server.url}/", "--last", "4"]) == 0
    replica, headings, *rows = capsys.readouterr().out.splitlines()
    assert replica == "replica only"
    assert headings.split()[:3] == ["step", "decoding", "drafted"]
    assert rows[4:6] == [
        "",
        "tokens:  20 drafted, 12 verified, 10.0 expected to be accepted, 8 accepted (0.80 of that)",
    ]


def test_explain_can_print_what_the_server_said(server, client, capsys):
    complete(client, "abc", max_tokens=12)
    assert main(["explain", "--url", server.url, "--last", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == steps(server, 2).json()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--last", "5000"], "400 last='5000': Input should be less than or equal to 1000"),
        (["--url", "http://127.0.0.1:9"], "Connection refused"),
        (["--url", "nonsense"], "missing an 'http://' or 'https://' protocol"),
    ],
)
def test_explain_says_in_one_line_what_went_wrong(server, capsys, arguments, expected):
    assert main(["explain", "--url", server.url, *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_explain_knows_another_servers_answer_when_it_sees_one(server, capsys, monkeypatch):
    monkeypatch.setattr("deployments.console.cli.get_json", lambda *arguments: {"steps": [{"step": 1}]})
    assert main(["explain", "--url", server.url]) == 2
    assert "not the answer of a dspark-ray" in capsys.readouterr().err
