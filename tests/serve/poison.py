"""Requests that kill their engine, installed in worker processes by Ray's set-up hook."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from benchmarks.chaos import faults as chaos_faults
from deployments.replica.workers import StepLoop
from dspark_ray.types import Request

KILLS, RAISES = 666, 667
"""Seeds of requests that end rank 0's process, or raise, in the step after they were added."""


def install() -> None:
    chaos_faults.install()
    add = StepLoop._submit

    def add_and_poison(loop: StepLoop, request: Request) -> None:
        add(loop, request)
        if request.sampling.seed in (KILLS, RAISES):
            loop._engine.step = _die if request.sampling.seed == KILLS else _raise  # type: ignore[method-assign]

    StepLoop._submit = add_and_poison  # type: ignore[method-assign]


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _raise() -> NoReturn:
    raise RuntimeError("poison with a secret in it")
