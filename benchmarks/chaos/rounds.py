"""Measures recovery from faults: kills, stops and breaks every process of the application while streams run.

    python -m benchmarks.chaos [--rounds 50] [--seed 0] [--minutes M]

Runs on two cores of a CPU; writes benchmarks/results/chaos.json and chaos.md. Eight streams with seeds run all the
time, and every text is compared with that of an undisturbed run. In a random order that the seed determines, rank 0,
another rank, the drafter, the Engine replica or the load controller is killed or stopped, or an exception is raised
inside a step. The next fault follows when the application is healthy and every stream has ended once. An interrupted
run continues after the last finished round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.chaos.faults import FAULTS, Fault, is_running, process_of, schedule, send
from benchmarks.harness.application import all_together, stream
from benchmarks.harness.gang import free_port

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
APP = "chaos"
NUM_STREAMS = 8
_HEALTHY_SECONDS = 240.0
"""Time limit of a recovery."""

ARGS: dict[str, Any] = {
    "model": "tiny",
    "tensor_parallel_size": 2,
    "engine": {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 2048},
    "dspark": {
        "drafter": {"placement": "actor"},
        "cost_table": {"directory": str(ROOT / ".build" / "chaos")},
        # Without requests, a broken drafter would not raise.
        "schedule": {"bypass": False},
    },
    "placement": {"verifier": {"resources": {"CPU": 0.5}}, "drafter": {"resources": {"CPU": 0.5}}},
    # The grace period of a production deployment, which must not delay recovery.
    "health": {
        "check_period_s": 1,
        "check_timeout_s": 5,
        "peer_timeout_s": 10,
        "step_timeout_s": 15,
        "graceful_shutdown_timeout_s": 600,
    },
}
PROMPTS = (
    "def add(a, b):\n",
    "class Stack:\n    def push(self, item):\n",
    "What is 12 + 30?",
    "The function returns ",
    "import os\n\n",
    "for name in names:\n",
    "Raised when ",
    "try:\n    value = int(text)\n",
)


@dataclass(frozen=True)
class Limits:
    """Settings that differ between this program and its short form in the tests."""

    max_tokens: int = 64
    args: dict[str, Any] = field(default_factory=lambda: ARGS)


@dataclass
class Round:
    """One fault and its outcome. Times are seconds since the fault."""

    fault: str
    seconds_to_end: float | None = None
    """Until the process of the Engine replica (for a fault of the controller, of the controller) had ended."""
    seconds_to_healthy: float | None = None
    """Until the next replica answered a new request, or the next controller showed its replica."""
    num_texts: int = 0
    """Streams that ended after the fault, until each of the streams had ended once."""
    num_changed: int = 0
    num_lost: int = 0
    num_refused: int = 0
    """New requests that got a 503 with Retry-After while there was no engine; they were sent again."""
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running(limits: Limits) -> Iterator[str]:
    """The application on a Ray of its own, with workers that raise on a signal; yields the base URL."""
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=4,
            object_store_memory=80 * 2**20,
            _temp_dir=directory,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "benchmarks.chaos.faults.install"},
        )
        try:
            with served(limits) as url:
                yield url
        finally:
            serve.shutdown()
            ray.shutdown()


@contextlib.contextmanager
def served(limits: Limits) -> Iterator[str]:
    """The application on the Ray that is connected; the caller shuts it down."""
    from ray import serve

    from deployments.app import build
    from deployments.args import AppArgs

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(AppArgs.model_validate(limits.args)), name=APP)
    yield f"http://127.0.0.1:{port}"


class Streams:
    """Eight streams, each of which requests its own text repeatedly and compares it."""

    def __init__(self, url: str, model: str, limits: Limits) -> None:
        self._client = httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
        self._bodies = [_body(model, index, limits.max_tokens) for index in range(NUM_STREAMS)]
        self._expected = [answer.text for answer in all_together(self._client, self._bodies)[1]]
        self._lock = threading.Lock()
        self._round = Round("none")
        self._ended: set[int] = set()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(NUM_STREAMS)]
        for thread in self._threads:
            thread.start()

    def begin(self, fault: str) -> Round:
        """Count streams that end from now on for this fault."""
        with self._lock:
            self._round, self._ended = Round(fault), set()
            return self._round

    def have_all_ended(self) -> bool:
        """Whether each of the streams has ended since `begin`."""
        with self._lock:
            return len(self._ended) == NUM_STREAMS

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)
        self._client.close()

    def _run(self, index: int) -> None:
        while not self._stopping.is_set():
            try:
                text = stream(self._client, self._bodies[index]).text
            except (RuntimeError, httpx.HTTPError) as error:
                self._note_error(index, str(error) or repr(error))
                time.sleep(0.5)
                continue
            with self._lock:
                self._ended.add(index)
                self._round.num_texts += 1
                if text != self._expected[index]:
                    self._round.num_changed += 1
                    self._round.notes.append(f"stream {index} differs at {_difference(text, self._expected[index])}")

    def _note_error(self, index: int, error: str) -> None:
        with self._lock:
            # A status before the first byte: the request was not accepted.
            if error.startswith(("503", "429")):
                self._round.num_refused += 1
            else:
                self._ended.add(index)
                self._round.num_lost += 1
                self._round.notes.append(f"stream {index}: {error[:300]}")


def _body(model: str, index: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": PROMPTS[index % len(PROMPTS)],
        "max_tokens": max_tokens,
        "seed": index,
        "temperature": 0.8 if index % 2 else 0.0,
        "ignore_eos": True,
    }


def _difference(text: str, expected: str) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
    )
    return f"{at} of {len(expected)} characters: {text[at : at + 20]!r} for {expected[at : at + 20]!r}"


class Chaos:
    """Injects faults one after the other."""

    def __init__(self, url: str, model: str, streams: Streams, pause: random.Random) -> None:
        self._http = httpx.Client(base_url=url, timeout=3)
        self._model, self._streams, self._pause = model, streams, pause

    def inject(self, fault: Fault) -> Round:
        """One round: the fault, back to health, and every stream to its end."""
        if _seconds_until(lambda: self._is_whole(fault), time.monotonic()) is None:
            raise RuntimeError(f"the application is not whole before the fault {fault.name}")
        pid = process_of(fault.to, APP)
        ending = process_of("Engine" if fault.hits_the_gang else "LoadController", APP)
        replica = None
        while replica is None:
            replica = self._replica()
        time.sleep(self._pause.uniform(0.5, 2.0))
        outcome = self._streams.begin(fault.name)
        started = time.monotonic()
        send(fault, pid)
        outcome.seconds_to_end = _seconds_until(lambda: not is_running(ending), started)
        is_healthy = (lambda: self._answers(replica)) if fault.hits_the_gang else (lambda: self._watches(ending))
        outcome.seconds_to_healthy = _seconds_until(is_healthy, started)
        if _seconds_until(self._streams.have_all_ended, started) is None:
            outcome.notes.append("some streams did not end")
            outcome.num_lost += 1
        return outcome

    def _is_whole(self, fault: Fault) -> bool:
        """Whether every process that the fault concerns runs, and the Engine replica answers."""
        try:
            process_of(fault.to, APP)
            process_of("Engine" if fault.hits_the_gang else "LoadController", APP)
        except LookupError:
            return False
        return self._replica() is not None

    def _replica(self) -> str | None:
        """The id of the Engine replica that answers, None without one."""
        try:
            answer = self._http.get("/admin/steps", params={"last": 1})
            return answer.json()["replica"] if answer.status_code == httpx.codes.OK else None
        except httpx.HTTPError:
            return None

    def _answers(self, former: str | None) -> bool:
        """Whether another replica than `former` answers and a new request succeeds."""
        replica = self._replica()
        if replica is None or replica == former:
            return False
        body = {"model": self._model, "prompt": "a", "max_tokens": 1}
        with contextlib.suppress(httpx.HTTPError):
            return self._http.post("/v1/completions", json=body).status_code == httpx.codes.OK
        return False

    def _watches(self, former: int) -> bool:
        """Whether another controller than `former` knows the Engine replica."""
        try:
            answer = self._http.get("/admin/load")
            is_known = answer.status_code == httpx.codes.OK and bool(answer.json()["replicas"])
            return is_known and process_of("LoadController", APP) != former
        except (httpx.HTTPError, LookupError):
            return False


def _seconds_until(condition: Callable[[], bool], started: float) -> float | None:
    """None when the time limit passes first."""
    while time.monotonic() - started < _HEALTHY_SECONDS:
        if condition():
            return time.monotonic() - started
        time.sleep(0.05)
    return None


# The long run, its file and its table.


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no round after so many minutes")
    parser.add_argument("--output", type=Path, default=RESULTS / "chaos.json")
    options = parser.parse_args()
    rounds = _kept(options.output, options.seed)
    faults = schedule(options.seed, options.rounds)
    deadline = time.monotonic() + 60 * options.minutes
    with closed_cluster():
        while len(rounds) < len(faults) and time.monotonic() < deadline:
            _run(faults, rounds, deadline, options)
    num_faults = sum(outcome.num_changed + outcome.num_lost for outcome in rounds)
    sys.exit(1 if num_faults or len(rounds) < len(faults) else 0)


def _run(faults: list[Fault], rounds: list[Round], deadline: float, options: argparse.Namespace) -> None:
    limits = Limits()
    with running(limits) as url:
        streams = Streams(url, "tiny", limits)
        chaos = Chaos(url, "tiny", streams, random.Random(options.seed))
        try:
            for fault in faults[len(rounds) :]:
                if time.monotonic() > deadline:
                    return
                outcome = chaos.inject(fault)
                rounds.append(outcome)
                print(f"{len(rounds):3} {_line(outcome)}", flush=True)
                _keep(options.output, options.seed, rounds)
        finally:
            streams.stop()


@contextlib.contextmanager
def closed_cluster() -> Iterator[None]:
    """Settings of a local cluster that is closed to others and writes nothing to the home folder.

    Enter it before Ray is imported.
    """
    with tempfile.TemporaryDirectory(prefix="dspark-chaos-") as folder:
        token = Path(folder, "auth_token")
        token.write_text(os.urandom(32).hex())
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            # Ray gives its workers the lowest priority, and the seconds of a busy machine would be measured.
            "RAY_worker_niceness": "0",
        }
        yield


def _kept(path: Path, seed: int) -> list[Round]:
    """The rounds of an earlier run with this seed; none where there was none."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    return [Round(**outcome) for outcome in kept["rounds"]] if kept["seed"] == seed else []


