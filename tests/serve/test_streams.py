"""Streams: headers and keep-alive comments before the first token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from byte_tokenizer import EOS, NUM_TOKENS
from echo_engine import EchoEngine
from http_server import HTTP, Server, running_server

from dspark_ray.text.tokenizer import Tokenizer

BODY = {"model": "echo", "prompt": "abc", "max_tokens": 6, "stream": True}


@pytest.fixture(scope="module")
def pinging(tokenizer: Tokenizer) -> Iterator[Server]:
    """Sends a comment every 50 ms."""
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), keep_alive_s=0.05) as running:
        yield running


def test_an_admitted_stream_has_headers_and_comments_before_its_first_token(pinging):
    pinging.engine.step_gate.clear()
    try:
        with HTTP.stream("POST", f"{pinging.url}/v1/completions", json=BODY, timeout=20) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["x-accel-buffering"] == "no"
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
            pinging.engine.step_gate.set()
            rest = [line for line in lines if line.startswith("data")]
    finally:
        pinging.engine.step_gate.set()
    assert rest[-1] == "data: [DONE]"


def test_a_refused_choice_still_has_a_status_of_its_own(server, echo):
    echo.max_requests = 2
    assert HTTP.post(f"{server.url}/v1/completions", json=BODY | {"n": 3}).status_code == 429


def test_comments_can_be_switched_off(tokenizer):
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), keep_alive_s=0) as running:
        answer = HTTP.post(f"{running.url}/v1/completions", json=BODY)
        assert ": ping" not in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
