"""From logits to tokens: processors, filters, shards, reports, and the drafter's side."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_kernels import apply_temperature, gumbel_noise
from dspark_kernels.philox import STREAM_DRAFT, STREAM_SAMPLE
from dspark_ray.drafters.draft_sampling import DraftChooser, DraftSampling
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.sampling.sampler import NO_TOKEN, Sampler, Samples, draw, edit_logits, filtered_logits
from dspark_ray.sampling.sampling_rows import RequestSampling, RowContext, build_sampling_rows
from dspark_ray.types import SamplingParams

VOCAB = 23
PROMPT, OUTPUTS = (1, 2, 3), (3, 4, 4)


def context(
    position: int = 6, stop_ids: tuple[int, ...] = (), wants_distribution: bool = False, **params: Any
) -> RowContext:
    """A row of a request whose `stop_ids` may not come yet."""
    sampling = RequestSampling(SamplingParams(**params), PROMPT, stop_ids, VOCAB)
    return RowContext(sampling, position, OUTPUTS, len(stop_ids) > 0, wants_distribution)


def random_logits(num_rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sample(logits: Tensor, contexts: list[RowContext]) -> Samples:
    samples = Sampler(ParallelGroup(), 0, VOCAB).sample(logits, build_sampling_rows(contexts))
    assert samples is not None
    return samples


def processed_row(logits: Tensor, **changes: Any) -> list[float]:
    """One row after edits and temperature."""
    rows = build_sampling_rows([context(**changes)])
    return apply_temperature(edit_logits(logits, rows, 0), rows.temperatures)[0].tolist()


# Processors


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = random_logits(1)
    expected = logits[0].tolist()
    for token in {*PROMPT, *OUTPUTS}:
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    assert processed_row(logits, repetition_penalty=1.7) == pytest.approx(expected)


def test_frequency_counts_outputs_and_presence_does_not() -> None:
    logits = random_logits(1)
    expected = logits[0].tolist()
    for token in set(OUTPUTS):
        expected[token] -= 0.3 * OUTPUTS.count(token) + 0.9
    assert processed_row(logits, frequency_penalty=0.3, presence_penalty=0.9) == pytest.approx(expected)


def test_repetition_comes_before_the_additive_penalties_and_temperature_last() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 3.0
    changes = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "logit_bias": {4: 2.0}, "temperature": 0.5}
    assert processed_row(logits, **changes)[4] == pytest.approx((3.0 / 2 - 0.5 + 2.0) / 0.5)


def test_forbidden_tokens_are_impossible_also_with_a_bias() -> None:
    samples = sample(torch.zeros(1, VOCAB), [context(temperature=0, stop_ids=(0, 5), logit_bias={5: 100.0})])
    assert samples.token_ids == [1]


def test_processing_leaves_the_logits_it_was_given() -> None:
    logits = random_logits(1)
    before = logits.clone()
    edit_logits(logits, build_sampling_rows([context(repetition_penalty=2.0, temperature=0.3)]), 0)
    assert torch.equal(logits, before)


# Filters


def kept(logits: Tensor, **changes: Any) -> set[int]:
    rows = build_sampling_rows([context(**changes), context()])
    filtered = filtered_logits(logits.expand(2, -1), rows)
    return set(filtered[0].isfinite().nonzero().flatten().tolist())


def straightforward(logits: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The kept tokens by definition: one filter after the other, each on the remaining tokens."""
    ranked = sorted(range(VOCAB), key=lambda token: -logits[0, token].item())[: top_k or VOCAB]
    weights = [math.exp(logits[0, token]) for token in ranked]
    kept_tokens: list[int] = []
    reached = 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if reached < top_p * sum(weights) and weight >= min_p * weights[0]:
            kept_tokens.append(token)
        reached += weight
    return set(kept_tokens)


