"""Acceptance kernels: number of accepted drafts, and the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from compare import DEVICE, DTYPES, generator, integers, random
from torch import Tensor

from dspark_kernels import gpu, gumbel_noise, reference, uniform_noise
from dspark_kernels.philox import STREAM_ACCEPT, STREAM_RECOVER, STREAM_SAMPLE

TEST_MARGIN = 1e-6
SCORE_MARGIN = 1e-5
"""Kernels sum a softmax in float32: within this margin either decision is correct."""


def first_rows_of(lengths: Sequence[int]) -> Tensor:
    """First rows of requests with so many rows each, and the end of the last one."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def assert_coupled(row_tokens: Tensor, target_tokens: Tensor, first_rows: Tensor) -> tuple[list[int], list[int]]:
    """The kernel's (numbers accepted, next anchors), which are those of the reference."""
    results = gpu.accept_coupled(row_tokens, target_tokens, first_rows)
    for result, expected in zip(results, reference.accept_coupled(row_tokens, target_tokens, first_rows)):
        assert result.dtype == torch.int64
        assert torch.equal(result, expected)
    return results[0].tolist(), results[1].tolist()


@pytest.mark.parametrize("num_padding", [0, 5])
@pytest.mark.parametrize("num_requests", [1, 16, 129])
def test_drafts_are_accepted_while_they_equal_the_targets_tokens(num_requests: int, num_padding: int) -> None:
    first_rows = first_rows_of(integers(0, 8, num_requests).tolist())
    # Two tokens: about half of the drafts are right.
    num_rows = int(first_rows[-1]) + num_padding
    assert_coupled(integers(0, 2, num_rows + 1)[1:], integers(0, 2, num_rows + 1)[1:], first_rows)


def test_requests_may_have_any_number_of_rows() -> None:
    lengths = [1, 17, 0, 25, 8, 9, 10, 0]
    target = integers(0, 99, sum(lengths))
    rows = target.roll(1)
    first_rows = first_rows_of(lengths)
    accepted, anchors = assert_coupled(rows, target, first_rows)
    assert accepted == [max(length - 1, 0) for length in lengths]
    assert anchors == [int(target[end - 1]) if length else -1 for length, end in zip(lengths, first_rows[1:])]
    for row in range(0, len(rows), 2):
        wrong = rows.clone()
        wrong[row] += 1
        assert_coupled(wrong, target, first_rows)


def test_an_anchor_is_not_tested() -> None:
    target = torch.tensor([7, 8, 9], device=DEVICE)
    assert assert_coupled(torch.tensor([100, 7, 100], device=DEVICE), target, first_rows_of([2, 1])) == ([1, 0], [8, 9])


def test_coupled_results_are_empty_without_requests_and_minus_one_without_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for side in (gpu, reference):
        assert [len(result) for result in side.accept_coupled(none, none, first_rows_of([]))] == [0, 0]
        results = side.accept_coupled(none, none, first_rows_of([0, 0]))
        assert [result.tolist() for result in results] == [[0, 0], [-1, -1]]


@dataclass(frozen=True)
class Rows:
    """Arguments of `accept_rejection`."""

    row_tokens: Tensor
    logits: Tensor
    q_ids: Tensor
    q_probabilities: Tensor
    seeds: Tensor
    positions: Tensor
    first_rows: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def rows_of(
    lengths: Sequence[int],
    vocab_size: int,
    num_q_ids: int,
    dtype: torch.dtype = torch.float32,
    num_padding: int = 0,
    kept: int | None = None,
) -> Rows:
    """Random rows whose drafts were drawn from a q near p; with `kept`, other tokens are filtered out of p."""
    first_rows = first_rows_of(lengths)
    num_used = int(first_rows[-1])
    num_rows = num_used + num_padding
    logits = random(num_rows, vocab_size, scale=3.0)
    q = (logits + random(num_rows, vocab_size)).topk(num_q_ids, dim=-1)
    probabilities = q.values.softmax(-1)
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator()).to(DEVICE)
    if kept is not None:
        logits = logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -torch.inf)
    # Never read: q of a last row, and anything after the last request.
    last = first_rows[1:][first_rows[1:] > first_rows[:-1]] - 1
    probabilities[last] = torch.nan
    probabilities[num_used:] = torch.nan
    logits[num_used:] = torch.nan
    return Rows(
        row_tokens=q.indices.gather(1, drawn).squeeze(1).roll(1),
        logits=logits.to(dtype),
        q_ids=q.indices,
        q_probabilities=probabilities,
        seeds=integers(-(2**62), 2**62, len(lengths)),
        positions=integers(0, 2**40, num_rows),
        first_rows=first_rows,
    )


