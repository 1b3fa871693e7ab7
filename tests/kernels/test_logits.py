"""Edited logits and filters against the reference."""

from __future__ import annotations

import compare
import pytest
import torch
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.gpu import logits as module

UNLIMITED = 2**31


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a hundred tokens are several blocks, and so are lists of some tens."""
    monkeypatch.setattr(module, "_BLOCK", 32)
    monkeypatch.setattr(module, "_BLOCK_LIST", 16)
    monkeypatch.setattr(module, "_EDITS", 16)


def edits(num_rows: int, vocab_size: int, num_edits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct pairs, some of which forbid a token."""
    pairs = torch.randperm(num_rows * vocab_size, generator=compare.generator())[:num_edits].to(compare.DEVICE)
    offsets = compare.random(num_edits)
    offsets[::3] = -torch.inf
    return pairs // vocab_size, pairs % vocab_size, compare.random(num_edits).abs() + 0.5, offsets


def filters(*rows: tuple[float, int, float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temperatures, top_k, top_p, min_p of rows given as such."""
    columns = torch.tensor(rows, dtype=torch.float64, device=compare.DEVICE).unbind(1)
    return columns[0], columns[1].long(), columns[2], columns[3]


def assert_same_filter(logits: Tensor, draws: tuple[Tensor, Tensor, Tensor, Tensor], widest: int = UNLIMITED) -> None:
    actual, expected = (side.filter_threshold(logits, *draws, widest) for side in (gpu, reference))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected), f"{actual}, expected {expected}"


@pytest.mark.parametrize(("num_rows", "vocab_size", "num_edits"), [(1, 1, 1), (3, 130, 200), (129, 7, 300)])
@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_edited_logits_equal_the_reference(num_rows: int, vocab_size: int, num_edits: int, dtype: torch.dtype) -> None:
    logits, edited = compare.random(num_rows, vocab_size, dtype=dtype), edits(num_rows, vocab_size, num_edits)
    compare.assert_close(gpu.edit_logits(logits, *edited), reference.edit_logits(logits, *edited))


def test_a_shard_takes_the_edits_of_its_own_ids() -> None:
    logits, edited = compare.random(5, 40, dtype=torch.bfloat16), edits(5, 120, 150)
    whole = gpu.edit_logits(logits, *edited, first_id=40)
    compare.assert_close(whole, reference.edit_logits(logits, *edited, first_id=40))


def test_without_edits_logits_are_copied() -> None:
    logits, nothing = compare.random(3, 50), edits(3, 50, 0)
    copied = gpu.edit_logits(logits, *nothing)
    assert torch.equal(copied, logits)
    assert copied.data_ptr() != logits.data_ptr()
    assert gpu.edit_logits(logits[:0], *nothing).shape == (0, 50)


def test_strided_logits_are_edited() -> None:
    edited = edits(4, 30, 50)
    for logits in (compare.random(4, 70)[:, 20:50], compare.random(30, 4).t()):
        compare.assert_close(gpu.edit_logits(logits, *edited), reference.edit_logits(logits, *edited))


# 20 tokens are fewer than lanes, 100 more; at temperature 4 more tokens are left than are gathered.
@pytest.mark.parametrize("vocab_size", [20, 100])
@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_every_filter_alone_and_together_equals_the_reference(vocab_size: int, dtype: torch.dtype) -> None:
    logits = compare.random(9, vocab_size, dtype=dtype, scale=3.0)
    draws = filters(
        (1.0, UNLIMITED, 1.0, 0.0),
        (0.7, 1, 1.0, 0.0),
        (0.0, 7, 1.0, 0.0),
        (0.5, UNLIMITED, 0.9, 0.0),
        (4.0, UNLIMITED, 0.9, 0.0),
        (1.0, UNLIMITED, 1.0, 0.05),
        (1.0, 11, 0.6, 0.0),
        (1.3, 15, 0.8, 0.2),
        (1.0, vocab_size, 0.3, 0.0),
    )
    assert_same_filter(logits, draws)


@pytest.mark.usefixtures("small_blocks")
def test_more_tokens_than_lanes_can_be_kept() -> None:
    logits = compare.random(3, 100)
    assert_same_filter(logits, filters((1.0, 40, 1.0, 0.0), (1.0, 99, 0.97, 0.0), (0.9, 60, 0.5, 0.0)))


@pytest.mark.parametrize("widest", [1, 6, 50, 100])
@pytest.mark.usefixtures("small_blocks")
def test_no_row_keeps_more_than_the_widest(widest: int) -> None:
    logits = compare.random(3, 50)
    assert_same_filter(logits, filters((1.0, UNLIMITED, 0.9, 0.0), (0.5, 9, 1.0, 0.0), (1.0, 3, 1.0, 0.1)), widest)


@pytest.mark.usefixtures("small_blocks")
def test_equal_logits_stay_together() -> None:
    steps = compare.integers(-3, 3, 4, 70).float()
    steps[3] = 2.0
    draws = filters((1.0, 5, 1.0, 0.0), (0.7, 20, 0.6, 0.0), (1.0, UNLIMITED, 0.9, 0.0), (1.0, 30, 0.5, 0.0))
    assert_same_filter(steps, draws)


@pytest.mark.usefixtures("small_blocks")
def test_forbidden_tokens_are_no_obstacle() -> None:
    logits = compare.random(3, 60)
    logits[:, ::2] = -torch.inf
    logits[1, :59] = -torch.inf
    assert_same_filter(logits, filters((1.0, 50, 1.0, 0.0), (1.0, 3, 0.5, 0.1), (0.8, UNLIMITED, 0.9, 0.0)))


def test_the_best_token_stays_whatever_the_filter() -> None:
    logits = compare.random(3, 50)
    draws = filters((1.0, 1, 1e-9, 1.0), (1.0, UNLIMITED, 0.0, 0.0), (0.3, 5, 1e-9, 0.0))
    best = (logits / draws[0].float().unsqueeze(1)).amax(-1)
    assert torch.equal(gpu.filter_threshold(logits, *draws, UNLIMITED), best)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("filter_", [(1.0, UNLIMITED, 1.0, 0.1), (0.7, 3, 1.0, 0.0), (1.0, UNLIMITED, 0.9, 0.0)])
@pytest.mark.usefixtures("small_blocks")
def test_rows_without_a_softmax_have_no_threshold(bad: float, filter_: tuple[float, int, float, float]) -> None:
    logits = compare.random(3, 100)
    logits[0, 57], logits[1] = bad, bad
    draws = filters(*[filter_] * 3)
    actual, expected = (side.filter_threshold(logits, *draws, UNLIMITED) for side in (gpu, reference))
    assert actual[:2].isnan().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[2], expected[2])


def test_a_row_of_many_blocks_is_searched_in_full_size() -> None:
    logits = compare.random(2, 9001, dtype=torch.bfloat16, scale=2.0)
    assert_same_filter(logits, filters((0.8, 50, 0.95, 0.0), (3.0, UNLIMITED, 0.9, 0.0)))


def test_129_rows_have_their_own_thresholds() -> None:
    logits = compare.random(129, 9)
    temperatures, top_k, top_p, min_p = filters(*[(1.0, UNLIMITED, 1.0, 0.3)] * 129)
    top_k[::32], top_p[5::32] = 2, 0.5
    assert_same_filter(logits, (temperatures, top_k, top_p, min_p))


def test_strided_rows_and_no_rows_have_thresholds() -> None:
    draws = filters((1.0, 3, 1.0, 0.0), (0.5, 9, 0.5, 0.0))
    for logits in (compare.random(2, 70)[:, 20:50], compare.random(30, 2).t()):
        assert_same_filter(logits, draws)
    empty = tuple(tensor[:0] for tensor in draws)
    assert gpu.filter_threshold(compare.random(0, 30), *empty, UNLIMITED).shape == (0,)
