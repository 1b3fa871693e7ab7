"""Budgets and verify lengths against those that other programs gave for the same confidences and costs.

The programs agree on the arithmetic (first maximum of tokens over seconds, stable ranking by survival) and differ in
what lies between two measured sizes. A `Curve` has all of their rules, and the table says which one is meant; see the
fixtures below.

Letters: R requests, G gamma.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from golden_files import case_files, case_name

from dspark_ray.speculative.calibration import calibrated
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.speculative.prefix_schedule import (
    CausalSchedule,
    FullSchedule,
    LaggedSchedule,
    RoundView,
    VerifyPlan,
    survival,
)

Facts = dict[str, Any]
TOLERANCE = 1e-5  # relative; the programs multiply confidences in single precision


@dataclass(frozen=True)
class Case:
    """One recorded decision, and what is common to its section of the file."""

    section: Facts
    facts: Facts


def sections(key: str) -> list[Any]:
    """Every section called `key`, as pytest parameters; none for a file without one."""
    found = [(case_name(path), json.loads(path.read_text())) for path in case_files("schedulers/*.json")]
    return [pytest.param(facts[key], id=name) for name, facts in found if key in facts]


def cases(key: str) -> list[Any]:
    """Every case of every section called `key`."""
    return [
        pytest.param(Case(section.values[0], facts), id=f"{section.id}-{number}")
        for section in sections(key)
        for number, facts in enumerate(section.values[0].get("cases", []))
    ]


def recorded(case: Case, name: str) -> Any:
    if name not in case.facts:
        pytest.skip(f"{name} was not recorded")
    return case.facts[name]


def survival_of(confidences: list[list[float]]) -> np.ndarray:
    return survival(np.array(confidences))


# SGLang: the budget comes from old confidences, current ones rank.


def sglang_table(case: Case) -> CostTable:
    """Its additive table is interpolated; a value of its flat one holds from its own size up to the next."""
    table, rows = case.section[f"{case.facts['table']}_table"], case.facts["R"] * (1 + case.section["gamma"])
    if "batch_tokens" not in table:
        return CostTable.from_sglang(table)
    # The golden file shortens the names that SGLang's own file has.
    names = {"sample_batch_tokens": table["batch_tokens"], "sample_steps_per_sec": table["steps_per_sec"]}
    return CostTable.from_sglang({**names, "max_batch_tokens": rows})


def sglang_view(case: Case) -> RoundView:
    table, num_requests, gamma = sglang_table(case), case.facts["R"], case.section["gamma"]
    return RoundView(
        survival=survival_of(case.facts["current_confidence"]),
        lagged_survival=survival_of(case.facts["lagged_confidence"]),
        limits=np.full(num_requests, gamma),
        certain_tokens=num_requests,
        base_rows=num_requests,
        target_seconds=table.target.table(num_requests * (1 + gamma)),
        draft_seconds=float(table.draft.table(num_requests)[num_requests]),
    )


@pytest.fixture(params=cases("sglang_budget_and_allocation"))
def sglang(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_the_lagged_budget_is_sglangs(sglang: Case) -> None:
    assert LaggedSchedule().plan(sglang_view(sglang)).budget == recorded(sglang, "budget")


def test_lagged_lengths_are_sglangs_less_the_anchor(sglang: Case) -> None:
    lengths = LaggedSchedule().plan(sglang_view(sglang)).lengths
    assert [1 + length for length in lengths] == recorded(sglang, "verify_lens_including_anchor")


def sglang_round(case: Case) -> tuple[float, float]:
    """Expected tokens and seconds of the round that was chosen."""
    view, budget = sglang_view(case), recorded(case, "budget")
    tokens = view.certain_tokens + np.sort(view.lagged_survival, axis=None)[::-1][:budget].sum()
    return float(tokens), float(view.draft_seconds + view.target_seconds[view.base_rows + budget])


def test_the_chosen_round_takes_as_long_as_sglang_predicts(sglang: Case) -> None:
    assert sglang_round(sglang)[1] == pytest.approx(recorded(sglang, "predicted_step_seconds"), rel=TOLERANCE)


def test_the_chosen_round_brings_as_much_as_sglang_predicts(sglang: Case) -> None:
    tokens, seconds = sglang_round(sglang)
    assert tokens / seconds == pytest.approx(recorded(sglang, "predicted_theta"), rel=TOLERANCE)


# vLLM: a stair as far as graphs were captured, and a line beyond.


def vllm_table(section: Facts, name: str, max_size: int) -> np.ndarray:
    """[max_size + 1] milliseconds. Without graphs vLLM keeps the stair for all sizes; our own curve is then a line."""
    sizes, milliseconds = zip(*section[f"{name}_curve_ms"])
    return Curve(sizes, milliseconds, padded_to=section.get("cudagraph_limit") or sizes[-1]).table(max_size)


@pytest.mark.parametrize("section", sections("vllm_adaptive_verification"))
@pytest.mark.parametrize(("name", "last"), [("draft", "max_num_reqs"), ("verify", "max_batch_tokens")])
def test_the_curve_between_measured_sizes_is_vllms(section: Facts, name: str, last: str) -> None:
    assert vllm_table(section, name, section[last]).tolist() == section[f"{name}_table"]


def vllm_view(case: Case) -> RoundView:
    facts = case.facts
    num_requests, limits = facts["R"], np.array(facts["scheduled_drafts"])
    non_draft = np.array(facts["non_draft_tokens"])
    # A prompt that does not end in this step brings no token.
    certain = np.array(facts["num_computed"]) + non_draft >= np.array(facts["prefill_len"])
    rows = int(non_draft.sum())
    milliseconds = vllm_table(case.section, "verify", rows + limits.size * limits.max())
    # How many rows may be sampled at once is vLLM's limit, not ours: rows beyond it never end.
    most_drafts = max(0, case.section.get("max_total_logits", len(milliseconds)) - num_requests)
    milliseconds[rows + most_drafts + 1 :] = np.inf
    return RoundView(
        survival=survival_of(facts["current_confidence"]),
        lagged_survival=survival_of(facts["stale_confidence"]),
        limits=limits,
        certain_tokens=int(certain.sum()),
        base_rows=rows,
        target_seconds=milliseconds,
        draft_seconds=float(vllm_table(case.section, "draft", num_requests)[num_requests]),
    )


@pytest.fixture(params=cases("vllm_adaptive_verification"))
def vllm(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_the_lagged_budget_is_vllms(vllm: Case) -> None:
    assert LaggedSchedule().plan(vllm_view(vllm)).budget == recorded(vllm, "budget")


def test_the_rows_of_the_forward_are_vllms(vllm: Case) -> None:
    view = vllm_view(vllm)
    assert view.base_rows + LaggedSchedule().plan(view).budget == recorded(vllm, "total_tokens")


def test_lagged_lengths_are_vllms(vllm: Case) -> None:
    assert list(LaggedSchedule().plan(vllm_view(vllm)).lengths) == recorded(vllm, "admitted_drafts")


# ATOM: Algorithm 1 of the paper, and the same without its early stop.


def paper_plan(sps_table: list[float], facts: Facts) -> VerifyPlan:
    confidences = np.array(facts["confidence"])
    temperatures = facts.get("sts_temperatures")
    if temperatures is not None:
        confidences = calibrated(confidences, np.array(temperatures))
    num_requests, gamma = confidences.shape
    view = RoundView(
        survival=survival(confidences),
        lagged_survival=np.ones_like(confidences),
        limits=np.full(num_requests, gamma),
        certain_tokens=num_requests,
        base_rows=num_requests,
        target_seconds=1 / np.array(sps_table),
    )
    return (CausalSchedule() if facts["early_stop"] else FullSchedule()).plan(view)


@pytest.mark.parametrize("case", cases("paper_algorithm_1"))
def test_lengths_are_those_of_the_papers_algorithm(case: Case) -> None:
    plan = paper_plan(case.facts["sps_table"], case.facts)
    assert list(plan.lengths) == recorded(case, "verify_drafts")


@pytest.mark.parametrize("section", sections("paper_algorithm_1"))
def test_lengths_are_those_of_the_papers_appendix_a(section: Facts) -> None:
    example = section.get("appendix_a")
    if example is None:
        pytest.skip("appendix_a was not recorded")
    for facts in example["cases"]:
        assert list(paper_plan(example["sps_table"], facts).lengths) == facts["verify_drafts"], facts
