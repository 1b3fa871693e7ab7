"""Gangs that die under load: all requests continue, except for one that causes the deaths."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from poison import KILLS, RAISES
from ray import serve
from ray_application import local_ray, wait_until
from small_checkpoint import COST_TABLE, ENGINE, save_small_checkpoint

from benchmarks.chaos.faults import is_running, process_of
from benchmarks.chaos.rounds import APP, Chaos, Fault, Limits, Streams, served

pytestmark = pytest.mark.ray

HEALTH = {
    "check_period_s": 1,
    "check_timeout_s": 5,
    "peer_timeout_s": 20,
    "step_timeout_s": 20,
    # As in production: a failed replica must not wait this long.
    "graceful_shutdown_timeout_s": 600,
}


_NUM_CLIENTS = 4


@dataclass
class App:
    url: str
    limits: Limits

    def post(self, **body: object) -> httpx.Response:
        body = {"model": "small", "prompt": "a request", "max_tokens": 4, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("small")
    args = {
        "model": str(save_small_checkpoint(folder / "model")),
        "served_model_name": "small",
        "tensor_parallel_size": 2,
        "engine": ENGINE,
        "dspark": {"cost_table": {"path": str(folder / "model" / COST_TABLE)}},
        "placement": {"verifier": {"resources": {"CPU": 0.5}}, "drafter": {"resources": {"CPU": 0.5}}},
        "health": HEALTH,
    }
    limits = Limits(max_tokens=80, args=args)
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory,
    ):
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        with local_ray(directory, 4, runtime_env={"worker_process_setup_hook": "poison.install"}):
            try:
                with served(limits) as url:
                    yield App(url, limits)
            finally:
                serve.shutdown()


@contextmanager
def short_requests(app: App) -> Iterator[list[int]]:
    """Send a request every 50 ms, so that all phases of a failure are hit; returns the statuses."""
    statuses: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(0.05 * _NUM_CLIENTS):
            statuses.append(app.post().status_code)

    threads = [threading.Thread(target=ask) for _ in range(_NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    "fault",
    [Fault("SIGKILL", "rank 0"), Fault("raise", "rank 1")],
    ids=lambda fault: fault.name,
)
def test_a_lost_rank_costs_no_text_whatever_is_sent_meanwhile(app, fault):
    streams = Streams(app.url, "small", app.limits)
    try:
        with short_requests(app) as statuses:
            outcome = Chaos(app.url, "small", streams, random.Random(0)).inject(fault)
    finally:
        streams.stop()
    assert outcome.seconds_to_end is not None, "the replica did not end"
    assert outcome.seconds_to_healthy is not None, "the application did not recover"
    assert outcome.num_texts >= 8
    assert (outcome.num_changed, outcome.num_lost, outcome.notes) == (0, 0, [])
    assert set(statuses) <= {200, 429, 503}


def test_a_replica_that_is_stopped_is_killed_by_its_rank_0(app):
    replica = process_of("Engine", APP)
    os.kill(replica, signal.SIGSTOP)
    wait_until(lambda: not is_running(replica), 120)
    assert app.post().status_code == 200


@pytest.mark.parametrize("seed", [KILLS, RAISES])
def test_a_request_that_kills_takes_two_gangs_and_no_third(app, seed):
    assert app.post().status_code == 200
    text = app.post(prompt="innocent", seed=5, max_tokens=120, ignore_eos=True).json()["choices"][0]["text"]
    engines = {process_of("Engine", APP)}
    with ThreadPoolExecutor(2) as pool:
        innocent = pool.submit(app.post, prompt="innocent", seed=5, max_tokens=120, ignore_eos=True)
        poison = pool.submit(app.post, seed=seed)
        while not (poison.done() and innocent.done()):
            with contextlib.suppress(LookupError):
                engines.add(process_of("Engine", APP))
            time.sleep(0.1)
    assert innocent.result().status_code == 200, innocent.result().text
    assert innocent.result().json()["choices"][0]["text"] == text
    assert poison.result().status_code == 500
    error = poison.result().json()["error"]["message"]
    assert error.startswith("internal error (request id ")
    assert "secret" not in error
    assert "Traceback" not in error
    assert app.post().status_code == 200
    engines.add(process_of("Engine", APP))
    assert len(engines) == 3  # two that it killed, and the one that is left
