"""`indexer_topk` against its reference.

Scores that differ by rounding alone may be chosen in either order; where all arithmetic is exact the choice must be the
reference's.
"""

from __future__ import annotations

import compare
import pytest
import torch
from compare import DEVICE, DTYPES
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.gpu import indexer

NAN = float("nan")

ROUNDING = 1e-5
"""Relative to the sum over heads of |weight * product|, because sums are in float32."""


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that hold 64 scores and count visible entries by 16."""
    monkeypatch.setattr(indexer, "_MOST_SCORES", 64)
    monkeypatch.setattr(indexer, "_LEAST_SCORES", 64)
    monkeypatch.setattr(indexer, "_SAMPLES", 16)


def visible(counts: list[int], length: int, pool_rows: int) -> Tensor:
    """[N, length] entries in a random order, as pages of a cache are; every row sees the first of its own ones."""
    order = torch.stack([compare.integers(0, 2**30, pool_rows).argsort()[:length] for _ in counts])
    seen = torch.arange(length, device=DEVICE) < torch.tensor(counts, device=DEVICE).unsqueeze(1)
    return torch.where(seen, order, -1)


def visible_to_requests(counts: list[int], rows: int, length: int, pool_rows: int) -> Tensor:
    """As `visible`, for requests of so many rows each, of which the first see one entry less."""
    index = visible(counts, length, pool_rows).repeat_interleave(rows, 0)
    index[::rows].scatter_(1, torch.tensor(counts, device=DEVICE).unsqueeze(1) - 1, -1)
    return index


def assert_best_are_chosen(
    query: Tensor, head_weights: Tensor, keys: Tensor, entry_index: Tensor, topk: int, chosen: Tensor
) -> None:
    """`chosen` is part of entry_index in its order, as long as the reference's, and nothing better is left out."""
    expected = reference.indexer_topk(query, head_weights, keys, entry_index, topk)
    assert chosen.shape == expected.shape
    assert chosen.dtype == expected.dtype
    assert torch.equal(chosen < 0, expected < 0)
    products = torch.einsum("nhd,nkd->nhk", query.double(), keys[entry_index.clamp_min(0)].double())
    weights = head_weights.double()
    scores = torch.einsum("nh,nhk->nk", weights, products.relu())
    sizes = torch.einsum("nh,nhk->nk", weights.abs(), products.abs())
    for row, (mine, all_entries) in enumerate(zip(chosen, entry_index, strict=True)):
        mine, all_entries = mine[mine >= 0], all_entries[all_entries >= 0]
        is_mine = torch.isin(all_entries, mine)
        assert torch.equal(all_entries[is_mine], mine), f"row {row} is not in the order of its entries"
        if not is_mine.all():
            row_scores = scores[row, : len(all_entries)]
            best_left = row_scores[~is_mine].max()
            worst_taken = row_scores[is_mine].min()
            bound = ROUNDING * sizes[row, : len(all_entries)].max()
            assert worst_taken >= best_left - bound, f"row {row}: {worst_taken} is taken, {best_left} is not"


