"""Load of a node without a GPU, in the form of a device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import psutil

from autoscale.signals import DeviceLoad


class CpuReader:
    """Reads the cores that this process may run on as one device.

    Affinity is respected, so a container with cores 0 to 3 has four; a limit of CPU time (cgroup quota) is not, and
    memory is the node's. Core time is counted here because psutil.cpu_percent counts from its last call by any code on
    the thread. Not thread-safe.
    """

    def __init__(self) -> None:
        self._times = _core_times()

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        """One device; its utilization is None where no core time has passed since the previous read. Raises nothing."""
        before, self._times = self._times, _core_times()
        memory = psutil.virtual_memory()
        load = DeviceLoad(
            kind="cpu",
            index=0,
            uuid="cpu",
            name=f"{len(self._times)} cores",
            utilization=busy_share(before, self._times),
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
        )
        return (load,)

    def close(self) -> None:
        """There is nothing to release."""


def busy_share(before: Sequence[Any], after: Sequence[Any]) -> float | None:
    """Busy share of core time between two lists of psutil's times per core; None where no time passed or the number of
    cores changed."""
    if len(before) != len(after):
        return None
    total = sum(map(_total_seconds, after)) - sum(map(_total_seconds, before))
    idle = sum(map(_idle_seconds, after)) - sum(map(_idle_seconds, before))
    return min(max(1 - idle / total, 0.0), 1.0) if total > 0 else None


def _core_times() -> list[Any]:
    times = psutil.cpu_times(percpu=True)
    # macOS and Windows have no affinity call.
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    return [core for index, core in enumerate(times) if index in allowed] or times


def _total_seconds(core: Any) -> float:
    # On Linux user and nice already include the time of guests.
    return sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0)


def _idle_seconds(core: Any) -> float:
    return core.idle + getattr(core, "iowait", 0.0)
