"""Device load from NVML: one reader for the GPUs of a node and their MIG instances.

A driver supports some calls and not others, and one GPU can be lost while the others work. So every GPU has an entry
that stays in the list, and every device remembers which calls its driver supports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import pynvml

from autoscale.signals import DeviceKind, DeviceLoad, DeviceState, ProcessUse

T = TypeVar("T")

_LOST = (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired)
_UNSUPPORTED = (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported)

_GPM_SECONDS = 0.15
"""Between two GPM samples: the driver refreshes its counters every 100 ms, and samples in between are equal."""
_SLOW_SECONDS = 1.0
"""Between two reads of values that take milliseconds: the process list, the MIG instances, the number of GPUs."""
_RETRY_SECONDS = 5.0
"""Between two attempts to reattach GPUs that do not answer."""
_HIGHEST_PERCENT = 101
"""Rounding in the driver exceeds 100; larger values are invalid."""

_GPM_METRICS = {
    "sm_activity": pynvml.NVML_GPM_METRIC_SM_UTIL,
    "tensor_activity": pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    "dram_activity": pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
}
_CLOCK_EVENTS = {
    pynvml.nvmlClocksEventReasonGpuIdle: "gpu_idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "applications_clocks_setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}
_ERROR_NAMES = {
    value: name.removeprefix("NVML_ERROR_").replace("_", " ").lower()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_")
}
_UNAVAILABLE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "this node has no NVML library (libnvidia-ml.so.1)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVML library and the loaded NVIDIA driver differ in version",
}


class NvmlUnavailable(Exception):
    """NVML does not start on this node; the message has the reason."""


class NvmlReader:
    """Reads every GPU of this node, and every MIG instance as a device of its own after its GPU.

    A GPU keeps its first index, also while it does not answer. The constructor raises NvmlUnavailable when NVML does
    not start; later errors of the driver become states of devices. Not thread-safe.
    """

    def __init__(self) -> None:
        self._entries: list[_GpuEntry] = []
        self._num_listed = 0
        self._counted_at = self._tried_at = -math.inf
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(_UNAVAILABLE.get(error.value, f"NVML does not start: {_error_name(error)}")) from None
        try:
            self._find()
        except pynvml.NVMLError as error:
            self.close()
            raise NvmlUnavailable(f"NVML does not count its GPUs: {_error_name(error)}") from None

    @property
    def num_gpus(self) -> int:
        """Number of GPUs, including those that no longer answer."""
        return len(self._entries)

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        """Load of every device at `now`, monotonic seconds; rates are the driver's, not smoothed further."""
        self._maintain(now)
        try:
            for entry in self._entries:
                entry.read(now)
        except pynvml.NVMLError_Uninitialized as error:  # The driver was reloaded under us; the next read starts again.
            self._detach_all(f"NVML: {_error_name(error)}")
        return tuple(load for entry in self._entries for load in entry.loads)

    def close(self) -> None:
        """Release NVML; later reads are unreadable."""
        self._detach_all("closed")
        self._counted_at = self._tried_at = math.inf
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def _maintain(self, now: float) -> None:
        if now - self._counted_at >= _SLOW_SECONDS:
            self._counted_at = now
            with suppress(pynvml.NVMLError):  # The reads report the error.
                if pynvml.nvmlDeviceGetCount() != self._num_listed:
                    self._find()
        if now - self._tried_at >= _RETRY_SECONDS and any(not entry.is_attached for entry in self._entries):
            self._tried_at = now
            self._retry()

    def _retry(self) -> None:
        try:
            if not any(entry.is_attached for entry in self._entries):
                _restart()  # This would invalidate the GPM samples of attached GPUs.
            self._find()
        except pynvml.NVMLError as error:
            for entry in self._entries:
                if not entry.is_attached:
                    entry.detach("unreadable", f"NVML: {_error_name(error)}")

    def _find(self) -> None:
        """Attach every GPU that the driver lists and that has no handle."""
        self._num_listed = pynvml.nvmlDeviceGetCount()
        listed: list[_GpuEntry] = []
        for index in range(self._num_listed):
            listed.append(self._find_at(index, listed))
        for entry in self._entries:
            if entry not in listed:
                entry.detach("unreadable", "the driver no longer lists it")

    def _find_at(self, index: int, taken: list[_GpuEntry]) -> _GpuEntry:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:
            entry = self._entry("", index, taken)
            if not entry.is_attached:  # The reads of an attached GPU report its errors.
                entry.detach_after(error)
        else:
            entry = self._entry(uuid, index, taken)
            entry.attach(uuid, handle)
        return entry

    def _entry(self, uuid: str, index: int, taken: list[_GpuEntry]) -> _GpuEntry:
        """By UUID, as indices move up when the driver drops a GPU; by index where one of the two UUIDs is unknown."""
        free = [entry for entry in self._entries if entry not in taken]
        for entry in free:
            if uuid and entry.uuid == uuid:
                return entry
        for entry in free:
            if entry.index == index and not (uuid and entry.uuid):
                return entry
        self._entries.append(_GpuEntry(index))
        return self._entries[-1]

    def _detach_all(self, note: str) -> None:
        for entry in self._entries:
            entry.detach("unreadable", note)


