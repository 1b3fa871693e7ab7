"""Calls of `gpu/mhc.py`, to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from model_shapes import MODELS, STREAMS

from dspark_kernels import gpu

MIXES = 24
EPS = 1e-6
OTHER_ROWS = (8, 16, 17, 32, 64)
"""Numbers of rows for `mhc_read` too: the first and the last of each of its tilings."""


def calls() -> dict[str, Callable[[], object]]:
    """Calls to compile, by name and number of rows."""
    found: dict[str, Callable[[], object]] = {}
    for model in MODELS:
        for num_rows in sorted((*model.rows, *OTHER_ROWS)):
            streams = torch.empty(num_rows, STREAMS, model.hidden, dtype=torch.bfloat16)
            post, comb = torch.empty(num_rows, STREAMS), torch.empty(num_rows, STREAMS, STREAMS)
            fn, base, scale = torch.empty(MIXES, STREAMS * model.hidden), torch.empty(MIXES), torch.empty(3)
            hidden, head = streams[:, 0], (fn[:STREAMS], base[:STREAMS], scale[:1])
            found |= {
                f"mhc_read {model.name} [N={num_rows}]": partial(
                    gpu.mhc_read, streams, fn, base, scale, hidden[0], 20, EPS, EPS
                ),
                f"mhc_write {model.name} [N={num_rows}]": partial(gpu.mhc_write, hidden, streams, post, comb),
                f"mhc_head {model.name} [N={num_rows}]": partial(gpu.mhc_head, streams, *head, EPS, EPS),
            }
    return found
