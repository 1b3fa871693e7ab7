"""What the planner makes of costs, confidences, policies and outcomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dspark_ray.config import ResolvedConfig, ScheduleKind
from dspark_ray.speculative.calibration import Temperatures
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.speculative.planner import Batch, DraftedRows, Planner, StepOutcome
from dspark_ray.types import StepRecord, VerificationPolicy

GAMMA = 4
LEVEL = CostTable.of(Curve((1, 64), (1.0, 1.001)), Curve((1, 8), (0.01, 0.01)))
STAIR = CostTable.of(Curve((2, 16, 64), (1.0, 1.05, 9.0), padded_to=64), Curve((1, 8), (0.01, 0.01)))


def planner(
    table: CostTable | None = LEVEL,
    temperatures: Temperatures | None = None,
    schedule: ScheduleKind = "full",
    **changes: Any,
) -> Planner:
    config = ResolvedConfig(
        gamma=GAMMA,
        schedule=schedule,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_pages=1,
        keep_quantised=False,
        kv_cache_dtype="float32",
        **changes,
    )
    return Planner(config, table, temperatures)


def rows(*confidences: float, limits: list[int] | None = None, thresholds: list[float] | None = None) -> DraftedRows:
    """A request per confidence, which is that of all its drafts."""
    num = len(confidences)
    return DraftedRows(
        slots=np.arange(num),
        confidences=np.repeat(np.array(confidences)[:, None], GAMMA, axis=1),
        limits=np.array(limits or [GAMMA] * num),
        thresholds=np.array(thresholds or [0.0] * num),
    )


def batch(num: int) -> Batch:
    return Batch(num_decoding=num, num_prefill_rows=0, certain_tokens=num, context=10.0)


def lengths(planner: Planner, drafted: DraftedRows) -> tuple[int, ...]:
    return planner.plan(drafted, batch(len(drafted.slots))).lengths


def outcome(accepted: list[int], **changes: Any) -> StepOutcome:
    counts = np.array(accepted)
    fields = {
        "num_tokens_accepted": counts,
        "num_committed": counts,
        "num_drafted": len(accepted),
        "bypass": None,
        "draft_seconds": 0.01,
        "target_seconds": 1.0,
        "schedule_seconds": 0.0,
        "ended_at": 0.0,
    }
    return StepOutcome(**{**fields, **changes})


def serve(planner: Planner, confidence: float, accepted: int, num_steps: int) -> StepRecord:
    """The same round again and again; the last record."""
    for _ in range(num_steps):
        planner.plan(rows(confidence), batch(1))
        record = planner.learn(batch(1), outcome([accepted]))
    return record


@pytest.mark.parametrize("kind", ["causal", "lagged", "full"])
def test_a_stair_that_pays_stops_no_schedule(kind: ScheduleKind) -> None:
    assert lengths(planner(STAIR, schedule=kind), rows(0.9, 0.9)) == (GAMMA, GAMMA)


def test_without_costs_everything_is_drafted_and_verified() -> None:
    blind = planner(None)
    assert blind.bypass_reason(3, batch(3)) is None
    assert lengths(blind, rows(0.01, 0.9)) == (GAMMA, GAMMA)
    assert not blind.follows_costs


def test_limits_of_requests_and_policy_hold_both() -> None:
    bounded = planner()
    bounded.apply(VerificationPolicy(max_draft_tokens=2), now=0.0)
    assert lengths(bounded, rows(0.99, 0.99, limits=[1, 4])) == (1, 2)


def test_of_two_thresholds_the_higher_one_cuts() -> None:
    bounded = planner()
    bounded.apply(VerificationPolicy(confidence_threshold=0.7), now=0.0)
    # Survival of confidences .9: .9, .81, .729, .656
    assert lengths(bounded, rows(0.9, 0.9, thresholds=[0.0, 0.85])) == (3, 1)


@pytest.mark.parametrize("changes", [{}, {"bypass": True}, {"confidence_threshold": 0.1}, {"max_draft_tokens": 2}])
def test_a_policy_does_not_lower_the_configured_threshold(changes: dict[str, Any]) -> None:
    bounded = planner(confidence_threshold=0.7)
    bounded.apply(VerificationPolicy(**changes), now=0.0)
    assert bounded.policy.confidence_threshold == 0.7
    bounded.apply(VerificationPolicy(confidence_threshold=0.8), now=0.0)
    assert bounded.policy.confidence_threshold == 0.8


def test_a_policy_ends_with_its_time_and_the_next_one_replaces_it() -> None:
    bounded = planner(confidence_threshold=0.25)
    bounded.apply(VerificationPolicy(version=1, valid_seconds=10.0), now=100.0)
    bounded.expire_policy(now=109.9)
    assert bounded.policy.version == 1
    bounded.apply(VerificationPolicy(version=2), now=109.9)
    bounded.expire_policy(now=1e9)
    assert bounded.policy.version == 2
    bounded.apply(VerificationPolicy(version=3, valid_seconds=1.0), now=200.0)
    bounded.expire_policy(now=201.0)
    assert bounded.policy == VerificationPolicy(confidence_threshold=0.25)


def test_temperatures_change_what_is_expected() -> None:
    hot = planner(temperatures=Temperatures((4.0,) * GAMMA), calibrate_online=False)
    cold = planner(calibrate_online=False)
    hot.plan(rows(0.9), batch(1))
    cold.plan(rows(0.9), batch(1))
    raw, calibrated = (each.learn(batch(1), outcome([4])).expected for each in (cold, hot))
    assert raw == pytest.approx(0.9 + 0.81 + 0.729 + 0.6561)
    assert calibrated < raw


def test_a_record_says_what_was_expected_and_what_came() -> None:
    asked = planner()
    asked.plan(rows(0.9, 0.5), batch(2))
    record = asked.learn(batch(2), outcome([4, 1], num_committed=np.array([3, 1]), draft_seconds=0.02))
    assert (record.lengths, record.accepted) == ((4, 4), (3, 1))
    assert (record.budget, record.num_drafted, record.num_accepted) == (8, 2, 4)
    assert record.predicted_target_seconds == pytest.approx(1.0, abs=0.01)
    assert (record.measured_draft_seconds, record.measured_target_seconds) == (0.02, 1.0)
    assert record.bypass is None


def test_the_calibration_error_becomes_known() -> None:
    asked = planner(calibrate_online=False)
    assert serve(asked, 0.9, 4, num_steps=10).calibration_error == (None,) * GAMMA
    record = serve(asked, 0.9, 4, num_steps=300)
    expected = [1 - 0.9, 1 - 0.81, 1 - 0.729, 1 - 0.6561]
    assert record.calibration_error == pytest.approx(expected, abs=1e-3)


def test_steps_with_prompt_rows_teach_nothing_about_costs() -> None:
    asked = planner()
    for _ in range(50):
        asked.learn(replace(batch(1), num_prefill_rows=7), outcome([], target_seconds=3.0))
    assert asked.cost is not None
    assert asked.cost.drift == 1.0
    for _ in range(50):
        asked.learn(batch(1), outcome([], target_seconds=3.0))
    assert asked.cost.drift > 1.5


def test_a_listener_gets_confidences_as_drafted() -> None:
    asked, heard = planner(temperatures=Temperatures((4.0,) * GAMMA)), []
    asked.listener = lambda *round_: heard.append(round_)
    serve(asked, 0.75, 2, num_steps=1)
    ((confidences, admitted, accepted),) = heard
    assert confidences.tolist() == [[0.75] * GAMMA]
    assert (admitted.tolist(), accepted.tolist()) == ([4], [2])


def test_the_rate_that_prices_rows_is_the_one_that_is_achieved() -> None:
    asked = planner()
    asked.bypass_reason(1, batch(1))
    forecast = asked._throughput.rate
    for _ in range(100):
        asked.learn(batch(1), outcome([], target_seconds=4.0))
    assert forecast is not None
    assert asked._throughput.rate == pytest.approx(1 / 4.0, rel=0.1)
    assert asked._throughput.rate < forecast
