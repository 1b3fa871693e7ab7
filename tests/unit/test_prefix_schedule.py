"""Lengths by hand, and against a search over every vector of lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from dspark_ray.speculative.prefix_schedule import (
    CausalSchedule,
    FixedSchedule,
    FullSchedule,
    LaggedSchedule,
    PrefixSchedule,
    RoundView,
    VerifyPlan,
    build_schedule,
    cut_at_threshold,
    survival,
)

CHOOSING = [CausalSchedule(), LaggedSchedule(), FullSchedule()]
EVERY = [*CHOOSING, FixedSchedule()]


def named(schedule: PrefixSchedule) -> str:
    return type(schedule).__name__


every_schedule = pytest.mark.parametrize("schedule", EVERY, ids=named)
every_choosing_schedule = pytest.mark.parametrize("schedule", CHOOSING, ids=named)


def view(
    survivals: list[list[float]],
    extra_seconds: list[float] | None = None,
    lagged: list[list[float]] | None = None,
    limits: list[int] | None = None,
    draft_seconds: float = 0.0,
    tokens_per_second: float | None = None,
) -> RoundView:
    """A round whose forward takes 1 s, and `extra_seconds[k]` more for k drafts (default: none)."""
    current = np.array(survivals, dtype=float)
    num_requests, gamma = current.shape
    extra = extra_seconds if extra_seconds is not None else [0.0] * (num_requests * gamma + 1)
    return RoundView(
        survival=current,
        lagged_survival=current if lagged is None else np.array(lagged, dtype=float),
        limits=np.full(num_requests, gamma) if limits is None else np.array(limits),
        certain_tokens=num_requests,
        base_rows=num_requests,
        target_seconds=np.array([0.0] * num_requests + [1.0 + more for more in extra]),
        draft_seconds=draft_seconds,
        tokens_per_second=tokens_per_second,
    )


def random_views(count: int, max_requests: int = 3, max_gamma: int = 3) -> Iterator[RoundView]:
    """Rounds of every small size, with limits, on curves with level stretches and jumps."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        num_requests, gamma = int(rng.integers(1, max_requests + 1)), int(rng.integers(1, max_gamma + 1))
        extra = np.cumsum(rng.exponential(0.3, num_requests * gamma) * (rng.random(num_requests * gamma) < 0.6))
        # Rounded confidences give equal survivals.
        confidences, old = rng.random((2, num_requests, gamma)).round(1)
        yield view(
            survival(confidences).tolist(),
            [0.0, *extra],
            lagged=survival(old).tolist(),
            limits=rng.integers(0, gamma + 1, num_requests).tolist(),
            draft_seconds=float(rng.choice([0.0, 0.5])),
        )


def theta(round_view: RoundView, lengths: tuple[int, ...]) -> float:
    """Expected tokens per second of a round, from its definition."""
    tokens = round_view.certain_tokens + sum(row[:length].sum() for row, length in zip(round_view.survival, lengths))
    seconds = round_view.draft_seconds + round_view.target_seconds[round_view.base_rows + sum(lengths)]
    return float(tokens / seconds)


def test_survival_is_the_product_of_the_confidences_so_far() -> None:
    np.testing.assert_allclose(
        survival(np.array([[0.5, 0.5, 1.0], [1.0, 0.2, 0.5]])), [[0.5, 0.25, 0.25], [1, 0.2, 0.1]]
    )


# All schedules


@every_schedule
def test_where_rows_cost_nothing_everything_is_verified(schedule: PrefixSchedule) -> None:
    assert schedule.plan(view([[0.9, 0.1], [0.5, 0.4]])).lengths == (2, 2)


@every_schedule
def test_no_request_gets_more_than_its_limit(schedule: PrefixSchedule) -> None:
    assert schedule.plan(view([[0.9, 0.8, 0.7]] * 3, limits=[1, 0, 3])).lengths == (1, 0, 3)


@every_schedule
def test_lengths_stay_within_limits_in_random_rounds(schedule: PrefixSchedule) -> None:
    for round_view in random_views(300):
        lengths = np.array(schedule.plan(round_view).lengths)
        assert (lengths >= 0).all()
        assert (lengths <= round_view.limits).all()


