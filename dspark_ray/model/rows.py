"""What one forward works on: the flattened rows of many sequences, and where each finds its keys.

A sequence brings rows at positions start .. start+n-1 (a verify block or a prefill chunk; the code is the same).
Keys older than `start` come from its ring, younger ones are rows of this very forward:

    positions      start-W+1 ........ start-1 | start ........ start+n-1
    where          the ring, by p mod ring    | this forward's own rows

All of it is computed once, on the CPU, from integers; every layer of a kind shares it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_ray.config import CSA_RATIO, ModelConfig


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence: positions start .. start + len(token_ids) - 1."""

    slot: int
    """Row of the rings that belongs to the sequence."""
    start: int
    """Position of the first token; everything before it is in the cache."""
    token_ids: list[int]
    pages: list[int]
    """Pages of the compressed cache, in order of position."""


@dataclass(frozen=True)
class RingIndex:
    """How rows meet a ring of `length` slots per sequence: what to read, which keys to see, what to store."""

    history: Tensor
    """[h] flat ring slots read before anything is stored."""
    keys: Tensor
    """[N, K] into [history ++ own rows], -1 where there is no key."""
    store_slots: Tensor
    """[s] flat ring slots written afterwards ..."""
    store_rows: Tensor
    """[s] ... with these rows of the forward."""


@dataclass(frozen=True)
class CompressIndex:
    """Entries of one compression ratio: those that close in this forward, and those each row may see."""

    ring: RingIndex
    """keys [E, coff*r] are the raw rows that each of the E closing entries pools."""
    store_entries: Tensor
    """[E] flat entries written."""
    entry_positions: Tensor
    """[E] position of each entry's first token."""
    visible: Tensor
    """[N, K] flat entries visible to each row, oldest first, -1 beyond them."""


@dataclass(frozen=True)
class Rows:
    """The input of one forward over N flattened rows."""

    token_ids: Tensor
    """[N]"""
    positions: Tensor
    """[N]"""
    window: RingIndex
    compressed: dict[int, CompressIndex]
    """By compression ratio."""


@dataclass(frozen=True)
class CacheShape:
    """Ring lengths and paging, from the model and the longest verify block (specification 3.2)."""

    window: int
    window_ring: int
    raw_rings: dict[int, int]
    """Ring length of raw compressor rows by ratio."""
    pooled_rows: dict[int, int]
    """Raw rows under one entry: 2r where windows overlap (CSA), else r."""
    page_size: int

    @staticmethod
    def of(config: ModelConfig, gamma: int, page_size: int) -> CacheShape:
        """The tight lengths: one slot fewer and a rejected row would overwrite a row still needed.

        The youngest row of a block of 1+gamma may be `gamma` positions ahead of the first kept one. A forward
        that wrote its rows before reading the ring would need one slot more.
        """
        ratios = sorted(set(config.compress_ratios) - {0})
        pooled = {ratio: 2 * ratio if ratio == CSA_RATIO else ratio for ratio in ratios}
        return CacheShape(
            window=config.sliding_window,
            window_ring=config.sliding_window - 1 + gamma,
            raw_rings={ratio: pooled[ratio] - 1 + gamma for ratio in ratios},
            pooled_rows=pooled,
            page_size=page_size,
        )


def build_rows(segments: SequenceOf[Segment], shape: CacheShape, device: torch.device | str = "cpu") -> Rows:
    """Flatten `segments` and work out every index of the forward."""
    layout = _Layout.of(segments)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def ring(wanted: np.ndarray, owners: np.ndarray, length: int) -> RingIndex:
        return RingIndex(*(tensor(part) for part in _ring_index(layout, wanted, owners, length)))

    window = np.arange(1 - shape.window, 1) + layout.positions[:, None]
    compressed = {}
    for ratio, length in shape.raw_rings.items():
        closing = _closing_entries(layout, ratio)
        ends = (closing.window + 1) * ratio
        pooled = np.arange(-shape.pooled_rows[ratio], 0) + ends[:, None]
        entries_per_page = shape.page_size // ratio
        compressed[ratio] = CompressIndex(
            ring=ring(pooled, closing.owner, length),
            store_entries=tensor(_flat_entries(layout, closing.owner, closing.window, entries_per_page)),
            entry_positions=tensor(closing.window * ratio),
            visible=tensor(_visible_entries(layout, ratio, entries_per_page)),
        )
    return Rows(
        token_ids=tensor(layout.token_ids),
        positions=tensor(layout.positions),
        window=ring(window, layout.owners, shape.window_ring),
        compressed=compressed,
    )


