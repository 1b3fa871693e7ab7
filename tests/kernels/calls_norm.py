"""Calls of norm, rotation, keys and compressor, to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from model_shapes import HEAD_DIM, MODELS, ROTARY_PAIRS, ROWS, Model

from dspark_kernels import gpu

_BF16 = torch.bfloat16
_EPS = 1e-6


def calls() -> dict[str, Callable[[], object]]:
    """Calls to compile, by name and number of rows."""
    found: dict[str, Callable[[], object]] = {}
    for model in MODELS:
        for rows in model.rows:
            found |= {f"{name} {model.name} [N={rows}]": call for name, call in _row_calls(model, rows).items()}
    for rows in ROWS:
        # Keys and their compressors are the same in both.
        found |= {f"{name} [N={rows}]": call for name, call in _cache_calls(rows).items()}
    return found


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=_BF16)


def _angles(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, ROTARY_PAIRS), torch.empty(rows, ROTARY_PAIRS)


def _row_calls(model: Model, rows: int) -> dict[str, Callable[[], object]]:
    query, angles = _bf16(rows, model.heads, HEAD_DIM), _angles(rows)
    inner = torch.empty(rows, 2 * model.expert_width).chunk(2, dim=-1)
    found: dict[str, Callable[[], object]] = {
        f"rms_norm d={width}": partial(gpu.rms_norm, _bf16(rows, width), _bf16(width), _EPS)
        for width in (model.hidden, model.q_lora, 28672)
    }
    return found | {
        "norm_rope query": partial(gpu.norm_rope, query, None, _EPS, *angles),
        "norm_rope key": partial(gpu.norm_rope, _bf16(rows, HEAD_DIM), _bf16(HEAD_DIM), _EPS, *angles),
        "rope inverse": partial(gpu.rope, query, *angles, inverse=True),
        "rope index query": partial(gpu.rope, _bf16(rows, 64, 128), *angles),
        "swiglu float32": partial(gpu.swiglu, *inner, 10.0),
        "swiglu bfloat16": partial(gpu.swiglu, inner[0].to(_BF16), inner[1].to(_BF16), 10.0),
    }


def _cache_calls(rows: int) -> dict[str, Callable[[], object]]:
    angles, slots = _angles(rows), torch.empty(rows, dtype=torch.int64)
    packed, plain = torch.empty(4096, 584, dtype=torch.uint8), _bf16(4096, HEAD_DIM)
    window = partial(gpu.store_window, _bf16(rows, HEAD_DIM), _bf16(HEAD_DIM), _EPS, *angles)
    found: dict[str, Callable[[], object]] = {
        "store_window packed": partial(window, packed, slots, quantise=True),
        "store_window rounded": partial(window, plain, slots, quantise=True),
        "store_window plain": partial(window, plain, slots),
    }
    for name, width, channels, ratio, store in (
        ("CSA", HEAD_DIM, 2 * HEAD_DIM, 4, packed),
        ("HCA", HEAD_DIM, HEAD_DIM, 128, packed),
        ("indexer", 128, 256, 4, _bf16(4096, 128)),
    ):
        pool, ape = torch.empty(4096, 2 * channels), torch.empty(ratio, channels)
        raw = torch.empty(rows, channels)
        index = torch.empty(rows, 2 * ratio if ratio == 4 else ratio, dtype=torch.int64)
        found[f"store_raw {name}"] = partial(gpu.store_raw, raw, raw, ape, slots, pool, slots)
        found[f"compress {name}"] = partial(
            gpu.compress, pool, index, _bf16(width), _EPS, *angles, store, slots, quantise=store is packed
        )
    return found
