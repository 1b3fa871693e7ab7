"""One probe per node: reads its devices twice a second and smooths their load."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

from autoscale.cpu import CpuReader
from autoscale.nvml import NvmlReader, NvmlUnavailable
from autoscale.signals import DeviceLoad, NodeLoad

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
"""From the end of a sample to the next, so that a slow driver gets a pause. Reading takes locks of the driver, and the
controller acts about once a second."""
TIME_CONSTANT_SECONDS = 1.0
"""Longer than several steps, short enough for the controller, which acts about once a second."""
STALE_SECONDS = 5.0
"""Age from which a sample is invalid: the driver hangs, or the probe is closed."""

_JOIN_SECONDS = 2.0
_RATES = ("utilization", "sm_activity", "tensor_activity", "dram_activity", "power_watts")


class Reader(Protocol):
    """Source of samples: NvmlReader or CpuReader."""

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        """Load of every device at `now`, monotonic seconds."""
        ...

    def close(self) -> None: ...


class OpenReader(NamedTuple):
    """A reader, its source, and why that is not NVML."""

    reader: Reader
    source: Literal["nvml", "psutil"]
    note: str


def open_reader() -> OpenReader:
    """The NVML reader where NVML finds a GPU, else the psutil reader."""
    try:
        reader = NvmlReader()
    except NvmlUnavailable as error:
        return OpenReader(CpuReader(), "psutil", str(error))
    if not reader.num_gpus:
        reader.close()
        return OpenReader(CpuReader(), "psutil", "NVML sees no GPU on this node")
    return OpenReader(reader, "nvml", "")


class Smoother:
    """Exponential average of one device's rates: average += (1 - exp(-elapsed / time constant)) * (value - average).

    With the true time between samples, 63 % of a step is visible one time constant after it, at any sampling rate.
    """

    def __init__(self, time_constant_seconds: float = TIME_CONSTANT_SECONDS) -> None:
        self._time_constant = time_constant_seconds
        self._averages: dict[str, tuple[float, float]] = {}
        """(average, time of its update) by field."""

    def add(self, load: DeviceLoad, now: float) -> DeviceLoad:
        """`load` with averaged rates; a rate of None stays None and does not change the average."""
        averages: dict[str, Any] = {field: self._add(field, getattr(load, field), now) for field in _RATES}
        return replace(load, **averages)

    def _add(self, field: str, value: float | None, now: float) -> float | None:
        if value is None:
            return None
        average, updated_at = self._averages.get(field, (value, now))
        average -= math.expm1(-max(now - updated_at, 0.0) / self._time_constant) * (value - average)
        self._averages[field] = average, now
        return average


class LoadProbe:
    """Samples this node's devices on a thread of its own, from its construction until `close`."""

    def __init__(
        self,
        node_id: str,
        host: str,
        *,
        open_reader: Callable[[], OpenReader] = open_reader,
        clock: Callable[[], float] = time.monotonic,
        period_seconds: float = PERIOD_SECONDS,
    ) -> None:
        """Takes the first sample, so that `load` always has one. Raises the errors of `open_reader`."""
        self._clock, self._period = clock, period_seconds
        self._reader, source, note = open_reader()
        self._node = NodeLoad(node_id=node_id, host=host, source=source, devices=(), note=note)
        self._smoothers: dict[tuple[str, str, int], Smoother] = {}
        self._reported: set[type[Exception]] = set()
        # The thread replaces the pair as a whole, so readers need no lock.
        self._latest = clock(), self._node
        self._sample()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-probe", daemon=True)
        self._thread.start()

    def load(self) -> NodeLoad:
        """The latest load; devices are unreadable when it is older than STALE_SECONDS. Thread-safe, does not block."""
        sampled_at, load = self._latest
        age = self._clock() - sampled_at
        return load if age <= STALE_SECONDS else self._without_values(load, f"no sample for {age:.0f} s")

    def close(self) -> None:
        """Stop sampling and release the driver; waits two seconds at most for a driver that hangs."""
        self._stopping.set()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopping.wait(self._period):
            self._sample()
        self._reader.close()

    def _sample(self) -> None:
        now = self._clock()
        try:
            load = replace(self._node, devices=self._smoothed(self._reader.read(now), now))
        except Exception as error:
            self._report(error)
            _, latest = self._latest
            load = self._without_values(latest, f"a sample failed: {error!r}")
        self._latest = now, load

    def _smoothed(self, loads: tuple[DeviceLoad, ...], now: float) -> tuple[DeviceLoad, ...]:
        keys = [(load.kind, load.uuid, load.index) for load in loads]
        # Smoothers of devices that disappeared are dropped.
        self._smoothers = {key: self._smoothers.get(key) or Smoother() for key in keys}
        return tuple(self._smoothers[key].add(load, now) for key, load in zip(keys, loads))

    def _report(self, error: Exception) -> None:
        """Once per type of exception, as every sample may raise it."""
        if type(error) not in self._reported:
            self._reported.add(type(error))
            logger.error("a load sample failed; the probe goes on", exc_info=error)

    def _without_values(self, load: NodeLoad, note: str) -> NodeLoad:
        """The node has the note too, as it may have no device yet."""
        devices = tuple(_unreadable(device, note) for device in load.devices)
        return replace(load, devices=devices, note="; ".join(filter(None, (self._node.note, note))))


def _unreadable(load: DeviceLoad, note: str) -> DeviceLoad:
    return DeviceLoad(kind=load.kind, index=load.index, uuid=load.uuid, name=load.name, state="unreadable", note=note)
