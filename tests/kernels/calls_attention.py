"""Calls of `sparse_attention` and `indexer_topk`, to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from model_shapes import FLASH, MODELS, PRO, ROTARY_PAIRS, ROWS

from dspark_kernels import gpu

_BFLOAT16 = torch.bfloat16


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
        torch.empty(rows, ROTARY_PAIRS) if rotate else None,
        torch.empty(rows, ROTARY_PAIRS) if rotate else None,
    )


def _choose(rows: int, entries: int, topk: int) -> object:
    query, weights = torch.empty(rows, 64, 128, dtype=_BFLOAT16), torch.empty(rows, 64, dtype=_BFLOAT16)
    return gpu.indexer_topk(query, weights, torch.empty(1024, 128, dtype=_BFLOAT16), _index(rows, entries), topk)


def calls() -> dict[str, Callable[[], object]]:
    """Calls to compile, by name and number of rows."""
    found: dict[str, Callable[[], object]] = {}
    for model in MODELS:
        for n in model.rows:
            attend = partial(_attend, n, model.heads, 128)
            found |= {
                f"sparse_attention {model.name} CSA packed [N={n}]": partial(attend, model.index_topk, packed=True),
                f"sparse_attention {model.name} HCA packed [N={n}]": partial(attend, 8192, packed=True),
                f"indexer_topk {model.name} 8K [N={n}]": partial(_choose, n, 2048, model.index_topk),
                f"indexer_topk {model.name} 1M [N={n}]": partial(_choose, n, 262144, model.index_topk),
            }
    for n in ROWS:
        attend = partial(_attend, n, FLASH.heads, 128)
        found |= {
            f"sparse_attention {FLASH.name} sliding [N={n}]": partial(attend, 0),
            f"sparse_attention {FLASH.name} CSA [N={n}]": partial(attend, FLASH.index_topk),
            f"sparse_attention {FLASH.name} CSA 8 heads [N={n}]": partial(_attend, n, 8, 128, FLASH.index_topk),
        }
    # The drafter's blocks are one row each, with the heads of all their positions.
    for model, heads in ((FLASH, 5 * 64), (PRO, 5 * 128)):
        for n in sorted({-(-rows // 6) for rows in model.rows}):
            found[f"sparse_attention {model.name} drafter [N={n}]"] = partial(_attend, n, heads, 133, 0, rotate=False)
    return found
