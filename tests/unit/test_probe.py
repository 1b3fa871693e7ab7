"""Smoothing, the probe's thread, and a node without a GPU."""

from __future__ import annotations

import logging
import math
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from autoscale import probe as probe_module
from autoscale.cpu import CpuReader, busy_share
from autoscale.probe import STALE_SECONDS, LoadProbe, OpenReader, Smoother
from autoscale.signals import DeviceLoad, ProcessUse

GPU = DeviceLoad(kind="gpu", index=0, uuid="GPU-0", name="NVIDIA H200")
RATES = {
    "utilization": 0.5,
    "sm_activity": 0.4,
    "tensor_activity": 0.3,
    "dram_activity": 0.2,
    "power_watts": 300.0,
}
TIMEOUT = 30.0
"""Seconds that a test waits for the thread before it fails."""


# Smoothing.


def test_what_does_not_change_stays():
    smoother, load = Smoother(), replace(GPU, **RATES)
    for tenth in range(50):
        smoothed = smoother.add(load, tenth / 10)
    assert {field: getattr(smoothed, field) for field in RATES} == pytest.approx(RATES)


@pytest.mark.parametrize("num_samples", [1, 3, 10, 1000])
@pytest.mark.parametrize("field", RATES)
def test_a_step_is_seen_to_63_percent_after_one_time_constant(field, num_samples):
    smoother = Smoother(time_constant_seconds=2.0)
    smoother.add(replace(GPU, **{field: 0.0}), 10.0)
    for sample in range(1, num_samples + 1):
        smoothed = smoother.add(replace(GPU, **{field: 1.0}), 10.0 + 2.0 * sample / num_samples)
    assert getattr(smoothed, field) == pytest.approx(1 - math.exp(-1))


def test_uneven_samples_weigh_by_their_time():
    smoother = Smoother(time_constant_seconds=1.0)
    smoother.add(replace(GPU, utilization=0.0), 0.0)
    for at in (0.01, 0.02, 0.9, 1.0):
        smoothed = smoother.add(replace(GPU, utilization=1.0), at)
    assert smoothed.utilization == pytest.approx(1 - math.exp(-1))


def test_none_stays_none_and_does_not_poison():
    smoother = Smoother()
    smoother.add(replace(GPU, utilization=0.5, power_watts=None), 0.0)
    assert smoother.add(GPU, 0.1).utilization is None
    after = smoother.add(replace(GPU, utilization=0.5), 0.2)
    assert (after.utilization, after.power_watts) == (0.5, None)


def test_an_average_from_before_a_long_silence_counts_for_nothing():
    smoother = Smoother()
    smoother.add(replace(GPU, utilization=1.0), 0.0)
    smoother.add(GPU, 1.0)
    assert smoother.add(replace(GPU, utilization=0.25), 60.0).utilization == pytest.approx(0.25)


def test_a_clock_that_stands_still_is_no_error():
    smoother = Smoother()
    smoother.add(replace(GPU, utilization=0.0), 5.0)
    assert smoother.add(replace(GPU, utilization=1.0), 5.0).utilization == 0.0


def test_what_is_no_rate_is_the_latest():
    smoother = Smoother()
    smoother.add(replace(GPU, memory_used=1, memory_total=10, sm_clock_mhz=100.0), 0.0)
    latest = replace(
        GPU,
        note="not read: gpm (not supported)",
        memory_used=9,
        memory_total=20,
        sm_clock_mhz=1980.0,
        clock_events=("gpu_idle",),
        processes=(ProcessUse(pid=1),),
    )
    assert smoother.add(latest, 0.1) == latest


# The probe.


class Script:
    """A reader that gives one entry per read, then the last one again; an entry that is an exception is raised."""

    def __init__(self, *entries: tuple[DeviceLoad, ...] | Exception) -> None:
        self._entries = list(entries)
        self.is_closed = False
        self._reads = threading.Semaphore(0)

    def then(self, *entries: tuple[DeviceLoad, ...] | Exception) -> None:
        self._entries = list(entries)

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        self._reads.release()
        entry = self._entries.pop(0) if len(self._entries) > 1 else self._entries[0]
        if isinstance(entry, Exception):
            raise entry
        return entry

    def close(self) -> None:
        self.is_closed = True

    def wait_for(self, num_reads: int) -> None:
        """Until that many more reads have begun; what the last but one gave is the probe's load then."""
        while self._reads.acquire(blocking=False):
            pass
        for _ in range(num_reads):
            assert self._reads.acquire(timeout=TIMEOUT), "the probe does not read"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(clock: Clock) -> Iterator:
    """Starts a probe that reads as fast as it can; stops it when the test ends."""
    probes = []

    def start(script: Script, note: str = "") -> LoadProbe:
        source = "psutil" if note else "nvml"
        opened = OpenReader(script, source, note)
        probe = LoadProbe("node-1", "host-1", open_reader=lambda: opened, clock=clock, period_seconds=0.001)
        probes.append(probe)
        return probe

    yield start
    for probe in probes:
        probe.close()


def test_there_is_a_load_from_the_start(start):
    load = start(Script((replace(GPU, utilization=0.5),)), note="no GPU").load()
    assert (load.node_id, load.host, load.source, load.note) == ("node-1", "host-1", "psutil", "no GPU")
    assert load.devices == (replace(GPU, utilization=0.5),)


