"""Hostile requests beside normal streams: every stream has the text that it has alone."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

from http_server import HTTP, Server

from benchmarks.chaos.hostile import REQUESTS, send

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
        statuses += [send(HTTP, f"{server.url}{path}", body) for path, body in REQUESTS.values()]
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
    assert len(statuses) >= len(REQUESTS)
