"""Limits that are checked before any work: bodies, lists, lengths, the tokenizer's queue; and extreme numbers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from byte_tokenizer import EOS, NUM_TOKENS
from echo_engine import EchoEngine
from http_server import HTTP, MAX_MODEL_LEN, Server, running_server
from pydantic import ValidationError

from deployments.http.chat_requests import ChatRequest
from deployments.http.errors import ApiError
from deployments.http.requests import CompletionRequest
from deployments.http.tokenizing import TokenizerPool
from dspark_ray.text.messages.deepseek_v4 import PromptPart
from dspark_ray.text.tokenizer import Tokenizer

BODY_LIMIT = 4000


@pytest.fixture(scope="module")
def small_server(tokenizer: Tokenizer) -> Iterator[Server]:
    """Accepts bodies of up to BODY_LIMIT bytes."""
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), max_body_bytes=BODY_LIMIT) as running:
        yield running


def post(server: Server, path: str, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    return answer.json()["error"]


def still_serves(server: Server) -> bool:
    body = {"model": "echo", "prompt": "abc", "max_tokens": 4}
    return post(server, "/v1/completions", body).json()["choices"][0]["text"] == "abc"


# Bodies.


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/admin/policy"])
def test_a_body_over_the_limit_is_413_everywhere(small_server, path):
    answer = post(small_server, path, {"model": "echo", "prompt": "a" * BODY_LIMIT})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"
    assert str(BODY_LIMIT) in error_of(answer)["message"]


def test_a_body_without_an_announced_length_has_the_same_limit(small_server):
    def chunks() -> Iterator[bytes]:
        yield b'{"model": "echo", "prompt": "'
        for _ in range(BODY_LIMIT // 100):
            yield b"a" * 100
        yield b'"}'

    answer = HTTP.post(f"{small_server.url}/v1/completions", content=chunks())
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_a_body_below_the_limit_is_served_in_chunks_too(small_server):
    body = json.dumps({"model": "echo", "prompt": "abc", "max_tokens": 4}).encode()
    answer = HTTP.post(
        f"{small_server.url}/v1/completions",
        content=iter([body[:10], body[10:]]),
        headers={"Content-Type": "application/json"},
    )
    assert answer.json()["choices"][0]["text"] == "abc"


# Lists: validation ends at the first error.


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, {"prompt": [0.5] * 300_000}),
        (CompletionRequest, {"prompt": [[0.5] * 300_000]}),
        (CompletionRequest, {"prompt": [[]] * 100}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 300_000}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * 300_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(n): 1 for n in range(100_000)}}),
        (CompletionRequest, {"prompt": "a"} | {f"field{n}": 1 for n in range(100_000)}),
        (CompletionRequest, {"prompt": "a", "speculative": {f"field{n}": 1 for n in range(100_000)}}),
        (ChatRequest, {"messages": [1] * 300_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 300_000}]}),
        (ChatRequest, {"messages": [{"role": "user", **{f"field{n}": 1 for n in range(100_000)}}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * 300_000}]}),
    ],
)
def test_many_mistakes_are_few_errors(schema: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    assert caught.value.error_count() <= 2


def test_a_long_list_of_mistakes_is_answered_with_the_first(server):
    answer = post(server, "/v1/completions", {"model": "echo", "prompt": [1] * 300_000 + [0.5]})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt[300000]"


# Lengths.


class CountingTokenizer:
    """Counts the texts that are encoded."""

    longest_token = 4

    def __init__(self) -> None:
        self.num_encoded = 0
        self.gate = threading.Event()
        self.gate.set()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.num_encoded += len(texts)
        self.gate.wait(10)
        return [[1] for _ in texts]

    def encode_parts(self, parts: list[PromptPart]) -> list[int]:
        if any(part.text for part in parts):
            self.encode_batch([part.text for part in parts])
        return [1]


def pool_of(tokenizer: CountingTokenizer, **options: Any) -> TokenizerPool:
    sizes = {"num_threads": 1, "max_waiting": 2, "retry_after_s": 3} | options
    return TokenizerPool(tokenizer, 10, **sizes)  # type: ignore[arg-type]


async def test_a_text_that_cannot_fit_is_not_tokenised() -> None:
    tokenizer = CountingTokenizer()
    pool = pool_of(tokenizer)
    for refused in (pool.encode(["a" * 41], "prompt"), pool.encode_parts([PromptPart("a" * 41)], "messages")):
        with pytest.raises(ApiError, match="at least 11 tokens, expected at most 9") as caught:
            await refused
        assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")
    assert tokenizer.num_encoded == 0
    assert await pool.encode(["a" * 40], "prompt") == [[1]]


async def test_more_prompts_than_may_wait_are_refused_until_there_is_room() -> None:
    tokenizer = CountingTokenizer()
    pool = pool_of(tokenizer)
    tokenizer.gate.clear()
    waiting = [asyncio.create_task(pool.encode(["a"], "prompt")) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        await pool.encode(["a"], "prompt")
    assert (caught.value.status_code, caught.value.headers) == (503, {"Retry-After": "3"})
    tokenizer.gate.set()
    assert await asyncio.gather(*waiting) == [[[1]]] * 3
    assert await pool.encode(["a"], "prompt") == [[1]]


async def test_a_caller_that_leaves_makes_room_when_its_work_has_ended() -> None:
    tokenizer = CountingTokenizer()
    pool = pool_of(tokenizer, max_waiting=0)
    tokenizer.gate.clear()
    left = asyncio.create_task(pool.encode(["a"], "prompt"))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    with pytest.raises(ApiError):
        await pool.encode(["a"], "prompt")
    tokenizer.gate.set()
    while True:
        try:
            assert await pool.encode(["a"], "prompt") == [[1]]
            return
        except ApiError:
            await asyncio.sleep(0.01)


def test_other_threads_run_while_a_text_is_tokenised(tokenizer):
    """Otherwise a long prompt would stop all streams of its process."""
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1

    ticking = threading.Thread(target=tick)
    ticking.start()
    before = ticks[0]
    tokenizer.encode_batch(["a b " * 500_000])
    seen = ticks[0] - before
    stop.set()
    ticking.join()
    # A call that holds the interpreter lets at most a few ticks pass before and behind it.
    assert seen > 100_000


def test_too_many_prompts_are_refused_before_any_is_tokenised(server, monkeypatch):
    encoded: list[int] = []
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda _, texts: encoded.append(len(texts)))
    answer = post(server, "/v1/completions", {"model": "echo", "prompt": ["a", "b"], "n": 65})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")
    answer = post(server, "/v1/completions", {"model": "echo", "prompt": ["a"] * 20_000})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt")
    assert encoded == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a" * 300}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 300}, "prompt"),
        ("/v1/completions", {"prompt": "a" * 1_000_000}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 300}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 1_000_000}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 300},
            "max_completion_tokens",
        ),
        ("/tokenize", {"prompt": "a" * 1_000_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 1_000_000}]}, "messages"),
    ],
)
def test_what_does_not_fit_into_the_model_has_a_code_of_its_own(server, path, body, param):
    answer = post(server, path, {"model": "echo", **body})
    assert answer.status_code == 400
    assert (error_of(answer)["code"], error_of(answer)["param"]) == ("context_length_exceeded", param)
    assert str(MAX_MODEL_LEN) in error_of(answer)["message"] or str(MAX_MODEL_LEN - 1) in error_of(answer)["message"]


# Numbers and texts that break naive code.

HUGE = 9223372036854775808


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": HUGE}, "top_k"),
        ({"top_k": 10**400}, "top_k"),
        ({"seed": 10**400}, "seed"),
        ({"max_tokens": HUGE}, "max_tokens"),
        ({"min_tokens": HUGE}, "min_tokens"),
        ({"n": 10**400}, "n"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logprobs": HUGE}, "logprobs"),
        ({"stop_token_ids": [HUGE]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 300}, "stop_token_ids"),
        ({"stop": ["a" * 10_000]}, "stop[0]"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 10: 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"speculative": {"max_draft_tokens": HUGE}}, "speculative.max_draft_tokens"),
        ({"stop": "\ud83d"}, "stop"),
        ({"\ud83d": 1}, "body"),
    ],
)
def test_a_number_of_any_size_is_a_bad_request_and_hurts_nothing(server, fields, param):
    answer = post(server, "/v1/completions", {"model": "echo", "prompt": "abc", **fields})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert still_serves(server)


@pytest.mark.parametrize("model", ["\ud83d", "x" * 100_000])
def test_a_model_of_any_name_is_answered(server, model):
    answer = post(server, "/v1/completions", {"model": model, "prompt": "abc"})
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    "function",
    [
        {"name": "f", "arguments": '{"a": "\\ud83d"}'},
        {"name": "f", "arguments": '{"\\ud83d": 1}'},
        {"name": "f", "arguments": {"a": ["\ud83d"]}},
        {"name": "\ud83d", "arguments": "{}"},
        {"name": "f", "arguments": "[" * 100_000},
        {"name": "f", "arguments": '{"a": ' * 500 + "1" + "}" * 500},
        {"name": "f", "arguments": '{"a": 1' + "0" * 5000 + "}"},
    ],
)
def test_arguments_of_a_tool_call_cannot_break_the_server(server, function):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
    ]
    answer = post(server, "/v1/chat/completions", {"model": "echo", "messages": messages, "max_tokens": 1})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert error_of(answer)["param"].startswith("messages")
    assert still_serves(server)


@pytest.mark.parametrize(
    "policy",
    [{"max_draft_tokens": HUGE}, {"version": 10**400}, {"valid_seconds": 1e300}, {"confidence_threshold": HUGE}],
)
def test_a_policy_of_any_size_is_a_bad_request_and_hurts_nothing(server, echo, policy):
    answer = post(server, "/admin/policy", policy)
    assert (answer.status_code, error_of(answer)["param"]) == (400, next(iter(policy)))
    assert echo.policies == []
    assert still_serves(server)


# Health.


def ready(server: Server) -> httpx.Response:
    return HTTP.get(f"{server.url}/ready")


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(100):
        if condition():
            return
        threading.Event().wait(0.1)
    pytest.fail("it did not happen in 10 s")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_liveness_is_the_process_and_readiness_the_engine(server, method):
    server.client.healthy = False
    wait_until(lambda: ready(server).status_code == 503)
    assert HTTP.request(method, f"{server.url}/health").status_code == 200
    assert HTTP.request(method, f"{server.url}/ready").status_code == 503
    server.client.healthy = True
    wait_until(lambda: ready(server).status_code == 200)


def test_readiness_is_answered_while_the_state_cannot_be_found_out(server):
    wait_until(lambda: ready(server).status_code == 200)
    server.client.health_gate.clear()
    try:
        threading.Event().wait(2.1)  # Until the known state is old.
        assert [ready(server).status_code for _ in range(3)] == [200] * 3
        assert HTTP.get(f"{server.url}/health").status_code == 200
        assert still_serves(server)
    finally:
        server.client.health_gate.set()