@dataclass(frozen=True)
class _Layout:
    """The segments as arrays: per segment [R], per row [N]."""

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first_rows: np.ndarray
    pages: np.ndarray  # [R, P], padded with 0
    token_ids: np.ndarray
    positions: np.ndarray
    owners: np.ndarray

    @staticmethod
    def of(segments: SequenceOf[Segment]) -> _Layout:
        lengths = np.array([len(segment.token_ids) for segment in segments], dtype=np.int64)
        starts = np.array([segment.start for segment in segments], dtype=np.int64)
        first_rows = np.cumsum(lengths) - lengths
        owners = np.repeat(np.arange(len(segments)), lengths)
        pages = np.zeros((len(segments), max(len(segment.pages) for segment in segments) or 1), dtype=np.int64)
        for row, segment in zip(pages, segments, strict=True):
            row[: len(segment.pages)] = segment.pages
        return _Layout(
            slots=np.array([segment.slot for segment in segments], dtype=np.int64),
            starts=starts,
            lengths=lengths,
            first_rows=first_rows,
            pages=pages,
            token_ids=np.array([token for segment in segments for token in segment.token_ids], dtype=np.int64),
            positions=np.arange(len(owners)) - first_rows[owners] + starts[owners],
            owners=owners,
        )


@dataclass(frozen=True)
class _Closing:
    """Compressed windows whose last token is among the rows: window numbers and owning segments [E]."""

    window: np.ndarray
    owner: np.ndarray


def _closing_entries(layout: _Layout, ratio: int) -> _Closing:
    closes = (layout.positions + 1) % ratio == 0
    return _Closing(window=layout.positions[closes] // ratio, owner=layout.owners[closes])


def _ring_index(
    layout: _Layout, wanted: np.ndarray, owners: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Resolve positions `wanted` [Q, K] of segments `owners` [Q] into ring slots and own rows."""
    starts, slots = layout.starts[owners][:, None], layout.slots[owners][:, None]
    own = wanted >= starts
    old = (wanted >= 0) & ~own
    # Many rows want the same old position: read each once.
    history, where = np.unique((slots * length + wanted % length)[old], return_inverse=True)
    keys = np.full(wanted.shape, -1, dtype=np.int64)
    keys[old] = where
    keys[own] = (wanted - starts + layout.first_rows[owners][:, None] + len(history))[own]
    # Only the last `length` rows of a segment survive in its ring.
    ends = layout.starts + layout.lengths
    kept = layout.positions >= (ends - length)[layout.owners]
    store_slots = layout.slots[layout.owners] * length + layout.positions % length
    return history, keys, store_slots[kept], np.flatnonzero(kept)


def _flat_entries(layout: _Layout, owners: np.ndarray, window: np.ndarray, entries_per_page: int) -> np.ndarray:
    page = layout.pages[owners, window // entries_per_page]
    return page * entries_per_page + window % entries_per_page


def _visible_entries(layout: _Layout, ratio: int, entries_per_page: int) -> np.ndarray:
    """Entry w is visible to position p iff its last token is not younger: w < (p + 1) // ratio."""
    counts = (layout.positions + 1) // ratio
    window = np.arange(counts.max(initial=0))
    pages = layout.pages[:, window // entries_per_page]  # [R, K]
    flat = (pages * entries_per_page + window % entries_per_page)[layout.owners]
    return np.where(window < counts[:, None], flat, -1)
