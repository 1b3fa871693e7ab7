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
            calls[f"lowest_kept_logit {name} [{case}]"] = partial(_lowest_kept_logit, logits)
        base = torch.empty(num_requests, _GAMMA, _VOCAB)
        calls[f"markov_sample [{case}]"] = partial(_markov_sample, base)
        shard = torch.empty(num_rows, _SHARD, dtype=torch.bfloat16)
        lowest = torch.zeros(num_rows)
        calls[f"gumbel_argmax shard with filter [{case}]"] = partial(
            gpu.gumbel_argmax, shard, *_draws(num_rows), STREAM_SAMPLE, first_id=3 * _SHARD, lowest=lowest
        )
        calls[f"edit_logits [{case}]"] = partial(_edit_logits, shard)
    return calls


def _draws(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    integers = torch.zeros(2, num_rows, dtype=torch.int64)
    return torch.ones(num_rows, dtype=torch.float64), integers[0], integers[1]


def _markov_sample(base: torch.Tensor) -> object:
    weights = torch.empty(_VOCAB, _RANK, dtype=torch.bfloat16)
    anchors = torch.zeros(len(base), dtype=torch.int64)
    return gpu.markov_sample(base, anchors, weights, weights, *_draws(len(base)), STREAM_SAMPLE)


def _lowest_kept_logit(logits: torch.Tensor) -> object:
    temperatures, integers, _ = _draws(len(logits))
    return gpu.lowest_kept_logit(logits, temperatures, integers, temperatures, temperatures, 2**31)


def _edit_logits(logits: torch.Tensor) -> object:
    rows, factors = torch.zeros(100, dtype=torch.int64), torch.ones(100)
    return gpu.edit_logits(logits, rows, rows, factors, factors, first_id=_SHARD)
