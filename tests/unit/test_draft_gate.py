"""Whether to draft, on machines whose seconds are known, for texts whose survivals are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dspark_ray.speculative.draft_gate import DraftGate, GateDecision

MAX_REQUESTS, GAMMA, MAX_ROWS = 8, 4, 80

EASY, HOPELESS = [0.95, 0.9, 0.85, 0.8], [0.05, 0.0, 0.0, 0.0]


@dataclass(frozen=True)
class Machine:
    """Seconds of a step: 1 for the target and more by row, `first_draft` for a draft and more by request."""

    row: float = 0.01
    first_draft: float = 0.1
    further_draft: float = 0.02

    @property
    def target_seconds(self) -> np.ndarray:
        return 1.0 + self.row * np.arange(MAX_ROWS + 1)

    @property
    def draft_seconds(self) -> np.ndarray:
        seconds = self.first_draft + self.further_draft * np.arange(MAX_REQUESTS + 1)
        seconds[0] = 0.0
        return seconds


FAST, DEAR, VERY_DEAR = Machine(), Machine(first_draft=0.9), Machine(first_draft=2.0, further_draft=0.3)


def new_gate(gamma: int = GAMMA) -> DraftGate:
    """One that decides anew in every step."""
    return DraftGate(gamma, steps_per_decision=1)


def decide(
    gate: DraftGate, machine: Machine, num_requests: int = MAX_REQUESTS, step_seconds: float = 0.0
) -> GateDecision:
    """For a step that decodes `num_requests`; without `step_seconds` there is no time for probes."""
    return gate.decide(
        num_requests, num_requests, num_requests, machine.target_seconds, machine.draft_seconds, step_seconds
    )


def observe(gate: DraftGate, survivals: np.ndarray, accepted_share: float = 1.0) -> None:
    """A round in which everything was verified, and `accepted_share` of what was expected was accepted."""
    expected = float(survivals.sum())
    gate.observe(survivals, expected, accepted_share * expected)


def run(
    gate: DraftGate,
    machine: Machine,
    survivals: np.ndarray,
    num_steps: int,
    probes: bool = False,
    accepted_share: float = 1.0,
) -> np.ndarray:
    """[T] which steps were drafted, when request r always drafts survivals[r]."""
    drafted, seconds = [], 0.0
    num_requests = len(survivals)
    for _ in range(num_steps):
        drafts = decide(gate, machine, num_requests, seconds if probes else 0.0).drafts
        if drafts:
            observe(gate, survivals, accepted_share)
        seconds = machine.target_seconds[num_requests] + (machine.draft_seconds[num_requests] if drafts else 0.0)
        drafted.append(drafts)
    return np.array(drafted)


def texts(*survivals: list[float]) -> np.ndarray:
    return np.array(survivals)


# When a draft pays


def test_requests_of_which_nothing_is_known_are_drafted() -> None:
    assert decide(new_gate(), FAST).drafts


def test_certain_drafts_are_made_even_when_they_are_dear() -> None:
    for machine in (FAST, DEAR):
        assert run(new_gate(), machine, np.ones((MAX_REQUESTS, GAMMA)), 50).all()


def test_dear_drafts_that_are_seldom_accepted_are_not_made() -> None:
    assert not run(new_gate(), VERY_DEAR, texts(*[HOPELESS] * MAX_REQUESTS), 100)[50:].any()


def test_a_mixed_batch_is_drafted_where_its_easy_requests_pay_for_it() -> None:
    survivals = texts(EASY, EASY, HOPELESS, EASY)
    assert run(new_gate(), FAST, survivals, 100).all()
    assert not run(new_gate(), VERY_DEAR, survivals, 200)[100:].any()


def test_the_expected_rate_of_a_drafted_round_is_tokens_over_seconds() -> None:
    gate, machine = new_gate(), Machine(row=0.0, first_draft=0.5, further_draft=0.0)
    run(gate, machine, np.ones((2, GAMMA)), 5)
    # 2 tokens and 2 * 4 drafts in 1.5 s
    assert decide(gate, machine, 2).tokens_per_second == pytest.approx(10 / 1.5)


def test_the_expected_rate_of_a_bypass_is_that_of_the_target_alone() -> None:
    machine = Machine(row=0.0, first_draft=20.0)
    decision = decide(new_gate(), machine, 2)
    assert (decision.drafts, decision.tokens_per_second) == (False, pytest.approx(2.0))


def test_what_could_not_have_been_verified_counts_as_worth_nothing() -> None:
    assert not run(new_gate(), DEAR, np.zeros((2, GAMMA)), 100)[50:].any()


def test_drafts_that_are_accepted_less_often_than_expected_are_not_made() -> None:
    survivals, machine = texts(EASY, EASY), Machine(first_draft=0.5)
    assert run(new_gate(), machine, survivals, 100).all()
    assert not run(new_gate(), machine, survivals, 100, accepted_share=0.1)[50:].any()


# How long a decision holds


def test_a_decision_holds_for_some_steps() -> None:
    gate = DraftGate(GAMMA, steps_per_decision=4)
    decisions = []
    for _ in range(60):
        decisions.append(decide(gate, VERY_DEAR).drafts)
        observe(gate, texts(*[HOPELESS] * MAX_REQUESTS))
    changed_at = decisions.index(False)
    assert changed_at % 4 == 0
    assert not any(decisions[changed_at:])


def test_a_decision_ends_when_there_are_more_or_fewer_requests() -> None:
    gate = DraftGate(GAMMA, steps_per_decision=1000)
    assert decide(gate, DEAR).drafts
    for _ in range(50):
        observe(gate, texts(*[HOPELESS] * MAX_REQUESTS))
    assert decide(gate, DEAR).drafts
    assert not decide(gate, DEAR, num_requests=5).drafts


# The thresholds of a bypass


def even_odds(draft_seconds: float) -> Machine:
    """One request whose draft is accepted half of the time brings (1 + 0.5) / (1 + draft_seconds) of the plain rate."""
    return Machine(row=0.0, first_draft=draft_seconds, further_draft=0.0)


def decisions(gate: DraftGate, draft_seconds: float, times: int) -> list[bool]:
    """Whether the one request is drafted, in some decisions in a row."""
    return [decide(gate, even_odds(draft_seconds), 1).drafts for _ in range(times)]


def test_a_small_loss_begins_no_bypass_and_a_small_gain_ends_none() -> None:
    gate = new_gate(gamma=1)
    run(gate, even_odds(0.3), texts([0.5]), 200)
    # Advantages of -0.2 %, -6 %, +0.2 %, +7 % and -0.2 %.
    last = [decisions(gate, seconds, times=12)[-1] for seconds in (0.503, 0.6, 0.497, 0.4, 0.503)]
    assert last == [True, False, False, True, True]


def test_one_bad_forecast_begins_no_bypass_and_a_large_loss_begins_one_soon() -> None:
    gate = new_gate(gamma=1)
    run(gate, even_odds(0.45), texts([0.5]), 200)
    assert decisions(gate, 0.6, times=1) == [True]
    assert all(decisions(gate, 0.45, times=4))
    assert decisions(gate, 2.0, times=4)[-1] is False


# Probes


def time_share(machine: Machine, drafted: np.ndarray) -> float:
    """Share of all time that went into drafts of MAX_REQUESTS."""
    draft = machine.draft_seconds[MAX_REQUESTS] * np.count_nonzero(drafted)
    return float(draft / (draft + machine.target_seconds[MAX_REQUESTS] * len(drafted)))


def test_probes_take_half_a_percent_of_the_time() -> None:
    drafted = run(new_gate(), VERY_DEAR, texts(*[HOPELESS] * MAX_REQUESTS), 5000, probes=True)[100:]
    assert 0.004 < time_share(VERY_DEAR, drafted) < 0.00525


def test_traffic_that_becomes_easy_is_drafted_again() -> None:
    gate, machine = new_gate(), Machine(first_draft=0.4)
    run(gate, machine, texts(*[HOPELESS] * MAX_REQUESTS), 500, probes=True)
    assert not decide(gate, machine).drafts
    assert run(gate, machine, texts(*[EASY] * MAX_REQUESTS), 600, probes=True)[-50:].all()


def test_a_few_probes_are_enough_when_hopeless_traffic_has_become_easy() -> None:
    gate, machine = new_gate(), Machine(first_draft=0.4)
    run(gate, machine, texts(*[HOPELESS] * MAX_REQUESTS), 2000, probes=True)
    drafted = run(gate, machine, texts(*[EASY] * MAX_REQUESTS), 600, probes=True)
    last_bypass = int(np.flatnonzero(~drafted)[-1])
    assert last_bypass < 500
    assert drafted[:last_bypass].sum() <= 4


def test_without_time_there_are_no_probes() -> None:
    assert not run(new_gate(), VERY_DEAR, texts(*[HOPELESS] * MAX_REQUESTS), 500)[100:].any()
