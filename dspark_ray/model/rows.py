"""Input of one forward: the flattened rows of many sequences, and the index of each row's keys.

Window keys and raw compressor rows are kept in pools: a ring per sequence, then staging.

    pool    | ring of slot 0 | ring of slot 1 | ... | staging: one place per row of a forward |

A verify block (an anchor and its drafts) writes its rows into its ring, at position mod ring length, before it reads;
the ring is long enough to keep all rows still needed. A longer segment (a chunk of a prompt) may exceed its ring. Its
rows are written to staging, keys before its start are read from the ring, and after the reads its last rows move into
the ring:

    positions      start-W+1 ........ start-1 | start ........ start+n-1
    where          the ring, by p mod ring    | staging, by row of the forward

The host sends the integers of the segments only. Indices are computed on the device, once per forward, and shared by
all layers of a kind (docs/model.md, Rows and positions).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_ray.cache.shape import CacheShape


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence: positions start .. start + len(token_ids) - 1."""

    slot: int
    """The sequence's ring in every pool."""
    start: int
    """Position of the first token; everything before it is in the cache."""
    token_ids: list[int]
    pages: list[int]
    """Pages of the compressed cache, in order of position."""


@dataclass(frozen=True)
class Moves:
    """Rows to move from staging to the rings once a layer has read its pool."""

    sources: Tensor
    """[s] pool rows"""
    targets: Tensor
    """[s] pool rows"""

    def apply(self, pool: Tensor) -> None:
        pool[self.targets] = pool[self.sources]


@dataclass(frozen=True)
class PoolIndex:
    """Indices into a pool: where each row is written, and the keys that are read afterwards."""

    slot_mapping: Tensor
    """[N] pool row that each row is written to."""
    keys: Tensor
    """[Q, K] pool rows, oldest first, -1 where there is no key."""
    moves: Moves | None
    """None where every segment is a verify block."""


@dataclass(frozen=True)
class CompressIndex:
    """Entries of one compression ratio: those that close in this forward, and those visible to each row."""

    pool: PoolIndex
    """keys [E, S] are the raw rows that each of the E closing entries pools; S is r, or 2r in CSA."""
    store_entries: Tensor
    """[E] flat entries to write, -1 for none."""
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
    window: PoolIndex
    compressed: dict[int, CompressIndex]
    """By compression ratio."""
    padding: Tensor | None = None
    """[N] bool: rows that fill up a recorded step and need no experts; None without padding."""


@dataclass(frozen=True)
class Layout:
    """The rows of a forward as integers on one device, from which all indices are computed."""

    token_ids: Tensor
    """[N]"""
    positions: Tensor
    """[N]"""
    slots: Tensor
    """[N] slot of each row's sequence, which is also its ring"""
    owners: Tensor
    """[N] row of `pages`"""
    pages: Tensor
    """[R, P]"""
    staged_from: Tensor | None
    """[N] first position of the row's sequence that is in staging, NOT_STAGED in verify blocks; None if all segments
    are verify blocks."""
    padding: Tensor | None = None
    """[N] bool: rows of no sequence; None without padding."""


def build_rows(segments: SequenceOf[Segment], shape: CacheShape, device: torch.device | str = "cpu") -> Rows:
    """Flatten `segments` and compute all indices of the forward."""
    flat = _Flat.of(segments, shape)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    layout = Layout(
        token_ids=tensor(flat.token_ids),
        positions=tensor(flat.positions),
        slots=tensor(flat.slots),
        owners=tensor(flat.owners),
        pages=tensor(flat.pages),
        staged_from=None if flat.staged_from is None else tensor(flat.staged_from),
    )

    def moves(ring: int) -> Moves | None:
        if flat.staged_from is None:
            return None
        kept = np.flatnonzero(flat.kept_from(ring) <= flat.positions)
        targets = flat.slots[kept] * ring + flat.positions[kept] % ring
        return Moves(tensor(kept + shape.num_slots * ring), tensor(targets))

    compressed = {}
    for ratio, ring in shape.raw_rings.items():
        closing = tensor(np.flatnonzero((flat.positions + 1) % ratio == 0))
        num_visible = (int(flat.positions.max()) + 1) // ratio
        compressed[ratio] = compress_index(layout, shape, ratio, closing, num_visible, moves(ring))
    return Rows(
        token_ids=layout.token_ids,
        positions=layout.positions,
        window=window_index(layout, shape, moves(shape.window_ring)),
        compressed=compressed,
    )


