"""Sampling at DeepSeek-V4-Flash shapes, for the compile check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from dspark_kernels import gpu
from dspark_kernels.philox import STREAM_SAMPLE

_VOCAB, _SHARD, _RANK, _GAMMA = 129280, 16160, 256, 5


def flash_calls() -> dict[str, Callable[[], object]]:
    """Calls by name, for one request and for 256."""
    calls: dict[str, Callable[[], object]] = {}
    for num_rows, num_requests in ((6, 1), (1536, 256)):
        case = f"N={num_rows}"
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            logits = torch.empty(num_rows, _VOCAB, dtype=dtype)
            calls[f"gumbel_argmax {name} [{case}]"] = partial(
                gpu.gumbel_argmax, logits, *_draws(num_rows), STREAM_SAMPLE
            )
            base = torch.empty(num_requests, _GAMMA, _VOCAB, dtype=dtype)
            calls[f"markov_sample {name} [{case}]"] = partial(_markov_sample, base)
    return calls


def _draws(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    integers = torch.zeros(2, num_rows, dtype=torch.int64)
    return torch.ones(num_rows, dtype=torch.float64), integers[0], integers[1]


def _markov_sample(base: torch.Tensor) -> object:
    weights = torch.empty(_VOCAB, _RANK, dtype=torch.bfloat16)
    anchors = torch.zeros(len(base), dtype=torch.int64)
    return gpu.markov_sample(base, anchors, weights, weights, *_draws(len(base)), STREAM_SAMPLE)
