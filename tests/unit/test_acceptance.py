"""Which drafts stand: coupled text does not depend on them, rejection's distribution does not.

The models here are tables of logits by the token before, so the law of the text is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from equal_blocks import accept_equal_blocks
from torch import Tensor

from dspark_kernels import reference
from dspark_kernels.philox import STREAM_DRAFT, STREAM_RECOVER
from dspark_ray.config import VerificationMode
from dspark_ray.drafters import draft_sampling
from dspark_ray.drafters.draft_sampling import DraftChooser, DraftSampling
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.sampling import sampler
from dspark_ray.sampling.sampler import NO_TOKEN, Sampler, Samples
from dspark_ray.sampling.sampling_rows import RequestSampling, RowContext, build_sampling_rows
from dspark_ray.speculative.acceptance import (
    Acceptance,
    DraftSource,
    VerifiedBlock,
    accept_coupled,
    accept_rejection,
    build_verification,
)
from dspark_ray.types import SamplingParams

VOCAB, START, NUM_TEXTS = 6, 40, 100_000
BOUND = 5.0
"""Standard deviations by which a chi-square statistic may exceed its mean."""


def table(seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


TARGET = table(1)
DRAFT = TARGET + table(2, spread=2.0)


# Coupled


@pytest.mark.parametrize(
    ("drafts", "target", "expected"),
    [
        ([], [7], Acceptance(0, 7)),
        ([1, 2], [1, 2, 3], Acceptance(2, 3)),
        ([1, 2], [1, 5, 3], Acceptance(1, 5)),
        ([1, 2], [4, 2, 3], Acceptance(0, 4)),
    ],
)
def test_drafts_stand_up_to_the_first_that_is_not_the_targets(
    drafts: list[int], target: list[int], expected: Acceptance
) -> None:
    assert accept_coupled(drafts, target) == expected


DraftRule = Callable[[int, list[int]], list[int]]


def coupled_text(num_tokens: int, draft: DraftRule) -> list[int]:
    """A sampled text of the target, by rounds whose drafts come from a rule of (round, tokens so far)."""
    params, tokens = SamplingParams(seed=11, temperature=1.2, presence_penalty=0.4), [0]
    sampling, verification = RequestSampling(params, (0,)), build_verification("coupled")
    number = 0
    while len(tokens) <= num_tokens:
        drafts = draft(number, tokens)
        rows = [RowContext(sampling, len(tokens) + k, [*tokens[1:], *drafts[:k]]) for k in range(len(drafts) + 1)]
        logits = TARGET[[tokens[-1], *drafts]]
        samples = Sampler(ParallelGroup(), 0, VOCAB).sample(logits, build_sampling_rows(rows))
        assert samples is not None
        (accepted,) = verification.verify([VerifiedBlock(drafts)], samples)
        tokens += [*drafts[: accepted.num_accepted], accepted.next_anchor]
        number += 1
    return tokens[: num_tokens + 1]


PERFECT = coupled_text(70, lambda *_: [])


@pytest.mark.parametrize(
    "draft",
    [
        lambda number, tokens: [number % VOCAB] * 3,
        lambda number, tokens: [(tokens[-1] + k) % VOCAB for k in range(number % 5)],
        lambda number, tokens: PERFECT[len(tokens) : len(tokens) + 3],
    ],
    ids=["constant", "of changing length", "perfect"],
)
def test_a_coupled_text_does_not_depend_on_its_drafts(draft: DraftRule) -> None:
    assert coupled_text(60, draft) == PERFECT[:61]


# Rejection: many texts at once, each with its own seed


@dataclass(frozen=True)
class Block:
    """Drafts of B requests and what they were drawn from."""

    tokens: Tensor
    ids: Tensor
    probabilities: Tensor


def draft_block(seeds: Tensor, start: int, anchors: Tensor, gamma: int, top_k: int = VOCAB) -> Block:
    params = SamplingParams()
    sampling = DraftSampling.of([params] * len(seeds))
    sampling.integers[0] = seeds
    starts = torch.full_like(seeds, start)
    choose = DraftChooser(sampling, starts, gamma, VOCAB, "rejection", top_k)
    tokens = [anchors]
    for k in range(gamma):
        tokens.append(choose(k, DRAFT[tokens[-1]]))
    return Block(torch.stack(tokens[1:], 1), choose.ids, choose.probabilities)


def verify(seeds: Tensor, start: int, anchors: Tensor, block: Block, target: Tensor) -> tuple[Tensor, Tensor]:
    k = block.tokens.shape[1]
    logits = target[torch.cat((anchors.unsqueeze(1), block.tokens), dim=1)]
    positions = start + 1 + torch.arange(k + 1).expand(len(seeds), -1)
    return accept_equal_blocks(block.tokens, logits, block.ids, block.probabilities, seeds, positions)


def two_tokens(top_k: int = VOCAB, target: Tensor = TARGET, draft: Callable[..., Block] = draft_block) -> Tensor:
    """[B, 2] the two tokens after token 0 of B texts; a second round where the first round gave one."""
    seeds, zeros = torch.arange(NUM_TEXTS), torch.zeros(NUM_TEXTS, dtype=torch.int64)
    block = draft(seeds, START, zeros, 2, top_k)
    num_accepted, anchors = verify(seeds, START, zeros, block, target)
    first = torch.where(num_accepted > 0, block.tokens[:, 0], anchors)
    second = torch.where(num_accepted > 1, block.tokens[:, 1], anchors)
    short = num_accepted == 0
    again = draft(seeds[short], START + 1, anchors[short], 2, top_k)
    num_accepted, anchors = verify(seeds[short], START + 1, anchors[short], again, target)
    second[short] = torch.where(num_accepted > 0, again.tokens[:, 0], anchors)
    return torch.stack((first, second), dim=1)


def distance(texts: Tensor, target: Tensor = TARGET) -> float:
    """Standard deviations by which a chi-square of the pairs against the target's law exceeds its mean."""
    p = target.double().softmax(-1)
    expected = (len(texts) * p[0].unsqueeze(1) * p).flatten()
    counts = torch.bincount(texts[:, 0] * VOCAB + texts[:, 1], minlength=VOCAB**2)
    possible = expected > 0
    assert counts[~possible].sum() == 0, "a token that the target excludes"
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
def test_rejection_texts_follow_the_targets_law_however_short_the_draft_distribution(top_k: int) -> None:
    assert distance(two_tokens(top_k)) < BOUND