def _keep(path: Path, seed: int, rounds: list[Round]) -> None:
    document = {
        "seed": seed,
        "num_streams": NUM_STREAMS,
        "health": ARGS["health"],
        "rounds": [asdict(outcome) for outcome in rounds],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rounds))


def _line(outcome: Round) -> str:
    return (
        f"{outcome.fault:24} ended {_seconds(outcome.seconds_to_end)} healthy {_seconds(outcome.seconds_to_healthy)}"
        f" texts {outcome.num_texts} changed {outcome.num_changed} lost {outcome.num_lost}"
        f" refused {outcome.num_refused} {'; '.join(outcome.notes)}"
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def table(rounds: list[Round]) -> str:
    """Markdown with a line per kind of fault."""
    lines = [
        "| fault | rounds | process ended (median, most) | healthy (median, most) | texts | changed | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        some = [outcome for outcome in rounds if outcome.fault == fault.name]
        if some:
            lines.append(
                f"| {fault.name} | {len(some)} | {_spread([o.seconds_to_end for o in some])}"
                f" | {_spread([o.seconds_to_healthy for o in some])} | {sum(o.num_texts for o in some)}"
                f" | {sum(o.num_changed for o in some)} | {sum(o.num_lost for o in some)} |"
            )
    return "\n".join(lines) + "\n"


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    never = f", {len(values) - len(known)} never" if len(known) < len(values) else ""
    return f"{median(known):.1f} s, {max(known):.1f} s{never}" if known else "never"