class _GpuEntry:
    """One GPU's entry in the list, attached to a handle while the GPU answers."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.loads: tuple[DeviceLoad, ...] = (DeviceLoad(kind="gpu", index=index, uuid="", name=""),)
        """Of the GPU and its MIG instances, as last read."""
        self._gpu: _Gpu | None = None

    @property
    def uuid(self) -> str:
        """Empty until the GPU has answered once."""
        return self.loads[0].uuid

    @property
    def is_attached(self) -> bool:
        return self._gpu is not None

    def attach(self, uuid: str, handle: Any) -> None:
        """Take a handle and read the constant fields; `read` reads the others."""
        if self._gpu is not None:
            return
        self.loads = (replace(self.loads[0], uuid=uuid), *self.loads[1:])
        try:
            self._gpu = _Gpu(self.index, uuid, handle)
        except _LOST as error:
            self.detach_after(error)

    def read(self, now: float) -> None:
        """Raises no error but NVMLError_Uninitialized."""
        if self._gpu is None:
            return
        try:
            self.loads = self._gpu.read(now)
        except _LOST as error:
            self.detach_after(error)
        else:
            if self.loads[0].state != "ok":
                self.detach(self.loads[0].state, self.loads[0].note)

    def detach_after(self, error: pynvml.NVMLError) -> None:
        self.detach("lost" if isinstance(error, _LOST) else "unreadable", _error_name(error))

    def detach(self, state: DeviceState, note: str) -> None:
        """Release the handle; a lost GPU stays lost until it answers again."""
        gpu, self._gpu = self._gpu, None
        if gpu is not None:
            gpu.close()
        if gpu is not None or self.loads[0].state != "lost":
            self.loads = tuple(_without_values(load, state, note) for load in self.loads)


class _FieldReader:
    """Reads fields of one device and remembers failures; an unsupported call is not repeated.

    Errors of the whole device or library, a lost GPU or an uninitialised NVML, pass through.
    """

    def __init__(self) -> None:
        self.num_read = 0
        """Successful calls so far."""
        self._unsupported: dict[str, str] = {}
        self._failing: dict[str, str] = {}

    def read(self, field: str, call: Callable[..., T], *arguments: Any) -> T | None:
        """The call's result, or None where the driver gives none."""
        if field in self._unsupported:
            return None
        try:
            value = call(*arguments)
        except (*_LOST, pynvml.NVMLError_Uninitialized):
            raise
        except pynvml.NVMLError as error:
            (self._unsupported if isinstance(error, _UNSUPPORTED) else self._failing)[field] = _error_name(error)
            return None
        self._failing.pop(field, None)
        self.num_read += 1
        return value

    def note(self) -> str:
        """The fields that could not be read, with reasons; empty where there are none."""
        missing = self._unsupported | self._failing
        return "not read: " + ", ".join(f"{field} ({why})" for field, why in missing.items()) if missing else ""


