"""A fault that belongs to one request ends that request: the others go on, with the same text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_model import SMALL, build_small_engine, request, run, run_outputs, small_config, small_modules, tokens_of

from dspark_ray.drafters.protocol import DraftProposal
from dspark_ray.engine.sequence import Sequence
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.draft_worker import DraftWorker, InlineDrafter
from dspark_ray.sampling.sampler import Sampler
from dspark_ray.sampling.sampling_rows import SamplingRows
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.speculative.planner import Planner
from dspark_ray.types import Request, RequestError, SamplingParams, SequenceOutput, StepRecord

PROMPT = tuple((7 * n + 3) % SMALL.vocab_size for n in range(23))
CHEAP = CostTable.of(Curve((1, 64), (1.0, 1.01)), Curve((1, 8), (0.01, 0.02)))
EVIL_SEED = 13
GOOD = request(PROMPT, "good", seed=5)
EVIL = request(PROMPT[:9], "evil", seed=EVIL_SEED)


def served(engine: Engine, *requests: Request) -> tuple[dict[str, list[SequenceOutput]], list[StepRecord]]:
    """Outputs of each request, and the records of all steps."""
    records: list[StepRecord] = []
    step = engine.step

    def recorded() -> Any:
        output = step()
        records.extend([output.record] if output.record else [])
        return output

    engine.step = recorded  # type: ignore[method-assign]
    return run_outputs(engine, *requests), records


# Exceptions.


def test_a_request_that_cannot_be_prepared_leaves_the_engine_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Engine._row_contexts

    def failing(engine: Engine, sequence: Sequence, drafts: tuple[int, ...]) -> Any:
        if sequence.request.request_id == "evil":
            raise OverflowError
        return prepare(engine, sequence, drafts)

    monkeypatch.setattr(Engine, "_row_contexts", failing)
    engine = build_small_engine()
    engine.add_request(GOOD)
    engine.step()
    with pytest.raises(OverflowError):
        engine.add_request(EVIL)
    assert [s.request.request_id for s in engine.scheduler.running] == ["good"]
    assert not engine.scheduler.waiting


@pytest.mark.parametrize("stage", ["_row_contexts", "_append"])
@pytest.mark.parametrize("num_outputs", [0, 7])
@pytest.mark.parametrize("company", [True, False])
def test_an_exception_in_a_step_ends_its_sequence_alone(
    stage: str, num_outputs: int, company: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"good": alone("good", "coupled"), "evil": alone("sampled", "coupled")}
    original = getattr(Engine, stage)
    engine = build_small_engine()

    def failing(engine: Engine, subject: Any, *rest: Any) -> Any:
        sequence = getattr(subject, "sequence", subject)
        if sequence.request.request_id == "evil" and sequence.slot is not None and sequence.num_outputs >= num_outputs:
            raise OverflowError("what the prompt says")
        return original(engine, subject, *rest)

    monkeypatch.setattr(Engine, stage, failing)
    outputs, records = served(engine, *((GOOD, EVIL) if company else (EVIL,)))
    last = outputs["evil"][-1]
    assert (last.finish_reason, last.token_ids) == ("error", ())
    assert last.error == "an internal error ended this request (OverflowError)"
    assert [o.finish_reason for o in outputs["evil"][:-1]] == [None] * (len(outputs["evil"]) - 1)
    text = tokens_of(outputs["evil"])
    assert len(text) >= num_outputs
    assert text == expected["evil"][: len(text)]
    if company:
        assert tokens_of(outputs["good"]) == expected["good"]
        assert len(records) > 5


def test_an_exception_of_the_forward_is_raised() -> None:
    engine = build_small_engine()
    engine.add_request(GOOD)
    engine._target.run = lambda command: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        engine.step()


# Logits that are not finite.


def poison_logits(monkeypatch: pytest.MonkeyPatch, value: float, first: int, columns: slice) -> None:
    """Put `value` into the evil request's rows of logits, from absolute position `first` on."""
    original = Sampler.sample

    def poisoned(sampler: Sampler, logits: torch.Tensor, rows: SamplingRows) -> Any:
        hit = (rows.seeds == EVIL_SEED) & (rows.positions >= first)
        logits = logits.clone()
        logits[hit, columns] = value
        return original(sampler, logits, rows)

    monkeypatch.setattr(Sampler, "sample", poisoned)


