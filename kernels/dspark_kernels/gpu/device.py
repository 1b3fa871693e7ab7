"""Properties of the device of a tensor, for launchers."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

_INTERPRETED_PROCESSORS = 3
"""Assumed in the interpreter, where programs run one after another: enough that work is split."""
_COMPILED_FOR = 132
"""An H200's number, for compilation without a GPU."""


@cache
def _count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors that can run programs at the same time."""
    if tensor.is_cuda:
        return _count(tensor.device)
    return _INTERPRETED_PROCESSORS if triton.knobs.runtime.interpret else _COMPILED_FOR
