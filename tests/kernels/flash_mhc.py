"""Calls of `gpu/mhc.py` at DeepSeek-V4-Flash shapes, to compile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dspark_kernels import gpu

M, D = 4, 4096


def flash_calls() -> dict[str, Callable[[], object]]:
    """The first launch of every op, by its number of rows: one request, some, and 256 of them."""
    calls: dict[str, Callable[[], object]] = {}
    for num_rows in (6, 48, 192, 1536):
        streams = torch.empty(num_rows, M, D, dtype=torch.bfloat16)
        calls |= {
            f"mhc_read [N={num_rows}]": lambda x=streams: gpu.mhc_read(
                x, _empty((2 + M) * M, M * D), _empty((2 + M) * M), _empty(3), x[0, 0], 20, 1e-6, 1e-6
            ),
            f"mhc_write [N={num_rows}]": lambda x=streams: gpu.mhc_write(
                x[:, 0], x, _empty(len(x), M), _empty(len(x), M, M)
            ),
            f"mhc_head [N={num_rows}]": lambda x=streams: gpu.mhc_head(
                x, _empty(M, M * D), _empty(M), _empty(1), 1e-6, 1e-6
            ),
        }
    return calls


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape)