SETTINGS: dict[str, dict[str, object]] = {
    "sampled": {},
    "greedy": {"temperature": 0.0},
    "filtered": {"top_p": 0.9, "top_k": 20},
    "reported": {"logprobs": 2},
    "edited": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
}
BROKEN: dict[str, tuple[float, slice]] = {
    "one NaN": (math.nan, slice(17, 18)),
    "all NaN": (math.nan, slice(None)),
    "one infinity": (math.inf, slice(30, 31)),
    "nothing possible": (-math.inf, slice(None)),
}


@cache
def alone(name: str, verification: str) -> list[int]:
    """The text of the good request, or of the evil one in a setting, when nothing is broken."""
    asked = GOOD if name == "good" else replace(EVIL, sampling=replace(EVIL.sampling, **SETTINGS[name]))  # type: ignore[arg-type]
    return run(build_small_engine(verification=verification), asked)[asked.request_id]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_logits_that_are_not_finite_end_their_sequence_with_an_error(
    verification: str, setting: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = replace(EVIL.sampling, **SETTINGS[setting])  # type: ignore[arg-type]
    evil, changes = replace(EVIL, sampling=sampling), {"verification": verification}
    plain = {"good": alone("good", verification), "evil": alone(setting, verification)}
    value, columns = BROKEN[broken]
    poison_logits(monkeypatch, value, first=len(EVIL.prompt_token_ids) + 8, columns=columns)
    outputs, records = served(build_small_engine(**changes), GOOD, evil)
    last, text = outputs["evil"][-1], tokens_of(outputs["evil"])
    assert last.finish_reason == "error"
    assert "are not finite" in (last.error or "")
    assert 1 <= len(text) <= 8, "tokens before the broken row, of which a whole block may be given up"
    assert text == plain["evil"][: len(text)]
    assert tokens_of(outputs["good"]) == plain["good"]
    assert sum(record.num_nonfinite_logits for record in records) == 1


def test_a_prompt_whose_logits_are_not_finite_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_logits(monkeypatch, math.nan, first=0, columns=slice(3, 4))
    outputs, records = served(build_small_engine(), EVIL)
    assert [(o.finish_reason, o.token_ids) for o in outputs["evil"]] == [("error", ())]
    assert sum(record.num_nonfinite_logits for record in records) == 1


# Drafts that are not finite.


class PoisonedDrafter(InlineDrafter):
    """Changes the proposals of the request whose draft sits in row 0."""

    def __init__(self, change: Callable[[DraftProposal], DraftProposal], **changes: object) -> None:
        super().__init__(DraftWorker(small_modules()[1], small_config(**changes)))
        self._change = change

    def collect(self) -> DraftProposal:
        proposal = super().collect()
        return self._change(proposal) if len(proposal.tokens) else proposal


def confidence(value: float) -> Callable[[DraftProposal], DraftProposal]:
    def change(proposal: DraftProposal) -> DraftProposal:
        confidences = proposal.confidences.copy()
        confidences[0, min(2, confidences.shape[1] - 1)] = value
        return replace(proposal, confidences=confidences)

    return change


def token(value: int) -> Callable[[DraftProposal], DraftProposal]:
    def change(proposal: DraftProposal) -> DraftProposal:
        tokens = proposal.tokens.copy()
        tokens[0, min(2, tokens.shape[1] - 1)] = value
        return replace(proposal, tokens=tokens)

    return change


def three_requests() -> list[Request]:
    return [request(PROMPT[: 5 + 3 * n], f"r{n}", seed=n, max_tokens=25) for n in range(3)]


@cache
def texts_without_speculation() -> dict[str, list[int]]:
    engine = build_small_engine(speculation=False)
    return {r.request_id: run(engine, r)[r.request_id] for r in three_requests()}


@pytest.mark.parametrize("schedule", ["full", "fixed"])
@pytest.mark.parametrize(
    "change",
    [confidence(math.nan), confidence(math.inf), confidence(-math.inf), token(-1), token(SMALL.vocab_size)],
    ids=["NaN", "inf", "-inf", "no token", "beyond the vocabulary"],
)
def test_a_draft_that_is_not_finite_is_cut_there_and_changes_nothing_else(change: Any, schedule: str) -> None:
    requests = three_requests()
    texts = texts_without_speculation()
    changes: dict[str, object] = {"schedule": schedule}
    planner = Planner(small_config(**changes), CHEAP)
    engine = build_small_engine(drafter=PoisonedDrafter(change, **changes), planner=planner, **changes)
    outputs, records = served(engine, *requests)
    assert {name: tokens_of(parts) for name, parts in outputs.items()} == texts
    drafted = [record for record in records if record.num_drafted]
    assert sum(record.num_nonfinite_drafts for record in drafted) >= len(drafted) - 1 > 10
    assert all(record.lengths[0] <= 2 for record in drafted)
    assert any(max(record.lengths[1:], default=0) > 2 for record in drafted), "the others are verified as before"


def test_a_distribution_that_is_not_finite_is_not_verified() -> None:
    changes: dict[str, object] = {"verification": "rejection", "schedule": "fixed"}

    def poisoned(proposal: DraftProposal) -> DraftProposal:
        assert proposal.distributions is not None
        probabilities = np.array(proposal.distributions.probabilities)
        probabilities[0, 1] = math.nan
        return replace(proposal, distributions=replace(proposal.distributions, probabilities=probabilities))

    outputs, records = served(build_small_engine(drafter=PoisonedDrafter(poisoned, **changes), **changes), GOOD)
    assert len(tokens_of(outputs["good"])) == 40
    drafted = [record for record in records if record.num_drafted]
    assert {record.lengths[0] for record in drafted[:-1]} == {1}


# What one request costs the others.


@pytest.mark.parametrize("num_tokens", [64, 65, 66])
def test_the_planner_forgets_the_former_tenant_of_a_slot_whatever_the_chunks(num_tokens: int) -> None:
    """A resumed sequence whose last chunk leaves one token decodes without a sample of its prompt."""
    engine, admitted = build_small_engine(), []
    engine.planner.admit = admitted.append  # type: ignore[method-assign, assignment]
    resumed = Request(
        request_id="r",
        prompt_token_ids=PROMPT * 2,
        output_token_ids=(1,) * (num_tokens - 2 * len(PROMPT)),
        sampling=SamplingParams(max_tokens=40, ignore_eos=True),
    )
    run(engine, resumed)
    assert len(admitted) == 1


class CountedIds(tuple[int, ...]):
    """Counts how often all ids are gone through."""

    num_passes = 0

    def __iter__(self) -> Any:
        CountedIds.num_passes += 1
        return super().__iter__()


def test_stop_ids_are_gone_through_when_a_request_is_added_and_never_again() -> None:
    stops = CountedIds(range(30, 60))
    engine = build_small_engine()
    engine.add_request(request(PROMPT, stop_token_ids=stops, min_tokens=30))
    passes = CountedIds.num_passes
    while engine.has_unfinished():
        engine.step()
    assert CountedIds.num_passes == passes


def test_stop_ids_that_leave_no_token_possible_are_refused() -> None:
    everything = tuple(range(SMALL.vocab_size))
    with pytest.raises(RequestError, match="leave no token possible before min_tokens"):
        build_small_engine().add_request(request(PROMPT, stop_token_ids=everything, min_tokens=3))
    assert len(run(build_small_engine(), request(PROMPT, stop_token_ids=everything))["r"]) == 1


def test_without_speculation_no_room_is_kept_for_drafts() -> None:
    config = small_config(speculation=False, max_num_batched_tokens=8)
    assert config.gamma == 0
    engine = build_small_engine(speculation=False, max_num_batched_tokens=8)
    requests = [request(PROMPT[: 3 + n], f"r{n}", seed=n) for n in range(8)]
    expected = {r.request_id: run(build_small_engine(), r)[r.request_id] for r in requests}
    assert run(engine, *requests) == expected
