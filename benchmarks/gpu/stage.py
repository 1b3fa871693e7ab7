"""Runs the jobs of a stage, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.gpu.records import Record, from_json, to_json

Status = Literal["not run", "running", "ended", "failed", "timed out"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    command: Sequence[str]
    seconds: float
    """Time limit."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's."""


@dataclass(frozen=True)
class Stage:
    """Batches of jobs: those of one batch run side by side, a batch after the one before it."""

    name: str
    seconds: float
    """Time limit of all of them together."""
    batches: Sequence[Sequence[Job]]
    workers: int
    """Jobs that run at a time."""


@dataclass
class JobResult:
    """Outcome of one job."""

    name: str
    status: Status = "not run"
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    seconds: float = 0.0


@dataclass
class StageResult:
    """State of a stage."""

    name: str
    limit_seconds: float
    jobs: list[JobResult]
    status: Status = "not run"
    seconds: float = 0.0


def append(path: Path, record: Record) -> None:
    """Add a record to a file that several processes append to."""
    line = json.dumps(to_json(record)) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())  # one write, so that lines of two processes do not mix
    finally:
        os.close(descriptor)


def read_records(path: Path) -> Iterator[Record]:
    """All complete lines; a killed process can leave an incomplete one."""
    if not path.exists():
        return
    for line in path.read_text().split("\n"):
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        yield from_json(fields)


class StageRun:
    """One stage while it runs."""

    def __init__(self, stage: Stage, log: Path, folder: Path, on_change: Callable[[StageResult], None]) -> None:
        """Jobs run in `folder` and write to `log`; `on_change` is called at every start and end, and once a second."""
        self._stage, self._log, self._folder, self._on_change = stage, log, folder, on_change
        self._started = time.monotonic()
        self.result = StageResult(
            stage.name, round(stage.seconds, 1), [JobResult(job.name) for batch in stage.batches for job in batch]
        )
        self._results = {result.name: result for result in self.result.jobs}
        self._running: dict[str, _Running] = {}

    def run(self) -> StageResult:
        """Run until all jobs have ended or the time is over; ends its processes, also when interrupted."""
        self.result.status = "running"
        try:
            for batch in self._stage.batches:
                self._run_batch(batch)
        finally:
            for running in list(self._running.values()):
                self._end(running, "timed out")
            self.result.status = self._status()
            self._tell()
        return self.result

    def _run_batch(self, batch: Sequence[Job]) -> None:
        waiting, told_at = list(batch), time.monotonic()
        while (waiting or self._running) and self._elapsed() < self._stage.seconds:
            while waiting and len(self._running) < self._stage.workers:
                self._start(waiting.pop(0))
            for running in list(self._running.values()):
                if running.process.poll() is not None:
                    self._end(running, "ended" if running.process.returncode == 0 else "failed")
                elif time.monotonic() - running.started > running.job.seconds:
                    self._end(running, "timed out")
            if time.monotonic() - told_at > 1:
                told_at = time.monotonic()
                self._tell()
            time.sleep(_POLL_SECONDS)

    def _start(self, job: Job) -> None:
        with self._log.open("ab") as log:
            log.write(f"=== {job.name}: {' '.join(job.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                job.command,
                cwd=self._folder,
                env=os.environ | dict(job.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
        self._running[job.name] = _Running(job, process, time.monotonic())
        self._results[job.name].status = "running"
        self._tell()

    def _end(self, running: _Running, status: Status) -> None:
        # Children of an ended job may still run.
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        del self._running[running.job.name]
        result = self._results[running.job.name]
        result.status, result.exit_code = status, running.process.returncode
        result.seconds = round(time.monotonic() - running.started, 2)
        self._tell()

    def _status(self) -> Status:
        statuses = {result.status for result in self.result.jobs}
        if statuses == {"ended"}:
            return "ended"
        return "timed out" if statuses & {"timed out", "not run"} else "failed"

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _tell(self) -> None:
        self.result.seconds = round(self._elapsed(), 2)
        self._on_change(self.result)


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float
