"""Schedules, budgets, thresholds and bypasses change the speed, never the text of coupled verification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_model import SMALL, build_small_engine, request, run, run_outputs, small_config, small_modules

from dspark_ray.config import ConfigError, EngineConfig, ResolvedConfig
from dspark_ray.drafters.protocol import DraftProposal, DraftRequest
from dspark_ray.engine.profiler import load_or_profile, profile
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.draft_worker import DraftWorker, InlineDrafter
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.speculative.planner import Batch, Planner
from dspark_ray.types import BypassReason, SequenceOutput, StepRecord, VerificationPolicy

PROMPT = tuple((7 * n + 3) % SMALL.vocab_size for n in range(23))
KINDS = [{"temperature": 0.0}, {"seed": 5}, {"temperature": 1.6, "seed": 6}, {"top_p": 0.8, "seed": 7}]

CHEAP = CostTable.of(Curve((1, 64), (1.0, 1.01)), Curve((1, 8), (0.01, 0.02)))
STEEP = CostTable.of(Curve((1, 64), (1.0, 20.0)), Curve((1, 8), (0.05, 0.1)))
STAIRS = CostTable.of(Curve((4, 12, 20, 64), (1.0, 2.0, 2.5, 9.0), padded_to=64), Curve((1, 8), (0.1, 0.2)))
HOPELESS = CostTable.of(Curve((1, 64), (1.0, 1.01)), Curve((1, 8), (50.0, 50.0)))


def mixed(speculate: bool = True):
    return [
        request(PROMPT[: 6 + 3 * number], f"r{number}", speculate, **sampling) for number, sampling in enumerate(KINDS)
    ]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[int]]:
    return {r.request_id: run(build_small_engine(), r)[r.request_id] for r in mixed(speculate=False)}


def scheduled(table: CostTable, **changes: object) -> Engine:
    """An engine whose costs are what `table` says, whatever its steps really take."""
    return build_small_engine(clock=Clock(), planner=Planner(small_config(**changes), table), **changes)


class Clock:
    """A clock that does not depend on the machine."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def records_of(engine: Engine, *requests: object) -> tuple[dict[str, list[SequenceOutput]], list[StepRecord]]:
    """Outputs and records of serving `requests` together."""
    records: list[StepRecord] = []
    step = engine.step

    def recorded():
        output = step()
        if output.record is not None:
            records.append(output.record)
        return output

    engine.step = recorded  # type: ignore[method-assign]
    return run_outputs(engine, *requests), records  # type: ignore[arg-type]


def tokens(outputs: dict[str, list[SequenceOutput]]) -> dict[str, list[int]]:
    return {name: [token for output in parts for token in output.token_ids] for name, parts in outputs.items()}


@pytest.mark.parametrize("table", [CHEAP, STEEP, STAIRS, HOPELESS], ids=["cheap", "steep", "stairs", "hopeless"])
@pytest.mark.parametrize("schedule", ["causal", "lagged", "full", "fixed"])
def test_no_schedule_and_no_cost_changes_the_text(schedule, table, texts):
    assert run(scheduled(table, schedule=schedule), *mixed()) == texts


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("schedule", ["causal", "lagged", "full"])
def test_no_threshold_of_the_engine_changes_the_text(schedule, threshold, texts):
    assert run(scheduled(CHEAP, schedule=schedule, confidence_threshold=threshold), *mixed()) == texts


@pytest.mark.parametrize("seed", range(6))
def test_arbitrary_lengths_and_bypasses_do_not_change_the_text(seed, texts):
    engine = build_small_engine(planner=ArbitraryPlanner(small_config(), np.random.default_rng(seed)))
    outputs, records = records_of(engine, *mixed())
    assert tokens(outputs) == texts
    assert len({record.num_drafted for record in records}) > 2
    assert {record.gamma for record in records if record.num_drafted} == {1, 2, 3, 4, 5}
    assert len({record.budget for record in records}) > 4


class ArbitraryPlanner(Planner):
    """Decides by dice."""

    def __init__(self, config: ResolvedConfig, generator: np.random.Generator) -> None:
        super().__init__(config)
        self._generator = generator
        self._schedule = self

    def bypass_reason(self, num_requests: int, batch: Batch) -> BypassReason | None:
        return "predicted_loss" if self._generator.random() < 0.4 else None

    def depth(self) -> int:
        return int(self._generator.integers(1, self.gamma + 1))

    def plan(self, rows, batch=None):
        if batch is None:  # called as a schedule, with a view
            lengths = [self._generator.integers(0, limit + 1) for limit in rows.limits]
            return _Lengths(tuple(int(length) for length in lengths))
        return super().plan(rows, batch)


class _Lengths:
    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths, self.budget = lengths, sum(lengths)


# What the planner does with costs


def test_cheap_rows_are_all_verified_and_dear_ones_are_not():
    _, cheap = records_of(scheduled(CHEAP), *mixed())
    _, steep = records_of(scheduled(STEEP), *mixed())
    assert sum(r.budget for r in cheap) > 3 * sum(r.budget for r in steep)


