"""Faults of the chaos program: signals to processes, and an exception inside a step."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ENGINE, CONTROLLER = "ServeReplica:{app}:Engine", "ServeReplica:{app}:LoadController"
RAISE = signal.SIGUSR1


@dataclass(frozen=True)
class Fault:
    """A signal or exception, and its target."""

    how: str
    """raise, SIGKILL or SIGSTOP"""
    to: str
    """rank 0, rank 1, drafter, Engine or LoadController"""

    @property
    def name(self) -> str:
        return f"{self.how}, {self.to}"

    @property
    def hits_the_gang(self) -> bool:
        return self.to != "LoadController"

    @property
    def signal(self) -> signal.Signals:
        return RAISE if self.how == "raise" else signal.Signals[self.how]


MEMBERS = ("rank 0", "rank 1", "drafter")
FAULTS = (
    *(Fault("raise", to) for to in MEMBERS),
    *(Fault(how, to) for how in ("SIGKILL", "SIGSTOP") for to in (*MEMBERS, "Engine", "LoadController")),
)


def schedule(seed: int, num_rounds: int) -> list[Fault]:
    """Every fault about equally often, in random order."""
    order = random.Random(seed)
    faults: list[Fault] = []
    while len(faults) < num_rounds:
        faults += order.sample(FAULTS, len(FAULTS))
    return faults[:num_rounds]


def install() -> None:
    """Setup of every Ray worker of this program: after the signal RAISE, the next forward raises."""
    signal.signal(RAISE, _break_the_next_step)


def _break_the_next_step(signum: int, frame: FrameType | None) -> None:
    from dspark_ray.ranks.draft_worker import DraftWorker
    from dspark_ray.ranks.executor import TargetRank

    TargetRank.run = DraftWorker.draft = _raise  # type: ignore[method-assign, assignment]


def _raise(*_: Any) -> None:
    raise RuntimeError("raised on purpose inside a step")


def process_of(target: str, app_name: str) -> int:
    """The process id of a fault's target. Raises LookupError while it is not there."""
    class_name = {
        "rank 0": "VerifierWorker",
        "rank 1": "VerifierWorker",
        "drafter": "DrafterWorker",
        "Engine": ENGINE.format(app=app_name),
        "LoadController": CONTROLLER.format(app=app_name),
    }[target]
    title = {"rank 0": "lead", "rank 1": "follow"}.get(target, "")
    found = [pid for pid in live_processes(class_name) if title in _title(pid)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} processes are {target}")
    return found[0]


def live_processes(class_name: str) -> list[int]:
    """Process ids of the actors of a class that are alive for Ray; needs no dashboard."""
    from ray._private import state

    actors = state.actors().values()
    return [a["Pid"] for a in actors if a["State"] == "ALIVE" and a["ActorClassName"] == class_name]


def is_running(pid: int) -> bool:
    """Whether the process has not ended; a zombie has."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(fault: Fault, pid: int) -> None:
    os.kill(pid, fault.signal)


def _title(pid: int) -> str:
    """The process title, which contains the running method of an actor."""
    try:
        return Path("/proc", str(pid), "cmdline").read_text()
    except OSError:
        return ""
