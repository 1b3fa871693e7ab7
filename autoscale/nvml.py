"""Device load as NVIDIA's driver gives it: one reader for the GPUs of a node and their MIG instances.

A driver answers some calls and not others, and a GPU can be lost while the others work. So every GPU has a slot that
stays in the list, and every device keeps a book of what it answers.
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
_NEVER = (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported)

_GPM_SECONDS = 0.15
"""Between two GPM samples; the driver refreshes its counters every 100 ms, and between two refreshes nothing moved."""
_SLOW_SECONDS = 1.0
"""Between two looks at what costs real drivers milliseconds: the process list, the MIG instances, the GPU count."""
_RETRY_SECONDS = 5.0
"""Between two attempts to reach GPUs that do not answer."""
_HIGHEST_PERCENT = 101
"""That is still 100 after rounding."""

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
_ERROR_WORDS = {
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
    """NVML does not start on this node; the message says why."""


class NvmlReader:
    """Reads every GPU of this node, and every MIG instance as a device of its own after its GPU.

    A GPU keeps the index it was first seen with, also while it does not answer. Raises NvmlUnavailable when NVML does
    not start; afterwards nothing that the driver does raises. Not for two threads at once.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._num_listed = 0
        self._counted_at = self._tried_at = -math.inf
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(_UNAVAILABLE.get(error.value, f"NVML does not start: {_words(error)}")) from None
        try:
            self._find()
        except pynvml.NVMLError as error:
            self.close()
            raise NvmlUnavailable(f"NVML does not count its GPUs: {_words(error)}") from None

    @property
    def num_gpus(self) -> int:
        """That were ever seen."""
        return len(self._slots)

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        """Every device as it is at `now`, monotonic seconds; rates are the driver's own, not smoothed further."""
        self._maintain(now)
        try:
            for slot in self._slots:
                slot.read(now)
        except pynvml.NVMLError_Uninitialized as error:  # The driver was reloaded under us; the next read starts again.
            self._leave_all(f"NVML: {_words(error)}")
        return tuple(load for slot in self._slots for load in slot.loads)

    def close(self) -> None:
        """Free what NVML lent; what is read afterwards is unreadable."""
        self._leave_all("closed")
        self._counted_at = self._tried_at = math.inf
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def _maintain(self, now: float) -> None:
        if now - self._counted_at >= _SLOW_SECONDS:
            self._counted_at = now
            with suppress(pynvml.NVMLError):  # The reads will say what is wrong.
                if pynvml.nvmlDeviceGetCount() != self._num_listed:
                    self._find()
        if now - self._tried_at >= _RETRY_SECONDS and any(not slot.is_attached for slot in self._slots):
            self._tried_at = now
            self._retry()

    def _retry(self) -> None:
        try:
            if not any(slot.is_attached for slot in self._slots):
                _restart()  # Would cost attached GPUs their GPM samples; here there are none.
            self._find()
        except pynvml.NVMLError as error:
            for slot in self._slots:
                if not slot.is_attached:
                    slot.leave("unreadable", f"NVML: {_words(error)}")

    def _find(self) -> None:
        """Attach every GPU that the driver lists and that has no handle yet."""
        self._num_listed = pynvml.nvmlDeviceGetCount()
        listed: list[_Slot] = []
        for index in range(self._num_listed):
            listed.append(self._find_at(index, listed))
        for slot in self._slots:
            if slot not in listed:
                slot.leave("unreadable", "the driver no longer lists it")

    def _find_at(self, index: int, taken: list[_Slot]) -> _Slot:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:
            slot = self._slot("", index, taken)
            if not slot.is_attached:  # Else its own reads decide.
                slot.leave_with(error)
        else:
            slot = self._slot(uuid, index, taken)
            slot.attach(uuid, handle)
        return slot

    def _slot(self, uuid: str, index: int, taken: list[_Slot]) -> _Slot:
        """By UUID, as indices move up when the driver drops a GPU; by index where one of the two UUIDs is unknown."""
        free = [slot for slot in self._slots if slot not in taken]
        for slot in free:
            if uuid and slot.uuid == uuid:
                return slot
        for slot in free:
            if slot.index == index and not (uuid and slot.uuid):
                return slot
        self._slots.append(_Slot(index))
        return self._slots[-1]

    def _leave_all(self, note: str) -> None:
        for slot in self._slots:
            slot.leave("unreadable", note)