def exact(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which all products and sums here are exact, also in bfloat16: their scores tie often."""
    return compare.integers(-1, 2, *shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "length", "topk", "heads", "dim"),
    [
        ([150], 150, 20, 3, 24),
        ([150, 0, 1, 19, 20, 21, 149], 150, 20, 17, 16),
        ([1500], 2000, 512, 3, 16),
        ([200], 201, 1, 64, 128),
    ],
)
def test_the_best_entries_are_chosen(
    counts: list[int], length: int, topk: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    query, head_weights = compare.random(len(counts), heads, dim, dtype=dtype), compare.random(len(counts), heads)
    keys, index = compare.random(2100, dim, dtype=dtype), visible(counts, length, 2100)
    keys[~torch.isin(torch.arange(len(keys), device=DEVICE), index)] = NAN
    chosen = gpu.indexer_topk(query, head_weights.to(dtype), keys, index, topk)
    assert_best_are_chosen(query, head_weights.to(dtype), keys, index, topk, chosen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype: torch.dtype) -> None:
    """More than there are programs: of two neighbours both see the same entries, or one sees more, or others."""
    counts = [int(count) for count in compare.integers(1, 41, 43)]
    query, head_weights = compare.random(129, 3, 16, dtype=dtype), compare.random(129, 3)
    keys, index = compare.random(99, 16, dtype=dtype), visible_to_requests(counts, 3, 40, 99)
    chosen = gpu.indexer_topk(query, head_weights, keys, index, 20)
    assert_best_are_chosen(query, head_weights, keys, index, 20, chosen)


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_neighbours_that_share_keys_see_several_blocks(num_rows: int) -> None:
    counts, length = [1290] * num_rows, 1300
    query, head_weights = compare.random(num_rows * 2 - 1, 3, 16, dtype=torch.bfloat16), exact(num_rows * 2 - 1, 3)
    keys = compare.random(1400, 16, dtype=torch.bfloat16)
    index = visible_to_requests(counts, 2, length, 1400)[1:]
    chosen = gpu.indexer_topk(query, head_weights, keys, index, 100)
    assert_best_are_chosen(query, head_weights, keys, index, 100, chosen)


@pytest.mark.usefixtures("small_programs")
def test_neighbours_may_differ_in_a_single_entry() -> None:
    """It is the best one of the row that has it, wherever it stands."""
    query, head_weights = exact(14, 3, 16, dtype=torch.bfloat16), torch.ones(14, 3, device=DEVICE)
    keys, index = exact(80, 16, dtype=torch.bfloat16), visible([64], 64, 64).repeat(14, 1)
    for row in range(1, 14, 2):
        index[row, 4 * row] = 64 + row
        keys[64 + row] = 64 * query[row, 0]
    chosen = gpu.indexer_topk(query, head_weights, keys, index, 20)
    assert torch.equal(chosen, reference.indexer_topk(query, head_weights, keys, index, 20))


@pytest.mark.parametrize(
    ("counts", "length"), [([65, 64, 63, 33, 32, 31, 1, 0], 65), ([200, 129, 128], 200), ([400, 399], 400)]
)
@pytest.mark.usefixtures("small_programs")
def test_rows_longer_than_a_program_holds(counts: list[int], length: int) -> None:
    """400 entries take four rounds of chunks, 65 two and a chunk of a single entry."""
    query, head_weights, keys = exact(len(counts), 3, 16), exact(len(counts), 3), exact(500, 16)
    index = visible(counts, length, 500)
    chosen = gpu.indexer_topk(query, head_weights, keys, index, 32)
    assert torch.equal(chosen, reference.indexer_topk(query, head_weights, keys, index, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [1, 5, 64, 99])
def test_ties_go_to_the_earlier_entry(topk: int, dtype: torch.dtype) -> None:
    """Few different scores, positive and negative, among 100 entries; in the last row all are equal."""
    query, head_weights, keys = exact(4, 4, 16, dtype=dtype), exact(4, 4), exact(120, 16, dtype=dtype)
    query[3] = 0
    index = visible([100, 90, 77, 100], 100, 120)
    chosen = gpu.indexer_topk(query, head_weights, keys, index, topk)
    assert torch.equal(chosen, reference.indexer_topk(query, head_weights, keys, index, topk))


def test_zeros_behind_the_relu_tie() -> None:
    """A weight below 0 turns them to -0, and of one above 0 and one below 0 the scores may cancel."""
    query, keys = -torch.ones(2, 2, 16, device=DEVICE), torch.ones(9, 16, device=DEVICE)
    keys[::2] = -keys[::2]
    head_weights = torch.tensor([[-1.0, -2.0], [1.0, -1.0]], device=DEVICE)
    index = torch.arange(9, device=DEVICE).flip(0).repeat(2, 1)
    chosen = gpu.indexer_topk(query, head_weights, keys, index, 6)
    assert torch.equal(chosen, reference.indexer_topk(query, head_weights, keys, index, 6))
    assert torch.equal(chosen[1], index[1, :6])


def test_scores_of_very_different_size() -> None:
    keys = compare.random(90, 16) * torch.exp2(compare.integers(-60, 60, 90, 1).float())
    query, head_weights, index = compare.random(3, 1, 16), compare.random(3, 1), visible([90, 80, 70], 90, 90)
    chosen = gpu.indexer_topk(query, head_weights, keys, index, 30)
    assert torch.equal(chosen, reference.indexer_topk(query, head_weights, keys, index, 30))


def test_all_visible_entries_are_chosen_where_there_is_room() -> None:
    query, head_weights, keys = compare.random(2, 3, 16), compare.random(2, 3), compare.random(99, 16)
    index = visible([40, 7], 40, 99)
    for topk in (40, 50):
        assert torch.equal(gpu.indexer_topk(query, head_weights, keys, index, topk), index)


def test_index_may_be_a_slice_and_of_32_bits() -> None:
    query, head_weights, keys = exact(3, 3, 16), exact(3, 3), exact(99, 16)
    index = visible([80, 75, 60], 80, 99).int()
    for part in (index[:, 10:70], index.t().contiguous().t()):
        chosen = gpu.indexer_topk(query, head_weights, keys, part, 12)
        assert chosen.dtype == torch.int32
        assert torch.equal(chosen, reference.indexer_topk(query, head_weights, keys, part, 12))


def test_no_rows_choose_nothing() -> None:
    none = torch.empty(0, 80, dtype=torch.int64, device=DEVICE)
    chosen = gpu.indexer_topk(compare.random(0, 3, 16), compare.random(0, 3), compare.random(9, 16), none, 12)
    assert chosen.shape == (0, 12)


def test_what_a_program_cannot_hold_is_refused() -> None:
    query, head_weights, keys = exact(1, 3, 16), exact(1, 3), exact(99, 16)
    index = torch.zeros(1, 20000, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="topk 5000: expected at most 4096"):
        gpu.indexer_topk(query, head_weights, keys, index, 5000)
    with pytest.raises(ValueError, match=r"keys \(99, 8\).*expected contiguous \[P, 16\]"):
        gpu.indexer_topk(query, head_weights, keys[:, :8], index, 90)
