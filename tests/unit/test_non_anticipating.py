"""The paper's Appendix A, end to end: a schedule that sees a draft before it decides on it bends rejection's output.

A world of two tokens A and B. The target says A with probability .7, the draft with .5. The confidence behind an A is
.9, behind a B it is 0, and seconds by rows are 1, 2 and 1/.45. So one draft never pays and two pay behind an A: who
looks at both confidences verifies an A, which always stands, and lets the target replace a B.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equal_blocks import accept_equal_blocks
from torch import Tensor

from dspark_kernels.philox import STREAM_SAMPLE
from dspark_ray.config import ConfigError, EngineConfig
from dspark_ray.drafters.draft_sampling import DraftChooser, DraftSampling
from dspark_ray.sampling import sampler
from dspark_ray.speculative.prefix_schedule import (
    CausalSchedule,
    FixedSchedule,
    FullSchedule,
    LaggedSchedule,
    PrefixSchedule,
    RoundView,
    survival,
)
from dspark_ray.types import SamplingParams

A, B = 0, 1
START, NUM_TEXTS, GAMMA = 40, 100_000, 2
SHARE_OF_A, PEEKING_SHARE = 0.70, 0.85
TOLERANCE = 4 * (0.7 * 0.3 / NUM_TEXTS) ** 0.5
"""Standard deviations of a share."""

STEPS_PER_SECOND = [1.0, 0.5, 0.45]
TARGET = torch.tensor([0.7, 0.3]).log()
DRAFT = torch.tensor([0.5, 0.5]).log()
# Behind each first draft, distributions that overlap by the confidence there: .9 behind A, 0 behind B.
TARGET_BEHIND = torch.tensor([[0.7, 0.3], [1.0, 0.0]]).log()
DRAFT_BEHIND = torch.tensor([[0.6, 0.4], [0.0, 1.0]]).log()
CONFIDENCES = [[0.8, 0.9], [0.8, 0.0]]
"""[first draft, 2]"""
SEEDS = torch.arange(NUM_TEXTS)


def drafts(seeds: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, 2] drawn as the engine draws them, and the ids and probabilities [N, 2, V] they came from."""
    sampling = DraftSampling.of([SamplingParams()] * len(seeds))
    sampling.integers[0] = seeds
    choose = DraftChooser(sampling, torch.full_like(seeds, start), GAMMA, 2, "rejection")
    first = choose(0, DRAFT.expand(len(seeds), -1))
    second = choose(1, DRAFT_BEHIND[first])
    return torch.stack((first, second), 1), choose.ids, choose.probabilities


def length(schedule: PrefixSchedule, first_draft: int, old_draft: int) -> int:
    """How many of two drafts one request has verified, by its first draft and that of an earlier round."""
    view = RoundView(
        survival=survival(np.array([CONFIDENCES[first_draft]])),
        lagged_survival=survival(np.array([CONFIDENCES[old_draft]])),
        limits=np.array([GAMMA]),
        certain_tokens=1,
        base_rows=1,
        target_seconds=1 / np.array([1.0, *STEPS_PER_SECOND]),
    )
    return schedule.plan(view).lengths[0]


def lengths(schedule: PrefixSchedule, first_drafts: Tensor, old_drafts: Tensor) -> Tensor:
    """[N] of many requests, each in a round of its own."""
    table = torch.tensor([[length(schedule, first, old) for old in (A, B)] for first in (A, B)])
    return table[first_drafts, old_drafts]


def first_tokens(schedule: PrefixSchedule) -> Tensor:
    """[N] what N texts begin with, each under its own seed."""
    tokens, ids, probabilities = drafts(SEEDS, START)
    old_drafts = drafts(SEEDS, START - 10)[0][:, 0]
    verified = lengths(schedule, tokens[:, 0], old_drafts)
    emitted = torch.empty_like(SEEDS)
    for num_drafts in range(GAMMA + 1):
        rows = verified == num_drafts
        if rows.any():
            emitted[rows] = verify(SEEDS[rows], tokens[rows, :num_drafts], ids[rows], probabilities[rows])
    return emitted


