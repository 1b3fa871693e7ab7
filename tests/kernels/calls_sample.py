"""Calls of sampling, to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from model_shapes import GAMMA, MODELS, ROWS, VOCABULARY

from dspark_kernels import gpu
from dspark_kernels.philox import STREAM_SAMPLE

_SHARD = VOCABULARY // 8


def calls() -> dict[str, Callable[[], object]]:
    """Calls to compile, by name and number of rows: verify blocks of six rows, or a single row."""
    found: dict[str, Callable[[], object]] = {}
    for num_rows in ROWS:
        case = f"N={num_rows}"
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            logits = torch.empty(num_rows, VOCABULARY, dtype=dtype)
            found[f"gumbel_argmax {name} [{case}]"] = partial(
                gpu.gumbel_argmax, logits, *_draws(num_rows), STREAM_SAMPLE
            )
            found[f"filter_threshold {name} [{case}]"] = partial(_filter_threshold, logits)
        base = torch.empty(-(-num_rows // (1 + GAMMA)), GAMMA, VOCABULARY)
        for model in MODELS:
            found[f"markov_sample {model.name} [{case}]"] = partial(_markov_sample, base, model.markov_rank)
        shard = torch.empty(num_rows, _SHARD, dtype=torch.bfloat16)
        threshold = torch.zeros(num_rows)
        found[f"gumbel_argmax shard with filter [{case}]"] = partial(
            gpu.gumbel_argmax, shard, *_draws(num_rows), STREAM_SAMPLE, first_id=3 * _SHARD, threshold=threshold
        )
        found[f"edit_logits [{case}]"] = partial(_edit_logits, shard)
    return found


def _draws(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    integers = torch.zeros(2, num_rows, dtype=torch.int64)
    return torch.ones(num_rows, dtype=torch.float64), integers[0], integers[1]


def _markov_sample(base: torch.Tensor, rank: int) -> object:
    weights = torch.empty(VOCABULARY, rank, dtype=torch.bfloat16)
    anchors = torch.zeros(len(base), dtype=torch.int64)
    return gpu.markov_sample(base, anchors, weights, weights, *_draws(len(base)), STREAM_SAMPLE)


def _filter_threshold(logits: torch.Tensor) -> object:
    temperatures, integers, _ = _draws(len(logits))
    return gpu.filter_threshold(logits, temperatures, integers, temperatures, temperatures, 2**31)


def _edit_logits(logits: torch.Tensor) -> object:
    rows, factors = torch.zeros(100, dtype=torch.int64), torch.ones(100)
    return gpu.edit_logits(logits, rows, rows, factors, factors, first_id=_SHARD)
