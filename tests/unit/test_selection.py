"""Who is drafted, on machines whose seconds are known, for texts whose survivals are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dspark_ray.speculative.selection import DraftSelection, DraftSelector

NUM_SLOTS, GAMMA, MAX_ROWS = 8, 4, 80
EVERYBODY = np.arange(NUM_SLOTS)

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
        seconds = self.first_draft + self.further_draft * np.arange(NUM_SLOTS + 1)
        seconds[0] = 0.0
        return seconds


def new_selector(num_slots: int = NUM_SLOTS, gamma: int = GAMMA) -> DraftSelector:
    """One that decides anew in every step."""
    return DraftSelector(num_slots, gamma, steps_per_decision=1)


FAST, DEARER, DEAR_DRAFTS = Machine(), Machine(first_draft=0.9), Machine(first_draft=2.0, further_draft=0.3)


def select(
    selector: DraftSelector, machine: Machine, slots: np.ndarray = EVERYBODY, step_seconds: float = 0.0
) -> DraftSelection:
    """A step that decodes `slots`; without `step_seconds` there is no time to explore in."""
    num = len(slots)
    return selector.select(slots, num, num, machine.target_seconds, machine.draft_seconds, step_seconds)


def observe(selector: DraftSelector, slots: np.ndarray, survivals: np.ndarray, truth: float = 1.0) -> None:
    """Everything is verified, and `truth` of what was expected comes true."""
    expected = survivals.sum(-1)
    selector.observe(slots, survivals, expected, truth * expected)


def run(
    selector: DraftSelector, machine: Machine, survivals: np.ndarray, num_steps: int, explore: bool = False
) -> np.ndarray:
    """[T, R] who was drafted, when slot r always drafts survivals[r]."""
    chosen, seconds = [], 0.0
    slots = np.arange(len(survivals))
    for _ in range(num_steps):
        mask = select(selector, machine, slots, seconds if explore else 0.0).chosen
        if mask.any():
            observe(selector, slots[mask], survivals[mask])
        seconds = machine.target_seconds[len(slots)] + machine.draft_seconds[mask.sum()]
        chosen.append(mask)
    return np.array(chosen)


def texts(*survivals: list[float]) -> np.ndarray:
    return np.array(survivals)


# Who is worth a draft


def test_of_requests_of_which_nothing_is_known_everybody_is_drafted() -> None:
    assert select(new_selector(), FAST).chosen.all()


def test_when_all_drafts_are_certain_everybody_is_drafted() -> None:
    assert run(new_selector(), FAST, np.ones((NUM_SLOTS, GAMMA)), 50).all()


def test_when_drafts_are_dear_and_seldom_stand_nobody_is_drafted() -> None:
    chosen = run(new_selector(), DEAR_DRAFTS, texts(*[HOPELESS] * NUM_SLOTS), 50)
    assert not chosen[10:].any()


def test_when_drafts_are_dear_but_certain_everybody_is_drafted() -> None:
    assert run(new_selector(), Machine(first_draft=0.9), np.ones((NUM_SLOTS, GAMMA)), 50).all()


def test_only_the_hopeless_request_of_a_mixed_batch_is_left_out() -> None:
    chosen = run(new_selector(), FAST, texts(EASY, EASY, HOPELESS, EASY), 200)
    assert chosen[100:].all(0).tolist() == [True, True, False, True]
    assert chosen[100:, 2].mean() < 0.1


def test_a_draft_that_costs_no_more_for_one_more_request_is_made_for_everybody() -> None:
    free = Machine(row=0.0, further_draft=0.0)
    assert run(new_selector(), free, texts(EASY, EASY, HOPELESS, EASY), 100).all()


def test_what_a_round_promises_is_tokens_over_seconds() -> None:
    selector, machine = new_selector(), Machine(row=0.0, first_draft=0.5, further_draft=0.0)
    run(selector, machine, np.ones((2, GAMMA)), 5)
    # 2 tokens and 2 * 4 drafts in 1.5 s
    assert select(selector, machine, np.arange(2)).tokens_per_second == pytest.approx(10 / 1.5)


def test_where_nobody_is_drafted_the_promise_is_that_of_the_target_alone() -> None:
    selector, machine = new_selector(), Machine(row=0.0, first_draft=20.0)
    assert select(selector, machine, np.arange(2)).tokens_per_second == pytest.approx(2.0)


def test_a_decision_holds_for_some_steps() -> None:
    selector = DraftSelector(NUM_SLOTS, GAMMA, steps_per_decision=4)
    decisions = []
    for _ in range(24):
        decisions.append(select(selector, DEARER).chosen.all())
        observe(selector, EVERYBODY, texts(*[HOPELESS] * NUM_SLOTS))
    changed_at = decisions.index(False)
    assert changed_at % 4 == 0
    assert not any(decisions[changed_at:])


def test_a_decision_ends_when_there_are_more_or_fewer_requests() -> None:
    selector = DraftSelector(NUM_SLOTS, GAMMA, steps_per_decision=1000)
    assert select(selector, DEARER).chosen.all()
    for _ in range(20):
        observe(selector, EVERYBODY, texts(*[HOPELESS] * NUM_SLOTS))
    assert select(selector, DEARER).chosen.all()
    assert not select(selector, DEARER, EVERYBODY[:5]).chosen.any()


def test_a_request_that_is_admitted_between_decisions_is_drafted_unless_nobody_is() -> None:
    selector = DraftSelector(NUM_SLOTS, GAMMA, steps_per_decision=1000)
    select(selector, FAST, np.array([0, 1]))
    selector.admit(2)
    assert select(selector, FAST, np.array([0, 2])).chosen.all()
    for _ in range(20):
        observe(selector, EVERYBODY, texts(*[HOPELESS] * NUM_SLOTS))
    select(selector, DEARER, EVERYBODY)
    selector.admit(3)
    assert not select(selector, DEARER, EVERYBODY).chosen[3]


# Requests come and go


def test_a_new_request_is_expected_to_be_like_the_traffic() -> None:
    selector = new_selector()
    run(selector, FAST, texts(*[HOPELESS] * 4), 50)
    selector.admit(7)
    assert not select(selector, DEAR_DRAFTS, np.array([7])).chosen.any()


def test_a_slot_forgets_who_had_it_before() -> None:
    selector, survivals = new_selector(), texts(HOPELESS, *[EASY] * 7)
    run(selector, FAST, survivals, 200)
    assert not select(selector, FAST).chosen[0]
    selector.admit(0)
    assert select(selector, FAST).chosen[0]


def test_what_could_not_have_been_verified_counts_as_worth_nothing() -> None:
    selector = new_selector()
    chosen = run(selector, FAST, texts(EASY, EASY, [0.0] * GAMMA), 100)
    assert chosen[50:].all(0).tolist() == [True, True, False]


def test_a_request_whose_drafts_stand_less_often_than_they_promise_is_left_out() -> None:
    selector = new_selector()
    for _ in range(100):
        observe(selector, np.array([0, 1]), texts(EASY, EASY), truth=1.0)
        observe(selector, np.array([2]), texts(EASY), truth=0.0)
        chosen = select(selector, FAST, np.array([0, 1, 2])).chosen
    assert chosen.tolist() == [True, True, False]


def test_new_requests_are_trusted_as_far_as_the_traffic_was_right() -> None:
    honest, boastful = new_selector(), new_selector()
    for selector, truth in ((honest, 1.0), (boastful, 0.1)):
        for _ in range(100):
            observe(selector, np.array([0, 1]), texts(EASY, EASY), truth)
            selector.admit(0)
            select(selector, DEARER, np.array([0, 1]))
        selector.admit(5)
    moderate = Machine(first_draft=0.5)
    decisions = [select(selector, moderate, np.array([5])).chosen[0] for selector in (honest, boastful)]
    assert decisions == [True, False]


# Nobody at all: begins and ends only for a gain


def even_odds(draft_seconds: float) -> Machine:
    """One request whose draft stands half of the time brings (1 + 0.5) / (1 + draft_seconds) of the plain rate."""
    return Machine(row=0.0, first_draft=draft_seconds, further_draft=0.0)


def test_a_draft_that_loses_less_than_the_hysteresis_goes_on_and_one_that_gains_less_does_not_begin() -> None:
    selector = new_selector(1, 1)
    run(selector, even_odds(0.3), texts([0.5]), 200)
    decisions = [decide(selector, seconds, times=12)[-1] for seconds in (0.503, 0.6, 0.497, 0.4, 0.503)]
    assert decisions == [True, False, False, True, True]


def decide(selector: DraftSelector, draft_seconds: float, times: int) -> list[bool]:
    """Whether the one request is drafted, in some decisions on end."""
    return [bool(select(selector, even_odds(draft_seconds), np.array([0])).chosen[0]) for _ in range(times)]


def test_one_bad_forecast_begins_no_bypass_and_a_large_loss_begins_one_soon() -> None:
    selector = new_selector(1, 1)
    run(selector, even_odds(0.45), texts([0.5]), 200)
    assert decide(selector, 0.6, times=1) == [True]
    assert all(decide(selector, 0.45, times=4))
    assert decide(selector, 2.0, times=4)[-1] is False


# Those who are left out are seen again


def time_share(machine: Machine, chosen: np.ndarray) -> float:
    """Of the whole time, what went into drafts."""
    drafts = machine.draft_seconds[chosen.sum(-1)]
    return float(drafts.sum() / (drafts + machine.target_seconds[chosen.shape[1]]).sum())


def test_drafts_for_nobodys_good_take_half_a_hundredth_of_the_time() -> None:
    selector = new_selector()
    chosen = run(selector, DEAR_DRAFTS, texts(*[HOPELESS] * NUM_SLOTS), 5000, explore=True)[100:]
    assert 0.0025 < time_share(DEAR_DRAFTS, chosen) < 0.00525


def test_drafts_for_those_left_out_take_less_than_a_hundredth_of_the_time_in_a_mixed_batch() -> None:
    survivals = texts(*[EASY] * 5, *[HOPELESS] * 3)
    chosen = run(new_selector(), FAST, survivals, 2000, explore=True)[200:]
    without = chosen.copy()
    without[:, 5:] = False
    assert chosen[:, :5].all()
    assert 0.0015 < time_share(FAST, chosen) - time_share(FAST, without) < 0.01


def test_everybody_who_is_left_out_is_seen_again_in_turn() -> None:
    selector = new_selector()
    chosen = run(selector, DEAR_DRAFTS, texts(*[HOPELESS] * NUM_SLOTS), 5000, explore=True)[100:]
    times_seen = chosen.sum(0)
    assert times_seen.min() >= 2
    assert times_seen.max() <= times_seen.min() + 1


def test_a_request_whose_text_becomes_easy_is_drafted_again() -> None:
    selector = new_selector()
    run(selector, FAST, texts(EASY, EASY, HOPELESS, EASY), 300, explore=True)
    assert run(selector, FAST, texts(*[EASY] * 4), 300, explore=True)[-50:].all()


def test_traffic_that_becomes_easy_is_drafted_again() -> None:
    selector = new_selector()
    machine = Machine(first_draft=0.4, further_draft=0.02)
    run(selector, machine, texts(*[HOPELESS] * NUM_SLOTS), 500, explore=True)
    assert not select(selector, machine).chosen.any()
    assert run(selector, machine, texts(*[EASY] * NUM_SLOTS), 600, explore=True)[-50:].all()


def test_a_few_looks_are_enough_when_hopeless_traffic_has_become_easy() -> None:
    selector = new_selector()
    machine = Machine(first_draft=0.4, further_draft=0.02)
    run(selector, machine, texts(*[HOPELESS] * NUM_SLOTS), 2000, explore=True)
    for slot in EVERYBODY:
        selector.admit(int(slot))
    chosen = run(selector, machine, texts(*[EASY] * NUM_SLOTS), 400, explore=True)
    first_for_all = int(np.argmax(chosen.all(1)))
    looks = chosen[:first_for_all].any(1).sum()
    assert chosen[first_for_all:].all()
    assert looks <= 4


def test_without_time_nothing_is_explored() -> None:
    chosen = run(new_selector(), DEAR_DRAFTS, texts(*[HOPELESS] * NUM_SLOTS), 500)
    assert not chosen[50:].any()
