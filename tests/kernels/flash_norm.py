"""Norm, rotation, keys and compressor at DeepSeek-V4-Flash shapes, for `compiling.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dspark_kernels import gpu

_BF16, _HEADS, _DIM, _PAIRS = torch.bfloat16, 64, 512, 32
_EPS = 1e-6


def flash_calls() -> dict[str, Callable[[], object]]:
    """By name and rows: what to call."""
    calls: dict[str, Callable[[], object]] = {}
    for rows in (6, 1536):
        for name, call in (*_row_calls(rows).items(), *_cache_calls(rows).items()):
            calls[f"{name} [N={rows}]"] = call
    return calls


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=_BF16)


def _angles(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, _PAIRS), torch.empty(rows, _PAIRS)


def _row_calls(rows: int) -> dict[str, Callable[[], object]]:
    query, angles = _bf16(rows, _HEADS, _DIM), _angles(rows)
    inner = torch.empty(rows, 2 * 2048).chunk(2, dim=-1)
    return {
        "rms_norm d=4096": partial(gpu.rms_norm, _bf16(rows, 4096), _bf16(4096), _EPS),
        "rms_norm d=1024": partial(gpu.rms_norm, _bf16(rows, 1024), _bf16(1024), _EPS),
        "rms_norm d=28672": partial(gpu.rms_norm, _bf16(rows, 28672), _bf16(28672), _EPS),
        "norm_rope query": partial(gpu.norm_rope, query, None, _EPS, *angles),
        "norm_rope key": partial(gpu.norm_rope, _bf16(rows, _DIM), _bf16(_DIM), _EPS, *angles),
        "rope inverse": partial(gpu.rope, query, *angles, inverse=True),
        "rope index query": partial(gpu.rope, _bf16(rows, _HEADS, 128), *angles),
        "swiglu float32": partial(gpu.swiglu, *inner, 10.0),
        "swiglu bfloat16": partial(gpu.swiglu, _bf16(rows, 2048), _bf16(rows, 2048), 10.0),
    }


def _cache_calls(rows: int) -> dict[str, Callable[[], object]]:
    angles, slots = _angles(rows), torch.empty(rows, dtype=torch.int64)
    packed, plain = torch.empty(4096, 584, dtype=torch.uint8), _bf16(4096, _DIM)
    window = partial(gpu.store_window, _bf16(rows, _DIM), _bf16(_DIM), _EPS, *angles)
    calls: dict[str, Callable[[], object]] = {
        "store_window packed": partial(window, packed, slots, quantise=True),
        "store_window rounded": partial(window, plain, slots, quantise=True),
        "store_window plain": partial(window, plain, slots),
    }
    for name, width, channels, ratio, store in (
        ("CSA", _DIM, 2 * _DIM, 4, packed),
        ("HCA", _DIM, _DIM, 128, packed),
        ("indexer", 128, 256, 4, _bf16(4096, 128)),
    ):
        pool, ape = torch.empty(4096, 2 * channels), torch.empty(ratio, channels)
        raw, index = _bf16(rows, channels), torch.empty(rows, 2 * ratio if ratio == 4 else ratio, dtype=torch.int64)
        calls[f"store_raw {name}"] = partial(gpu.store_raw, raw, raw, ape, slots, pool, slots)
        calls[f"compress {name}"] = partial(
            gpu.compress, pool, index, _bf16(width), _EPS, *angles, store, slots, quantise=store is packed
        )
    return calls
