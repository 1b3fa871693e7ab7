"""The last main_x rows of every sequence, kept by the verifier, so that a drafter is disposable."""

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
        """Remember rows that are being sent to the drafter."""
        slots = update.slots * self.window + update.positions % self.window
        self._rows[torch.from_numpy(slots)] = update.main_x.to(self._rows.dtype)

    def restore(self, sequences: Iterable[tuple[int, int]]) -> ContextUpdate:
        """Everything known about (slot, number of computed positions) of the running sequences."""
        parts = []
        for slot, num_computed in sequences:
            positions = np.arange(max(0, num_computed - self.window), num_computed)
            rows = self._rows[torch.from_numpy(slot * self.window + positions % self.window)]
            parts.append(ContextUpdate(np.full(len(positions), slot), positions, rows))
        return ContextUpdate.join(parts, self._rows.shape[1])