@every_schedule
def test_a_round_without_requests_has_no_lengths(schedule: PrefixSchedule) -> None:
    nobody = replace(view([[0.9]]), survival=np.ones((0, 3)), lagged_survival=np.ones((0, 3)), limits=np.ones(0, int))
    assert schedule.plan(nobody) == VerifyPlan(())


@every_choosing_schedule
def test_nothing_is_verified_where_no_draft_pays(schedule: PrefixSchedule) -> None:
    assert schedule.plan(view([[0.1, 0.05]], extra_seconds=[0.0, 1.0, 2.0])).lengths == (0,)


@every_choosing_schedule
def test_of_equal_drafts_those_of_the_earlier_request_go_first(schedule: PrefixSchedule) -> None:
    stair = [0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 9.0]
    assert schedule.plan(view([[1.0, 1.0, 1.0]] * 2, extra_seconds=stair)).lengths == (3, 1)


@every_choosing_schedule
def test_the_likelier_drafts_of_all_requests_are_verified(schedule: PrefixSchedule) -> None:
    stair = [0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0]
    assert schedule.plan(view([[0.3, 0.2, 0.1], [0.9, 0.8, 0.2]], extra_seconds=stair)).lengths == (0, 2)


@every_choosing_schedule
def test_a_limit_leaves_its_place_to_others(schedule: PrefixSchedule) -> None:
    stair = [0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0]
    survivals = [[0.3, 0.2, 0.1], [0.9, 0.8, 0.2]]
    assert schedule.plan(view(survivals, extra_seconds=stair, limits=[3, 1])).lengths == (1, 1)


@every_choosing_schedule
def test_a_draft_that_does_not_change_theta_is_left_out(schedule: PrefixSchedule) -> None:
    assert schedule.plan(view([[0.5]], extra_seconds=[0.0, 0.5])).lengths == (0,)


@every_choosing_schedule
def test_the_dearer_the_draft_was_the_more_of_it_is_worth_verifying(schedule: PrefixSchedule) -> None:
    cheap = view([[0.5]], extra_seconds=[0.0, 0.6])
    assert schedule.plan(cheap).lengths == (0,)
    assert schedule.plan(replace(cheap, draft_seconds=1.0)).lengths == (1,)


# Causal


STAIR = view([[0.9, 0.8, 0.7]], extra_seconds=[0.0, 0.95, 0.95, 0.95])
"""The first draft does not pay for the step of the stair, three together do."""


def test_causal_stops_at_a_stair() -> None:
    assert CausalSchedule().plan(STAIR).lengths == (0,)


def test_full_goes_on_behind_a_stair() -> None:
    assert FullSchedule().plan(STAIR).lengths == (3,)


def test_causal_never_verifies_more_than_full() -> None:
    for round_view in random_views(300):
        assert CausalSchedule().plan(round_view).budget <= FullSchedule().plan(round_view).budget


def test_what_causal_admits_does_not_depend_on_drafts_behind_it() -> None:
    for round_view in random_views(300):
        plan = CausalSchedule().plan(round_view)
        behind = np.arange(round_view.survival.shape[1]) >= np.array(plan.lengths)[:, None]
        changed = replace(round_view, survival=np.where(behind, 0.0, round_view.survival))
        assert CausalSchedule().plan(changed) == plan


# Full


def test_full_is_as_good_as_a_search_over_all_lengths() -> None:
    for round_view in random_views(400):
        everything = itertools.product(*(range(limit + 1) for limit in round_view.limits))
        best = max(theta(round_view, lengths) for lengths in everything)
        assert theta(round_view, FullSchedule().plan(round_view).lengths) == pytest.approx(best, rel=1e-12)


DEARER_AND_DEARER = view([[0.5, 0.2]], extra_seconds=[0.0, 0.2, 0.4])
"""Tokens over seconds is 1, then 1.25, then 1.21."""


