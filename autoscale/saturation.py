"""Saturation of a replica: every signal on a scale from 0 to 1, and the largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from autoscale.errors import PolicyError
from autoscale.signals import DeviceLoad, LoadSample

SignalName = Literal["tensor", "power", "throttle", "cpu", "slowness", "cache", "slots", "queue"]
Range = tuple[float, float]
"""(low, high): values of a raw signal that count as 0 and as 1."""

THROTTLING = frozenset(
    ("sw_power_cap", "hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
)
"""Clock events that mean throttling."""


@dataclass(frozen=True, kw_only=True)
class SignalScale:
    """Values of each signal that count as unloaded and as saturated; null switches a signal off.

    GPU utilisation and DRAM activity are no signals: a decode loop of one request drives both near their maximum, while
    further rows still cost almost no time. Rows cost time when the tensor pipe or the power budget is busy.
    """

    tensor: Range | None = (0.1, 0.6)
    """Tensor activity; large matrix products reach well below 1."""
    power: Range | None = (0.7, 1.0)
    """Power over its limit."""
    throttle: Range | None = (0.05, 0.3)
    """Share by which throttling lowers the SM clock."""
    cpu: Range | None = (0.5, 1.0)
    """Share of core time in use, on nodes without a GPU."""
    slowness: Range | None = (1.1, 1.6)
    """Measured over profiled step seconds; other processes on the device raise it, for example."""
    cache: Range | None = (0.7, 0.95)
    """Share of cache pages in use."""
    slots: Range | None = (0.5, 1.0)
    """Running requests over the largest number that can run."""
    queue: Range | None = (0.0, 0.5)
    """Waiting requests over the largest number that can run."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}
    """Of autoscale.settings, spelled out: GPU machines read their devices by this scale without pydantic."""

    def __post_init__(self) -> None:
        for field in fields(self):
            scale = getattr(self, field.name)
            if scale is not None and not scale[0] < scale[1]:
                raise PolicyError(f"{field.name}={list(scale)}: expected [low, high] with low < high, or null")


@dataclass(frozen=True, slots=True)
class Saturation:
    """The largest signal, with its name."""

    value: float
    limiting: SignalName | None
    """None where no signal is above its low end."""
    parts: dict[SignalName, float]
    """Signals above their low end; unreadable signals are missing too."""


def device_parts(device: DeviceLoad, scale: SignalScale) -> dict[SignalName, float]:
    """Signals of one device; empty for a lost or unreadable device, which counts as unknown."""
    parts: dict[SignalName, float] = {}
    if device.state != "ok":
        return parts
    if device.kind == "cpu":
        _add(parts, "cpu", device.utilization, scale.cpu)
        return parts
    _add(parts, "tensor", device.tensor_activity, scale.tensor)
    _add(parts, "power", _share(device.power_watts, device.power_limit_watts), scale.power)
    if not THROTTLING.isdisjoint(device.clock_events):
        clock = _share(device.sm_clock_mhz, device.max_sm_clock_mhz)
        # Throttling by an unknown amount counts in full.
        _add(parts, "throttle", 1.0 if clock is None else 1.0 - clock, scale.throttle)
    return parts


def saturation_of(sample: LoadSample, devices: Sequence[dict[SignalName, float]], scale: SignalScale) -> Saturation:
    """Saturation of a replica from its heartbeat and the `device_parts` of its devices; the busiest device counts."""
    parts: dict[SignalName, float] = {}
    for device in devices:
        for name, value in device.items():
            if value > parts.get(name, 0.0):
                parts[name] = value
    _add(parts, "slowness", sample.slowness, scale.slowness)
    _add(parts, "cache", sample.cache_usage, scale.cache)
    _add(parts, "slots", sample.num_running / sample.max_running, scale.slots)
    _add(parts, "queue", sample.num_waiting / sample.max_running, scale.queue)
    limiting = max(parts, key=parts.__getitem__, default=None)
    return Saturation(parts[limiting] if limiting else 0.0, limiting, parts)


def _add(parts: dict[SignalName, float], name: SignalName, value: float | None, scale: Range | None) -> None:
    if value is None or scale is None or value <= scale[0]:
        return
    parts[name] = 1.0 if value >= scale[1] else (value - scale[0]) / (scale[1] - scale[0])


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