class _Device:
    """Fields that GPUs and MIG instances share."""

    kind: DeviceKind

    def __init__(self, index: int, uuid: str, handle: Any, gpm: _Gpm) -> None:
        self.uuid, self.is_silent = uuid, False
        self._index, self._handle, self._gpm, self._reader = index, handle, gpm, gpm.reader
        self._processes = _Processes(handle, self._reader)
        self._name = _text(self._reader.read("name", pynvml.nvmlDeviceGetName, handle) or "")

    def load(self, now: float) -> DeviceLoad:
        """Unreadable when every call failed."""
        num_read = self._reader.num_read
        fields = self._fields(now)
        load = DeviceLoad(kind=self.kind, index=self._index, uuid=self.uuid, name=self._name, **fields)
        self.is_silent = self._reader.num_read == num_read
        if self.is_silent:
            return _without_values(load, "unreadable", self._reader.note())
        return replace(load, note=self._reader.note())

    def close(self) -> None:
        self._gpm.close()

    def _fields(self, now: float) -> dict[str, Any]:
        memory = self._reader.read("memory", pynvml.nvmlDeviceGetMemoryInfo, self._handle)
        utilization = self._reader.read("utilization", pynvml.nvmlDeviceGetUtilizationRates, self._handle)
        return {
            "memory_used": memory and memory.used,
            "memory_total": memory and memory.total,
            "utilization": utilization and _share(utilization.gpu),
            "processes": self._processes.read(now),
            **self._gpm.read(now),
        }


class _MigInstance(_Device):
    """Power and clocks belong to its GPU and are not repeated here."""

    kind = "mig"