def test_full_without_a_past_maximises_the_rounds_own_ratio() -> None:
    assert FullSchedule().plan(DEARER_AND_DEARER).lengths == (1,)


def test_full_cuts_a_bad_round_shorter_when_the_engine_makes_more_otherwise() -> None:
    assert FullSchedule().plan(replace(DEARER_AND_DEARER, tokens_per_second=3.0)).lengths == (0,)


def test_full_verifies_more_of_a_good_round_when_the_engine_makes_less_otherwise() -> None:
    assert FullSchedule().plan(replace(DEARER_AND_DEARER, tokens_per_second=0.9)).lengths == (2,)


def rate_of_run(rounds: list[RoundView], tokens_per_second: float | None) -> float:
    """Tokens over seconds of all rounds together."""
    tokens = seconds = 0.0
    for round_view in rounds:
        lengths = FullSchedule().plan(replace(round_view, tokens_per_second=tokens_per_second)).lengths
        took = round_view.draft_seconds + round_view.target_seconds[round_view.base_rows + sum(lengths)]
        seconds += took
        tokens += theta(round_view, lengths) * took
    return tokens / seconds


def test_a_run_brings_more_when_rounds_are_measured_by_its_rate_than_each_by_itself() -> None:
    rounds = list(random_views(200))
    by_themselves = rate_of_run(rounds, None)
    rate = by_themselves
    for _ in range(10):
        rate = rate_of_run(rounds, rate)
    assert rate > 1.002 * by_themselves
    assert rate_of_run(rounds, rate) == pytest.approx(rate)


# Lagged


def test_the_lagged_budget_comes_from_old_confidences() -> None:
    dear = [0.0, 0.3, 0.6, 0.9, 1.2]
    promising, hopeless = [[0.9, 0.9], [0.9, 0.9]], [[0.1, 0.1], [0.1, 0.1]]
    assert LaggedSchedule().plan(view(hopeless, dear, lagged=promising)).budget == 4
    assert LaggedSchedule().plan(view(promising, dear, lagged=hopeless)).budget == 0


def test_lagged_ranks_come_from_current_confidences() -> None:
    stair = [0.0, 0.0, 0.0, 9.0, 9.0]
    current, old = [[0.1, 0.1], [0.9, 0.9]], [[0.9, 0.9], [0.1, 0.1]]
    assert LaggedSchedule().plan(view(current, stair, lagged=old)).lengths == (0, 2)


def test_without_a_change_of_confidences_lagged_is_full() -> None:
    for round_view in random_views(200):
        steady = replace(round_view, lagged_survival=round_view.survival)
        assert LaggedSchedule().plan(steady) == FullSchedule().plan(steady)


# Fixed, thresholds, names


def test_fixed_asks_neither_confidences_nor_costs() -> None:
    assert FixedSchedule().plan(view([[0.0, 0.0]], extra_seconds=[0.0, 9.0, 99.0])).lengths == (2,)


def test_a_threshold_drops_positions_whose_survival_is_below_it() -> None:
    current = np.array([[0.9, 0.5, 0.2], [0.4, 0.3, 0.2]])
    cut = cut_at_threshold(VerifyPlan((3, 3)), current, np.array([0.5, 0.35]))
    assert cut.lengths == (2, 1)


def test_a_threshold_adds_nothing() -> None:
    assert cut_at_threshold(VerifyPlan((1,)), np.array([[0.9, 0.8]]), np.array([0.1])).lengths == (1,)


def test_without_thresholds_a_plan_stays_as_it_is() -> None:
    plan = VerifyPlan((2, 0))
    assert cut_at_threshold(plan, np.zeros((2, 2)), np.zeros(2)) == plan


def test_the_budget_is_the_sum_of_the_lengths() -> None:
    assert VerifyPlan((2, 0, 3)).budget == 5


def test_every_name_of_the_config_builds_its_schedule() -> None:
    kinds = [type(build_schedule(kind)) for kind in ("causal", "lagged", "full", "fixed")]
    assert kinds == [CausalSchedule, LaggedSchedule, FullSchedule, FixedSchedule]