def test_rejection_texts_follow_a_filtered_target() -> None:
    target = TARGET.masked_fill(TARGET.topk(3).values[:, -1:] > TARGET, -torch.inf)
    assert distance(two_tokens(target=target), target) < BOUND


BREAKAGES = {
    "recovery shares the draft's noise": ("STREAM_RECOVER", STREAM_DRAFT),
    "the test shares the draft's noise": ("STREAM_ACCEPT", STREAM_DRAFT),
    "the test shares the recovery's noise": ("STREAM_ACCEPT", STREAM_RECOVER),
    "recovery draws from p, not from max(p - q, 0)": ("_residual", lambda p, q_ids, q: p),
    "every draft is accepted": ("_passes", lambda drafts, *_: torch.ones_like(drafts, dtype=torch.bool)),
    "no draft stands, but recovery leaves q out": (
        "_passes",
        lambda drafts, *_: drafts < 0,
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES.keys())
def test_the_law_exposes_a_broken_acceptance(breakage: tuple[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, *breakage)
    assert distance(two_tokens()) > 3 * BOUND


def misreported_block(seeds: Tensor, start: int, anchors: Tensor, gamma: int, top_k: int) -> Block:
    """Drawn from the best `top_k` tokens, but reported as drawn from all."""
    drawn = draft_block(seeds, start, anchors, gamma, top_k)
    reported = draft_block(seeds, start, anchors, gamma)
    return Block(drawn.tokens, reported.ids, reported.probabilities)


def test_the_law_exposes_a_draft_distribution_that_is_not_the_one_drawn_from() -> None:
    assert distance(two_tokens(2, draft=misreported_block)) > 3 * BOUND


def lagged_texts() -> Tensor:
    """[B, 2] as two_tokens, but round two verifies a draft only where round one's of that place was low."""
    seeds, zeros = torch.arange(NUM_TEXTS), torch.zeros(NUM_TEXTS, dtype=torch.int64)
    block = draft_block(seeds, START, zeros, 2)
    one = Block(block.tokens[:, :1], block.ids[:, :1], block.probabilities[:, :1])
    num_accepted, anchors = verify(seeds, START, zeros, one, TARGET)
    first, second = torch.where(num_accepted > 0, block.tokens[:, 0], anchors), anchors.clone()
    short, low = num_accepted == 0, block.tokens[:, 1] < VOCAB // 2
    with_draft, without = short & low, short & ~low
    again = draft_block(seeds[with_draft], START + 1, first[with_draft], 1)
    num_accepted, anchors = verify(seeds[with_draft], START + 1, first[with_draft], again, TARGET)
    second[with_draft] = torch.where(num_accepted > 0, again.tokens[:, 0], anchors)
    second[without] = target_tokens(seeds[without], START + 2, first[without])
    return torch.stack((first, second), dim=1)


def target_tokens(seeds: Tensor, position: int, previous: Tensor) -> Tensor:
    """What the target says without drafts."""
    rows = DraftSampling.of([SamplingParams()] * len(seeds))
    rows.integers[0], rows.integers[1] = seeds, position
    return sampler.draw(TARGET[previous], rows, sampler.STREAM_SAMPLE)[1]


def test_a_budget_may_come_from_an_earlier_rounds_drafts() -> None:
    assert distance(lagged_texts()) < BOUND


def test_the_law_exposes_draft_noise_that_returns_in_a_later_round(monkeypatch: pytest.MonkeyPatch) -> None:
    coupled_address = draft_sampling._noise_positions
    monkeypatch.setattr(
        draft_sampling, "_noise_positions", lambda starts, gamma, mode: coupled_address(starts, gamma, "coupled")
    )
    assert distance(lagged_texts()) > 3 * BOUND


def test_the_first_draft_stands_as_often_as_the_distributions_overlap() -> None:
    seeds, zeros = torch.arange(NUM_TEXTS), torch.zeros(NUM_TEXTS, dtype=torch.int64)
    num_accepted, _ = verify(seeds, START, zeros, draft_block(seeds, START, zeros, 1), TARGET)
    overlap = torch.minimum(TARGET[0].softmax(-1), DRAFT[0].softmax(-1)).sum()
    assert float(num_accepted.double().mean()) == pytest.approx(float(overlap), abs=0.01)


# Rejection: one request


def source(probabilities: list[list[float]], seed: int = 3) -> DraftSource:
    q = torch.tensor(probabilities)
    return DraftSource(torch.arange(q.shape[1]).expand_as(q), q, seed, START + 1)


def judged(draft_tokens: list[int], rows: list[list[float]], q: list[list[float]], seed: int) -> Acceptance:
    """One block by the target's probabilities behind its rows and those it was drawn from."""
    (accepted,) = accept_rejection([VerifiedBlock(draft_tokens, source(q, seed))], logits_of(rows))
    return accepted


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).log()


def test_drafts_from_the_targets_own_distribution_always_stand() -> None:
    rows = [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]
    for seed in range(100):
        assert judged([1, 0], rows, rows[:2], seed).num_accepted == 2


def test_a_draft_that_the_target_excludes_never_stands() -> None:
    rows = [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]
    for seed in range(100):
        accepted = judged([2], rows, [[0.0, 0.0, 1.0]], seed)
        assert accepted.num_accepted == 0
        assert accepted.next_anchor in (0, 1)


def test_where_nothing_is_left_of_p_minus_q_recovery_draws_from_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_passes", lambda drafts, *_: drafts < 0)
    rows = [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    tokens = {judged([1], rows, rows[:1], seed).next_anchor for seed in range(50)}
    assert tokens == {1, 2}


def test_one_request_gets_what_it_gets_among_many() -> None:
    seeds, zeros = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    drawn = draft_block(seeds, START, zeros, 3)
    # Of different lengths, some without any draft.
    blocks, logits = [], []
    for row in range(50):
        drafts = drawn.tokens[row, : row % 4].tolist()
        blocks.append(VerifiedBlock(drafts, DraftSource(drawn.ids[row], drawn.probabilities[row], row, START + 1)))
        logits.append(TARGET[[0, *drafts]])
    together = accept_rejection(blocks, torch.cat(logits))
    assert together == [accept_rejection([block], rows)[0] for block, rows in zip(blocks, logits, strict=True)]
    assert {accepted.num_accepted for accepted in together} == {0, 1, 2, 3}


def samples_of(logits: Tensor, token_ids: list[int], sampled: bool = True) -> Samples:
    nothing = [None] * len(token_ids)
    return Samples(token_ids, nothing, list(logits) if sampled else nothing, nothing)  # type: ignore[arg-type]


def test_fewer_drafts_may_be_verified_than_were_drawn() -> None:
    rows = [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]
    verification = build_verification("rejection")
    block = VerifiedBlock([1], source([rows[0]] * 3))
    (accepted,) = verification.verify([block], samples_of(logits_of(rows), [0, 0]))
    assert accepted.num_accepted == 1


def test_the_token_behind_accepted_drafts_is_the_samplers_own() -> None:
    for seed in range(50):
        params = SamplingParams(seed=seed)
        contexts = [RowContext(RequestSampling(params), START + 1 + k, wants_distribution=True) for k in range(2)]
        own = Sampler(ParallelGroup(), 0, VOCAB).sample(TARGET[:2], build_sampling_rows(contexts))
        assert own is not None
        block = VerifiedBlock([1], source([TARGET[0].softmax(-1).tolist()], seed))
        assert build_verification("rejection").verify([block], own) == [Acceptance(1, own.token_ids[1])]


def test_greedy_blocks_and_rows_without_drafts_take_the_targets_tokens_in_rejection_too() -> None:
    verification = build_verification("rejection")
    samples = samples_of(TARGET[:4], [4, 1, 2, 3], sampled=False)
    blocks = [VerifiedBlock([4, 5]), VerifiedBlock([])]
    assert verification.verify(blocks, samples) == [Acceptance(1, 1), Acceptance(0, 3)]


def test_only_rejection_needs_whole_distributions() -> None:
    assert [build_verification(mode).wants_distribution for mode in ("coupled", "rejection")] == [False, True]


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_a_block_with_a_row_that_cannot_be_drawn_from_has_no_next_token(mode: VerificationMode) -> None:
    logits = TARGET[:4].clone()
    logits[1] = torch.nan
    own = [int(token) for token in TARGET[:4].argmax(-1)]
    samples = samples_of(logits, [own[0], NO_TOKEN, own[2], own[3]])
    rows = [TARGET[0].softmax(-1).tolist()]
    blocks = [VerifiedBlock(own[:1], source(rows)), VerifiedBlock(own[2:3], source(rows))]
    broken, sound = build_verification(mode).verify(blocks, samples)
    assert broken.next_anchor == NO_TOKEN
    assert sound.next_anchor >= 0
