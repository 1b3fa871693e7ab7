"""Context features of the last tokens: a read returns the last rows written, whenever it happens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark_ray.engine.feature_window import Committed, FeatureWindow

NUM_SLOTS, WINDOW, WIDTH = 3, 8, 2


class Plain:
    """The same, one row at a time."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], float] = {}

    def store(self, committed: Committed, features: torch.Tensor) -> None:
        for slot, stop, count, first in zip(*(getattr(committed, name).tolist() for name in Committed.__annotations__)):
            for offset in range(count):
                self.rows[slot, stop - count + offset] = features[first + offset, 0].item()

    def since(self, slot: int, num_known: int, num_computed: int) -> list[float]:
        start = max(num_known, num_computed - WINDOW)
        return [self.rows[slot, position] for position in range(start, num_computed)]


def committed(*parts: tuple[int, int, int, int]) -> Committed:
    """Of (slot, stop, count, first row)."""
    return Committed(*np.array(parts).T)


def asked(window: FeatureWindow, slot: int, num_known: int, num_computed: int) -> list[float]:
    missing = window.since(np.array([slot]), np.array([num_known]), np.array([num_computed]))
    assert missing.positions.tolist() == list(range(max(num_known, num_computed - WINDOW), num_computed))
    return missing.features[:, 0].tolist()


@pytest.mark.parametrize("steps_between_questions", [1, 5, 40])
def test_reads_equal_those_of_one_row_at_a_time(steps_between_questions):
    generator = np.random.default_rng(0)
    window, plain = FeatureWindow(NUM_SLOTS, WINDOW), Plain()
    lengths, stamp = np.zeros(NUM_SLOTS, dtype=np.int64), 0.0
    for step in range(400):
        parts, first = [], 0
        for slot in range(NUM_SLOTS):
            if generator.random() < 0.05:
                lengths[slot] = 0  # another sequence has the slot now
            # A prompt may be longer than the window, a round has rows that were rejected.
            count = int(generator.integers(1, 20 if lengths[slot] == 0 else 4))
            lengths[slot] += count
            parts.append((slot, int(lengths[slot]), count, first))
            first += count + int(generator.integers(0, 3))
        features = (stamp + torch.arange(first, dtype=torch.float64))[:, None].repeat(1, WIDTH)
        stamp += first
        for each in (window, plain):
            each.store(committed(*parts), features)
        if step % steps_between_questions == 0:
            for slot, length in enumerate(lengths.tolist()):
                known = int(generator.integers(0, length + 1))
                assert asked(window, slot, known, length) == plain.since(slot, known, length)


def test_chunks_of_a_long_prompt_do_not_pile_up():
    window, chunk = FeatureWindow(NUM_SLOTS, WINDOW), 100
    for number in range(1, 6):
        window.store(committed((0, number * chunk, chunk, 0)), torch.full((chunk, WIDTH), float(number)))
        assert not window._waiting
    assert asked(window, 0, 0, 5 * chunk) == [5.0] * WINDOW
