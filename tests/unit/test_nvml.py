"""Reading GPUs through NVIDIA's own binding, on a driver library that the test scripts."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
from fake_nvml import GIB, FakeNvml, compile_library, install

from autoscale.nvml import NvmlReader, NvmlUnavailable
from autoscale.probe import open_reader
from autoscale.signals import DeviceLoad, ProcessUse

PERIOD = 0.2
"""Seconds between reads: above what GPM needs between two samples."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("old_nvml"), "-DOLD_DRIVER")


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(library)
    install(monkeypatch, fake.library)
    return fake


@pytest.fixture
def old_driver(old_library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(old_library)
    install(monkeypatch, fake.library)
    return fake


class Reads:
    """A reader with a clock; closed when the test ends."""

    def __init__(self) -> None:
        self.reader, self.now = NvmlReader(), 100.0

    def __call__(self, *, after: float = PERIOD) -> tuple[DeviceLoad, ...]:
        self.now += after
        return self.reader.read(self.now)


@pytest.fixture
def reads(driver: FakeNvml) -> Iterator[Reads]:
    """Of one H200."""
    driver.add_gpu()
    reads = Reads()
    yield reads
    reads.reader.close()


def second_of(reads: Reads) -> tuple[DeviceLoad, ...]:
    """GPM needs two samples."""
    reads()
    return reads()


def test_an_h200_says_everything(driver, reads):
    driver.add_process(0, 4242, memory=118 * GIB, timestamp=10, sm=93)
    assert second_of(reads) == (
        DeviceLoad(
            kind="gpu",
            index=0,
            uuid="GPU-0",
            name="NVIDIA H200",
            utilization=0.97,
            sm_activity=0.715,
            tensor_activity=0.3325,
            dram_activity=0.88,
            power_watts=655.5,
            power_limit_watts=700.0,
            sm_clock_mhz=1845,
            max_sm_clock_mhz=1980,
            memory_used=120 * GIB,
            memory_total=141 * GIB,
            processes=(ProcessUse(pid=4242, memory_used=118 * GIB, sm_utilization=0.93),),
        ),
    )


def test_saturation_and_throttling_show_with_the_names_of_their_reasons(driver, reads):
    reads()
    driver.set(0, utilization=100, gpm_02=100.004, power=701_000, sm_clock=1230)
    driver.set(0, clock_events=pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown)
    (load,) = reads()
    assert (load.utilization, load.sm_activity) == (1.0, 1.0)
    assert (load.power_watts, load.sm_clock_mhz) == (701.0, 1230)
    assert load.clock_events == ("sw_power_cap", "hw_thermal_slowdown")


def test_every_clock_event_has_its_name(driver, reads):
    driver.set(0, clock_events=pynvml.nvmlClocksEventReasonAll)
    (load,) = reads()
    assert load.clock_events == (
        "gpu_idle",
        "applications_clocks_setting",
        "sw_power_cap",
        "hw_slowdown",
        "sync_boost",
        "sw_thermal_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "display_clock_setting",
    )


# GPM.


def test_activities_need_two_samples_and_keep_following(driver, reads):
    (first,) = reads()
    (second,) = reads()
    driver.set(0, gpm_02=12.5)
    (third,) = reads()
    assert [load.sm_activity for load in (first, second, third)] == [None, 0.715, 0.125]
    assert first.note == ""


def test_activities_stand_until_the_driver_has_refreshed_its_counters(driver, reads):
    second_of(reads)
    driver.set(0, gpm_02=12.5)
    taken = driver.num_calls("nvmlGpmSampleGet")
    (soon,) = reads(after=0.1)
    assert (soon.sm_activity, driver.num_calls("nvmlGpmSampleGet")) == (0.715, taken)
    (later,) = reads(after=0.1)
    assert later.sm_activity == 0.125


def test_a_percentage_that_is_none_is_not_a_share(driver, reads):
    driver.set(0, gpm_02=float("nan"), gpm_05=4e9)
    (_, load) = reads()[0], reads()[0]
    assert (load.sm_activity, load.tensor_activity, load.dram_activity) == (None, None, 0.88)


def test_one_metric_that_a_chip_does_not_count_is_named(driver, reads):
    driver.unset(0, "gpm_05")
    (load,) = second_of(reads)
    assert (load.sm_activity, load.tensor_activity, load.dram_activity) == (0.715, None, 0.88)
    assert load.note == "not read: tensor_activity (not supported)"


def test_samples_are_freed(driver, reads):
    second_of(reads)
    assert driver.num_live_samples == 2
    reads.reader.close()
    assert (driver.num_live_samples, driver.num_inits) == (0, 0)


# Partial support.


def test_an_a100_has_no_gpm_and_is_asked_once(driver):
    driver.add_gpu("NVIDIA A100-SXM4-80GB", gpm=0)
    (load,) = second_of(Reads())
    assert (load.state, load.utilization, load.power_watts) == ("ok", 0.97, 655.5)
    assert (load.sm_activity, load.tensor_activity, load.dram_activity) == (None, None, None)
    assert load.note == "not read: gpm (not supported)"
    assert driver.num_calls("nvmlGpmQueryDeviceSupport") == 1
    assert driver.num_calls("nvmlGpmSampleGet") == driver.num_live_samples == 0


def test_a_laptop_gpu_says_less_and_is_asked_once_for_what_it_never_says(driver):
    driver.add_gpu("Laptop GPU", without=("gpm", "power", "power_limit", "mig_mode", "process_samples"))
    driver.add_process(0, 7, memory=GIB)
    reads = Reads()
    for _ in range(20):
        (load,) = reads()
    assert (load.state, load.power_watts, load.power_limit_watts, load.utilization) == ("ok", None, None, 0.97)
    assert load.processes == (ProcessUse(pid=7, memory_used=GIB),)
    assert sorted(load.note.removeprefix("not read: ").split(", ")) == [
        "gpm (not supported)",
        "power_limit_watts (not supported)",
        "power_watts (not supported)",
        "processes.sm_utilization (not supported)",
    ]
    for function in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetProcessUtilization", "nvmlDeviceGetMigMode"):
        assert driver.num_calls(function) == 1, function


def test_an_old_driver_lacks_gpm_and_has_older_names_for_the_rest(old_driver):
    old_driver.add_gpu(clock_events=pynvml.nvmlClocksEventReasonHwSlowdown)
    old_driver.add_process(0, 7, memory=GIB)
    (load,) = second_of(Reads())
    assert (load.state, load.clock_events, load.sm_activity) == ("ok", ("hw_slowdown",), None)
    assert [use.pid for use in load.processes] == [7]
    assert load.note == "not read: gpm (function not found)"


def test_what_fails_for_the_moment_is_asked_again(driver, reads):
    driver.fail(pynvml.NVML_ERROR_TIMEOUT, "nvmlDeviceGetPowerUsage")
    (failing,) = reads()
    driver.heal("nvmlDeviceGetPowerUsage")
    (healed,) = reads()
    assert (failing.state, failing.power_watts, failing.note) == ("ok", None, "not read: power_watts (timeout)")
    assert (healed.power_watts, healed.note) == (655.5, "")


# Processes.


def test_the_process_list_is_read_once_a_second(driver, reads):
    driver.add_process(0, 1, memory=GIB)
    (first,) = reads()
    driver.add_process(0, 2, memory=2 * GIB)
    (soon,) = reads(after=0.5)
    (later,) = reads(after=0.5)
    assert [[use.pid for use in load.processes] for load in (first, soon, later)] == [[1], [1], [1, 2]]


def test_who_may_not_see_processes_sees_the_rest(driver, reads):
    driver.fail(pynvml.NVML_ERROR_NO_PERMISSION, "nvmlDeviceGetComputeRunningProcesses_v3")
    (load,) = reads()
    assert (load.state, load.processes, load.utilization) == ("ok", (), 0.97)
    assert load.note == "not read: processes (no permission)"
    driver.heal("nvmlDeviceGetComputeRunningProcesses_v3")
    driver.add_process(0, 1, memory=GIB)
    (load,) = reads(after=1.0)
    assert ([use.pid for use in load.processes], load.note) == ([1], "")


@pytest.mark.parametrize("silence", [1, 2])
def test_a_process_without_a_new_sample_has_no_share_and_that_is_no_error(driver, reads, silence):
    driver.set(0, process_samples=silence)
    driver.add_process(0, 1, memory=GIB, timestamp=50, sm=40)
    driver.add_process(0, 2, memory=GIB, timestamp=40, sm=4_000_000)
    (first,) = reads()
    (second,) = reads(after=1.0)
    assert [use.sm_utilization for use in first.processes] == [0.4, None]
    assert [use.sm_utilization for use in second.processes] == [None, None]
    assert second.note == ""


# Falling off the bus.


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED])
def test_a_lost_gpu_stays_in_the_list_and_may_come_back(driver, error):
    driver.add_gpu()
    driver.add_gpu()
    reads = Reads()
    second_of(reads)
    driver.fail(error, device=1)
    other, lost = reads()
    assert (other.state, other.sm_activity) == ("ok", 0.715)
    assert lost == DeviceLoad(kind="gpu", index=1, uuid="GPU-1", name="NVIDIA H200", state="lost", note=lost.note)
    assert lost.note in ("gpu is lost", "reset required")
    assert driver.num_live_samples == 2

    driver.heal(device=1)
    driver.set(1, power_limit=350_000)
    reads(after=5.0)
    assert driver.num_calls("nvmlInitWithFlags") == 1, "the other GPU would have lost its samples"
    other, back = reads()
    assert (back.state, back.note, back.sm_activity) == ("ok", "", 0.715)
    assert back.power_limit_watts == 350.0, "what changes slowly is read again"