@pytest.mark.parametrize("top_k", [0, 1, 4, VOCAB - 1])
@pytest.mark.parametrize("top_p", [0.3, 0.85, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_filters_keep_the_tokens_of_their_definitions(top_k: int, top_p: float, min_p: float) -> None:
    for seed in range(5):
        logits = random_logits(1, seed)
        expected = straightforward(logits, top_k, top_p, min_p)
        assert kept(logits, top_k=top_k, top_p=top_p, min_p=min_p) == expected


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    assert len(kept(random_logits(1), top_k=VOCAB + 5)) == VOCAB


def test_a_top_p_of_one_keeps_tokens_too_unlikely_to_count() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 90.0
    assert len(kept(logits, top_k=VOCAB, top_p=1.0)) == VOCAB


def test_a_tiny_top_p_keeps_the_best_token() -> None:
    logits = random_logits(1)
    assert kept(logits, top_p=1e-12) == {int(logits.argmax())}


def test_a_min_p_of_one_keeps_the_best_token() -> None:
    logits = random_logits(1)
    assert kept(logits, min_p=1.0) == {int(logits.argmax())}


def test_tokens_that_tie_at_the_threshold_all_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, *[0.0] * (VOCAB - 4)]])
    assert kept(logits, top_k=2) == {0, 1, 2, 3}


def test_rows_without_a_filter_keep_everything_beside_rows_with_one() -> None:
    rows = build_sampling_rows([context(top_k=2), context()])
    assert filtered_logits(random_logits(2), rows).isfinite().sum(-1).tolist() == [2, VOCAB]


def test_a_filtered_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = random_logits(4)
    contexts = [context(top_p=0.7), context(top_k=3, top_p=0.9), context(min_p=0.1), context()]
    together = filtered_logits(logits, build_sampling_rows(contexts))
    for row in range(4):
        alone = filtered_logits(logits[row : row + 1], build_sampling_rows(contexts[row : row + 1]))
        assert torch.equal(together[row], alone[0])


# The sampler


def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed() -> None:
    logits = random_logits(3)
    contexts = [context(temperature=0, seed=seed) for seed in range(3)]
    assert sample(logits, contexts).token_ids == logits.argmax(-1).tolist()


def test_a_token_is_the_best_of_scaled_logits_plus_the_noise_of_its_address() -> None:
    logits = random_logits(50)
    contexts = [context(position=100 + row, seed=row - 25, temperature=0.6) for row in range(50)]
    noise = gumbel_noise(torch.arange(50) - 25, torch.arange(50) + 100, STREAM_SAMPLE, 0, VOCAB)
    assert sample(logits, contexts).token_ids == (logits / 0.6 + noise).argmax(-1).tolist()


def test_a_row_that_reports_logprobs_draws_the_same_token() -> None:
    logits = random_logits(50)
    plain = sample(logits, [context(seed=seed) for seed in range(50)])
    mixed = sample(logits, [context(seed=seed, logprobs=2 if seed % 2 else None) for seed in range(50)])
    assert mixed.token_ids == plain.token_ids


def test_filtered_tokens_are_never_drawn() -> None:
    logits = random_logits(1).expand(300, -1)
    tokens = sample(logits, [context(seed=seed, top_k=3, temperature=5.0) for seed in range(300)]).token_ids
    assert set(tokens) == set(logits[0].topk(3).indices.tolist())


def test_the_lowest_temperatures_are_as_good_as_greedy() -> None:
    logits = random_logits(20)
    contexts = [context(temperature=1e-30, seed=seed) for seed in range(20)]
    assert sample(logits, contexts).token_ids == logits.argmax(-1).tolist()


def test_logprobs_are_those_of_the_unprocessed_logits() -> None:
    logits = random_logits(1)
    report = sample(logits, [context(logprobs=4, temperature=0.2, repetition_penalty=3.0, top_k=1)]).logprobs[0]
    assert report is not None
    expected = logits[0].log_softmax(-1)
    best = expected.argsort(descending=True)[:4].tolist()
    assert report.logprob == pytest.approx(float(expected[report.token_id]))
    assert [token for token, _ in report.top] == best
    assert [logprob for _, logprob in report.top] == pytest.approx(expected[best].tolist())


def test_zero_alternatives_still_report_the_chosen_token() -> None:
    samples = sample(random_logits(1), [context(logprobs=0)])
    report = samples.logprobs[0]
    assert report is not None
    assert (report.token_id, report.top) == (samples.token_ids[0], ())


def test_another_token_than_the_sampled_one_can_be_reported() -> None:
    logits = random_logits(1)
    samples = sample(logits, [context(logprobs=1)])
    other = (samples.token_ids[0] + 1) % VOCAB
    report = samples.logprobs_of(0, other)
    assert report is not None
    assert (report.token_id, report.logprob) == (
        other,
        pytest.approx(float(logits[0].log_softmax(-1)[other])),
    )