class _Gpu(_Device):
    """A GPU with a handle, and its MIG instances."""

    kind = "gpu"

    def __init__(self, index: int, uuid: str, handle: Any) -> None:
        super().__init__(index, uuid, handle, _Gpm(handle, partial(pynvml.nvmlGpmSampleGet, handle)))
        self._power_limit = self._read("power_limit_watts", pynvml.nvmlDeviceGetEnforcedPowerLimit)
        self._max_sm_clock = self._read("max_sm_clock_mhz", pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM)
        self._instances: list[_MigInstance] = []
        self._is_divided = False
        # A reader of their own: a GPU without MIG support has no field missing.
        self._instance_reader, self._instances_found_at = _FieldReader(), -math.inf

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        """Load of this GPU, then of its MIG instances."""
        if now - self._instances_found_at >= _SLOW_SECONDS:
            self._instances_found_at = now
            self._find_instances()
        load = self.load(now)
        if self._is_divided:
            load = replace(load, note=f"MIG, {len(self._instances)} instances; {load.note}".removesuffix("; "))
        return (load, *(instance.load(now) for instance in self._instances))

    def close(self) -> None:
        for device in self._instances:
            device.close()
        super().close()

    def _fields(self, now: float) -> dict[str, Any]:
        power = self._read("power_watts", pynvml.nvmlDeviceGetPowerUsage)
        return {
            **super()._fields(now),
            "power_watts": _watts(power),
            "power_limit_watts": _watts(self._power_limit),
            "sm_clock_mhz": self._read("sm_clock_mhz", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "max_sm_clock_mhz": self._max_sm_clock,
            "clock_events": self._read("clock_events", _clock_events) or (),
        }

    def _read(self, field: str, call: Callable[..., T], *arguments: Any) -> T | None:
        return self._reader.read(field, call, self._handle, *arguments)

    def _find_instances(self) -> None:
        instances = self._instance_reader.read("mig", _mig_instances, self._handle)
        if instances is None:
            return
        self._is_divided, found = instances
        is_same = list(found) == [instance.uuid for instance in self._instances]
        if is_same and not any(instance.is_silent for instance in self._instances):
            return
        for instance in self._instances:
            instance.close()
        self._instances = [self._instance(uuid, *found[uuid]) for uuid in found]

    def _instance(self, uuid: str, handle: Any, gpu_instance_id: int) -> _MigInstance:
        # The counters belong to the GPU and are sampled through its handle.
        take = partial(pynvml.nvmlGpmMigSampleGet, self._handle, gpu_instance_id)
        return _MigInstance(self._index, uuid, handle, _Gpm(self._handle, take))


class _Gpm:
    """Activities between the last two samples of the GPU performance counters, Hopper and later."""

    def __init__(self, handle: Any, take: Callable[[Any], object]) -> None:
        self.reader = _FieldReader()
        self._take, self._taken_at = take, -math.inf
        self._samples: list[Any] = []
        self._activities: dict[str, float | None] = {}
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version, self._request.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, len(_GPM_METRICS)
        for metric, metric_id in zip(self._request.metrics, _GPM_METRICS.values()):
            metric.metricId = metric_id
        self.reader.read("gpm", _check_gpm_support, handle)

    def read(self, now: float) -> dict[str, float | None]:
        """Shares by field of DeviceLoad; empty before the second sample and without GPM support."""
        if now - self._taken_at >= _GPM_SECONDS:
            self._activities = self.reader.read("gpm", self._measure, now) or {}
        return self._activities

    def close(self) -> None:
        for sample in self._samples:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlGpmSampleFree(sample)
        self._samples = []

    def _measure(self, now: float) -> dict[str, float | None]:
        while len(self._samples) < 2:
            self._samples.append(pynvml.nvmlGpmSampleAlloc())
        older, newer = self._samples
        self._take(newer)
        self._samples = [newer, older]
        is_first, self._taken_at = self._taken_at == -math.inf, now
        if is_first:
            return {}
        self._request.sample1, self._request.sample2 = older, newer
        pynvml.nvmlGpmMetricsGet(self._request)
        return {
            field: self.reader.read(field, _gpm_share, metric)
            for field, metric in zip(_GPM_METRICS, self._request.metrics)
        }


class _Processes:
    """The compute processes of one device, by their process ids on the host."""

    def __init__(self, handle: Any, reader: _FieldReader) -> None:
        self._handle, self._reader = handle, reader
        self._processes: tuple[ProcessUse, ...] = ()
        self._read_at = -math.inf
        self._seen_until = 0
        """Time of the newest utilisation sample, microseconds of the driver's clock."""

    def read(self, now: float) -> tuple[ProcessUse, ...]:
        if now - self._read_at >= _SLOW_SECONDS:
            self._read_at = now
            running = self._reader.read("processes", _running_processes, self._handle) or []
            shares = self._sm_shares() if running else {}
            self._processes = tuple(
                ProcessUse(pid=use.pid, memory_used=use.usedGpuMemory, sm_utilization=shares.get(use.pid))
                for use in running
            )
        return self._processes

    def _sm_shares(self) -> dict[int, float | None]:
        field = "processes.sm_utilization"
        samples = self._reader.read(field, _process_samples, self._handle, self._seen_until) or []
        samples.sort(key=lambda sample: sample.timeStamp)
        if samples:
            self._seen_until = samples[-1].timeStamp
        return {sample.pid: _share(sample.smUtil) for sample in samples}


def _restart() -> None:
    with suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()
    pynvml.nvmlInit()


def _check_gpm_support(handle: Any) -> None:
    if not pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def _gpm_share(metric: Any) -> float | None:
    if metric.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(metric.nvmlReturn)
    return _share(metric.value)


def _clock_events(handle: Any) -> tuple[str, ...]:
    try:
        bits = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError_FunctionNotFound:  # The name of the call before driver 535.
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return tuple(name for bit, name in _CLOCK_EVENTS.items() if bits & bit)


def _mig_instances(handle: Any) -> tuple[bool, dict[str, tuple[Any, int]]]:
    """(whether MIG mode is on, handle and GPU instance id by UUID)"""
    found: dict[str, tuple[Any, int]] = {}
    mode, _ = pynvml.nvmlDeviceGetMigMode(handle)
    if mode != pynvml.NVML_DEVICE_MIG_ENABLE:
        return False, found
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(pynvml.NVMLError_NotFound):  # No instance at this index.
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(instance))
            found[uuid] = instance, pynvml.nvmlDeviceGetGpuInstanceId(instance)
    return True, found


def _running_processes(handle: Any) -> list[Any]:
    try:
        return pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except pynvml.NVMLError_FunctionNotFound:  # Before driver 510.
        return pynvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)


def _process_samples(handle: Any, since: int) -> list[Any]:
    """Samples newer than `since`; empty when no process ran."""
    try:
        return list(pynvml.nvmlDeviceGetProcessUtilization(handle, since))
    except pynvml.NVMLError as error:
        # The binding raises an error with the code of success where the driver has no samples.
        if error.value in (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND):
            return []
        raise


def _without_values(load: DeviceLoad, state: DeviceState, note: str) -> DeviceLoad:
    return DeviceLoad(kind=load.kind, index=load.index, uuid=load.uuid, name=load.name, state=state, note=note)


def _share(percent: float) -> float | None:
    """None for values outside 0 to 100, which the driver returns for ended processes and unchanged counters."""
    return min(percent / 100, 1.0) if 0 <= percent <= _HIGHEST_PERCENT else None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _error_name(error: pynvml.NVMLError) -> str:
    return _ERROR_NAMES.get(error.value, f"error {error.value}")