class _Slot:
    """The place of one GPU in the list, whether it answers or not."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.loads: tuple[DeviceLoad, ...] = (DeviceLoad(kind="gpu", index=index, uuid="", name=""),)
        """Of the GPU and its MIG instances, as last read."""
        self._gpu: _Gpu | None = None

    @property
    def uuid(self) -> str:
        """Empty as long as it has never answered."""
        return self.loads[0].uuid

    @property
    def is_attached(self) -> bool:
        return self._gpu is not None

    def attach(self, uuid: str, handle: Any) -> None:
        """Read what changes slowly, and the rest from the next `read` on."""
        if self._gpu is not None:
            return
        self.loads = (replace(self.loads[0], uuid=uuid), *self.loads[1:])
        try:
            self._gpu = _Gpu(self.index, uuid, handle)
        except _LOST as error:
            self.leave_with(error)

    def read(self, now: float) -> None:
        """Raises NVMLError_Uninitialized only."""
        if self._gpu is None:
            return
        try:
            self.loads = self._gpu.read(now)
        except _LOST as error:
            self.leave_with(error)
        else:
            if self.loads[0].state != "ok":
                self.leave(self.loads[0].state, self.loads[0].note)

    def leave_with(self, error: pynvml.NVMLError) -> None:
        self.leave("lost" if isinstance(error, _LOST) else "unreadable", _words(error))

    def leave(self, state: DeviceState, note: str) -> None:
        """Let go of the handle; a lost GPU counts as lost until it answers again."""
        gpu, self._gpu = self._gpu, None
        if gpu is not None:
            gpu.close()
        if gpu is not None or self.loads[0].state != "lost":
            self.loads = tuple(_without_values(load, state, note) for load in self.loads)


class _Answers:
    """What one device answers; a call that it will never answer is not made again.

    That a GPU is lost or NVML not initialised is no matter of one field: those errors pass through.
    """

    def __init__(self) -> None:
        self.count = 0
        self._never: dict[str, str] = {}
        self._failing: dict[str, str] = {}

    def ask(self, field: str, call: Callable[..., T], *arguments: Any) -> T | None:
        """None where the driver does not say."""
        if field in self._never:
            return None
        try:
            answer = call(*arguments)
        except (*_LOST, pynvml.NVMLError_Uninitialized):
            raise
        except pynvml.NVMLError as error:
            (self._never if isinstance(error, _NEVER) else self._failing)[field] = _words(error)
            return None
        self._failing.pop(field, None)
        self.count += 1
        return answer

    def note(self) -> str:
        """Names what was not read, and why."""
        missing = self._never | self._failing
        return "not read: " + ", ".join(f"{field} ({why})" for field, why in missing.items()) if missing else ""


class _Device:
    """What a GPU and a MIG instance have in common."""

    kind: DeviceKind

    def __init__(self, index: int, uuid: str, handle: Any, gpm: _Gpm) -> None:
        self.uuid, self.is_silent = uuid, False
        self._index, self._handle, self._gpm, self._answers = index, handle, gpm, gpm.answers
        self._processes = _Processes(handle, self._answers)
        self._name = _text(self._answers.ask("name", pynvml.nvmlDeviceGetName, handle) or "")

    def load(self, now: float) -> DeviceLoad:
        """Unreadable when nothing at all was answered."""
        count = self._answers.count
        fields = self._fields(now)
        load = DeviceLoad(kind=self.kind, index=self._index, uuid=self.uuid, name=self._name, **fields)
        self.is_silent = self._answers.count == count
        if self.is_silent:
            return _without_values(load, "unreadable", self._answers.note())
        return replace(load, note=self._answers.note())

    def close(self) -> None:
        self._gpm.close()

    def _fields(self, now: float) -> dict[str, Any]:
        memory = self._answers.ask("memory", pynvml.nvmlDeviceGetMemoryInfo, self._handle)
        utilization = self._answers.ask("utilization", pynvml.nvmlDeviceGetUtilizationRates, self._handle)
        return {
            "memory_used": memory and memory.used,
            "memory_total": memory and memory.total,
            "utilization": utilization and _share(utilization.gpu),
            "processes": self._processes.read(now),
            **self._gpm.read(now),
        }


class _MigInstance(_Device):
    """Power and clocks are its GPU's, so they are not repeated here."""

    kind = "mig"


