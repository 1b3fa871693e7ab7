"""Hostile requests beside honest streams: every stream says what it says alone."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

from http_server import HTTP, Server

HUGE = 9223372036854775808
CALL = {"name": "f", "arguments": '{"a": "\\ud83d"}'}
HOSTILE = [
    ("/v1/completions", {"prompt": "a", "top_k": HUGE}),
    ("/v1/completions", {"prompt": "a", "seed": 10**400}),
    ("/v1/completions", {"prompt": [0.5] * 300_000}),
    ("/v1/completions", {"prompt": ["a"] * 20_000}),
    ("/v1/completions", {"prompt": "a b " * 500_000}),
    ("/v1/completions", {"prompt": "a" * 17_000_000}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(token): 1 for token in range(100_000)}}),
    ("/v1/completions", {"prompt": "a", "stop": ["b" * 100_000]}),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": list(range(100_000))}),
    ("/v1/completions", {f"field{number}": 1 for number in range(100_000)}),
    ("/v1/completions", {"prompt": "\ud800"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 300_000}]}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"function": CALL}]}]}),
    ("/tokenize", {"prompt": "a b " * 500_000}),
    ("/admin/policy", {"max_draft_tokens": HUGE}),
    ("/admin/policy", {"valid_seconds": float("inf")}),
]
NUM_STREAMS = 8


def stream(server: Server, number: int) -> str:
    body = {"model": "echo", "prompt": f"stream {number} ", "max_tokens": 240, "seed": number, "stream": True}
    lines = HTTP.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def attack(server: Server, stop: threading.Event) -> list[int]:
    """The statuses of all hostile requests, sent again and again until `stop`, at least once each."""
    statuses = []
    while True:
        for path, body in HOSTILE:
            content = json.dumps(body).encode()
            answer = HTTP.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})
            statuses.append(answer.status_code)
        if stop.is_set():
            return statuses


def test_streams_beside_hostile_requests_say_what_they_say_alone(server):
    alone = [stream(server, number) for number in range(NUM_STREAMS)]
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        attacking = pool.submit(attack, server, stop)
        together = [list(pool.map(lambda number: stream(server, number), range(NUM_STREAMS))) for _ in range(3)]
        stop.set()
        statuses = attacking.result()
    assert together == [alone] * 3
    assert set(statuses) == {400, 413}
    assert len(statuses) >= len(HOSTILE)