def test_the_thread_smooths_with_the_clock(start, clock):
    script = Script((replace(GPU, utilization=0.0),))
    probe = start(script)
    script.then((replace(GPU, utilization=1.0),))
    script.wait_for(2)
    assert probe.load().devices[0].utilization == 0.0
    clock.now += 1.0
    script.wait_for(3)
    assert probe.load().devices[0].utilization == pytest.approx(1 - math.exp(-1))


def test_two_devices_have_an_average_each(start, clock):
    other = replace(GPU, kind="mig", uuid="MIG-0")
    script = Script((replace(GPU, utilization=0.0), replace(other, utilization=1.0)))
    probe = start(script)
    clock.now += 1.0
    script.wait_for(3)
    assert [device.utilization for device in probe.load().devices] == [0.0, 1.0]


def test_a_failed_sample_leaves_no_values_and_the_probe_goes_on(start, clock):
    script = Script((replace(GPU, utilization=0.5, memory_used=1),))
    probe = start(script)
    script.then(RuntimeError("what a surprise"))
    script.wait_for(3)
    load = probe.load()
    assert load.devices == (replace(GPU, state="unreadable", note=load.note),)
    assert "what a surprise" in load.note
    script.then((replace(GPU, utilization=0.75),))
    clock.now += 100.0
    script.wait_for(3)
    load = probe.load()
    assert (load.devices, load.note) == ((replace(GPU, utilization=0.75),), "")


def test_a_probe_whose_first_sample_fails_says_so_on_the_node(start):
    load = start(Script(OSError("no /proc")), note="no GPU").load()
    assert (load.devices, load.note) == ((), "no GPU; a sample failed: OSError('no /proc')")


def test_a_failure_is_logged_once_per_kind(start, caplog):
    with caplog.at_level(logging.ERROR, logger="autoscale.probe"):
        script = Script(RuntimeError("one"))
        start(script)
        script.wait_for(10)
        script.then(ValueError("two"))
        script.wait_for(10)
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError, ValueError]


def test_a_driver_that_hangs_leaves_no_values_either(start, clock):
    hangs, ends = threading.Event(), threading.Event()

    class Hanging(Script):
        def read(self, now: float) -> tuple[DeviceLoad, ...]:
            if now > 1000.0:
                hangs.set()
                ends.wait(TIMEOUT)
            return super().read(now)

    probe = start(Hanging((replace(GPU, utilization=0.5),)))
    clock.now += 0.5
    assert hangs.wait(TIMEOUT)
    assert probe.load().devices[0].utilization == 0.5
    clock.now += STALE_SECONDS + 1
    load = probe.load()
    ends.set()
    assert load.devices == (replace(GPU, state="unreadable", note=load.note),)
    assert load.note.startswith("no sample for")


def test_closing_ends_the_thread_and_the_reader(start):
    script = Script((GPU,))
    num_threads = threading.active_count()
    probe = start(script)
    assert threading.active_count() == num_threads + 1
    probe.close()
    assert (script.is_closed, threading.active_count()) == (True, num_threads)
    probe.close()


def test_without_nvml_its_absence_is_found_out_once(monkeypatch):
    opened = []

    class Absent:
        def __init__(self) -> None:
            opened.append(self)
            raise probe_module.NvmlUnavailable("the NVIDIA driver is not loaded")

    class Counted(CpuReader):
        num_reads = threading.Semaphore(0)

        def read(self, now: float) -> tuple[DeviceLoad, ...]:
            self.num_reads.release()
            return super().read(now)

    monkeypatch.setattr(probe_module, "NvmlReader", Absent)
    monkeypatch.setattr(probe_module, "CpuReader", Counted)
    probe = LoadProbe("node-1", "host-1", period_seconds=0.001)
    for _ in range(5):
        assert Counted.num_reads.acquire(timeout=TIMEOUT)
    load = probe.load()
    probe.close()
    assert (load.source, load.note) == ("psutil", "the NVIDIA driver is not loaded")
    assert len(opened) == 1


# A node without a GPU.

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")
NOTHING = Times(*[0.0] * 10)


@pytest.mark.parametrize(
    ("after", "share"),
    [
        ([NOTHING._replace(idle=8.0, user=2.0), NOTHING._replace(idle=4.0, system=6.0)], 0.4),
        ([NOTHING._replace(idle=10.0), NOTHING._replace(iowait=10.0)], 0.0),
        ([NOTHING._replace(user=10.0, guest=10.0), NOTHING._replace(idle=10.0)], 0.5),
        ([NOTHING, NOTHING], None),
        ([NOTHING._replace(user=1.0)], None),
    ],
)
def test_the_busy_share_is_of_all_cores(after, share):
    assert busy_share([NOTHING, NOTHING], after) == (None if share is None else pytest.approx(share))


def test_the_cores_of_this_process_are_one_device(monkeypatch):
    cores = [NOTHING._replace(user=100.0), NOTHING, NOTHING]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: list(cores))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 2}, raising=False)
    reader = CpuReader()
    cores[:] = [NOTHING._replace(user=200.0), NOTHING._replace(user=1.0, idle=1.0), NOTHING._replace(idle=2.0)]
    (load,) = reader.read(0.0)
    assert (load.kind, load.uuid, load.name, load.utilization) == ("cpu", "cpu", "2 cores", 0.25)
    assert load.memory_total == psutil.virtual_memory().total
    assert 0 < load.memory_used < load.memory_total
