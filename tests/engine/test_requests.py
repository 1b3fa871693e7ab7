"""What a request gets back: ends, aborts, log-probabilities, errors, and books that balance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_model import (
    SMALL,
    build_small_engine,
    request,
    run,
    run_outputs,
    small_config,
    small_modules,
    tokens_of,
)

from dspark_ray.drafters.protocol import ContextUpdate, DraftProposal, DraftRequest
from dspark_ray.engine.round import computed_of, slots_of
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.draft_worker import DraftWorker, InlineDrafter
from dspark_ray.types import QueueFullError, Request, RequestError, SamplingParams

PROMPT = tuple((5 * n + 1) % SMALL.vocab_size for n in range(19))


def text(**sampling: object) -> list[int]:
    return run(build_small_engine(), request(PROMPT, **sampling))["r"]


def test_max_tokens_ends_with_length():
    outputs = run_outputs(build_small_engine(), request(PROMPT, max_tokens=7))["r"]
    assert len(tokens_of(outputs)) == 7
    assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"]


def test_the_model_length_ends_with_length():
    outputs = run_outputs(build_small_engine(max_model_len=32), request(PROMPT, max_tokens=500))["r"]
    assert len(tokens_of(outputs)) == 32 - len(PROMPT)
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("speculate", [True, False])
def test_a_stop_id_ends_the_text_with_itself(speculate):
    stop = text(seed=3)[11]
    expected = text(seed=3)[: text(seed=3).index(stop) + 1]
    outputs = run_outputs(build_small_engine(), request(PROMPT, speculate=speculate, seed=3, stop_token_ids=(stop,)))
    assert tokens_of(outputs["r"]) == expected
    assert (outputs["r"][-1].finish_reason, outputs["r"][-1].stop_token_id) == ("stop", stop)


def test_end_of_sequence_stops_unless_ignored():
    eos = SMALL.eos_token_id
    biased = {"logit_bias": {eos: 100.0}, "temperature": 0.0}
    assert text(ignore_eos=False, **biased) == [eos]
    assert len(text(ignore_eos=True, **biased)) == 40


def test_stop_ids_are_impossible_before_min_tokens():
    eos = SMALL.eos_token_id
    tokens = text(ignore_eos=False, min_tokens=9, temperature=0.0, logit_bias={eos: 50.0})
    assert tokens.index(eos) == 9
    assert len(tokens) == 10


def test_an_aborted_request_says_so_once_and_leaves_nothing_behind():
    engine = build_small_engine()
    engine.add_request(request(PROMPT, "a"))
    engine.add_request(request(PROMPT, "b"))
    engine.step()
    engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("never seen")
    outputs = [o for _ in range(100) if engine.has_unfinished() for o in engine.step().sequences]
    assert [o.finish_reason for o in outputs if o.request_id == "a"] == ["abort"]
    assert len([o for o in outputs if o.request_id == "b" and o.finish_reason == "length"]) == 1
    engine.scheduler.check_idle()


def test_aborting_a_waiting_request_frees_its_place():
    engine = build_small_engine(max_num_seqs=1, max_waiting=1)
    engine.add_request(request(PROMPT, "a"))
    engine.add_request(request(PROMPT, "b"))
    engine.abort("a")
    engine.add_request(request(PROMPT, "c"))
    assert engine.has_unfinished()


def test_a_burst_on_an_idle_engine_is_accepted_up_to_what_may_run_and_wait():
    engine = build_small_engine(max_num_seqs=4, max_waiting=2)
    for index in range(6):
        engine.add_request(request(PROMPT, str(index)))
    with pytest.raises(QueueFullError, match="6 requests have not ended, max_num_seqs=4 and max_waiting=2 more"):
        engine.add_request(request(PROMPT, "one more"))


def test_a_full_queue_takes_a_request_that_another_engine_began():
    engine = build_small_engine(max_num_seqs=1, max_waiting=1)
    for request_id in ("a", "b"):
        engine.add_request(request(PROMPT, request_id))
    engine.add_request(replace(request(PROMPT, "resumed"), output_token_ids=(1,)))
    assert engine.has_unfinished()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request((1,) * 256), "256 tokens: expected fewer than 256"),
        (request((1, 61)), "token id 61: expected 0..60"),
        (request((1,), logit_bias={99: 1.0}), "logit_bias has token id 99"),
        (request((1,), stop_token_ids=(61,)), "stop_token_ids has token id 61"),
    ],
)
def test_requests_that_can_never_run_are_refused_with_the_value(bad, message):
    with pytest.raises(RequestError, match=message):
        build_small_engine().add_request(bad)


def test_the_same_id_twice_is_refused():
    engine = build_small_engine()
    engine.add_request(request(PROMPT))
    with pytest.raises(RequestError, match="already running"):
        engine.add_request(request(PROMPT))


def test_more_requests_than_slots_all_end():
    requests = [request(PROMPT[: 3 + n], f"r{n}", max_tokens=9, seed=n) for n in range(12)]
    together = run(build_small_engine(max_num_seqs=3, max_num_batched_tokens=24), *requests)
    assert together == {r.request_id: run(build_small_engine(), r)[r.request_id] for r in requests}


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_targets_own_one_per_token(verification, temperature):
    wanted = request(PROMPT, temperature=temperature, logprobs=3, max_tokens=20)
    outputs = run_outputs(build_small_engine(verification=verification), wanted)["r"]
    reports = [report for o in outputs for report in o.logprobs]
    tokens = tokens_of(outputs)
    assert [report.token_id for report in reports] == tokens
    # Recomputed without speculation, by forcing the same tokens one by one.
    for number, report in enumerate(reports):
        forced = request((*PROMPT, *tokens[:number]), max_tokens=1, logprobs=3, logit_bias={}, temperature=0.0)
        plain = run_outputs(build_small_engine(), forced)["r"][0].logprobs[0]
        assert [t for t, _ in report.top] == [t for t, _ in plain.top]
        assert [v for _, v in report.top] == pytest.approx([v for _, v in plain.top], abs=1e-4)
        if report.token_id == plain.token_id:
            assert report.logprob == pytest.approx(plain.logprob, abs=1e-4)
        assert report.logprob <= report.top[0][1] + 1e-6
        assert math.isfinite(report.logprob)


def test_rejection_with_temperature_zero_is_greedy():
    expected = text(temperature=0.0)
    assert run(build_small_engine(verification="rejection"), request(PROMPT, temperature=0.0))["r"] == expected


def test_rejection_is_reproducible_with_a_seed():
    runs = [run(build_small_engine(verification="rejection"), request(PROMPT, seed=9))["r"] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 40


def test_statistics_add_up():
    outputs = run_outputs(build_small_engine(), request(PROMPT, max_tokens=33))["r"]
    stats = outputs[-1].stats
    assert stats is not None
    assert sum(stats.accepted_histogram) == stats.num_rounds
    assert sum(n * count for n, count in enumerate(stats.accepted_histogram)) == stats.num_accepted
    # The prefill gives one token, every round its accepted drafts and one more.
    assert 1 + stats.num_rounds + stats.num_accepted == 33
    assert stats.num_accepted <= stats.num_admitted <= stats.num_drafted


def test_drafts_behind_a_stop_id_do_not_count_as_accepted():
    stop = text(seed=3)[11]
    outputs = run_outputs(build_small_engine(), request(PROMPT, seed=3, stop_token_ids=(stop,)))["r"]
    stats = outputs[-1].stats
    assert stats is not None
    assert 1 + stats.num_rounds + stats.num_accepted == len(tokens_of(outputs))


def context_of_all(engine: Engine) -> ContextUpdate:
    """The whole context of all running sequences, as a new drafter would need it."""
    running = [sequence for sequence in engine.scheduler.running if engine._speculates(sequence)]
    return engine._context(slots_of(running), np.zeros(len(running), dtype=np.int64), computed_of(running))


class ForgetfulDrafter(InlineDrafter):
    """Replaces its worker before every draft by a new one, rebuilt from the verifier's rows."""

    def __init__(self) -> None:
        self.config = small_config()
        self.proposals: list[DraftProposal] = []
        self.engine = None
        super().__init__(DraftWorker(small_modules()[1], self.config))

    def submit(self, request: DraftRequest) -> None:
        self._worker = DraftWorker(small_modules()[1], self.config)
        self._worker.store(context_of_all(self.engine))
        none = np.empty(0, dtype=np.int64)
        super().submit(replace(request, context=ContextUpdate(none, none, torch.empty(0, SMALL.hidden_size))))

    def collect(self) -> DraftProposal:
        self.proposals.append(super().collect())
        return self.proposals[-1]


