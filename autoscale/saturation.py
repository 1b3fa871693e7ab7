"""How loaded a replica is: every signal on a scale from 0 to 1, and the largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from autoscale.errors import PolicyError
from autoscale.signals import DeviceLoad, LoadSample

SignalName = Literal["tensor", "power", "throttle", "cpu", "slowness", "cache", "slots", "queue"]
Range = tuple[float, float]
"""Values of a raw signal that count as 0 and as 1."""

THROTTLING = frozenset(
    ("sw_power_cap", "hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
)
"""Clock events that mean that the device would be faster if it could."""


@dataclass(frozen=True, kw_only=True)
class SignalScale:
    """What counts as unloaded and what as saturated; null switches a signal off.

    Neither GPU utilisation nor DRAM activity is among the signals: a decode loop of one request drives both near their
    top, and then further rows are free, not dear. Rows cost time when the tensor pipe or the power budget is busy.
    """

    tensor: Range | None = (0.1, 0.6)
    """Tensor activity; dense matrix products of this kind reach well below 1."""
    power: Range | None = (0.7, 1.0)
    """Power over its limit."""
    throttle: Range | None = (0.05, 0.3)
    """Share of the SM clock that is missing while the device is throttled."""
    cpu: Range | None = (0.5, 1.0)
    """Share of core time in use, on nodes without a GPU."""
    slowness: Range | None = (1.1, 1.6)
    """Measured over profiled step seconds: what neighbours take, for example."""
    cache: Range | None = (0.7, 0.95)
    """Share of cache pages in use."""
    slots: Range | None = (0.5, 1.0)
    """Running requests over how many can run."""
    queue: Range | None = (0.0, 0.5)
    """Waiting requests over how many can run."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}
    """Of autoscale.settings, spelled out: GPU machines read their devices by this scale without pydantic."""

    def __post_init__(self) -> None:
        for field in fields(self):
            scale = getattr(self, field.name)
            if scale is not None and not scale[0] < scale[1]:
                raise PolicyError(f"{field.name}={list(scale)}: expected [low, high] with low < high, or null")


@dataclass(frozen=True, slots=True)
class Saturation:
    """The largest signal decides, and is named."""

    value: float
    limiting: SignalName | None
    """None where no signal is above its low end."""
    parts: dict[SignalName, float]
    """Signals above their low end; those that nothing could be read of are missing as well."""


def device_parts(device: DeviceLoad, scale: SignalScale) -> dict[SignalName, float]:
    """The signals of one device; empty for one that is lost or unreadable, so that nothing is concluded from it."""
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
        # A device that says it is throttled but not by how much is believed.
        _add(parts, "throttle", 1.0 if clock is None else 1.0 - clock, scale.throttle)
    return parts


def saturation_of(sample: LoadSample, devices: Sequence[dict[SignalName, float]], scale: SignalScale) -> Saturation:
    """A replica's, from its heartbeat and from the `device_parts` of its devices; the busiest device counts."""
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
