"""Sampling against the reference: equal token ids, also where rounding, ties or noise alone decide."""

from __future__ import annotations

from typing import Any

import compare
import pytest
import torch
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.gpu import sample as module
from dspark_kernels.philox import STREAM_DRAFT, STREAM_SAMPLE, gumbel_noise

COLD = 1e-5
"""The lowest temperature above 0 that the engine uses: logits near a million, where float32 steps are 0.06."""
UNLIMITED = 2**31


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes several tiles of a row, and reduces several blocks of partial results."""
    monkeypatch.setattr(module, "_TILE", 32)
    monkeypatch.setattr(module, "_REDUCED_SPLITS", 2)


def draws(num_rows: int, *temperatures: float) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures in turn, seeds and positions."""
    cycle = torch.tensor(temperatures or (1.0, 0.0, 0.7, COLD), dtype=torch.float64, device=compare.DEVICE)
    seeds = compare.integers(-(2**62), 2**62, num_rows)
    return cycle.repeat(num_rows)[:num_rows], seeds, compare.integers(0, 2**40, num_rows)


def assert_same_draws(logits: Tensor, drawn: tuple[Tensor, Tensor, Tensor], **kwargs: Any) -> None:
    arguments = (logits, *drawn, STREAM_SAMPLE)
    actual, expected = gpu.gumbel_argmax(*arguments, **kwargs), reference.gumbel_argmax(*arguments, **kwargs)
    assert actual[1].dtype == torch.int64
    assert torch.equal(actual[1], expected[1]), f"{actual[1]}, expected {expected[1]}"
    # Apart: the bound is relative to the largest value.
    cold = (drawn[0] > 0) & (drawn[0] <= COLD)
    for rows in (cold, ~cold):
        compare.assert_close(actual[0][rows], expected[0][rows])
        compare.assert_close(actual[2][rows], expected[2][rows])


def threshold_of(logits: Tensor, temperatures: Tensor, num_kept: int) -> Tensor:
    limits = torch.full((len(logits),), num_kept, device=logits.device)
    nothing = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    return reference.filter_threshold(logits, temperatures, limits, nothing + 1, nothing, UNLIMITED)


