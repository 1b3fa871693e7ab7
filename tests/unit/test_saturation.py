"""Signals on their scales: what counts, what does not, and what decides."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoscale.errors import PolicyError
from autoscale.saturation import SignalScale, device_parts, saturation_of
from autoscale.signals import DeviceLoad, LoadSample

SCALE = SignalScale()
GPU = DeviceLoad(
    kind="gpu",
    index=0,
    uuid="GPU-0",
    name="a GPU",
    utilization=1.0,
    sm_activity=0.95,
    dram_activity=0.9,
    tensor_activity=0.05,
    power_watts=300.0,
    power_limit_watts=700.0,
    sm_clock_mhz=1980.0,
    max_sm_clock_mhz=1980.0,
)
IDLE = LoadSample(
    replica="r",
    places=(),
    seconds=1.0,
    num_steps=0,
    num_running=0.0,
    num_waiting=0.0,
    max_running=16,
    cache_usage=0.0,
    rows_per_step=0.0,
    budget_per_request=0.0,
    accepted_length=1.0,
    tokens_per_second=0.0,
    busy_share=0.0,
    slowness=1.0,
    threshold=0.0,
    policy_version=0,
)


def test_a_decode_loop_of_one_request_is_not_saturated():
    # Utilisation, SM and DRAM activity are near their top there; further rows are nearly free.
    assert device_parts(GPU, SCALE) == {}


@pytest.mark.parametrize(
    ("change", "signal"),
    [
        ({"tensor_activity": 0.35}, "tensor"),
        ({"power_watts": 595.0}, "power"),
        ({"clock_events": ("hw_thermal_slowdown",), "sm_clock_mhz": 1980 * (1 - 0.175)}, "throttle"),
        ({"clock_events": ("sw_power_cap",), "sm_clock_mhz": 1980 * (1 - 0.175)}, "throttle"),
    ],
)
def test_the_middle_of_a_scale_is_a_half(change, signal):
    assert device_parts(replace(GPU, **change), SCALE) == {signal: pytest.approx(0.5)}


def test_a_low_clock_without_a_throttling_event_is_no_signal():
    assert device_parts(replace(GPU, sm_clock_mhz=300.0, clock_events=("gpu_idle",)), SCALE) == {}


def test_throttling_by_an_unknown_amount_counts_in_full():
    throttled = replace(GPU, clock_events=("hw_slowdown",), sm_clock_mhz=None)
    assert device_parts(throttled, SCALE) == {"throttle": 1.0}


@pytest.mark.parametrize("state", ["lost", "unreadable"])
def test_a_device_that_does_not_answer_has_no_signals(state):
    assert device_parts(replace(GPU, state=state, tensor_activity=1.0), SCALE) == {}


def test_missing_values_are_no_signal():
    bare = DeviceLoad(kind="gpu", index=0, uuid="GPU-0", name="old", utilization=1.0)
    assert device_parts(bare, SCALE) == {}


def test_a_cpu_counts_by_its_core_time():
    cpu = DeviceLoad(kind="cpu", index=0, uuid="cpu", name="2 cores", utilization=0.75)
    assert device_parts(cpu, SCALE) == {"cpu": 0.5}


def test_an_idle_replica_is_at_zero():
    saturation = saturation_of(IDLE, [], SCALE)
    assert (saturation.value, saturation.limiting, saturation.parts) == (0.0, None, {})


@pytest.mark.parametrize(
    ("change", "signal", "value"),
    [
        ({"slowness": 1.35}, "slowness", 0.5),
        ({"cache_usage": 0.825}, "cache", 0.5),
        ({"num_running": 12.0}, "slots", 0.5),
        ({"num_waiting": 4.0}, "queue", 0.5),
        ({"num_waiting": 400.0}, "queue", 1.0),
    ],
)
def test_the_signals_of_an_engine_are_scaled(change, signal, value):
    saturation = saturation_of(replace(IDLE, **change), [], SCALE)
    assert saturation.limiting == signal
    assert saturation.value == pytest.approx(value)


def test_the_largest_signal_decides_and_the_busiest_device_counts():
    busy = replace(IDLE, num_running=12.0)
    saturation = saturation_of(busy, [{"tensor": 0.2}, {"tensor": 0.8, "power": 0.7}], SCALE)
    assert (saturation.value, saturation.limiting) == (0.8, "tensor")
    assert saturation.parts == {"tensor": 0.8, "power": 0.7, "slots": pytest.approx(0.5)}


@pytest.mark.parametrize("bad", [(0.6, 0.1), (0.5, 0.5), (math.nan, 1.0)])
def test_an_inverted_scale_is_refused_by_name(bad):
    with pytest.raises(PolicyError, match=r"tensor=\[.*\]: expected \[low, high\] with low < high"):
        SignalScale(tensor=bad)
