"""Compile kernels for an H200 (sm_90) on a machine without a GPU: what Triton's compiler and ptxas say of them.

A launcher runs as always, but each of its kernels is compiled instead of launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_BYTES = 227 * 1024
"""Limit of one program on sm_90."""


@dataclass(frozen=True)
class Compiled:
    """One kernel."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


class _Driver:
    """A driver without a device: names the target of compilation and cannot launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu


_known: dict[str, Compiled] = {}
"""By hash: kernels that this process has assembled."""


def compiled_kernels(call: Callable[[], object]) -> list[Compiled]:
    """Kernel variants that `call` would launch, in order, each once."""
    found: dict[str, Compiled] = {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in _known:
            _known[kernel.hash] = _assembled(kernel)
        found[kernel.hash] = _known[kernel.hash]
        return kernel

    # Stays: the process that compiles has no device to go back to.
    triton.runtime.driver.set_active(_Driver())
    run, JITFunction.run = JITFunction.run, compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return list(found.values())


def _assembled(kernel: Any) -> Compiled:
    """Run ptxas again for its report of registers and spills."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Newer Tritons carry two assemblers, and the one with the longer name understands what they write.
    ptxas = max(folder.glob("ptxas*"), key=lambda path: len(path.name))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [ptxas, "-arch=sm_90a", "-v", "-o", Path(scratch) / "kernel.cubin", source]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))
    return Compiled(kernel.metadata.name, int(registers[1]), spilled, kernel.metadata.shared)