def block_of(p: Sequence[float], q: dict[int, float], draft: int, num_requests: int, seed: int = 0) -> Rows:
    """Requests that are alike but for their seeds: one draft, which the target gives `p` over the vocabulary."""
    logits = torch.tensor(p, device=DEVICE).log().repeat(2 * num_requests, 1)
    return Rows(
        row_tokens=torch.tensor([0, draft], device=DEVICE).repeat(num_requests),
        logits=logits,
        q_ids=torch.tensor(list(q), device=DEVICE).repeat(2 * num_requests, 1),
        q_probabilities=torch.tensor(list(q.values()), device=DEVICE).repeat(2 * num_requests, 1),
        seeds=torch.arange(num_requests, device=DEVICE) + 1000 * seed,
        positions=torch.tensor([41, 42], device=DEVICE).repeat(num_requests),
        first_rows=first_rows_of([2] * num_requests),
    )


def assert_rejection(rows: Rows) -> tuple[Tensor, Tensor]:
    """The kernel's (numbers accepted, next anchors), which are those of the reference or as good."""
    accepted, anchors = gpu.accept_rejection(*rows.arguments())
    expected = reference.accept_rejection(*rows.arguments())
    assert accepted.dtype == anchors.dtype == torch.int64
    num_judged = 0
    for request in range(len(rows.seeds)):
        first, end = rows.first_rows[request : request + 2].tolist()
        if first < end and _is_close_call(rows, request, first, end):
            continue
        num_judged += 1
        assert accepted[request] == expected[0][request], f"request {request}"
        if anchors[request] != expected[1][request]:
            _assert_as_good(rows, request, first + int(accepted[request]), end, int(anchors[request]))
    assert num_judged >= 0.9 * len(rows.seeds)
    return accepted, anchors


def _is_close_call(rows: Rows, request: int, first: int, end: int) -> bool:
    """Whether u * q is so close to p at one of the drafts that rounding decides."""
    judged = slice(first, end - 1)
    drafts = rows.row_tokens[first + 1 : end].unsqueeze(1)
    p = rows.logits[judged].double().softmax(-1).gather(1, drafts).squeeze(1)
    q = (rows.q_probabilities[judged].double() * (rows.q_ids[judged] == drafts)).sum(-1)
    seeds = rows.seeds[request].expand(end - 1 - first)
    distance = (uniform_noise(seeds, rows.positions[judged], STREAM_ACCEPT) * q - p).abs()
    return bool((distance < TEST_MARGIN * p).any())


def _assert_as_good(rows: Rows, request: int, row: int, end: int, token: int) -> None:
    """The token scores as high as the best one up to rounding: the reference adds in float64."""
    weights = rows.logits[row : row + 1].double().softmax(-1)
    recovers = row < end - 1
    if recovers:
        q = rows.q_ids[row : row + 1], -rows.q_probabilities[row : row + 1].double()
        left = weights.scatter_add(-1, *q).clamp(min=0)
        weights = left if left.sum() > 0 else weights
    stream = STREAM_RECOVER if recovers else STREAM_SAMPLE
    address = rows.seeds[request : request + 1], rows.positions[row : row + 1]
    scores = (weights.log() + gumbel_noise(*address, stream, 0, weights.shape[1])).squeeze(0)
    assert scores[token] >= scores.max() - SCORE_MARGIN, f"request {request} draws {token}, not {scores.argmax()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "num_q_ids"), [(5003, 63), (1031, 1), (1031, 64), (1031, 130)])
def test_rejection_agrees_on_ragged_rows(vocab_size: int, num_q_ids: int, dtype: torch.dtype) -> None:
    lengths = [6, 0, 1, 20, 3, 0, 2, 6]
    accepted, anchors = assert_rejection(rows_of(lengths, vocab_size, num_q_ids, dtype, num_padding=3))
    assert anchors[1] == anchors[5] == -1
    assert accepted[1] == accepted[2] == 0