@pytest.mark.parametrize(
    ("error", "state"), [(pynvml.NVML_ERROR_GPU_IS_LOST, "lost"), (pynvml.NVML_ERROR_UNKNOWN, "unreadable")]
)
def test_a_gpu_that_does_not_answer_is_asked_rarely(driver, reads, error, state):
    driver.fail(error, device=0)
    for _ in range(2):
        reads()
    driver.forget_calls()
    for _ in range(49):
        (load,) = reads(after=0.1)
    assert load.state == state
    assert driver.num_calls("*", 0) <= 1


def test_a_lost_gpu_counts_as_lost_until_it_answers(driver, reads):
    driver.fail(pynvml.NVML_ERROR_GPU_IS_LOST, device=0)
    reads()
    driver.fail(pynvml.NVML_ERROR_UNKNOWN, device=0)
    (load,) = reads(after=10.0)
    assert (load.state, load.note) == ("lost", "gpu is lost")


def test_the_only_gpu_comes_back_after_nvml_has_started_again(driver, reads):
    driver.fail(pynvml.NVML_ERROR_GPU_IS_LOST, device=0)
    reads()
    driver.heal(device=0)
    (load,) = reads(after=10.0)
    assert load.state == "ok"
    assert (driver.num_inits, driver.num_calls("nvmlInitWithFlags")) == (1, 2)


