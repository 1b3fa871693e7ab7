"""Sampling parameters of rows as tensors that are sent to every rank."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from dspark_ray.sampling.sampling_rows import RequestSampling, RowContext, SamplingRows, build_sampling_rows
from dspark_ray.types import SamplingParams

VOCAB = 32


def context(
    stop_ids: tuple[int, ...] = (), wants_distribution: bool = False, position: int = 6, **params: Any
) -> RowContext:
    """A row of a request with prompt 1 2 3 and outputs 3 4 4; `stop_ids` may not come yet."""
    sampling = RequestSampling(SamplingParams(**params), (1, 2, 3), stop_ids, VOCAB)
    return RowContext(sampling, position, [3, 4, 4], len(stop_ids) > 0, wants_distribution)


def edits_of(rows: SamplingRows) -> dict[tuple[int, int], tuple[float, float]]:
    edits = rows.edits
    assert edits is not None
    keys = zip(edits.rows.tolist(), edits.token_ids.tolist(), strict=True)
    values = zip(edits.factors.tolist(), edits.offsets.tolist(), strict=True)
    return dict(zip(keys, values, strict=True))


def test_plain_requests_have_no_edits_and_need_no_full_vocabulary() -> None:
    rows = build_sampling_rows([context(), context(temperature=0)])
    assert rows.edits is None
    assert rows.full_vocab_rows == ()


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"logprobs": 0}, {"wants_distribution": True}],
    ids=str,
)
def test_filters_reports_and_distributions_need_the_full_vocabulary(changes: dict[str, Any]) -> None:
    assert build_sampling_rows([context(), context(**changes)]).full_vocab_rows == (1,)


def test_a_greedy_row_ignores_filters_and_wants_no_distribution() -> None:
    rows = build_sampling_rows([context(temperature=0, top_k=2, wants_distribution=True)])
    assert rows.full_vocab_rows == ()
    assert rows.wants_distribution == (False,)


def test_repetition_looks_at_prompt_and_outputs() -> None:
    edits = edits_of(build_sampling_rows([context(repetition_penalty=1.5)]))
    assert edits == {(0, token): (1.5, 0.0) for token in (1, 2, 3, 4)}


def test_frequency_and_presence_look_at_outputs_only() -> None:
    edits = edits_of(build_sampling_rows([context(), context(frequency_penalty=0.5, presence_penalty=1)]))
    assert edits == {(1, 3): (1.0, -1.5), (1, 4): (1.0, -2.0)}


def test_bias_adds_to_penalties_and_forbidding_overrides_both() -> None:
    contexts = [context(presence_penalty=1, logit_bias={3: 4.0, 4: 100.0, 9: -2.0}, stop_ids=(4, 0))]
    edits = edits_of(build_sampling_rows(contexts))
    never = (1.0, -float("inf"))
    assert edits == {(0, 0): never, (0, 3): (1.0, 3.0), (0, 4): never, (0, 9): (1.0, -2.0)}


def test_rows_survive_pickling() -> None:
    contexts = [context(seed=-5), context(repetition_penalty=2, logprobs=3, wants_distribution=True)]
    rows = build_sampling_rows(contexts)
    copy = pickle.loads(pickle.dumps(rows))
    assert torch.equal(copy.integers, rows.integers)
    assert torch.equal(copy.floats, rows.floats)
    assert edits_of(copy) == edits_of(rows)
    assert (copy.logprobs, copy.full_vocab_rows, copy.wants_distribution) == ((None, 3), (1,), (False, True))


def test_selected_rows_are_renumbered_with_all_that_belongs_to_them() -> None:
    contexts = [context(logit_bias={token: 1.0}, seed=token, top_k=token or 0) for token in range(4)]
    selected = build_sampling_rows(contexts).select([1, 3])
    assert selected.seeds.tolist() == [1, 3]
    assert edits_of(selected) == {(0, 1): (1.0, 1.0), (1, 3): (1.0, 1.0)}
    assert selected.full_vocab_rows == (0, 1)


def test_no_rows_can_be_packed() -> None:
    rows = build_sampling_rows([])
    assert (rows.num_rows, rows.full_vocab_rows, rows.any_sampled) == (0, (), False)


@pytest.mark.parametrize(
    ("params", "stop_ids", "wrong"),
    [({"logit_bias": {VOCAB: 1.0}}, (), VOCAB), ({}, (3, VOCAB + 1), VOCAB + 1)],
)
def test_a_token_outside_the_vocabulary_is_named(params: Any, stop_ids: tuple[int, ...], wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"\[{wrong}\]: expected 0..31"):
        context(stop_ids, **params)


class Unsearchable(tuple[int, ...]):
    """Rows whose membership must not be tested one by one."""

    def __contains__(self, row: object) -> bool:
        raise AssertionError("every search looks through all rows")


def test_selecting_rows_does_not_search_full_vocab_rows_for_each() -> None:
    rows = build_sampling_rows([context(top_p=0.5), context(), context(top_p=0.5)])
    selected = replace(rows, full_vocab_rows=Unsearchable(rows.full_vocab_rows)).select([1, 2])
    assert selected.full_vocab_rows == (1,)
