"""The target's KV cache: rings by position for sliding windows, pages for compressed entries (docs/model.md, KV cache).

Nothing is ever rolled back. The row of a rejected draft stays until its position is computed again, and is invisible
until then; rejection only makes the `length` of the sequence smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_kernels.formats import packed_key_bytes
from dspark_ray.cache.shape import CacheShape
from dspark_ray.config import CSA_RATIO, ModelConfig


class LayerCache:
    """State of one target layer for all sequences, flat over (slot, ring) and staging, or over (page, entry)."""

    window: Tensor
    """[P, D] keys, normed and rotated, or [P, bytes] packed: a ring per slot, then staging (`model/rows.py`)."""
    raw: Tensor | None = None
    """[P, 2 * width] float32 compressor rows: kv, then gate + position bias."""
    entries: Tensor | None = None
    """[pages * entries_per_page, D], or [..., bytes] packed"""
    index_raw: Tensor | None = None
    index_entries: Tensor | None = None

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        shape: CacheShape,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
        packed: bool,
    ) -> None:
        def rows(count: int, width: int, row_dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, width, dtype=row_dtype, device=device)

        def key_rows(count: int) -> Tensor:
            if not packed:
                return rows(count, config.head_dim, dtype)
            return rows(count, packed_key_bytes(config.head_dim, config.qk_rope_head_dim), torch.uint8)

        self.window = key_rows(shape.pool_rows(shape.window_ring))
        ratio = config.compress_ratio(layer)
        if ratio == 0:
            return
        num_raw = shape.pool_rows(shape.raw_rings[ratio])
        num_entries = num_pages * (shape.page_size // ratio)
        series = 2 if ratio == CSA_RATIO else 1
        self.raw = rows(num_raw, 2 * series * config.head_dim, torch.float32)
        self.entries = key_rows(num_entries)
        if ratio == CSA_RATIO:
            self.index_raw = rows(num_raw, 2 * series * config.index_head_dim, torch.float32)
            self.index_entries = rows(num_entries, config.index_head_dim, dtype)


class CacheTensors:
    """One LayerCache per target layer."""

    def __init__(
        self,
        config: ModelConfig,
        shape: CacheShape,
        num_pages: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        packed: bool = False,
    ) -> None:
        """`packed` stores keys and entries in FP8 (`dspark_kernels.formats`), but the indexer's keys in `dtype`."""
        self.shape = shape
        self.layers = [
            LayerCache(config, layer, shape, num_pages, dtype, device, packed)
            for layer in range(config.num_hidden_layers)
        ]

    @property
    def memory_bytes(self) -> int:
        """Bytes held by all layers."""
        tensors = (t for layer in self.layers for t in vars(layer).values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)