def test_a_gpu_that_is_lost_from_the_start_is_in_the_list(driver):
    driver.add_gpu()
    driver.add_gpu()
    driver.fail(pynvml.NVML_ERROR_GPU_IS_LOST, device=0)
    reads = Reads()
    lost, other = reads()
    assert lost == DeviceLoad(kind="gpu", index=0, uuid="", name="", state="lost", note="gpu is lost")
    assert (other.state, other.index, other.uuid) == ("ok", 1, "GPU-1")
    driver.heal(device=0)
    back, _ = reads(after=5.0)
    assert (back.state, back.index, back.uuid) == ("ok", 0, "GPU-0")


def test_a_gpu_that_answers_unknown_to_everything_is_unreadable_until_it_answers(driver, reads):
    second_of(reads)
    driver.fail(pynvml.NVML_ERROR_UNKNOWN, device=0)
    (load,) = reads()
    assert (load.state, load.utilization, load.sm_activity, load.processes) == ("unreadable", None, None, ())
    assert "utilization (unknown)" in load.note
    driver.heal(device=0)
    (load,) = reads(after=5.0)
    assert (load.state, load.note) == ("ok", "")


def test_a_gpu_that_is_no_longer_listed_is_unreadable(driver):
    driver.add_gpu()
    driver.add_gpu()
    reads = Reads()
    reads()
    driver.set_num_gpus(1)
    other, gone = reads(after=1.0)
    assert (other.state, gone.state, gone.uuid) == ("ok", "unreadable", "GPU-1")
    assert gone.note == "the driver no longer lists it"
    driver.set_num_gpus(2)
    assert [load.state for load in reads(after=1.0)] == ["ok", "ok"]


