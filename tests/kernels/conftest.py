"""Kernels against their references: on a GPU where there is one, else interpreted on the CPU.

    pytest tests/kernels

Outputs that a kernel allocates are filled with NaN, or with the largest integer, before it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, which is when `dspark_kernels.gpu` is imported.
    os.environ["TRITON_INTERPRET"] = "1"

if find_spec("dspark_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an unwritten value cannot equal an expected one."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def rounding_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from interpreting import compute_as_a_gpu  # imports Triton

    compute_as_a_gpu(monkeypatch)
