"""The watchdog, which ends a replica even if its event loop is blocked, and the background tasks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import zmq
from http_server import running_loop

from deployments.replica.channel import EngineChannel
from deployments.replica.engine import end_streams, find_silence
from deployments.replica.messages import EngineLost, Ping, encode
from deployments.replica.supervision import BackgroundTasks, Watchdog
from deployments.replica.workers import ReplicaProcess, ReplicaSilent, StepLoop
from dspark_ray.types import Request, SamplingParams


@dataclass
class Exits:
    """Stands in for os._exit."""

    codes: list[int] = field(default_factory=list)
    called: threading.Event = field(default_factory=threading.Event)

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.called.set()


@pytest.fixture
def exits() -> Exits:
    return Exits()


@pytest.fixture
def reasons() -> list[str]:
    return []


@pytest.fixture
def watchdog(exits: Exits, reasons: list[str]) -> Iterator[Watchdog]:
    dog = Watchdog(reasons.append, exits)
    yield dog
    dog.stop()


def test_the_end_of_a_run_ends_the_process_with_its_reason(watchdog, exits, reasons):
    run: Future[None] = Future()
    watchdog.watch("verifier 1", run)
    watchdog.start()
    run.set_exception(RuntimeError("out of memory"))
    assert exits.called.wait(10)
    assert exits.codes == [1]
    assert reasons == ["verifier 1 failed: RuntimeError('out of memory')"]


def test_a_run_that_returns_ends_the_process_too(watchdog, exits, reasons):
    run: Future[None] = Future()
    run.set_result(None)
    watchdog.watch("drafter", run)
    watchdog.start()
    assert exits.called.wait(10)
    assert reasons == ["drafter ended its run"]


def test_a_fault_that_a_check_finds_ends_the_process(watchdog, exits, reasons):
    faults: list[str | None] = [None, None, "rank 0 was silent"]
    watchdog.check(lambda: faults.pop(0) if faults else None)
    watchdog.start()
    assert exits.called.wait(10)
    assert reasons == ["rank 0 was silent"]


@pytest.mark.parametrize("hangs", [True, False])
def test_a_last_call_that_hangs_or_raises_does_not_keep_the_process(exits, hangs):
    release = threading.Event()

    def before_exit(reason: str) -> None:
        if hangs:
            release.wait(60)
        raise RuntimeError

    watchdog = Watchdog(before_exit, exits)
    watchdog.start()
    watchdog.lose("lost")
    assert exits.called.wait(20)
    watchdog.stop()
    release.set()


def test_a_replica_that_closes_lets_its_runs_end(watchdog, exits):
    run: Future[None] = Future()
    watchdog.watch("verifier 0", run)
    watchdog.start()
    watchdog.stop()
    run.set_result(None)
    assert not exits.called.wait(1.5)


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.6, 0.9])
async def test_a_rank_that_raises_ends_the_process_and_its_streams_whenever_it_does(engine, exits, seconds):
    """While the replica sends requests, aborts, pings and policies throughout the failure."""
    channel = EngineChannel()
    loop = asyncio.get_running_loop()
    watchdog = Watchdog(
        lambda reason: asyncio.run_coroutine_threadsafe(end_streams(channel, reason), loop).result(1.0), exits
    )
    tasks = BackgroundTasks(lambda name: None, watchdog.lose)
    tasks.start("listen", channel.listen, is_essential=True)
    tasks.start("ping", channel.ping, is_essential=True)
    run: Future[None] = Future()
    watchdog.watch("verifier 0", run)
    watchdog.check(lambda: find_silence(channel, 30.0))
    watchdog.start()
    with running_loop(engine, channel, closes=True) as thread:
        await asyncio.wait_for(channel.ready.wait(), 10)
        await asyncio.sleep(seconds)
        engine.breaks = True
        first = asyncio.create_task(read(channel, "first"))
        ended = asyncio.create_task(asyncio.to_thread(fail_when_it_ends, thread, run))
        stranded = [asyncio.create_task(read(channel, f"r{n}")) async for n in every(0.02, 40)]
        assert await asyncio.to_thread(exits.called.wait, 10)
        await ended
        results = await asyncio.gather(first, *stranded, return_exceptions=True)
        assert all(isinstance(result, EngineLost) for result in results)
        assert results[0].in_flight
        assert "the engine broke on purpose" in results[0].reason
        tasks.cancel()
        watchdog.stop()


async def read(channel: EngineChannel, request_id: str) -> int:
    request = Request(request_id=request_id, prompt_token_ids=(5,), sampling=SamplingParams(max_tokens=90))
    return len([event async for event in channel.generate(request)])


async def every(seconds: float, count: int):
    for n in range(count):
        await asyncio.sleep(seconds)
        yield n


def fail_when_it_ends(thread: threading.Thread, run: Future[None]) -> None:
    thread.join()
    run.set_exception(RuntimeError("the engine broke on purpose"))


async def test_a_blocked_event_loop_is_found_by_the_thread(exits):
    channel = EngineChannel()
    watchdog = Watchdog(lambda reason: None, exits)
    pinging = asyncio.create_task(channel.ping())
    watchdog.check(lambda: find_silence(channel, 1.5))
    watchdog.start()
    await asyncio.sleep(0.1)
    time.sleep(4)  # the fault under test
    assert exits.called.is_set()
    assert "the event loop was blocked" in watchdog.reason
    pinging.cancel()
    channel.close()
    watchdog.stop()


@pytest.mark.parametrize("replica", ["silent", "deaf"])
def test_rank_0_gives_up_a_replica_that_stands_still(replica, engine):
    with zmq.Context() as context, context.socket(zmq.PAIR) as far, context.socket(zmq.PAIR) as near:
        far.set_hwm(1)
        near.set_hwm(1)
        near.linger = far.linger = 0
        near.connect(f"tcp://127.0.0.1:{far.bind_to_random_port('tcp://127.0.0.1')}")
        loop = StepLoop(engine, near, max_silence_seconds=1.5)
        if replica == "deaf":
            # It asks for more output than the sockets hold, and reads nothing.
            request = Request(
                request_id="r",
                prompt_token_ids=tuple(range(5, 9)),
                sampling=SamplingParams(max_tokens=10**6, logprobs=20),
            )
            engine.add_request(request)
            keep_alive = threading.Thread(target=send_pings, args=(far, 8.0))
            keep_alive.start()
        with pytest.raises(ReplicaSilent):
            loop.run()
        if replica == "deaf":
            keep_alive.join()


def send_pings(socket: zmq.Socket, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.send(encode(Ping()), zmq.DONTWAIT)
        except zmq.Again:
            return
        time.sleep(0.1)


# Background tasks.


class Recorder:
    def __init__(self) -> None:
        self.failures: list[str] = []
        self.ends: list[str] = []

    def tasks(self) -> BackgroundTasks:
        return BackgroundTasks(self.failures.append, self.ends.append)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_essential_task_that_raises_is_counted_and_reported():
    async def work() -> None:
        raise ValueError("a bug")

    recorder = Recorder()
    recorder.tasks().start("listen", work, is_essential=True)
    await until(lambda: bool(recorder.ends))
    assert recorder.failures == ["listen"]
    assert recorder.ends == ["listen failed: ValueError('a bug')"]


async def test_another_task_that_raises_is_started_again():
    calls = []

    async def work() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise ValueError("a bug")
        await asyncio.sleep(60)

    recorder = Recorder()
    tasks = recorder.tasks()
    tasks.start("heartbeat", work, is_essential=False)
    await until(lambda: len(calls) == 2)
    assert (recorder.failures, recorder.ends) == (["heartbeat"], [])
    tasks.cancel()


async def test_a_cancelled_task_is_no_failure():
    recorder = Recorder()
    tasks = recorder.tasks()
    tasks.start("listen", lambda: asyncio.sleep(60), is_essential=True)
    await asyncio.sleep(0)
    tasks.cancel()
    await asyncio.sleep(0.05)
    assert (recorder.failures, recorder.ends) == ([], [])


def test_a_stopped_process_is_killed():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        replica = ReplicaProcess(process.pid)
        process.send_signal(signal.SIGSTOP)
        replica.kill()
        assert process.wait(20) == -signal.SIGKILL


def test_a_process_that_cannot_be_held_is_left_alone(monkeypatch, caplog):
    def refuse(pid: int) -> int:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    ReplicaProcess(os.getpid()).kill()
    assert "Operation not permitted" in caplog.text