def test_a_drafter_that_costs_more_than_it_brings_is_left_alone():
    outputs, records = records_of(scheduled(HOPELESS), *mixed())
    decoding = [record for record in records if record.num_decoding]
    assert sum(record.bypass == "predicted_loss" for record in decoding) > 0.8 * len(decoding)
    stats = [o.stats for parts in outputs.values() for o in parts if o.finish_reason]
    assert all(s is not None and s.num_drafted <= 10 for s in stats)


def test_positions_that_are_never_verified_are_not_drafted_either():
    engine = scheduled(CHEAP)
    engine.apply_policy(VerificationPolicy(max_draft_tokens=2))
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=120)) for r in mixed()]
    outputs, records = records_of(engine, *requests)
    late = [record.gamma for record in records[-20:] if record.num_drafted]
    assert sum(depth == 2 for depth in late) > 0.7 * len(late) > 5
    stats = [o.stats for parts in outputs.values() for o in parts if o.finish_reason]
    assert sum(s.num_drafted for s in stats) == sum(r.num_drafted * r.gamma for r in records)


def test_rejection_draws_from_shallow_blocks_too():
    engine = scheduled(CHEAP, verification="rejection")
    engine.apply_policy(VerificationPolicy(max_draft_tokens=1))
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=120)) for r in mixed()]
    outputs, records = records_of(engine, *requests)
    assert all(len(text) == 120 for text in tokens(outputs).values())
    assert 1 in {record.gamma for record in records}
    assert sum(record.num_accepted for record in records) > 20


def test_a_bypass_can_be_forbidden():
    _, records = records_of(scheduled(HOPELESS, bypass=False), *mixed())
    assert not any(record.bypass == "predicted_loss" for record in records)


def test_records_add_up_to_the_statistics_of_the_requests():
    outputs, records = records_of(scheduled(STEEP), *mixed())
    stats = [o.stats for parts in outputs.values() for o in parts if o.finish_reason]
    assert sum(s.num_rounds for s in stats) == sum(r.num_decoding for r in records)
    assert sum(s.num_drafted for s in stats) == sum(r.num_drafted * r.gamma for r in records)
    assert sum(s.num_admitted for s in stats) == sum(r.budget for r in records)
    assert sum(s.num_accepted for s in stats) == sum(r.num_accepted for r in records)
    assert all(0 <= a <= k for r in records for a, k in zip(r.accepted, r.lengths, strict=True))
    assert [r.step for r in records] == list(range(len(records)))


# Policies


def test_a_policy_bounds_lengths_and_says_so():
    engine = scheduled(CHEAP)
    engine.apply_policy(VerificationPolicy(max_draft_tokens=2, confidence_threshold=0.1, version=7))
    _, records = records_of(engine, *mixed())
    assert max(length for record in records for length in record.lengths) == 2
    assert {(record.policy_version, record.confidence_threshold) for record in records} == {(7, 0.1)}


def test_a_step_without_a_draft_says_why_and_a_step_with_one_does_not():
    engine = scheduled(CHEAP)
    engine.apply_policy(VerificationPolicy(bypass=True, valid_seconds=0.8))
    _, records = records_of(engine, *mixed())
    for record in records[1:]:
        assert (record.bypass is None) == (record.num_drafted > 0)
    assert records[0].bypass is None  # nobody decoded in it


def test_a_policy_can_stop_all_drafting(texts):
    engine = scheduled(CHEAP)
    engine.apply_policy(VerificationPolicy(bypass=True))
    outputs, records = records_of(engine, *mixed())
    assert tokens(outputs) == texts
    assert {record.bypass for record in records if record.num_decoding} == {"policy"}


def test_an_expired_policy_gives_way_to_the_engines_own():
    engine = scheduled(CHEAP)
    engine.apply_policy(VerificationPolicy(bypass=True, valid_seconds=1.0))
    _, records = records_of(engine, *mixed())
    reasons = [record.bypass for record in records if record.num_decoding]
    assert reasons[0] == "policy"
    assert reasons[-1] != "policy"
    assert any(record.num_drafted for record in records)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"confidence_threshold": 1.5}, r"confidence_threshold=1.5: expected a number in \[0, 1\]"),
        ({"max_draft_tokens": -1}, r"max_draft_tokens=-1: expected an integer in \[0, 1024\]"),
        ({"valid_seconds": 0}, r"valid_seconds=0: expected a number in \(0, 1e\+09\], or None"),
    ],
)
def test_a_policy_out_of_range_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        VerificationPolicy(**fields)


def test_a_schedule_that_sees_what_it_decides_on_is_refused_for_rejection():
    with pytest.raises(ConfigError, match=r"schedule='full' with verification='rejection'.*bends the output"):
        EngineConfig(verification="rejection", schedule="full")


@pytest.mark.parametrize(("verification", "kind"), [("coupled", "full"), ("rejection", "lagged")])
def test_the_schedule_in_force_suits_the_verification(verification, kind):
    assert small_config(verification=verification).schedule == kind


# The drafter's context