def verify(seeds: Tensor, tokens: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """[n] first tokens of texts whose drafts [n, k] are verified."""
    num_texts, k = tokens.shape
    if k == 0:
        return target_tokens(seeds)
    behind = TARGET_BEHIND[tokens[:, 0]].unsqueeze(1).expand(-1, k, -1)
    logits = torch.cat((TARGET.expand(num_texts, 1, -1), behind), 1)
    positions = START + 1 + torch.arange(k + 1).expand(num_texts, -1)
    num_accepted, anchors = accept_equal_blocks(tokens, logits, ids[:, :k], probabilities[:, :k], seeds, positions)
    return torch.where(num_accepted > 0, tokens[:, 0], anchors)


def target_tokens(seeds: Tensor) -> Tensor:
    """What the target says without drafts."""
    rows = DraftSampling.of([SamplingParams()] * len(seeds))
    rows.integers[0], rows.integers[1] = seeds, START + 1
    return sampler.draw(TARGET.expand(len(seeds), -1), rows, STREAM_SAMPLE)[1]


def share_of_a(tokens: Tensor) -> float:
    return float((tokens == A).double().mean())


def test_the_target_alone_says_a_with_its_own_probability() -> None:
    assert share_of_a(target_tokens(SEEDS)) == pytest.approx(SHARE_OF_A, abs=TOLERANCE)


def test_causal_verifies_neither_draft() -> None:
    assert [length(CausalSchedule(), first, A) for first in (A, B)] == [0, 0]


def test_a_search_over_current_confidences_verifies_an_a_and_no_b() -> None:
    assert [length(FullSchedule(), first, A) for first in (A, B)] == [2, 0]


@pytest.mark.parametrize(
    "schedule", [CausalSchedule(), LaggedSchedule(), FixedSchedule()], ids=lambda schedule: type(schedule).__name__
)
def test_a_schedule_that_does_not_anticipate_leaves_the_targets_probability_as_it_is(schedule: PrefixSchedule) -> None:
    assert share_of_a(first_tokens(schedule)) == pytest.approx(SHARE_OF_A, abs=TOLERANCE)


def test_the_lagged_budget_is_sometimes_both_drafts_and_sometimes_none() -> None:
    assert {length(LaggedSchedule(), first, old) for first in (A, B) for old in (A, B)} == {0, 2}


def test_a_schedule_that_peeks_says_a_more_often_than_the_target() -> None:
    assert share_of_a(first_tokens(FullSchedule())) == pytest.approx(PEEKING_SHARE, abs=TOLERANCE)


def test_a_drafted_a_always_stands() -> None:
    tokens, ids, probabilities = drafts(SEEDS[:200], START)
    drafted_a = tokens[:, 0] == A
    logits = torch.stack((TARGET, TARGET_BEHIND[A], TARGET_BEHIND[A])).expand(200, -1, -1)
    positions = torch.arange(START + 1, START + 4).expand(200, -1)
    num_accepted, _ = accept_equal_blocks(tokens, logits, ids, probabilities, SEEDS[:200], positions)
    assert drafted_a.any()
    assert (num_accepted[drafted_a] >= 1).all()


def test_the_config_refuses_a_peeking_schedule_with_rejection_and_says_why() -> None:
    with pytest.raises(ConfigError, match=r"schedule='full' with verification='rejection': .*appendix A"):
        EngineConfig(verification="rejection", schedule="full")


@pytest.mark.parametrize("schedule", ["causal", "lagged", "fixed", None])
def test_the_config_takes_every_other_schedule_with_rejection(schedule: str | None) -> None:
    EngineConfig(verification="rejection", schedule=schedule)  # type: ignore[arg-type]


def test_with_coupled_verification_peeking_is_allowed() -> None:
    EngineConfig(verification="coupled", schedule="full")
