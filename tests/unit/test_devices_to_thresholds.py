"""From a scripted driver to the answer of a heartbeat: what happens to a GPU, and what its replica may verify then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from fake_nvml import FakeNvml, compile_library, install
from test_saturation import IDLE

from autoscale.controller import ControllerConfig, Decision, LoadController
from autoscale.nvml import NvmlReader
from autoscale.signals import NodeLoad, Place
from autoscale.thresholds import LoadCurve

CURVE = LoadCurve(curve=((0.2, 0.0), (1.0, 0.4)), dead_band=0.0, slew_per_second=10.0, smoothing_seconds=0.0)
CALM = {"gpm_05": 4.0, "power": 300_000, "sm_clock": 1980}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(library)
    install(monkeypatch, fake.library)
    return fake


class Cluster:
    """One node with this driver, and a replica on one of its devices."""

    def __init__(self, accelerator: str) -> None:
        self._reader, self._now = NvmlReader(), 100.0
        self._boss = LoadController(ControllerConfig(policy=CURVE))
        self._sample = replace(IDLE, places=(Place(node_id="n", accelerators=(accelerator,)),))

    def beat(self, seconds: int = 3) -> Decision:
        """The answer to the last of some heartbeats, each behind a reading of the devices."""
        for _ in range(seconds):
            self._now += 1.0
            devices = self._reader.read(self._now)
            self._boss.on_node(NodeLoad(node_id="n", host="h", source="nvml", devices=devices), self._now)
            decision = self._boss.on_sample(self._sample, self._now)
        return decision

    def close(self) -> None:
        self._reader.close()


@pytest.fixture
def cluster(driver: FakeNvml) -> Iterator[Cluster]:
    """On a calm H200."""
    driver.add_gpu(**CALM)
    cluster = Cluster("0")
    assert cluster.beat().bounds.confidence_threshold == 0.0
    yield cluster
    cluster.close()


def test_a_busy_but_unsaturated_gpu_raises_nothing(driver, cluster):
    driver.set(0, utilization=100, gpm_02=95, gpm_10=92)
    decision = cluster.beat()
    assert (decision.bounds.confidence_threshold, decision.saturation.limiting) == (0.0, None)


def test_a_saturated_tensor_pipe_raises_the_threshold_and_lets_it_fall_again(driver, cluster):
    driver.set(0, gpm_05=60)
    decision = cluster.beat()
    assert (decision.bounds.confidence_threshold, decision.saturation.limiting) == (pytest.approx(0.4), "tensor")
    driver.set(0, **CALM)
    assert cluster.beat().bounds.confidence_threshold == 0.0


def test_a_power_cap_and_heat_count_by_the_clock_they_take(driver, cluster):
    driver.set(0, clock_events=pynvml.nvmlClocksEventReasonHwThermalSlowdown, sm_clock=1300)
    decision = cluster.beat()
    assert (decision.bounds.confidence_threshold, decision.saturation.limiting) == (pytest.approx(0.4), "throttle")


def test_a_gpu_that_falls_off_the_bus_concludes_nothing_and_counts_again_when_it_is_back(driver, cluster):
    driver.set(0, gpm_05=60)
    assert cluster.beat().bounds.confidence_threshold > 0.3
    driver.fail(pynvml.NVML_ERROR_GPU_IS_LOST, device=0)
    decision = cluster.beat()
    assert (decision.bounds.confidence_threshold, decision.saturation.parts) == (0.0, {})
    driver.heal(device=0)
    assert cluster.beat(10).saturation.limiting == "tensor"


def test_without_gpm_power_decides(driver):
    driver.add_gpu("NVIDIA A100", without=("gpm", "gpm_02", "gpm_05", "gpm_10"), power=690_000, sm_clock=1980)
    cluster = Cluster("0")
    decision = cluster.beat()
    assert decision.saturation.limiting == "power"
    assert decision.bounds.confidence_threshold > 0.3
    cluster.close()


def test_a_gpu_that_says_only_its_utilisation_raises_nothing(driver):
    silent = ("gpm", "gpm_02", "gpm_05", "gpm_10", "power", "power_limit", "clock_events")
    driver.add_gpu("an old one", without=silent, utilization=100)
    cluster = Cluster("0")
    assert cluster.beat().bounds.confidence_threshold == 0.0
    cluster.close()


def test_of_mig_instances_each_has_its_own_load(driver):
    driver.add_gpu(mig_mode=1, **CALM)
    driver.add_mig(0, "H200 MIG 3g", place=0, gpu_instance=1, gpm=1, gpm_05=60)
    driver.add_mig(0, "H200 MIG 4g", place=1, gpu_instance=2, gpm=1, gpm_05=5)
    thresholds = {}
    for uuid in ("MIG-0-1", "MIG-0-2"):
        cluster = Cluster(uuid)
        thresholds[uuid] = cluster.beat().bounds.confidence_threshold
        cluster.close()
    assert thresholds == {"MIG-0-1": pytest.approx(0.4), "MIG-0-2": 0.0}