@dataclass(frozen=True)
class _Flat:
    """The segments as arrays per row [N], and their pages [R, P], padded with 0."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    owners: np.ndarray
    pages: np.ndarray
    ends: np.ndarray
    """[N] first position after the row's segment."""
    staged_from: np.ndarray | None

    @staticmethod
    def of(segments: SequenceOf[Segment], shape: CacheShape) -> _Flat:
        lengths = np.array([len(segment.token_ids) for segment in segments], dtype=np.int64)
        starts = np.array([segment.start for segment in segments], dtype=np.int64)
        slots = np.array([segment.slot for segment in segments], dtype=np.int64)
        owners = np.repeat(np.arange(len(segments)), lengths)
        first_rows = np.cumsum(lengths) - lengths
        pages = np.zeros((len(segments), max(len(segment.pages) for segment in segments) or 1), dtype=np.int64)
        for row, segment in zip(pages, segments, strict=True):
            row[: len(segment.pages)] = segment.pages
        staged = lengths > shape.block_length
        return _Flat(
            token_ids=np.array([token for segment in segments for token in segment.token_ids], dtype=np.int64),
            positions=np.arange(len(owners)) + (starts - first_rows)[owners],
            slots=slots[owners],
            owners=owners,
            pages=pages,
            ends=(starts + lengths)[owners],
            staged_from=np.where(staged, starts, NOT_STAGED)[owners] if staged.any() else None,
        )

    def kept_from(self, ring: int) -> np.ndarray:
        """[N] first position whose row is kept in the ring after a staged segment; NOT_STAGED in verify blocks."""
        assert self.staged_from is not None
        return np.where(self.staged_from == NOT_STAGED, NOT_STAGED, self.ends - ring)


NOT_STAGED = 2**62
"""Larger than every position."""


def window_index(layout: Layout, shape: CacheShape, moves: Moves | None) -> PoolIndex:
    """Index of every row's sliding window."""
    rows = torch.arange(len(layout.positions), device=layout.positions.device)
    return _pool_index(layout, shape, rows, shape.window, shape.window_ring, moves)


def compress_index(
    layout: Layout, shape: CacheShape, ratio: int, closing: Tensor, num_visible: int, moves: Moves | None
) -> CompressIndex:
    """Index of the entries of `ratio`.

    `closing` [E] are rows checked for an entry to write, and include every row that ends a window; `num_visible` is the
    largest number of entries that a row sees.
    """
    entries_per_page = shape.page_size // ratio
    positions = layout.positions[closing]
    entry = positions // ratio
    stored = _flat_entries(layout.pages, layout.owners[closing], entry, entries_per_page)
    window = torch.arange(num_visible, device=layout.positions.device)
    visible = (layout.pages * entries_per_page)[:, window // entries_per_page] + window % entries_per_page  # [R, K]
    counts = (layout.positions + 1).div(ratio, rounding_mode="floor").unsqueeze(1)
    return CompressIndex(
        pool=_pool_index(layout, shape, closing, shape.pooled_rows[ratio], shape.raw_rings[ratio], moves),
        store_entries=torch.where((positions + 1) % ratio == 0, stored, -1),
        entry_positions=entry * ratio,
        # An entry is visible from the position of its last token on.
        visible=torch.where(window < counts, visible[layout.owners], -1),
    )


def _pool_index(
    layout: Layout, shape: CacheShape, readers: Tensor, num_keys: int, ring: int, moves: Moves | None
) -> PoolIndex:
    """Write index of all rows; read index of the `num_keys` positions up to each of the rows `readers` [Q]."""
    offsets = torch.arange(1 - num_keys, 1, device=readers.device)
    positions, slots = layout.positions[readers].unsqueeze(1), layout.slots[readers].unsqueeze(1)
    wanted = positions + offsets
    keys = slots * ring + wanted % ring
    written = layout.slots * ring + layout.positions % ring
    if layout.staged_from is not None:
        staging = shape.num_slots * ring
        rows = torch.arange(len(layout.positions), device=readers.device)
        own = wanted >= layout.staged_from[readers].unsqueeze(1)
        keys = torch.where(own, staging + readers.unsqueeze(1) + offsets, keys)
        written = torch.where(layout.positions >= layout.staged_from, staging + rows, written)
    return PoolIndex(written, torch.where(wanted >= 0, keys, -1), moves)


def _flat_entries(pages: Tensor, owners: Tensor, entry: Tensor, entries_per_page: int) -> Tensor:
    return pages[owners, entry // entries_per_page] * entries_per_page + entry % entries_per_page
