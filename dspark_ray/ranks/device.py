"""Whether torch can use the device that a configuration names."""

from __future__ import annotations

import torch

from dspark_ray.config import ConfigError


def check_device(name: str) -> None:
    """Raise ConfigError for a device that this process cannot use."""
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(
            f"device={name!r}: torch {torch.__version__} finds no GPU here: expected cpu, or a machine with a GPU, its"
            " driver and a CUDA build of torch"
        )
    if (device.index or 0) >= count:
        raise ConfigError(f"device={name!r}: expected cuda:0 to cuda:{count - 1}, the GPUs of this machine")