@pytest.mark.parametrize(("dtype", "vocab_size"), [(torch.float32, 8195), (torch.bfloat16, 300)])
def test_rejection_agrees_on_129_rows(dtype: torch.dtype, vocab_size: int) -> None:
    assert_rejection(rows_of([40, 35, 0, 25, 20, 9], vocab_size, 7, dtype))


@pytest.mark.parametrize(("num_requests", "shift"), [(1, 0.0), (12, 0.0), (12, 1e6)])
def test_one_row_gives_a_token(num_requests: int, shift: float) -> None:
    rows = rows_of([1] * num_requests, 1900, 3)
    assert_rejection(replace(rows, logits=rows.logits + shift))


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 512, 513])
def test_vocabularies_of_any_size(vocab_size: int) -> None:
    assert_rejection(rows_of([4, 2, 3, 0, 1] * 2, vocab_size, min(vocab_size, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_filtered_tokens_are_never_drawn(dtype: torch.dtype) -> None:
    rows = rows_of([4, 3, 2] * 3, 1100, 64, dtype, kept=20)
    accepted, anchors = assert_rejection(rows)
    assert rows.logits[rows.first_rows[:-1] + accepted, anchors].isfinite().all()


def test_the_same_id_may_occur_in_q_more_than_once() -> None:
    rows = rows_of([5] * 12, 700, 40)
    # The first id twice, with its probability in two parts, and padding of probability 0.
    ids, probabilities = rows.q_ids.clone(), rows.q_probabilities.clone()
    ids[:, -1] = ids[:, 0]
    probabilities[:, -1] = probabilities[:, 0] * 0.25
    probabilities[:, 0] *= 0.75
    ids[:, 20:30] = 0
    probabilities[:, 20:30] = 0.0
    assert_rejection(replace(rows, q_ids=ids, q_probabilities=probabilities))


def test_logits_and_q_may_be_slices() -> None:
    rows = rows_of([4, 3, 2], 600, 9)
    logits = random(len(rows.logits), 700)
    logits[:, 50:650] = rows.logits
    q_ids = torch.stack((rows.q_ids, rows.q_ids * 0), dim=-1)[..., 0]
    q_probabilities = rows.q_probabilities.t().contiguous().t()
    assert_rejection(replace(rows, logits=logits[:, 50:650], q_ids=q_ids, q_probabilities=q_probabilities))


def test_a_draft_that_is_certain_for_the_target_is_accepted() -> None:
    accepted, anchors = assert_rejection(block_of([0.0, 1.0, 0.0], {1: 1.0}, 1, 15))
    assert accepted.tolist() == [1] * 15
    assert anchors.tolist() == [1] * 15


def test_a_draft_that_is_impossible_for_the_target_is_rejected() -> None:
    accepted, anchors = assert_rejection(block_of([0.0, 0.5, 0.5], {0: 1.0}, 0, 15))
    assert not accepted.any()
    assert set(anchors.tolist()) == {1, 2}


def test_a_draft_with_draft_probability_zero_is_accepted() -> None:
    accepted, _ = assert_rejection(block_of([0.3, 0.7], {1: 1.0}, 0, 10))
    assert accepted.tolist() == [1] * 10


def test_a_draft_twice_as_likely_as_for_the_target_is_rejected_half_the_time() -> None:
    accepted, anchors = assert_rejection(block_of([0.25, 0.75, 0.0], {0: 0.5, 1: 0.3, 2: 0.2}, 0, 24))
    assert 6 <= int(accepted.sum()) <= 18
    # Only token 1 has more of p than of q.
    assert anchors[accepted == 0].unique().tolist() == [1]
    assert anchors[accepted == 1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("filtered", [-torch.inf, -1e30])
def test_an_empty_residual_is_replaced_by_p(filtered: float) -> None:
    # No distribution, but what rounding could leave: q is not below p anywhere.
    rows = block_of([0.0, 0.5, 0.0, 0.5], {3: 0.8, 1: 0.9, 0: 0.1}, 1, 15)
    accepted, anchors = assert_rejection(replace(rows, logits=rows.logits.clamp(min=filtered)))
    assert not accepted.all()
    assert anchors[accepted == 0].unique().tolist() == [1, 3]


def test_the_first_rejected_draft_ends_the_block() -> None:
    # Nine requests with 12 drafts, of which one is impossible, and 18 without any row.
    logits = torch.full((13 * 9, 3), -torch.inf, device=DEVICE)
    logits[:, 1] = 0.0
    row_tokens = torch.ones(13 * 9, dtype=torch.int64, device=DEVICE).view(9, 13)
    row_tokens[torch.arange(9), torch.arange(9) + 1] = 2
    rows = Rows(
        row_tokens=row_tokens.flatten(),
        logits=logits,
        q_ids=torch.tensor([[2, 1]], device=DEVICE).expand(117, 2),
        q_probabilities=torch.tensor([[0.5, 0.5]], device=DEVICE).expand(117, 2),
        seeds=integers(0, 2**62, 27),
        positions=integers(0, 2**20, 117),
        first_rows=first_rows_of([13, 0, 0] * 9),
    )
    accepted, anchors = assert_rejection(rows)
    assert accepted[::3].tolist() == list(range(9))
    assert anchors.tolist() == [1, -1, -1] * 9


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("places", [slice(0, 1), slice(899, 900), slice(0, 900)])
def test_a_row_without_a_softmax_gives_no_token(bad: float, places: slice) -> None:
    """Both where it tests a draft and where it predicts the last token; other requests are unaffected."""
    rows = rows_of([4, 1, 3, 2], 900, 8)
    expected = gpu.accept_rejection(*rows.arguments())
    logits = rows.logits.clone()
    logits[rows.first_rows[0], places] = bad
    logits[rows.first_rows[1], places] = bad
    logits[rows.first_rows[3] + 1, places] = bad
    for side in (gpu, reference):
        accepted, anchors = side.accept_rejection(*replace(rows, logits=logits).arguments())
        assert accepted.tolist() == [0, 0, *expected[0][2:].tolist()]
        assert anchors[:2].tolist() == [-1, -1]
        assert anchors[2] == expected[1][2]
        assert anchors[3] == (-1 if accepted[3] == 1 else expected[1][3])


def test_a_row_without_a_possible_token_gives_no_token() -> None:
    rows = rows_of([3, 1], 300, 4)
    rows = replace(rows, logits=torch.full_like(rows.logits, -torch.inf))
    for side in (gpu, reference):
        accepted, anchors = side.accept_rejection(*rows.arguments())
        assert (accepted.tolist(), anchors.tolist()) == ([0, 0], [-1, -1])


def test_a_draft_with_nan_probability_is_rejected_and_p_sampled() -> None:
    rows = rows_of([2] * 12, 300, 4)
    q_probabilities = rows.q_probabilities.clone()
    q_probabilities[:, 2] = torch.nan
    rows = replace(rows, q_probabilities=q_probabilities)
    results = [side.accept_rejection(*rows.arguments()) for side in (gpu, reference)]
    p = rows.logits[::2].double().softmax(-1)
    noise = gumbel_noise(rows.seeds, rows.positions[::2], STREAM_RECOVER, 0, 300)
    for accepted, anchors in results:
        assert not accepted.any()
        assert torch.equal(anchors, (p.log() + noise).argmax(-1))


def test_rejection_results_are_empty_without_requests_and_minus_one_without_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    floats, ids = torch.zeros(0, 9, device=DEVICE), none.view(0, 9)
    seeds = integers(0, 9, 2)
    for side in (gpu, reference):
        results = side.accept_rejection(none, floats, ids, floats, none, none, first_rows_of([]))
        assert [len(result) for result in results] == [0, 0]
        results = side.accept_rejection(none, floats, ids, floats, seeds, none, first_rows_of([0, 0]))
        assert [result.tolist() for result in results] == [[0, 0], [-1, -1]]


def test_too_many_ids_in_q_are_refused() -> None:
    rows = rows_of([2], 1500, 1025)
    with pytest.raises(ValueError, match="1025 ids per row: expected at most 1024"):
        gpu.accept_rejection(*rows.arguments())