def test_a_distribution_is_the_processed_and_filtered_row() -> None:
    logits = random_logits(2)
    contexts = [context(), context(wants_distribution=True, top_k=4, temperature=0.5, logit_bias={2: 1.0})]
    samples = sample(logits, contexts)
    assert samples.distributions[0] is None
    rows = build_sampling_rows(contexts)
    expected = filtered_logits(edit_logits(logits, rows, 0), rows)[1]
    assert torch.equal(samples.distributions[1], expected)  # type: ignore[arg-type]


def test_no_rows_give_no_samples() -> None:
    assert sample(torch.empty(0, VOCAB), []).token_ids == []


# Shards


@dataclass
class Meeting:
    """Exchanges tensors between threads that act as ranks."""

    barrier: threading.Barrier
    parts: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadGroup(ParallelGroup):
    """A rank of a group of threads."""

    meeting: Meeting = field(kw_only=True)

    def gather_to_first(self, x: Tensor) -> list[Tensor] | None:
        self.meeting.parts[self.rank] = x
        self.meeting.barrier.wait(timeout=30)
        parts = [self.meeting.parts[rank] for rank in range(self.size)]
        assert len({part.shape for part in parts}) == 1, "a real gather needs one shape"
        self.meeting.barrier.wait(timeout=30)
        return parts if self.rank == 0 else None


def on_ranks(size: int, work: Callable[[ParallelGroup], Any]) -> list[Any]:
    meeting = Meeting(threading.Barrier(size))
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [ThreadGroup(rank, size, None, meeting=meeting) for rank in range(size)]))


VARIED = [
    context(seed=1),
    context(seed=2, temperature=0),
    context(seed=3, top_p=0.8, logprobs=3),
    context(seed=4, repetition_penalty=1.5, logit_bias={22: 3.0, 0: -1.0}),
    context(seed=5, wants_distribution=True, min_p=0.05, frequency_penalty=1.0),
    context(seed=6, stop_ids=(11, 12)),
]


@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_unequal_size_sample_what_one_rank_samples(size: int) -> None:
    for trial in range(10):
        logits = random_logits(len(VARIED), trial)

        def work(group: ParallelGroup, logits: Tensor = logits) -> Samples | None:
            start, stop = group.range(VOCAB)
            rows = build_sampling_rows(VARIED)
            return Sampler(group, start, VOCAB).sample(logits[:, start:stop], rows)

        first, *others = on_ranks(size, work)
        alone = sample(logits, VARIED)
        assert others == [None] * (size - 1)
        assert first.token_ids == alone.token_ids
        assert first.logprobs == alone.logprobs
        assert torch.equal(first.distributions[4], alone.distributions[4])  # type: ignore[arg-type]


def test_of_equal_logits_on_several_ranks_the_lowest_id_wins() -> None:
    def work(group: ParallelGroup) -> Samples | None:
        start, stop = group.range(VOCAB)
        rows = build_sampling_rows([context(temperature=0)])
        return Sampler(group, start, VOCAB).sample(torch.zeros(1, stop - start), rows)

    assert on_ranks(3, work)[0].token_ids == [0]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("changes", [{"temperature": 0}, {}, {"top_p": 0.9}], ids=["greedy", "sampled", "filtered"])
def test_a_row_that_is_not_finite_on_one_rank_has_no_token(size: int, changes: dict[str, Any]) -> None:
    logits = random_logits(5)
    logits[0, 20] = torch.nan  # on the last rank alone, and not the largest
    logits[1, 2] = torch.inf  # on the first
    logits[2, :12] = -torch.inf  # one rank, or most of it, has nothing possible: the others do
    logits[3] = -torch.inf
    contexts = [context(seed=row, **changes) for row in range(5)]

    def work(group: ParallelGroup) -> Samples | None:
        start, stop = group.range(VOCAB)
        return Sampler(group, start, VOCAB).sample(logits[:, start:stop], build_sampling_rows(contexts))

    tokens = on_ranks(size, work)[0].token_ids
    assert tokens[:2] == [NO_TOKEN] * 2
    assert tokens[2] >= 12
    assert tokens[3] == NO_TOKEN
    assert tokens[4] == sample(logits[4:], contexts[4:]).token_ids[0] >= 0


