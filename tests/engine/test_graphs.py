"""Steps that are replayed: fixed shapes, filled up, in memory that stays where it is.

Without a GPU nothing can be recorded. `Rerun` keeps the rest of the contract: a replay computes from the same input
tensors, and leaves its results in the tensors of the recording.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_model import SMALL, build_small_engine, request, run, small_config, small_modules
from torch import Tensor

from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.drafters.draft_sampling import DraftSampling
from dspark_ray.drafters.protocol import ContextUpdate, DraftRequest
from dspark_ray.model.rows import Segment, build_rows
from dspark_ray.ranks.draft_worker import DraftWorker
from dspark_ray.runner.decode import TargetGraphs
from dspark_ray.runner.graphs import GraphSet, Outputs, Replay, graph_sizes, padded_size
from dspark_ray.types import SamplingParams

PROMPT = tuple((7 * n + 3) % SMALL.vocab_size for n in range(23))
BLOCK = 6
"""An anchor and five drafts."""


class Rerun:
    """A `Capture` that computes anew at every replay."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        outputs = function()

        def replay() -> None:
            self.num_replays += 1
            for kept, fresh in zip(outputs, function(), strict=True):
                kept.copy_(fresh)

        return replay, outputs


def requests(**sampling: object):
    return [
        request(PROMPT[: 3 + 2 * number], str(number), speculate=number != 2, seed=number, **sampling)
        for number in range(6)
    ]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.8}],
    ids=["greedy", "sampled", "filtered"],
)
def test_replayed_steps_say_what_launched_steps_say(sampling: dict[str, object]) -> None:
    capture = Rerun()
    assert run(build_small_engine(capture=capture), *requests(**sampling)) == run(
        build_small_engine(), *requests(**sampling)
    )
    assert capture.num_replays > 20


def test_rejection_verification_replays_the_target_and_launches_the_draft() -> None:
    changes: dict[str, object] = {"verification": "rejection"}
    capture = Rerun()
    replayed = run(build_small_engine(capture=capture, **changes), *requests(temperature=1.0))
    assert replayed == run(build_small_engine(**changes), *requests(temperature=1.0))
    assert capture.num_replays > 0


def test_a_text_that_fills_the_model_is_replayed_to_its_last_token() -> None:
    changes: dict[str, object] = {"max_model_len": 64}
    asked = request(PROMPT, "long", temperature=1.0, seed=2, max_tokens=1000)
    replayed = run(build_small_engine(capture=Rerun(), **changes), asked)
    assert replayed == run(build_small_engine(**changes), asked)
    assert len(replayed["long"]) == 64 - len(PROMPT)


def test_long_texts_replay_with_the_indexer_and_short_ones_without(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, cache = target_graphs(Rerun(), max_length=256)
    looked: list[int] = []
    monkeypatch.setattr("dspark_kernels.indexer_topk", counting(looked))
    model, _ = small_modules()
    for start, tokens in ((0, BLOCK), (6, 4), (10, 6), (16, 1), (17, 6)):
        before = len(looked)
        piece = [segment(0, start, tokens)]
        expected = model(build_rows(piece, cache.shape), cache)
        launched = len(looked) - before
        torch.testing.assert_close(graphs.run(piece).hidden, expected.hidden, atol=2e-5, rtol=0)
        assert (len(looked) - before - launched > 0) == (start + tokens > 16), "index_topk 4 entries are 16 tokens"


def counting(calls: list[int]) -> Callable[..., Tensor]:
    from dspark_kernels.reference import indexer_topk

    def counted(*args: object) -> Tensor:
        calls.append(1)
        return indexer_topk(*args)  # type: ignore[arg-type]

    return counted


def target_graphs(capture: Rerun, max_length: int) -> tuple[TargetGraphs, CacheTensors]:
    config = small_config()
    shape = CacheShape.of(SMALL, BLOCK - 1, config.page_size, config.max_num_seqs, config.max_num_batched_tokens)
    cache = CacheTensors(SMALL, shape, num_pages=16)
    for layer in cache.layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor):
                tensor.fill_(float("nan"))
    return TargetGraphs(small_modules()[0], cache, config.max_num_seqs, max_length, capture), cache


