"""CUDA graphs by size: a forward is recorded once per size, and a step replays the smallest graph that fits it.

On a GPU a decode step is some hundred kernels, each shorter than the time it takes to launch it. A graph is launched
at once, but repeats the same work on the same memory with the same shapes. Inputs therefore reach it through tensors
that stay in place, and a step that is smaller than its graph is filled up with padding rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Key = TypeVar("Key")

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Outputs]], tuple[Replay, Outputs]]
"""Captures a function as a graph; returns a replay callable and the output tensors that each replay overwrites."""

_WARM_UPS = 2
"""Runs before recording, in which kernels are compiled and libraries choose algorithms and allocate memory."""
_STEPS_PER_DOUBLING = 4


def graph_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 3, ... and from 8 on four sizes per doubling, up to `largest`: at most a fourth of a step is padding."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size += max(1, (1 << (size.bit_length() - 1)) // _STEPS_PER_DOUBLING)
    return (*sizes, largest)


def padded_size(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of the ascending `sizes` that is at least `wanted`, which must not be above the largest."""
    return sizes[bisect_left(sizes, wanted)]


class CudaCapture:
    """Records CUDA graphs in one shared memory pool, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function()
        return graph.replay, outputs


class GraphSet(Generic[Key]):
    """Recordings of one function, by key."""

    def __init__(self, function: Callable[[Key], Outputs], capture: Capture) -> None:
        """`function` must read its inputs from tensors that stay in place and must not synchronise with the device."""
        self._function, self._capture = function, capture
        self._recorded: dict[Key, tuple[Replay, Outputs]] = {}

    def record(self, key: Key) -> None:
        """Record for `key`, unless it is recorded already."""
        if key not in self._recorded:
            self._recorded[key] = self._capture(lambda: self._function(key))

    def run(self, key: Key) -> Outputs:
        """Replay; the results stay valid until the next replay of any recording that shares their memory."""
        self.record(key)
        replay, outputs = self._recorded[key]
        replay()
        return outputs