def test_a_gpu_keeps_its_index_when_the_driver_moves_the_others_up(driver):
    driver.add_gpu()
    driver.add_gpu("NVIDIA H100")
    reads = Reads()
    reads()
    driver.unload()
    reads()
    driver.set_num_gpus(1)
    driver.set_text(0, "uuid", "GPU-1")
    gone, other = reads(after=5.0)
    assert (gone.index, gone.uuid, gone.state) == (0, "GPU-0", "unreadable")
    assert (other.index, other.uuid, other.state) == (1, "GPU-1", "ok")


# The driver.


def test_a_driver_that_was_reloaded_is_started_again_on_the_next_read(driver, reads):
    second_of(reads)
    driver.unload()
    (during,) = reads()
    assert (during.state, during.note) == ("unreadable", "NVML: uninitialized")
    (after,) = reads()
    assert (after.state, after.utilization) == ("ok", 0.97)
    (later,) = reads()
    assert later.sm_activity == 0.715


def test_a_driver_that_stays_away_is_asked_rarely_and_taken_back(driver, reads):
    driver.unload()
    driver.fail(pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "nvmlInitWithFlags")
    reads()
    driver.forget_calls()
    for _ in range(50):
        (load,) = reads(after=0.1)
    assert (load.state, load.note) == ("unreadable", "NVML: driver not loaded")
    assert driver.num_calls("nvmlInitWithFlags") <= 2
    driver.heal("nvmlInitWithFlags")
    (load,) = reads(after=5.0)
    assert load.state == "ok"


def test_without_a_library_there_is_no_reader(monkeypatch):
    def refuse(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    install(monkeypatch, None)
    monkeypatch.setattr(pynvml, "CDLL", refuse)
    with pytest.raises(NvmlUnavailable, match="this node has no NVML library"):
        NvmlReader()
    reader, source, note = open_reader()
    assert (source, [load.kind for load in reader.read(0.0)]) == ("psutil", ["cpu"])
    assert note == "this node has no NVML library (libnvidia-ml.so.1)"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "the NVIDIA driver is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "differ in version"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML does not start: unknown"),
        (31, "NVML does not start: error 31"),
    ],
)
def test_a_driver_that_does_not_start_says_why(driver, error, why):
    driver.fail(error, "nvmlInitWithFlags")
    with pytest.raises(NvmlUnavailable, match=why):
        NvmlReader()
    assert open_reader().source == "psutil"


def test_a_driver_without_gpus_is_closed_again(driver):
    reader, source, note = open_reader()
    assert (source, note) == ("psutil", "NVML sees no GPU on this node")
    assert driver.num_inits == 0
    reader.close()


def test_a_driver_that_cannot_count_is_closed_again(driver):
    driver.fail(pynvml.NVML_ERROR_UNKNOWN, "nvmlDeviceGetCount_v2")
    with pytest.raises(NvmlUnavailable, match="unknown"):
        NvmlReader()
    assert driver.num_inits == 0


def test_with_a_gpu_nvml_is_the_source(driver):
    driver.add_gpu()
    reader, source, note = open_reader()
    assert (source, note, [load.name for load in reader.read(0.0)]) == ("nvml", "", ["NVIDIA H200"])
    reader.close()


def test_a_closed_reader_asks_nothing(driver, reads):
    reads()
    reads.reader.close()
    driver.forget_calls()
    (load,) = reads(after=60.0)
    assert (load.state, load.note, driver.num_calls()) == ("unreadable", "closed", 0)


def test_the_binding_finds_the_library_by_its_name(library):
    script = (
        "from fake_nvml import FakeNvml\n"
        "from autoscale.probe import open_reader\n"
        "FakeNvml('libnvidia-ml.so.1').add_gpu()\n"
        "reader, source, note = open_reader()\n"
        "print(source, reader.read(0.0)[0].name)\n"
    )
    here = Path(__file__).resolve()
    paths = os.pathsep.join((str(here.parents[2]), str(here.parent)))
    environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "nvml NVIDIA H200\n"


# MIG.


@pytest.fixture
def divided(driver: FakeNvml) -> Iterator[Reads]:
    """An H200 with two MIG instances, at the first and the third place."""
    driver.add_gpu(mig_mode=1, without=("utilization", "process_samples"))
    small = {"memory_total": 18 * GIB, "memory_used": 9 * GIB, "gpm_02": 20, "gpm_05": 10, "gpm_10": 30}
    large = {"memory_total": 71 * GIB, "memory_used": 70 * GIB, "gpm_02": 90, "gpm_05": 60, "gpm_10": 50}
    driver.add_mig(0, "NVIDIA H200 MIG 1g.18gb", place=0, gpu_instance=9, **small, gpm=1)
    driver.add_mig(0, "NVIDIA H200 MIG 3g.71gb", place=2, gpu_instance=2, **large, gpm=1)
    reads = Reads()
    yield reads
    reads.reader.close()


