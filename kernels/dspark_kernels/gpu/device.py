"""What launchers ask of the device that a tensor is on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_INTERPRETED_PROCESSORS = 3
"""Where kernels are interpreted, programs run one after another: enough of them that work is split at all."""


@cache
def _count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors that can run programs at the same time."""
    return _count(tensor.device) if tensor.is_cuda else _INTERPRETED_PROCESSORS
