"""Sends hostile requests to a live application while streams run: compares every text, and watches memory.

    python -m benchmarks.chaos.hostile [--rounds 4]

Eight streams with seeds run all the time, on the tiny model with two verifier ranks and a drafter. Every round sends
each hostile request once, four at a time. The result, benchmarks/results/hostile.json, has the status of each request
in each round, the streams that ended and those whose text changed, and the resident memory of every process after
each round, once it has been idle for ten seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.chaos.faults import live_processes
from benchmarks.chaos.rounds import APP, ROOT, Limits, Streams, closed_cluster, running
from benchmarks.harness import report

RESULT = ROOT / "benchmarks" / "results" / "hostile.json"
AT_A_TIME = 4
IDLE_SECONDS = 10.0

_HUGE = 9223372036854775808
_CALL = {"name": "f", "arguments": '{"a": "\\ud83d"}'}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k beyond 64 bits": ("/v1/completions", {"prompt": "a", "top_k": _HUGE}),
    "seed of 400 digits": ("/v1/completions", {"prompt": "a", "seed": 10**400}),
    "300,000 fractional tokens": ("/v1/completions", {"prompt": [0.5] * 300_000}),
    "20,000 prompts": ("/v1/completions", {"prompt": ["a"] * 20_000}),
    "prompt of a million words": ("/v1/completions", {"prompt": "a b " * 500_000}),
    "prompt of 17 MB": ("/v1/completions", {"prompt": "a" * 17_000_000}),
    "bias of a token of 5,000 digits": ("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}),
    "100,000 biases": ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): 1 for n in range(100_000)}}),
    "stop string of 100 KB": ("/v1/completions", {"prompt": "a", "stop": ["b" * 100_000]}),
    "100,000 stop tokens": ("/v1/completions", {"prompt": "a", "stop_token_ids": list(range(100_000))}),
    "100,000 fields": ("/v1/completions", {f"field{number}": 1 for number in range(100_000)}),
    "half a surrogate pair": ("/v1/completions", {"prompt": "\ud800"}),
    "300,000 parts of a message": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [1] * 300_000}]},
    ),
    "half a surrogate pair in a tool call": (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": _CALL}]}]},
    ),
    "tokenize a million words": ("/tokenize", {"prompt": "a b " * 500_000}),
    "policy beyond 64 bits": ("/admin/policy", {"max_draft_tokens": _HUGE}),
    "policy for an infinite time": ("/admin/policy", {"valid_seconds": float("inf")}),
}
"""By what is wrong with it: path and body."""

PROCESSES = {
    "proxy": "ProxyActor",
    "Ingress": f"ServeReplica:{APP}:Ingress",
    "Engine": f"ServeReplica:{APP}:Engine",
    "LoadController": f"ServeReplica:{APP}:LoadController",
    "verifiers": "VerifierWorker",
    "drafter": "DrafterWorker",
}
"""Classes of actors whose memory is watched."""


def send(client: httpx.Client, path: str, body: dict[str, Any]) -> int:
    """The status of the answer."""
    headers = {"Content-Type": "application/json"}
    return client.post(path, content=json.dumps(body).encode(), headers=headers).status_code


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    limits = Limits()
    with closed_cluster(), running(limits) as url, httpx.Client(base_url=url, timeout=300) as client:
        streams = Streams(url, "tiny", limits)
        try:
            result = _measure(client, streams, options.rounds)
        finally:
            streams.stop()
    result["origin"] = report.provenance(ROOT, "python -m benchmarks.chaos.hostile")
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    failed = result["streams"]["num_changed"] + result["streams"]["num_lost"] + (not result["same_processes"])
    sys.exit(1 if failed or {status for row in result["statuses"].values() for status in row} - {400, 413} else 0)


def _measure(client: httpx.Client, streams: Streams, num_rounds: int) -> dict[str, Any]:
    before = _pids()
    outcome = streams.begin("hostile requests")
    statuses: dict[str, list[int]] = {name: [] for name in REQUESTS}
    memory = [_megabytes()]
    for number in range(num_rounds):
        started = time.monotonic()
        for name, status in _one_round(client):
            statuses[name].append(status)
        time.sleep(IDLE_SECONDS)
        memory.append(_megabytes())
        print(f"round {number + 1}: {time.monotonic() - started:.0f} s, MB {memory[-1]}", flush=True)
    while not streams.have_all_ended():
        time.sleep(0.1)
    ended = {key: value for key, value in asdict(outcome).items() if key.startswith("num_") or key == "notes"}
    return {
        "statuses": statuses,
        "streams": ended,
        "same_processes": _pids() == before,
        "megabytes": memory,
    }


def _one_round(client: httpx.Client) -> Iterator[tuple[str, int]]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from zip(REQUESTS, pool.map(lambda request: send(client, *request), REQUESTS.values()))


def _pids() -> dict[str, list[int]]:
    return {name: sorted(live_processes(class_name)) for name, class_name in PROCESSES.items()}


def _megabytes() -> dict[str, float]:
    """Resident memory by kind of process."""
    return {
        name: round(sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20, 1)
        for name, pids in _pids().items()
    }


if __name__ == "__main__":
    main()
