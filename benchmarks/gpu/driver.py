"""Reads this GPU through `autoscale.nvml` under different loads, and compares with the controller's scales."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Protocol

import torch

from autoscale.nvml import NvmlReader, NvmlUnavailable
from autoscale.saturation import SignalScale, device_parts
from autoscale.signals import DeviceLoad
from benchmarks.gpu.device import Device
from benchmarks.gpu.records import NvmlReading, SignalReading

IDLE = "idle"
LOADS = ("one stream", "one row", "matrix product")
"""The tiny checkpoint decoding one text; products of one row with weights larger than the caches, like one stream of a
large model; products of large square matrices."""
SETTLE_SECONDS, READ_SECONDS = 2.5, 1.5
_READS = 3
"""Reads per load; the last one is recorded."""
_START_SECONDS = 60.0


class Reader(Protocol):
    def read(self, now: float) -> tuple[DeviceLoad, ...]: ...


class NoDriver:
    """Stands in for NVML in a dry run: one GPU without values."""

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        return (DeviceLoad(kind="gpu", index=0, uuid="", name="no driver"),)


def readings(device: Device) -> Iterator[NvmlReading | SignalReading]:
    """Idle first, then under each load in turn."""
    reader = _reader(device)
    with ExitStack() as stack:
        # All processes start at once, as imports take seconds, and wait to be told to compute.
        loads = {name: stack.enter_context(_Load(name, device.is_dry)) for name in LOADS}
        for load in loads.values():
            load.wait_until_ready()
        yield from _under(IDLE, reader, device)
        for name, load in loads.items():
            load.go()
            yield from _under(name, reader, device)
            load.stop()


def _reader(device: Device) -> Reader:
    try:
        return NvmlReader()
    except NvmlUnavailable:
        if device.is_dry:
            return NoDriver()
        raise


def _under(load: str, reader: Reader, device: Device) -> Iterator[NvmlReading | SignalReading]:
    pause = 0.01 if device.is_dry else 1.0
    reader.read(time.monotonic())  # rates are those since the reading before
    time.sleep(SETTLE_SECONDS * pause)
    for _ in range(_READS):
        time.sleep(READ_SECONDS / _READS * pause)
        started = time.perf_counter()
        devices = reader.read(time.monotonic())
        milliseconds = 1e3 * (time.perf_counter() - started)
    for read in devices:
        yield NvmlReading(load, asdict(read), round(milliseconds, 3))
        yield from _signals(load, read)


def _signals(load: str, device: DeviceLoad) -> Iterator[SignalReading]:
    scale = SignalScale()
    parts = device_parts(device, scale)
    clock = _ratio(device.sm_clock_mhz, device.max_sm_clock_mhz)
    raw = {
        "tensor": device.tensor_activity,
        "power": _ratio(device.power_watts, device.power_limit_watts),
        "throttle": None if clock is None else 1 - clock,
    }
    for signal, value in raw.items():
        low, high = getattr(scale, signal) or (None, None)
        yield SignalReading(load, signal, value, low, high, parts.get(signal, 0.0))  # type: ignore[call-overload]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


class _Load:
    """A process that computes between `go` and `stop`."""

    def __init__(self, name: str, dry_run: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.driver", name, *(["--dry-run"] if dry_run else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> _Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Raises RuntimeError where the process of the load fails."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"a load did not start: exit code {self._process.wait(_START_SECONDS)}")

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


# The process of a load.


def _compute(name: str, device: Device) -> Iterator[None]:
    """Yields once when ready, then once per unit of work."""
    if name == "one stream":
        from benchmarks.gpu.engines import build, held_out_requests, run

        engine = build(device, device.torch, "bfloat16", replayed=True, speculation=True)
        run(engine, held_out_requests(1, 4))
        yield
        while True:
            run(engine, held_out_requests(1, 64))
            yield
    rows, width, count = (1, 8192, 32) if name == "one row" else (8192, 8192, 2)
    if device.is_dry:
        rows, width = min(rows, 16), 16
    weights = torch.randn(count, width, width, device=device.torch).to(torch.bfloat16)
    x = torch.randn(rows, width, device=device.torch).to(torch.bfloat16)
    yield
    while True:
        for weight in weights:
            torch.mm(x, weight)
        if device.torch.type == "cuda":
            torch.cuda.synchronize()
        yield


def main() -> None:
    name, device = sys.argv[1], Device("--dry-run" in sys.argv[2:])
    with torch.inference_mode():
        work = _compute(name, device)
        next(work)
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in work:
            pass


if __name__ == "__main__":
    main()
