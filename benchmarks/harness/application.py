"""The Serve application as a user starts it, and a client that counts tokens and seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.harness.gang import free_port

_SECONDS_TO_START = 180.0


@dataclass(frozen=True)
class Answer:
    """One streamed completion."""

    num_tokens: int
    text: str


@contextmanager
def running(config: dict[str, Any], scratch: Path) -> Iterator[str]:
    """`serve run` the config on a free port of a new local Ray; yields the base URL when it is healthy."""
    port = free_port()
    config_file = scratch / "application.yaml"
    config_file.write_text(yaml.safe_dump({**config, "http_options": {"host": "127.0.0.1", "port": port}}))
    command = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", str(config_file)]
    with (scratch / "application.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment(scratch), start_new_session=True, preexec_fn=_heed_ctrl_c
        )
    base_url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(base_url, process, scratch / "application.log")
        yield base_url
    finally:
        _stop(process)


def stream(client: httpx.Client, body: dict[str, Any]) -> Answer:
    """POST one completion as a stream and read it to its end. Raises RuntimeError for an error answer."""
    text, usage = [], None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"the stream ended with {event['error']}")
            text += [choice["text"] for choice in event["choices"]]
            usage = event.get("usage") or usage
    if usage is None:
        raise RuntimeError("the stream ended without usage")
    return Answer(usage["completion_tokens"], "".join(text))


def one_after_the_other(client: httpx.Client, bodies: list[dict[str, Any]]) -> tuple[float, list[Answer]]:
    """Seconds, and the answers in order."""
    started = time.perf_counter()
    answers = [stream(client, body) for body in bodies]
    return time.perf_counter() - started, answers


def all_together(client: httpx.Client, bodies: list[dict[str, Any]]) -> tuple[float, list[Answer]]:
    """As many streams as bodies; seconds until the last has ended."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda body: stream(client, body), bodies))
        return time.perf_counter() - started, answers


def _environment(scratch: Path) -> dict[str, str]:
    token = scratch / "auth_token"
    token.write_text(os.urandom(32).hex())
    return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}


def _wait_until_healthy(base_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"serve run ended with {process.returncode}: see {log}")
        try:
            if httpx.get(f"{base_url}/ready", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1.0)
    raise RuntimeError(f"not healthy after {_SECONDS_TO_START:.0f} s: see {log}")


def _heed_ctrl_c() -> None:
    """A job in the background of a shell ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, as a user ends it; when that takes too long, SIGTERM, and then the whole session, which is ours alone."""
    for end in (
        lambda: process.send_signal(signal.SIGINT),
        process.terminate,
        lambda: os.killpg(process.pid, signal.SIGKILL),
    ):
        if process.poll() is not None:
            return
        end()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