def segment(slot: int, start: int, num_tokens: int) -> Segment:
    tokens = [(5 * (start + n) + slot) % SMALL.vocab_size for n in range(num_tokens)]
    return Segment(slot, start, tokens, pages=[2 * slot, 2 * slot + 1])


@torch.inference_mode()
def test_a_step_that_is_filled_up_computes_and_stores_what_the_same_step_does_alone() -> None:
    """5 sequences of 1, 6, 3, 6 and 2 rows in a graph of 20, again and again, in a cache full of NaN."""
    graphs, replayed = target_graphs(Rerun(), max_length=64)
    _, launched = target_graphs(Rerun(), max_length=64)
    model, _ = small_modules()
    starts = [0] * 5
    for step in range(6):
        counts = [1 + (5 * slot + step) % BLOCK for slot in range(5)]
        pieces = [segment(slot, start, count) for slot, (start, count) in enumerate(zip(starts, counts, strict=True))]
        output = graphs.run(pieces)
        expected = model(build_rows(pieces, launched.shape), launched)
        torch.testing.assert_close(output.hidden, expected.hidden, atol=2e-5, rtol=0)
        torch.testing.assert_close(output.context_features, expected.context_features, atol=2e-5, rtol=0)
        starts = [start + 1 + count // 2 for start, count in zip(starts, counts, strict=True)]  # some are rejected
    rings = launched.shape.num_slots * launched.shape.window_ring
    for ours, theirs in zip(replayed.layers, launched.layers, strict=True):
        torch.testing.assert_close(ours.window[:rings], theirs.window[:rings], atol=2e-5, rtol=0, equal_nan=True)
        if theirs.entries is not None:
            torch.testing.assert_close(ours.entries, theirs.entries, atol=2e-5, rtol=0, equal_nan=True)


def test_features_stay_as_they_were_when_the_next_step_has_been_replayed() -> None:
    graphs, _ = target_graphs(Rerun(), max_length=64)
    with torch.inference_mode():
        first = graphs.run([segment(0, 0, 3)]).context_features
        assert first is not None
        before = first.clone()
        graphs.run([segment(0, 3, 3)])
    assert torch.equal(first, before)


def test_only_steps_of_blocks_fit() -> None:
    graphs, _ = target_graphs(Rerun(), max_length=64)
    assert graphs.fits([segment(slot, 0, BLOCK) for slot in range(8)])
    assert not graphs.fits([segment(0, 0, 1), segment(1, 0, BLOCK + 1)])


def test_sizes_leave_at_most_a_fourth_of_a_step_unused() -> None:
    sizes = graph_sizes(1536)
    assert sizes[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
    assert sizes[-1] == 1536
    assert len(sizes) == 38
    assert all(padded_size(sizes, rows) <= 1.25 * rows for rows in range(1, 1537))
    assert graph_sizes(1) == (1,)


def test_a_recording_is_made_once() -> None:
    made: list[int] = []

    def function(key: int) -> Outputs:
        made.append(key)
        return (torch.tensor([key]),)

    def capture(function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        return (lambda: None), function()

    graphs: GraphSet[int] = GraphSet(function, capture)
    graphs.record(3)
    assert [int(graphs.run(key)[0]) for key in (3, 5, 3)] == [3, 5, 3]
    assert made == [3, 5]


def test_a_replayed_draft_is_as_long_as_its_recording_however_little_was_asked_for() -> None:
    """The recording computes every position; a launched draft stops where it may."""
    sampling = DraftSampling.of([SamplingParams(seed=1)])
    none = np.empty(0, dtype=np.int64)
    asked = DraftRequest(
        context=ContextUpdate(none, none, torch.empty(0, SMALL.hidden_size)),
        slots=np.array([0]),
        anchors=np.array([7]),
        starts=np.array([0]),
        sampling=sampling,
        num_positions=2,
    )
    replayed = DraftWorker(small_modules()[1], small_config(), Rerun()).draft(asked)
    launched = DraftWorker(small_modules()[1], small_config()).draft(asked)
    assert (replayed.tokens.shape, launched.tokens.shape) == ((1, BLOCK - 1), (1, 2))
    assert replayed.tokens[0, :2].tolist() == launched.tokens[0].tolist()
