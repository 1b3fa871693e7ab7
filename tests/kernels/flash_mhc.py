"""Calls of `gpu/mhc.py` at DeepSeek-V4-Flash shapes, to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dspark_kernels import gpu

M, D, MIXES = 4, 4096, 24
EPS = 1e-6


def flash_calls() -> dict[str, Callable[[], object]]:
    """One request, some, and 256 of them: each number of rows is cut another way."""
    calls: dict[str, Callable[[], object]] = {}
    for num_rows in (6, 24, 48, 192, 1536):
        streams = torch.empty(num_rows, M, D, dtype=torch.bfloat16)
        post, comb = torch.empty(num_rows, M), torch.empty(num_rows, M, M)
        fn, base, scale = torch.empty(MIXES, M * D), torch.empty(MIXES), torch.empty(3)
        hidden = streams[:, 0]
        calls |= {
            f"mhc_read [N={num_rows}]": partial(gpu.mhc_read, streams, fn, base, scale, hidden[0], 20, EPS, EPS),
            f"mhc_write [N={num_rows}]": partial(gpu.mhc_write, hidden, streams, post, comb),
            f"mhc_head [N={num_rows}]": partial(gpu.mhc_head, streams, fn[:M], base[:M], scale[:1], EPS, EPS),
        }
    return calls
