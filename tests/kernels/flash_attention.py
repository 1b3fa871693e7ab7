"""Calls of `sparse_attention` and `indexer_topk` at DeepSeek-V4-Flash shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dspark_kernels import gpu

_BFLOAT16 = torch.bfloat16
_ROTARY = 32  # pairs


def _index(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64)


def _attend(rows: int, heads: int, window: int, entries: int, packed: bool = False, rotate: bool = True) -> object:
    width, dtype = (584, torch.uint8) if packed else (512, _BFLOAT16)
    return gpu.sparse_attention(
        torch.empty(rows, heads, 512, dtype=_BFLOAT16),
        torch.empty(1024, width, dtype=dtype),
        _index(rows, window),
        torch.empty(1024, width, dtype=dtype) if entries else None,
        _index(rows, entries) if entries else None,
        torch.empty(heads),
        512**-0.5,
        torch.empty(rows, _ROTARY) if rotate else None,
        torch.empty(rows, _ROTARY) if rotate else None,
    )


def _choose(rows: int, entries: int) -> object:
    query, weights = torch.empty(rows, 64, 128, dtype=_BFLOAT16), torch.empty(rows, 64, dtype=_BFLOAT16)
    return gpu.indexer_topk(query, weights, torch.empty(1024, 128, dtype=_BFLOAT16), _index(rows, entries), 512)


def flash_calls() -> dict[str, Callable[[], object]]:
    """By name, for `compiling.compiled_kernels`."""
    calls: dict[str, Callable[[], object]] = {}
    for rows in (6, 1536):
        calls |= {
            f"sparse_attention sliding [N={rows}]": partial(_attend, rows, 64, 128, 0),
            f"sparse_attention CSA [N={rows}]": partial(_attend, rows, 64, 128, 512),
            f"sparse_attention HCA [N={rows}]": partial(_attend, rows, 64, 128, 8192),
            f"sparse_attention CSA packed [N={rows}]": partial(_attend, rows, 64, 128, 512, packed=True),
            f"sparse_attention CSA 8 heads [N={rows}]": partial(_attend, rows, 8, 128, 512),
            f"sparse_attention CSA 8 heads packed [N={rows}]": partial(_attend, rows, 8, 128, 512, packed=True),
            f"sparse_attention drafter [R={rows // 6}]": partial(_attend, rows // 6, 320, 133, 0, rotate=False),
            f"indexer_topk 8K [N={rows}]": partial(_choose, rows, 2048),
            f"indexer_topk 1M [N={rows}]": partial(_choose, rows, 262144),
        }
    return calls
