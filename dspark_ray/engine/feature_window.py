"""The target's features of the last tokens of every sequence, kept by the verifier.

So a drafter is disposable, and a sequence may go on for a while without it: it is told what it missed when it is
needed again. Features are projected to main_x only then: rejected rows, and rows that nobody drafts from, never are.

Letters: k sequences, W window, T tapped layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Committed:
    """Which rows of a forward became tokens of k sequences.

    Rows first_rows[i] .. first_rows[i] + counts[i] - 1 hold the last counts[i] positions before stops[i].
    """

    slots: np.ndarray
    """[k]"""
    stops: np.ndarray
    counts: np.ndarray
    first_rows: np.ndarray


@dataclass(frozen=True)
class Missing:
    """Tokens that a drafter has not been told of."""

    slots: np.ndarray
    """[n]"""
    positions: np.ndarray
    """[n]"""
    features: Tensor
    """[n, T*d]"""


class FeatureWindow:
    """W rows per slot, by position modulo W.

    While nobody is drafted nobody asks, so rows are put into their places only when somebody does, or when many wait.
    """

    _MOST_WAITING = 16
    """Steps whose features are kept whole, rejected rows too, before they are sorted in; and as many rows per slot,
    so that chunks of long prompts, of which only the last W rows count, do not pile up."""

    def __init__(self, num_slots: int, window: int) -> None:
        self.num_slots, self.window = num_slots, window
        self._waiting: list[tuple[Committed, Tensor]] = []
        self._rows = torch.empty(0)
        """[slots * W, T*d], made with the first features, whose width, type and device it takes."""

    def store(self, committed: Committed, features: Tensor) -> None:
        """Remember `features` [N, T*d] of newly committed tokens, the last W of each sequence."""
        self._waiting.append((committed, features))
        num_rows = sum(len(features) for _, features in self._waiting)
        if len(self._waiting) > self._MOST_WAITING or num_rows > self._MOST_WAITING * self.num_slots:
            self._sort_in()

    def _sort_in(self) -> None:
        if not self._waiting:
            return
        features = torch.cat([features for _, features in self._waiting])
        first_rows = np.cumsum([0, *(len(features) for _, features in self._waiting)])
        places, rows = zip(
            *(self._moves(committed, first) for (committed, _), first in zip(self._waiting, first_rows.tolist())),
            strict=True,
        )
        self._waiting.clear()
        # Of rows that go to the same place, the newest is the one that counts.
        newest, latest = np.unique(np.concatenate(places)[::-1], return_index=True)
        rows = np.concatenate(rows)[::-1][latest]
        if not len(self._rows):
            self._rows = features.new_zeros(self.num_slots * self.window, features.shape[1])
        self._rows[torch.from_numpy(newest)] = features[torch.from_numpy(rows)]

    def _moves(self, committed: Committed, first_row: int) -> tuple[np.ndarray, np.ndarray]:
        """(place, row) of every row that is kept of a step whose features begin at `first_row`."""
        counts = np.minimum(committed.counts, self.window)
        owners, positions = _ranges(committed.stops - counts, counts)
        # A row is as far behind the first position of its sequence as its place is behind the first row.
        rows = positions + (committed.first_rows + committed.counts - committed.stops)[owners] + first_row
        return self._places(committed.slots[owners], positions), rows

    def since(self, slots: np.ndarray, num_known: np.ndarray, num_computed: np.ndarray) -> Missing:
        """What a drafter misses that knows `num_known` [k] of `num_computed` [k] positions; 0 is a new drafter."""
        self._sort_in()
        # Whoever knows more than there is knows another sequence that had the slot.
        num_known = np.where(num_known > num_computed, 0, num_known)
        starts = np.maximum(num_known, num_computed - self.window)
        owners, positions = _ranges(starts, num_computed - starts)
        return Missing(slots[owners], positions, self._rows[torch.from_numpy(self._places(slots[owners], positions))])

    def _places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return slots * self.window + positions % self.window


def _ranges(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, value) of starts[i], starts[i] + 1, ... for counts[i] values each, one after the other."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) + (starts - np.cumsum(counts) + counts)[owners]
