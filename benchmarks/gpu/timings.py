"""Reads the figures of benchmarks.gpu.kernels and benchmarks.gpu.round from their files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import KernelTime, RoundTime

_LARGEST = 12
"""Kernels of a round that are named."""


def kernel_times(path: Path) -> Iterator[KernelTime]:
    """Figures in the file so far; none where there is no file."""
    for op, by_requests in _content(path).get("results", {}).items():
        for requests, figures in by_requests.items():
            yield KernelTime(
                op=op,
                requests=int(requests),
                check=figures.get("problem") or figures["check"],
                kernel_us=figures.get("kernel_us", {}).get("median"),
                floor_us=figures.get("floor_us"),
                bound=figures.get("bound", ""),
                over_floor=figures.get("over_floor"),
                baseline=figures.get("baseline", ""),
                baseline_over_kernel=figures.get("baseline_over_kernel"),
            )


def round_times(path: Path) -> Iterator[RoundTime]:
    """As `kernel_times`."""
    content = _content(path)
    for figures in content.get("results", {}).values():
        kernels: dict[str, float] = figures.get("kernel_ms", {})
        replayed = figures.get("replayed_ms")
        yield RoundTime(
            requests=figures["requests"],
            rows=figures["rows"],
            layers=content["settings"]["layers"],
            launched_ms=statistics.median(figures["launched_ms"]),
            replayed_ms=statistics.median(replayed) if replayed else None,
            in_kernels_ms=sum(kernels.values()) if kernels else None,
            largest_kernels=[f"{name} {value:.3f}" for name, value in list(kernels.items())[:_LARGEST]],
        )


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content
