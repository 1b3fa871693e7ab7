"""Context features of the last W tokens of every sequence, kept by the verifier.

They make the drafter disposable, and a sequence can go without drafts for a while: when it is drafted again, the
drafter receives the features it lacks. Only then are they projected; rejected and unused rows never are.

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
    """Context features of tokens that a drafter has not received."""

    slots: np.ndarray
    """[n]"""
    positions: np.ndarray
    """[n]"""
    features: Tensor
    """[n, T*d]"""


class FeatureWindow:
    """W rows per slot, by position modulo W.

    Rows are sorted into their places only when they are asked for or when many wait, because no row is needed as long
    as no request is drafted.
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
        # The last write to a place wins.
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
        """Features that a drafter with the first `num_known` [k] of `num_computed` [k] positions lacks.

        `num_known` is 0 for a new drafter.
        """
        self._sort_in()
        # num_known > num_computed means that the slot was reused: the drafter knows the sequence that had it before.
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
