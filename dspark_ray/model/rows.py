"""What one forward works on: the flattened rows of many sequences, and where each finds its keys.

Cache tensors that slide (window keys, raw compressor rows) are pools: a ring per sequence, then staging.

    pool    | ring of slot 0 | ring of slot 1 | ... | staging: one place per row of a forward |

A block (an anchor and its drafts) writes its rows into its ring, at position mod ring length, and reads afterwards: the
ring is long enough that nothing still needed is overwritten. A longer segment (a chunk of a prompt) may be longer than
its ring. Its rows are written to staging, keys before its start come from the ring, and when everything has
been read, its last rows move into the ring:

    positions      start-W+1 ........ start-1 | start ........ start+n-1
    where          the ring, by p mod ring    | staging, by row of the forward

Only integers of the segments come from the host. The indices are worked out on the device that needs them, once per
forward, and every layer of a kind shares them.
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
    """Rows to move from staging to the rings when all layers' reads of a pool are done."""

    sources: Tensor
    """[s] pool rows"""
    targets: Tensor
    """[s] pool rows"""

    def apply(self, pool: Tensor) -> None:
        pool[self.targets] = pool[self.sources]


@dataclass(frozen=True)
class PoolIndex:
    """How rows meet a pool: where each is written, and which keys are read afterwards."""

    slot_mapping: Tensor
    """[N] pool row that each row is written to."""
    keys: Tensor
    """[Q, K] pool rows, oldest first, -1 where there is no key."""
    moves: Moves | None
    """None where every segment is a block."""


@dataclass(frozen=True)
class CompressIndex:
    """Entries of one compression ratio: those that close in this forward, and those each row may see."""

    pool: PoolIndex
    """keys [E, coff*r] are the raw rows that each of the E closing entries pools."""
    store_entries: Tensor
    """[E] flat entries written, -1 for none."""
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
    """[N] bool: rows that only fill up a recorded step, and need no experts; None where there are none."""


@dataclass(frozen=True)
class Layout:
    """The rows of a forward as integers on one device, from which every index follows."""

    token_ids: Tensor
    """[N]"""
    positions: Tensor
    """[N]"""
    slots: Tensor
    """[N] ring of each row's sequence"""
    owners: Tensor
    """[N] row of `pages`"""
    pages: Tensor
    """[R, P]"""
    staged_from: Tensor | None
    """[N] position from which on the row's sequence is in staging, beyond every position for a block; None if all
    are blocks."""
    padding: Tensor | None = None
    """[N] bool: rows of no sequence; None where there are none."""


def build_rows(segments: SequenceOf[Segment], shape: CacheShape, device: torch.device | str = "cpu") -> Rows:
    """Flatten `segments` and work out every index of the forward."""
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
    """Position behind the row's segment."""
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
        """[N] position from which on a staged segment's rows survive in its ring; never, in blocks."""
        assert self.staged_from is not None
        return np.where(self.staged_from == NOT_STAGED, NOT_STAGED, self.ends - ring)


NOT_STAGED = 2**62
"""Beyond every position."""


def window_index(layout: Layout, shape: CacheShape, moves: Moves | None) -> PoolIndex:
    """The sliding window of every row."""
    rows = torch.arange(len(layout.positions), device=layout.positions.device)
    return _pool_index(layout, shape, rows, shape.window, shape.window_ring, moves)


def compress_index(
    layout: Layout, shape: CacheShape, ratio: int, closing: Tensor, num_visible: int, moves: Moves | None
) -> CompressIndex:
    """Entries of `ratio`; `closing` [E] are the rows looked at for entries to write: at least all that end a window.

    `num_visible` is the most entries that any row sees.
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
        # An entry is visible to a position iff its last token is not younger.
        visible=torch.where(window < counts, visible[layout.owners], -1),
    )


def _pool_index(
    layout: Layout, shape: CacheShape, readers: Tensor, num_keys: int, ring: int, moves: Moves | None
) -> PoolIndex:
    """Where all rows are written; the `num_keys` positions up to each of the rows `readers` [Q] as pool rows."""
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
