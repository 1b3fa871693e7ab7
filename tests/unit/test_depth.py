"""How deep a block is drafted, by what was verified of it."""

from __future__ import annotations

import numpy as np

from dspark_ray.speculative.depth import DraftDepth


def run(depth: DraftDepth, wanted: list[int], num_steps: int) -> list[int]:
    """Depths of steps in which every request would have had `wanted` drafts verified, had they been drafted."""
    depths = []
    for _ in range(num_steps):
        depths.append(depth.choose())
        depth.observe(np.minimum(wanted, depths[-1]), depths[-1])
    return depths


def test_at_first_the_whole_block_is_drafted() -> None:
    assert DraftDepth(5).choose() == 5


def test_what_is_always_verified_is_always_drafted() -> None:
    assert set(run(DraftDepth(5), [5, 1, 5], 100)) == {5}


def test_positions_that_are_never_verified_are_not_drafted() -> None:
    depths = run(DraftDepth(5), [2, 1, 0], 200)[100:]
    assert np.mean([depth == 2 for depth in depths]) > 0.9


def test_the_whole_block_is_looked_at_now_and_then() -> None:
    depths = run(DraftDepth(5), [2, 1, 0], 200)[100:]
    assert 5 <= depths.count(5) <= 7


def test_when_more_becomes_worth_it_more_is_drafted() -> None:
    depth = DraftDepth(5)
    run(depth, [1, 1], 100)
    assert set(run(depth, [4, 1], 40)[-20:]) <= {4, 5}


def test_one_position_is_always_drafted() -> None:
    assert set(run(DraftDepth(5), [0, 0], 200)[100:]) == {1, 5}


def test_a_single_request_among_many_does_not_deepen_the_block_for_all() -> None:
    depths = run(DraftDepth(5), [5] + [1] * 99, 300)[150:]
    assert np.median(depths) == 1