class _Gpu(_Device):
    """A GPU with a handle, and its MIG instances."""

    kind = "gpu"

    def __init__(self, index: int, uuid: str, handle: Any) -> None:
        super().__init__(index, uuid, handle, _Gpm(handle, partial(pynvml.nvmlGpmSampleGet, handle)))
        self._power_limit = self._ask("power_limit_watts", pynvml.nvmlDeviceGetEnforcedPowerLimit)
        self._max_sm_clock = self._ask("max_sm_clock_mhz", pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM)
        self._instances: list[_MigInstance] = []
        self._is_divided = False
        # With a book of their own, as nothing is missing from a GPU that cannot be divided.
        self._instance_answers, self._instances_found_at = _Answers(), -math.inf

    def read(self, now: float) -> tuple[DeviceLoad, ...]:
        """Of this GPU, then of its MIG instances."""
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
        power = self._ask("power_watts", pynvml.nvmlDeviceGetPowerUsage)
        return {
            **super()._fields(now),
            "power_watts": _watts(power),
            "power_limit_watts": _watts(self._power_limit),
            "sm_clock_mhz": self._ask("sm_clock_mhz", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "max_sm_clock_mhz": self._max_sm_clock,
            "clock_events": self._ask("clock_events", _clock_events) or (),
        }

    def _ask(self, field: str, call: Callable[..., T], *arguments: Any) -> T | None:
        return self._answers.ask(field, call, self._handle, *arguments)

    def _find_instances(self) -> None:
        answer = self._instance_answers.ask("mig", _mig_instances, self._handle)
        if answer is None:
            return
        self._is_divided, found = answer
        is_same = list(found) == [instance.uuid for instance in self._instances]
        if is_same and not any(instance.is_silent for instance in self._instances):
            return
        for instance in self._instances:
            instance.close()
        self._instances = [self._instance(uuid, *found[uuid]) for uuid in found]

    def _instance(self, uuid: str, handle: Any, gpu_instance_id: int) -> _MigInstance:
        # Counters belong to the GPU and are sampled through its handle.
        take = partial(pynvml.nvmlGpmMigSampleGet, self._handle, gpu_instance_id)
        return _MigInstance(self._index, uuid, handle, _Gpm(self._handle, take))


class _Gpm:
    """Activities between the last two samples of the GPU performance counters, Hopper and later."""

    def __init__(self, handle: Any, take: Callable[[Any], object]) -> None:
        self.answers = _Answers()
        self._take, self._taken_at = take, -math.inf
        self._samples: list[Any] = []
        self._activities: dict[str, float | None] = {}
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version, self._request.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, len(_GPM_METRICS)
        for metric, metric_id in zip(self._request.metrics, _GPM_METRICS.values()):
            metric.metricId = metric_id
        self.answers.ask("gpm", _check_gpm_support, handle)

    def read(self, now: float) -> dict[str, float | None]:
        """Shares by field of DeviceLoad; empty before the second sample, or where there is no GPM."""
        if now - self._taken_at >= _GPM_SECONDS:
            self._activities = self.answers.ask("gpm", self._measure, now) or {}
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
            field: self.answers.ask(field, _gpm_share, metric)
            for field, metric in zip(_GPM_METRICS, self._request.metrics)
        }


class _Processes:
    """The compute processes of one device, by the ids that they have on the host."""

    def __init__(self, handle: Any, answers: _Answers) -> None:
        self._handle, self._answers = handle, answers
        self._processes: tuple[ProcessUse, ...] = ()
        self._read_at = -math.inf
        self._seen_until = 0
        """Microseconds, by the driver's clock, of the newest utilization sample."""

    def read(self, now: float) -> tuple[ProcessUse, ...]:
        if now - self._read_at >= _SLOW_SECONDS:
            self._read_at = now
            running = self._answers.ask("processes", _running_processes, self._handle) or []
            shares = self._sm_shares() if running else {}
            self._processes = tuple(
                ProcessUse(pid=use.pid, memory_used=use.usedGpuMemory, sm_utilization=shares.get(use.pid))
                for use in running
            )
        return self._processes

    def _sm_shares(self) -> dict[int, float | None]:
        field = "processes.sm_utilization"
        samples = self._answers.ask(field, _process_samples, self._handle, self._seen_until) or []
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
    except pynvml.NVMLError_FunctionNotFound:  # Before driver 535 the same bits had another name.
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return tuple(name for bit, name in _CLOCK_EVENTS.items() if bits & bit)


def _mig_instances(handle: Any) -> tuple[bool, dict[str, tuple[Any, int]]]:
    """Whether MIG mode is on, and handle and GPU instance id by UUID."""
    found: dict[str, tuple[Any, int]] = {}
    mode, _ = pynvml.nvmlDeviceGetMigMode(handle)
    if mode != pynvml.NVML_DEVICE_MIG_ENABLE:
        return False, found
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(pynvml.NVMLError_NotFound):  # An empty place.
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            uuid = _text(pynvml.nvmlDeviceGetUUID(instance))
            found[uuid] = instance, pynvml.nvmlDeviceGetGpuInstanceId(instance)
    return True, found


def _running_processes(handle: Any) -> list[Any]:
    try:
        return pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except pynvml.NVMLError_FunctionNotFound:  # Before driver 510.
        return pynvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)


def _process_samples(handle: Any, since: int) -> list[Any]:
    """Newer than `since`; none when no process ran."""
    try:
        return list(pynvml.nvmlDeviceGetProcessUtilization(handle, since))
    except pynvml.NVMLError as error:
        # The binding raises an error with the value of success where the driver has nothing to list.
        if error.value in (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND):
            return []
        raise


def _without_values(load: DeviceLoad, state: DeviceState, note: str) -> DeviceLoad:
    return DeviceLoad(kind=load.kind, index=load.index, uuid=load.uuid, name=load.name, state=state, note=note)


def _share(percent: float) -> float | None:
    """None for what is no percentage, as the driver gives for processes that ended and counters that did not move."""
    return min(percent / 100, 1.0) if 0 <= percent <= _HIGHEST_PERCENT else None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _words(error: pynvml.NVMLError) -> str:
    return _ERROR_WORDS.get(error.value, f"error {error.value}")