class RememberingDrafter(InlineDrafter):
    def __init__(self) -> None:
        self.proposals: list[DraftProposal] = []
        super().__init__(DraftWorker(small_modules()[1], small_config()))

    def collect(self) -> DraftProposal:
        self.proposals.append(super().collect())
        return self.proposals[-1]


def test_a_new_drafter_rebuilt_from_the_verifiers_rows_drafts_the_same():
    requests = [request(PROMPT, "a"), request(PROMPT[:4], "b", seed=2)]
    forgetful, remembering = ForgetfulDrafter(), RememberingDrafter()
    forgetful.engine = build_small_engine(drafter=forgetful)
    assert run(forgetful.engine, *requests) == run(build_small_engine(drafter=remembering), *requests)
    assert len(forgetful.proposals) == len(remembering.proposals) > 5
    for ours, theirs in zip(forgetful.proposals, remembering.proposals, strict=True):
        assert (ours.tokens == theirs.tokens).all()
        torch.testing.assert_close(torch.from_numpy(ours.confidences), torch.from_numpy(theirs.confidences))


def test_sampling_parameters_out_of_range_name_themselves():
    with pytest.raises(RequestError, match=r"temperature=-1.0: expected a number in \[0, 100\]"):
        SamplingParams(temperature=-1.0)
    with pytest.raises(RequestError, match="at least one token"):
        Request(request_id="r", prompt_token_ids=())