# The drafter's side

DRAFTED = [
    SamplingParams(seed=-3, temperature=0.8),
    SamplingParams(temperature=0),
    SamplingParams(seed=9, temperature=1.3, top_k=5),
    SamplingParams(seed=10, top_p=0.6),
]
STARTS = torch.tensor([4, 17, 100, 8])
GAMMA = 3


def chooser(mode: Any, top_k: int = 6) -> DraftChooser:
    return DraftChooser(DraftSampling.of(DRAFTED), STARTS, GAMMA, VOCAB, mode, top_k)


def test_a_coupled_draft_from_the_targets_logits_is_the_targets_token() -> None:
    choose = chooser("coupled")
    for k in range(GAMMA):
        logits = random_logits(len(DRAFTED), k)
        contexts = [
            RowContext(RequestSampling(params, PROMPT), int(start) + 1 + k, OUTPUTS)
            for params, start in zip(DRAFTED, STARTS, strict=True)
        ]
        assert choose(k, logits).tolist() == sample(logits, contexts).token_ids


def test_a_rejection_draft_is_one_of_its_ids_with_positive_probability() -> None:
    choose = chooser("rejection")
    for k in range(GAMMA):
        tokens = choose(k, random_logits(len(DRAFTED), k))
        hits = choose.ids[:, k] == tokens.unsqueeze(1)
        assert hits.sum(-1).tolist() == [1] * len(DRAFTED)
        assert (choose.probabilities[:, k][hits] > 0).all()


def test_the_truncated_distribution_is_the_filtered_one_renormalised() -> None:
    choose = chooser("rejection")
    logits = random_logits(len(DRAFTED))
    choose(0, logits)
    best = logits[0].topk(6)
    assert choose.ids[0, 0].tolist() == best.indices.tolist()
    assert torch.allclose(choose.probabilities[0, 0], (best.values / 0.8).softmax(-1))
    assert (choose.probabilities[2, 0] > 0).sum() == 5
    assert torch.allclose(choose.probabilities[:, 0].sum(-1), torch.ones(len(DRAFTED)))


def test_a_greedy_draft_is_certain_in_either_mode() -> None:
    logits = random_logits(len(DRAFTED))
    choose = chooser("rejection")
    assert choose(0, logits)[1] == chooser("coupled")(0, logits)[1] == logits[1].argmax()
    assert choose.probabilities[1, 0].tolist() == [1.0] + [0.0] * 5


def test_a_position_drafted_again_by_a_later_block_has_fresh_noise_in_rejection() -> None:
    params, logits = [SamplingParams()] * 200, torch.zeros(200, VOCAB)
    sampling = DraftSampling.of([SamplingParams(seed=seed) for seed in range(len(params))])
    starts = torch.full((200,), 50)
    earlier = DraftChooser(sampling, starts, 2, VOCAB, "rejection", VOCAB)(1, logits)
    later = DraftChooser(sampling, starts + 1, 2, VOCAB, "rejection", VOCAB)(0, logits)
    assert (earlier == later).sum() < 30  # 200 / 23 by chance


def test_truncated_drafts_follow_the_distribution_they_report() -> None:
    num = 40_000
    sampling = DraftSampling.of([SamplingParams(seed=seed, temperature=1.5) for seed in range(num)])
    choose = DraftChooser(sampling, torch.zeros(num, dtype=torch.int64), 1, VOCAB, "rejection", 5)
    tokens = choose(0, random_logits(1).expand(num, -1))
    expected = num * choose.probabilities[0, 0]
    counts = (tokens.unsqueeze(1) == choose.ids[0, 0]).sum(0)
    assert ((counts - expected) ** 2 / expected).sum() < 24  # 4 degrees of freedom


def test_noise_of_a_block_is_made_in_the_stream_of_its_mode() -> None:
    sampling = DraftSampling.of([SamplingParams(seed=3)])
    start, logits = torch.tensor([5]), torch.zeros(1, VOCAB)
    for mode, stream in (("coupled", STREAM_SAMPLE), ("rejection", STREAM_DRAFT)):
        rows = build_sampling_rows([context(position=6, seed=3)])
        expected = draw(logits, rows, stream)[1]
        assert DraftChooser(sampling, start, 1, VOCAB, mode, VOCAB)(0, logits) == expected  # type: ignore[arg-type]
