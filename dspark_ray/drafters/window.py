"""The last main_x rows of every sequence, kept by the verifier.

So a drafter is disposable, and a sequence may go on for a while without it: it is told what it missed when it is
needed again.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from dspark_ray.drafters.protocol import ContextUpdate


class FeatureWindow:
    """W rows per slot, by position modulo W; `restore` is all a new drafter needs to know."""

    def __init__(self, num_slots: int, window: int, hidden_size: int) -> None:
        self.window = window
        self._rows = torch.zeros(num_slots * window, hidden_size)

    def store(self, update: ContextUpdate) -> None:
        """Remember rows of newly committed tokens."""
        slots = update.slots * self.window + update.positions % self.window
        self._rows[torch.from_numpy(slots)] = update.main_x.to(self._rows.dtype)

    def since(self, sequences: Iterable[tuple[int, int, int]]) -> ContextUpdate:
        """What a drafter misses of (slot, positions it knows, computed positions), as far as it can matter to it."""
        slots, positions = [], []
        for slot, num_known, num_computed in sequences:
            missing = np.arange(max(num_known, num_computed - self.window, 0), num_computed)
            slots.append(np.full(len(missing), slot))
            positions.append(missing)
        none = np.empty(0, dtype=np.int64)
        flat_slots, flat_positions = np.concatenate((none, *slots)), np.concatenate((none, *positions))
        rows = torch.from_numpy(flat_slots * self.window + flat_positions % self.window)
        return ContextUpdate(flat_slots, flat_positions, self._rows[rows])

    def restore(self, sequences: Iterable[tuple[int, int]]) -> ContextUpdate:
        """Everything known about (slot, number of computed positions) of the running sequences."""
        return self.since((slot, 0, num_computed) for slot, num_computed in sequences)
