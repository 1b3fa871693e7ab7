"""The device of the checks: a GPU, or in a dry run a CPU with interpreted kernels and the smallest shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks.gpu.floors import FLASH, TINY, Shapes
from dspark_ray.runner.graphs import Capture, CudaCapture, Outputs, Replay

_FLUSH_BYTES = 256 * 2**20
"""Size of a write before every timed call, which evicts the call's inputs from L2."""
_REPEATS = 15


class Device:
    """A GPU, or its stand-in in a dry run."""

    def __init__(self, dry_run: bool) -> None:
        self.is_dry, self.torch = dry_run, torch.device("cpu" if dry_run else "cuda")

    def shapes(self, gamma: int) -> Shapes:
        """V4-Flash's with other block sizes; tiny ones in a dry run."""
        return replace(TINY if self.is_dry else FLASH, gamma=gamma)

    def microseconds(self, function: Callable[[], object]) -> float:
        """Median of a recorded call on a GPU; of one call in a dry run."""
        if self.is_dry:
            started = time.perf_counter()
            function()
            return 1e6 * (time.perf_counter() - started)
        from benchmarks.gpu.kernels import Clock, Recorded

        clock, recorded = Clock(self.torch), Recorded(lambda *_: function(), [()])
        clock.warm_up([recorded])
        return 1e6 * statistics.median(clock.seconds(recorded) for _ in range(_REPEATS))

    def capture(self) -> Capture:
        """Records CUDA graphs; computes anew in a dry run."""
        return _compute_anew if self.is_dry else CudaCapture()

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        """Inside, a call that makes the host wait for the device raises RuntimeError; no call does in a dry run."""
        if self.is_dry:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _compute_anew(function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
    outputs = function()

    def replay() -> None:
        for kept, fresh in zip(outputs, function(), strict=True):
            kept.copy_(fresh)

    return replay, outputs
