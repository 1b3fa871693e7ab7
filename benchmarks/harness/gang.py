"""An engine's gang as plain processes: the same members as in the application, without Ray."""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import GangSpec, join_as_drafter, join_as_follower, join_as_leader, leave_gang
from dspark_ray.types import Request, SpeculationStats

_SPAWN = multiprocessing.get_context("spawn")
_SECONDS_TO_START = 120.0
_SECONDS_PER_JOB = 300.0


@dataclass(frozen=True)
class Job:
    """Requests to run, one after the other or all together."""

    requests: tuple[Request, ...]
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    """Measurements of rank 0."""

    num_tokens: int
    seconds: float
    loop_seconds_per_round: float
    """Median over the steps that decoded."""
    stats: dict[str, SpeculationStats]
    """By request id."""
    token_ids: dict[str, tuple[int, ...]]


class Gang:
    """Starts the members and sends jobs to rank 0."""

    def __init__(self, spec: GangSpec) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        members: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(_lead, (spec, theirs))]
        members += [(_follow, (spec, rank)) for rank in range(1, spec.tensor_parallel_size)]
        members += [(_draft, (spec,))] if spec.has_draft_process else []
        self._processes = [_SPAWN.Process(target=run, args=args, daemon=True) for run, args in members]
        for process in self._processes:
            process.start()
        theirs.close()
        self._answer(_SECONDS_TO_START)

    def run(self, job: Job) -> Outcome:
        """Raises RuntimeError when the gang is dead or stuck."""
        self._connection.send(job)
        outcome = self._answer(_SECONDS_PER_JOB)
        assert isinstance(outcome, Outcome)
        return outcome

    def close(self) -> None:
        """End all members; safe to call when they are gone already."""
        if self._processes[0].is_alive():
            self._connection.send(None)
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()

    def _answer(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise RuntimeError(f"no message from rank 0 for {seconds:.0f} s")
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("rank 0 died: its traceback is above") from None


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _lead(spec: GangSpec, connection: Connection) -> None:
    torch.set_num_threads(1)
    engine = join_as_leader(spec)
    connection.send("ready")
    while (job := connection.recv()) is not None:
        connection.send(_measure(engine, job))
    engine.close()
    leave_gang()


def _follow(spec: GangSpec, rank: int) -> None:
    torch.set_num_threads(1)
    join_as_follower(spec, rank).run()
    leave_gang()


def _draft(spec: GangSpec) -> None:
    torch.set_num_threads(1)
    join_as_drafter(spec).run()
    leave_gang()


def _measure(engine: Engine, job: Job) -> Outcome:
    batches = [job.requests] if job.together else [(request,) for request in job.requests]
    stats: dict[str, SpeculationStats] = {}
    tokens: dict[str, list[int]] = {request.request_id: [] for request in job.requests}
    loop_seconds = []
    started = time.perf_counter()
    for batch in batches:
        for request in batch:
            engine.add_request(request)
        while engine.has_unfinished():
            for output in engine.step().sequences:
                tokens[output.request_id].extend(output.token_ids)
                if output.stats is not None:
                    stats[output.request_id] = output.stats
            loop_seconds.append(engine.last_step_timing.loop)
    seconds = time.perf_counter() - started
    return Outcome(
        num_tokens=sum(map(len, tokens.values())),
        seconds=seconds,
        loop_seconds_per_round=statistics.median(loop_seconds),
        stats=stats,
        token_ids={request_id: tuple(ids) for request_id, ids in tokens.items()},
    )