class Watched(InlineDrafter):
    """Keeps every request and proposal."""

    def __init__(self) -> None:
        super().__init__(DraftWorker(small_modules()[1], small_config()))
        self.seen: list[tuple[DraftRequest, DraftProposal]] = []

    def collect(self) -> DraftProposal:
        request = self._request
        proposal = super().collect()
        assert request is not None
        self.seen.append((request, proposal))
        return proposal


def drafts_by_anchor(drafter: Watched) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    """Tokens and confidences of every drafted block, by (slot, position of its anchor)."""
    return {
        (int(slot), int(start)): (proposal.tokens[row].tolist(), proposal.confidences[row].tolist())
        for request, proposal in drafter.seen
        for row, (slot, start) in enumerate(zip(request.slots, request.starts, strict=True))
    }


@pytest.mark.parametrize("num_left_out", [1, 20])
def test_a_drafter_that_was_left_out_drafts_as_if_it_had_not_been(num_left_out):
    always, sometimes = Watched(), Watched()
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=120)) for r in mixed()]
    run(build_small_engine(drafter=always), *requests)
    engine = build_small_engine(drafter=sometimes, planner=Intermittent(small_config(), num_left_out))
    run(engine, *requests)
    known, found = drafts_by_anchor(always), drafts_by_anchor(sometimes)
    common = known.keys() & found.keys()
    assert len(common) >= 4
    for anchor in common:
        assert found[anchor][0] == known[anchor][0]
        assert found[anchor][1] == pytest.approx(known[anchor][1], abs=1e-5)


class Intermittent(Planner):
    """Drafts in one step of a few."""

    def __init__(self, config: ResolvedConfig, num_left_out: int) -> None:
        super().__init__(config)
        self._period, self._count = num_left_out + 1, 0

    def bypass_reason(self, num_requests: int, batch: Batch) -> BypassReason | None:
        self._count += 1
        return None if self._count % self._period == 0 else "predicted_loss"


# Profiling


def test_a_profile_covers_the_sizes_of_the_engine_and_leaves_it_empty():
    engine = build_small_engine()
    told: list[tuple[int, int]] = []
    table = profile(engine, lambda done, total: told.append((done, total)))
    assert table.target.sizes[0] == 1
    assert table.target.sizes[-1] == 8 * (1 + engine.gamma)
    assert table.draft.sizes == (1, 2, 4, 8)
    assert all(seconds > 0 for seconds in table.target.seconds + table.draft.seconds)
    assert told[-1][0] == told[-1][1] == len(told) - 1
    engine.scheduler.check_idle()
    assert run(engine, request(PROMPT)) == run(build_small_engine(), request(PROMPT))


def test_a_profile_is_kept_for_the_same_deployment_and_measured_anew_for_another(tmp_path):
    engine = build_small_engine(max_num_seqs=2, cost_directory=str(tmp_path))
    first = load_or_profile(engine, tmp_path, {"tensor_parallel_size": 1})
    assert load_or_profile(engine, tmp_path, {"tensor_parallel_size": 1}) == first
    assert load_or_profile(engine, tmp_path, {"tensor_parallel_size": 2}).key != first.key
    assert len(list(tmp_path.glob("cost-*.json"))) == 2


def test_a_damaged_profile_is_measured_anew(tmp_path):
    engine = build_small_engine(max_num_seqs=2, cost_directory=str(tmp_path))
    load_or_profile(engine, tmp_path, {})
    (file,) = tmp_path.glob("cost-*.json")
    file.write_text("{")
    load_or_profile(engine, tmp_path, {})
    assert CostTable.load(file).target.sizes[0] == 1


def test_a_cost_table_that_is_named_is_used_and_a_bad_one_refused(tmp_path):
    STEEP.save(tmp_path / "steep.json")
    engine = build_small_engine(cost_table=str(tmp_path / "steep.json"))
    assert load_or_profile(engine, tmp_path, {}).target == STEEP.target
    engine = build_small_engine(cost_table=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"none\.json: No such file.*expected a cost table"):
        load_or_profile(engine, tmp_path, {})


def test_confidences_and_outcomes_can_be_listened_to():
    engine, heard = build_small_engine(schedule="fixed"), []
    engine.planner.listener = lambda *round_: heard.append(round_)
    outputs = run_outputs(engine, *mixed())
    stats = [o.stats for parts in outputs.values() for o in parts if o.finish_reason]
    confidences, admitted, accepted = (np.concatenate(parts) for parts in zip(*heard, strict=True))
    assert confidences.shape == (len(admitted), engine.gamma)
    assert admitted.sum() == sum(s.num_admitted for s in stats)
    assert accepted.sum() >= sum(s.num_accepted for s in stats)
    assert ((confidences > 0) & (confidences < 1)).all()


def test_requests_that_are_about_to_end_need_no_draft():
    _, records = records_of(build_small_engine(), request(PROMPT, max_tokens=2))
    assert records[-1].bypass == "no_room"


def test_an_engine_with_fewer_pages_than_slots_is_profiled_as_far_as_its_pages_go():
    engine = build_small_engine(max_num_seqs=16, max_num_batched_tokens=96, num_pages=8)
    table = profile(engine)
    engine.scheduler.check_idle()
    # 16 tokens and what the timed steps add take two pages of 32.
    assert table.draft.sizes == (1, 2, 4)