def test_each_mig_instance_is_a_device_of_its_own(driver, divided):
    driver.add_process(65, 4242, memory=60 * GIB)
    gpu, small, large = second_of(divided)
    assert (gpu.kind, gpu.uuid, gpu.power_watts, gpu.utilization) == ("gpu", "GPU-0", 655.5, None)
    assert gpu.note.startswith("MIG, 2 instances; ")
    assert small == DeviceLoad(
        kind="mig",
        index=0,
        uuid="MIG-0-9",
        name="NVIDIA H200 MIG 1g.18gb",
        note="not read: utilization (not supported)",
        sm_activity=0.2,
        tensor_activity=0.1,
        dram_activity=0.3,
        memory_used=9 * GIB,
        memory_total=18 * GIB,
    )
    assert (large.name, large.uuid, large.sm_activity) == ("NVIDIA H200 MIG 3g.71gb", "MIG-0-2", 0.9)
    assert large.processes == (ProcessUse(pid=4242, memory_used=60 * GIB),)


def test_instances_that_stay_keep_their_samples(driver, divided):
    second_of(divided)
    assert [load.sm_activity for load in divided(after=1.0)] == [0.715, 0.2, 0.9]


def test_instances_come_and_go(driver, divided):
    second_of(divided)
    assert driver.num_live_samples == 6
    driver.remove_migs()
    driver.add_mig(0, "NVIDIA H200 MIG 7g.141gb", place=0, gpu_instance=0, memory_total=141 * GIB, memory_used=0)
    divided(after=1.0)
    gpu, whole = divided()
    assert (whole.name, whole.memory_total) == ("NVIDIA H200 MIG 7g.141gb", 141 * GIB)
    assert driver.num_live_samples == 4
    driver.set(0, mig_mode=0)
    (gpu,) = divided(after=1.0)
    assert "MIG" not in gpu.note


def test_a_lost_gpu_takes_its_instances_with_it(driver, divided):
    second_of(divided)
    driver.fail(pynvml.NVML_ERROR_GPU_IS_LOST, device=0)
    loads = divided()
    assert [(load.kind, load.state, load.memory_used) for load in loads] == [
        ("gpu", "lost", None),
        ("mig", "lost", None),
        ("mig", "lost", None),
    ]
    assert driver.num_live_samples == 0


def test_an_instance_that_answers_nothing_is_unreadable_alone(driver, divided):
    second_of(divided)
    driver.fail(pynvml.NVML_ERROR_UNKNOWN, device=65)
    driver.fail(pynvml.NVML_ERROR_UNKNOWN, "nvmlGpmMigSampleGet")
    gpu, small, large = divided()
    assert (gpu.state, small.state, large.state) == ("ok", "ok", "unreadable")
    assert (large.memory_used, large.sm_activity) == (None, None)
    driver.heal(device=65)
    driver.heal("nvmlGpmMigSampleGet")
    divided(after=1.0)
    gpu, small, large = divided()
    assert (large.state, large.sm_activity) == ("ok", 0.9)
    assert driver.num_live_samples == 6


def test_instances_stay_while_the_driver_does_not_list_them(driver, divided):
    second_of(divided)
    driver.fail(pynvml.NVML_ERROR_TIMEOUT, "nvmlDeviceGetMigMode")
    assert [load.kind for load in divided(after=1.0)] == ["gpu", "mig", "mig"]


# Cost.


def test_a_sample_costs_few_calls(driver):
    driver.add_gpu()
    driver.add_gpu()
    driver.add_process(0, 1, memory=GIB, timestamp=1, sm=50)
    driver.add_process(1, 2, memory=GIB, timestamp=1, sm=50)
    reads, costs = Reads(), []
    second_of(reads)
    for _ in range(20):
        driver.forget_calls()
        reads(after=0.1)
        costs.append(max(driver.num_calls("*", 0), driver.num_calls("*", 1)))
    assert max(costs) <= 12
    assert sum(costs) / len(costs) <= 7