# Tiles of 2048, or 1024 of bfloat16: programs of the last shape take two.
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "dtype"),
    [(1, 1, torch.float32), (129, 9, torch.bfloat16), (1, 5003, torch.bfloat16), (5, 7001, torch.float32)],
)
def test_draws_equal_the_reference(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    assert_same_draws(compare.random(num_rows, vocab_size, dtype=dtype, scale=3.0), draws(num_rows))


@pytest.mark.parametrize(("first_id", "num_kept"), [(0, 20), (3, None), (16161, 1), (16162, 20)])
@pytest.mark.usefixtures("small_tiles")
def test_a_shard_with_a_filter_draws_as_the_reference(first_id: int, num_kept: int | None) -> None:
    logits, drawn = compare.random(4, 170, dtype=torch.bfloat16, scale=2.0), draws(4)
    threshold = None if num_kept is None else threshold_of(logits, drawn[0], num_kept)
    assert_same_draws(logits, drawn, first_id=first_id, threshold=threshold)


@pytest.mark.usefixtures("small_tiles")
def test_shards_decide_as_the_whole_row_does() -> None:
    logits, drawn = compare.random(4, 160), draws(4)
    values, ids, sums = gpu.gumbel_argmax(logits, *drawn, STREAM_SAMPLE)
    parts = [
        gpu.gumbel_argmax(logits[:, begin : begin + 40], *drawn, STREAM_SAMPLE, first_id=begin)
        for begin in range(0, 160, 40)
    ]
    part_values, part_ids, part_sums = (torch.stack(column) for column in zip(*parts, strict=True))
    best = part_values.max(0)
    assert torch.equal(best.values, values)
    assert torch.equal(part_ids.gather(0, best.indices.unsqueeze(0)).squeeze(0), ids)
    compare.assert_close(part_sums.logsumexp(0), sums)


@pytest.mark.usefixtures("small_tiles")
def test_nothing_kept_is_minus_infinity_and_no_id() -> None:
    logits = compare.random(3, 40)
    logits[0] = -torch.inf
    threshold = torch.tensor([-torch.inf, 1e9, 1e9], device=compare.DEVICE)
    for first_id in (0, 7):
        drawn = draws(3, 1.0, 0.0, 1.0)
        assert_same_draws(logits, drawn, first_id=first_id, threshold=threshold)
        values, ids, _ = gpu.gumbel_argmax(logits, *drawn, STREAM_SAMPLE, first_id, threshold)
        assert values.tolist() == [-torch.inf] * 3
        assert ids.tolist() == [-1] * 3


@pytest.mark.usefixtures("small_tiles")
def test_forbidden_tokens_are_passed_over() -> None:
    logits = compare.random(4, 200)
    logits[:, :150] = -torch.inf
    logits[1, :199] = -torch.inf
    assert_same_draws(logits, draws(4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("places", [slice(0, 1), slice(70, 90, 10), slice(99, 100), slice(0, 100)])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_a_row_without_a_softmax_draws_no_id(bad: float, places: slice, filtered: bool) -> None:
    """In particular not the first one; other rows of the same call are unaffected."""
    logits, drawn = compare.random(4, 100), draws(4, 1.0, 0.0)
    expected = gpu.gumbel_argmax(logits[2:], *(tensor[2:] for tensor in drawn), STREAM_SAMPLE, 40)
    logits[:2, places] = bad
    threshold = threshold_of(logits, drawn[0], 100) if filtered else None
    for side in (gpu, reference):
        values, ids, sums = side.gumbel_argmax(logits, *drawn, STREAM_SAMPLE, 40, threshold)
        assert values[:2].isnan().all()
        assert ids[:2].tolist() == [-1, -1]
        assert not (sums[:2] < torch.inf).any()
        assert torch.equal(ids[2:], expected[1])
        compare.assert_close(values[2:], expected[0])


@pytest.mark.usefixtures("small_tiles")
def test_a_shard_with_nan_is_noticed_among_others() -> None:
    logits, drawn = compare.random(2, 80), draws(2, 1.0, 0.0)
    logits[:, 50] = torch.nan
    parts = [
        gpu.gumbel_argmax(logits[:, begin : begin + 40], *drawn, STREAM_SAMPLE, first_id=begin) for begin in (0, 40)
    ]
    values, ids = (torch.stack(column) for column in list(zip(*parts, strict=True))[:2])
    assert ids.gather(0, values.argmax(0, keepdim=True)).tolist() == [[-1, -1]]


@pytest.mark.usefixtures("small_tiles")
def test_of_equal_logits_without_noise_the_lowest_id_wins() -> None:
    steps = compare.integers(-2, 3, 3, 260).float()
    steps[2] = -1.0
    assert_same_draws(steps, draws(3, 0.0))


@pytest.mark.usefixtures("small_tiles")
def test_where_logits_are_equal_noise_alone_decides() -> None:
    assert_same_draws(torch.full((4, 130), -20.0, device=compare.DEVICE), draws(4, 1.0, COLD))


@pytest.mark.usefixtures("small_tiles")
def test_of_values_that_round_to_the_same_the_lowest_id_wins() -> None:
    """Noise of the same size as a float32 step, and steps that many logits share."""
    steps = compare.integers(20, 23, 3, 80).to(torch.bfloat16)
    assert_same_draws(steps, draws(3, COLD, 1e-6, 1e-7))


@pytest.mark.parametrize(("value", "scale"), [(3.0, 0.0), (-100.0, 0.0), (0.0, 2e-6)])
@pytest.mark.usefixtures("small_tiles")
def test_tokens_that_differ_in_the_last_bit_are_told_apart(value: float, scale: float) -> None:
    """Logits that undo the noise: every sum is `value` but for rounding, or for less than float32 noise is off."""
    drawn = draws(2, 1.0)
    noise = gumbel_noise(drawn[1], drawn[2], STREAM_SAMPLE, 8, 40)
    assert_same_draws(value - noise + compare.random(2, 40, scale=scale), drawn, first_id=8)


@pytest.mark.usefixtures("small_tiles")
def test_strided_rows_draw_as_contiguous_ones() -> None:
    for logits in (compare.random(3, 100)[:, 30:70], compare.random(40, 3).t()):
        assert_same_draws(logits, draws(3))


def test_no_rows_draw_nothing() -> None:
    values, ids, sums = gpu.gumbel_argmax(compare.random(0, 50, dtype=torch.bfloat16), *draws(0), STREAM_SAMPLE)
    assert (values.shape, ids.shape, sums.shape) == ((0,), (0,), (0,))
    assert (values.dtype, ids.dtype, sums.dtype) == (torch.float32, torch.int64, torch.float32)


def markov_head(vocab_size: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return compare.random(vocab_size, rank, dtype=dtype), compare.random(vocab_size, rank, dtype=dtype, scale=0.5)


def assert_same_drafts(
    base_logits: Tensor, head: tuple[Tensor, Tensor], drawn: tuple[Tensor, Tensor, Tensor], filters: Any = None
) -> None:
    anchors = compare.integers(0, base_logits.shape[2], len(base_logits))
    arguments = (base_logits, anchors, *head, *drawn, STREAM_DRAFT, filters)
    (tokens, sums), expected = gpu.markov_sample(*arguments), reference.markov_sample(*arguments)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, expected[0]), f"{tokens}, expected {expected[0]}"
    compare.assert_close(sums, expected[1])


# Requests fill tiles of 16, 32 and 64; 65 of them two.
@pytest.mark.parametrize(
    ("num_requests", "num_positions", "vocab_size", "rank"),
    [(1, 5, 250, 16), (16, 1, 300, 24), (19, 2, 150, 24), (65, 2, 150, 40), (129, 1, 70, 16)],
)
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_drafts_equal_the_reference(
    num_requests: int, num_positions: int, vocab_size: int, rank: int, dtype: torch.dtype
) -> None:
    base = compare.random(num_requests, num_positions, vocab_size, dtype=dtype, scale=2.0)
    assert_same_drafts(base, markov_head(vocab_size, rank, dtype), draws(num_requests, 1.0, 0.0, 0.7))


def test_float32_logits_meet_a_bfloat16_head() -> None:
    assert_same_drafts(compare.random(3, 2, 300), markov_head(300, 24, torch.bfloat16), draws(3))


def test_a_rank_beyond_one_product_is_summed() -> None:
    assert_same_drafts(compare.random(2, 2, 70), markov_head(70, 530, torch.bfloat16), draws(2))


def test_partial_results_of_many_programs_are_reduced_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REDUCED_SPLITS", 2)
    tiles = module._Tiles(16, 32, 16, splits=2, per_processor=2)
    monkeypatch.setattr(module, "_markov_tiles", lambda *_: tiles)
    assert_same_drafts(compare.random(3, 3, 400), markov_head(400, 16, torch.bfloat16), draws(3))


def test_drafts_without_noise_need_none() -> None:
    base = compare.random(3, 2, 300)
    assert_same_drafts(base, markov_head(300, 16, torch.float32), draws(3, 0.0))
    steps = compare.integers(-1, 2, 3, 2, 300).float()
    nothing = torch.zeros(300, 16, device=compare.DEVICE)
    assert_same_drafts(steps, (nothing, nothing), draws(3, 0.0))


def test_drafts_that_differ_in_the_last_bit_are_told_apart() -> None:
    drawn = draws(2, 1.0)
    noise = gumbel_noise(drawn[1], drawn[2], STREAM_DRAFT, 0, 70).unsqueeze(1)
    nothing = torch.zeros(70, 16, device=compare.DEVICE)
    assert_same_drafts(3.0 - noise, (nothing, nothing), drawn)


def test_drafts_draw_the_noise_of_the_target_at_their_positions() -> None:
    logits, (temperatures, seeds, positions) = compare.random(2, 3, 200), draws(2, 1.0)
    nothing = torch.zeros(200, 16, device=compare.DEVICE)
    anchors = torch.zeros(2, dtype=torch.int64, device=compare.DEVICE)
    tokens, _ = gpu.markov_sample(logits, anchors, nothing, nothing, temperatures, seeds, positions, STREAM_SAMPLE)
    for k in range(3):
        drawn = gpu.gumbel_argmax(logits[:, k], temperatures, seeds, positions + k, STREAM_SAMPLE)
        assert torch.equal(tokens[:, k], drawn[1])


@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_filtered_drafts_equal_the_reference(dtype: torch.dtype) -> None:
    top_k = torch.tensor([3, UNLIMITED, 20], device=compare.DEVICE)
    top_p, min_p = torch.tensor([[1.0, 0.8, 0.9], [0.0, 0.0, 0.02]], dtype=torch.float64, device=compare.DEVICE)
    filters = (top_k, top_p, min_p, UNLIMITED)
    base = compare.random(3, 2, 100, dtype=dtype, scale=2.0)
    assert_same_drafts(base, markov_head(100, 16, dtype), draws(3, 1.0, 0.7, 1.5), filters)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_drafts_are_tokens_whatever_the_logits_hold(bad: float, filtered: bool, everywhere: bool) -> None:
    """They are verified, and index the Markov head in the next step."""
    base, drawn = compare.random(3, 3, 100), draws(3, 1.0, 0.0)
    base[1, 1, :: 1 if everywhere else 20] = bad
    filters = None
    if filtered:
        ones = torch.ones(3, dtype=torch.float64, device=compare.DEVICE)
        filters = (torch.full((3,), 5, device=compare.DEVICE), ones * 0.9, ones * 0.01, UNLIMITED)
    arguments = (base, compare.integers(0, 100, 3), *markov_head(100, 16, torch.float32), *drawn, STREAM_DRAFT, filters)
    for side in (gpu, reference):
        tokens, sums = side.markov_sample(*arguments)
        assert (tokens.min() >= 0) & (tokens.max() < 100)
        if bad != -torch.inf:
            assert not (sums[1, 1] < torch.inf)
        assert sums[0].isfinite().all()


def test_strided_base_logits_are_drafted_from() -> None:
    head, drawn = markov_head(100, 16, torch.float32), draws(2)
    assert_same_drafts(compare.random(3, 2, 100).transpose(0, 1), head, drawn)
    assert_same_drafts(compare.random(2, 100, 3).transpose(1, 2), head, drawn)


def test_no_requests_draft_nothing() -> None:
    anchors = compare.integers(0, 9, 0)
    head = markov_head(50, 16, torch.bfloat16)
    tokens, sums = gpu.markov_sample(compare.random(0, 5, 50), anchors, *head, *draws(0), STREAM_DRAFT)
    assert (tokens.shape, tokens.dtype) == ((0, 5), torch.int64)
    assert (sums.shape, sums.dtype) == ((0, 5), torch.float32)


def test_a_head_of_two_dtypes_is_refused() -> None:
    w1, w2 = compare.random(50, 16), compare.random(50, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one dtype"):
        gpu.markov_sample(compare.random(2, 1, 50), compare.integers(0, 50, 2), w1, w2, *draws(2), STREAM_DRAFT)
