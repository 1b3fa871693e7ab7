"""Records of load: devices as probes read them, engines as their replicas report them.

Shares and activities are 0 to 1, memory is in bytes, times are in seconds. None means that the device, the driver or
the operating system does not provide the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["gpu", "mig", "cpu"]
DeviceState = Literal["ok", "lost", "unreadable"]
"""lost: the GPU fell off the bus and needs a reset or a reboot. unreadable: the driver returns no values for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessUse:
    """Use of a device by one process."""

    pid: int
    memory_used: int | None = None
    sm_utilization: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLoad:
    """One GPU, one MIG instance, or all cores of a node; rates are smoothed over the probe's last samples."""

    kind: DeviceKind
    index: int
    """Index of the GPU on its node; a MIG instance has its parent's."""
    uuid: str
    name: str
    state: DeviceState = "ok"
    note: str = ""
    """Why the state is not ok, or what could not be read."""
    utilization: float | None = None
    """On a GPU, share of time with any kernel running: a decode loop of one request reaches 1.0, so it is no measure of
    load. On a CPU, share of core time in use."""
    sm_activity: float | None = None
    """Share of SM cycles with a warp resident (GPM, Hopper and later)."""
    tensor_activity: float | None = None
    """Share of cycles with the tensor pipe busy (GPM)."""
    dram_activity: float | None = None
    """Share of cycles with DRAM busy (GPM)."""
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    clock_events: tuple[str, ...] = ()
    """Reasons for a reduced clock, NVML's names without the prefix: sw_power_cap, hw_slowdown, hw_thermal_slowdown,
    hw_power_brake_slowdown, sw_thermal_slowdown, gpu_idle, and so on."""
    memory_used: int | None = None
    memory_total: int | None = None
    processes: tuple[ProcessUse, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLoad:
    """Load of one node, from its probe."""

    node_id: str
    host: str
    source: Literal["nvml", "psutil"]
    devices: tuple[DeviceLoad, ...]
    note: str = ""
    """Why NVML is not the source, or which of its calls fail on this node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Node and devices of one actor of a replica's gang."""

    node_id: str
    accelerators: tuple[str, ...] = ()
    """UUIDs as NVML reports them, or an index where no UUID is known. Empty for an actor without a GPU, whose device is
    the node's CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSample:
    """A replica's heartbeat: statistics of its engine since the previous one."""

    replica: str
    places: tuple[Place, ...]
    """Of its verifiers, and of its drafter where that has devices of its own."""
    seconds: float
    """Time that the sample covers."""
    num_steps: int
    num_running: float
    """Requests that hold cache, averaged over the steps."""
    num_waiting: float
    """Accepted requests that do not run yet, averaged over the steps."""
    max_running: int
    cache_usage: float
    """Share of the cache's pages in use, at the end."""
    rows_per_step: float
    """Rows of the target's forward, averaged over the steps."""
    budget_per_request: float
    """Drafts verified per decoding request and round."""
    accepted_length: float
    """Tokens committed per request and round; 0 where nothing was decoded."""
    tokens_per_second: float
    """Committed tokens over `seconds`, idle time included."""
    busy_share: float
    """Share of `seconds` spent in steps."""
    slowness: float
    """Measured over profiled step seconds, smoothed. 1 where steps take as long as when they were profiled, and where
    there were no steps."""
    threshold: float
    """In force at the end."""
    policy_version: int
    """Of the policy in force; 0 for the engine's own."""
