"""A driver library that a test scripts, and NVIDIA's real binding on top of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pynvml
import pytest

ANY = -1
"""Every device."""

GIB = 1 << 30
H200 = {
    "utilization": 97,
    "memory_total": 141 * GIB,
    "memory_used": 120 * GIB,
    "power": 655_500,
    "power_limit": 700_000,
    "sm_clock": 1845,
    "max_sm_clock": 1980,
    "clock_events": 0,
    "mig_mode": 0,
    "process_samples": 1,
    "gpm": 1,
    "gpm_02": 71.5,
    "gpm_05": 33.25,
    "gpm_10": 88,
}


def compile_library(folder: Path, *flags: str) -> Path:
    """Skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the driver library with")
    library, source = folder / "libnvidia-ml.so.1", Path(__file__).with_suffix(".c")
    options = ["-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{library.name}", *flags]
    subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True)
    return library


def install(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL | None) -> None:
    """Let the binding use `library`, or look for one itself, until the test ends."""
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)


class FakeNvml:
    """The table behind the library; devices are numbers, MIG instances too."""

    def __init__(self, library: Path | str) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.fake_reset()

    def add_gpu(self, name: str = "NVIDIA H200", *, without: tuple[str, ...] = (), **values: float) -> int:
        """An H200's values, changed by `values`; those in `without` are not supported."""
        device = self.library.fake_add_gpu()
        self._describe(device, name, f"GPU-{device}")
        self.set(device, **{key: value for key, value in (H200 | values).items() if key not in without})
        return device

    def add_mig(self, gpu: int, name: str, *, place: int, gpu_instance: int, **values: float) -> int:
        device = self.library.fake_add_mig(gpu, place, gpu_instance)
        self._describe(device, name, f"MIG-{gpu}-{gpu_instance}")
        self.set(device, **values)
        return device

    def remove_migs(self) -> None:
        self.library.fake_remove_migs()

    def set(self, device: int, **values: float) -> None:
        for name, value in values.items():
            self.library.fake_set(device, name.encode(), ctypes.c_double(value))

    def unset(self, device: int, name: str) -> None:
        self.library.fake_unset(device, name.encode())

    def set_text(self, device: int, name: str, text: str) -> None:
        self.library.fake_set_text(device, name.encode(), text.encode())

    def set_num_gpus(self, count: int) -> None:
        """How many the driver lists."""
        self.library.fake_set_num_gpus(count)

    def fail(self, error: int, function: str = "*", device: int = ANY) -> None:
        """Let a function (or all) answer with an NVML error."""
        self.library.fake_fail(function.encode(), device, error)

    def heal(self, function: str = "*", device: int = ANY) -> None:
        self.fail(pynvml.NVML_SUCCESS, function, device)

    def unload(self) -> None:
        """The driver goes away: nothing is initialised, and every handle is invalid."""
        self.library.fake_unload()

    def add_process(self, device: int, pid: int, *, memory: int, timestamp: int = 0, sm: int = 0) -> None:
        self.library.fake_add_process(device, pid, ctypes.c_ulonglong(memory), ctypes.c_ulonglong(timestamp), sm)

    def remove_processes(self) -> None:
        self.library.fake_remove_processes()

    def num_calls(self, function: str = "*", device: int = ANY) -> int:
        return self.library.fake_calls(function.encode(), device)

    def forget_calls(self) -> None:
        self.library.fake_forget_calls()

    @property
    def num_live_samples(self) -> int:
        """GPM samples allocated and not freed."""
        return self.library.fake_live_samples()

    @property
    def num_inits(self) -> int:
        """Not undone by a shutdown."""
        return self.library.fake_num_inits()

    def _describe(self, device: int, name: str, uuid: str) -> None:
        self.set_text(device, "name", name)
        self.set_text(device, "uuid", uuid)
