"""Curves by hand, tables there and back, and a model that follows what steps really take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_ray.config import ConfigError
from dspark_ray.speculative.cost import CostModel, lower_hull
from dspark_ray.speculative.cost_table import NO_COST, CostTable, Curve

# Curves


def seconds_at(curve: Curve, *sizes: int) -> list[float]:
    return [float(curve.table(max(sizes))[size]) for size in sizes]


LINE = Curve((2, 4, 8), (1.0, 3.0, 5.0))


def test_a_measured_size_costs_what_was_measured() -> None:
    assert seconds_at(LINE, 2, 4, 8) == [1.0, 3.0, 5.0]


def test_between_measured_sizes_seconds_lie_on_a_line() -> None:
    assert seconds_at(LINE, 3, 6, 7) == pytest.approx([2.0, 4.0, 4.5])


def test_below_the_first_measured_size_a_curve_is_level() -> None:
    assert seconds_at(LINE, 0, 1) == [1.0, 1.0]


def test_beyond_the_last_measured_size_the_last_slope_goes_on() -> None:
    assert seconds_at(LINE, 10, 16) == pytest.approx([6.0, 9.0])


def test_a_curve_of_one_size_is_level() -> None:
    assert seconds_at(Curve((4,), (2.0,)), 0, 4, 9) == [2.0, 2.0, 2.0]


STAIR = Curve((2, 4, 8, 12), (1.0, 3.0, 7.0, 9.0), padded_to=4)


def test_a_padded_size_costs_what_the_next_measured_one_does() -> None:
    assert seconds_at(STAIR, 1, 2, 3, 4) == [1.0, 1.0, 3.0, 3.0]


def test_behind_the_padded_sizes_a_curve_is_level_up_to_the_first_measured_one() -> None:
    assert seconds_at(STAIR, 5, 7, 8) == [7.0, 7.0, 7.0]


def test_behind_that_a_padded_curve_is_a_line() -> None:
    assert seconds_at(STAIR, 10, 14) == pytest.approx([8.0, 10.0])


def test_padding_ends_with_the_last_measured_size() -> None:
    assert seconds_at(Curve((2, 4), (1.0, 3.0), padded_to=10), 3, 4, 6) == pytest.approx([3.0, 3.0, 5.0])


def test_seconds_that_fall_with_size_are_noise() -> None:
    assert seconds_at(Curve((1, 2, 3), (2.0, 1.0, 3.0)), 1, 2, 3) == [2.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ((1, 2), (1.0,), "2 sizes and 1 seconds"),
        ((), (), "0 sizes and 0 seconds"),
        ((2, 2), (1.0, 1.0), r"sizes \[2, 2\]: expected rising positive numbers"),
        ((0, 1), (1.0, 1.0), r"sizes \[0, 1\]: expected rising positive numbers"),
        ((1,), (-0.5,), "-0.5 seconds: expected finite numbers"),
        ((1,), (float("nan"),), "nan seconds: expected finite numbers"),
    ],
)
def test_a_curve_that_cannot_be_names_its_values(
    sizes: tuple[int, ...], seconds: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Curve(sizes, seconds)


def test_the_hull_of_a_stair_touches_its_far_ends() -> None:
    seconds = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 9.0])
    assert lower_hull(seconds, 2, 6).tolist() == pytest.approx([1, 1, 1, 1.25, 1.5, 1.75, 2, 9])


def test_a_hull_is_convex_nowhere_above_its_curve_and_meets_it_at_both_ends() -> None:
    for seed in range(20):
        seconds = np.cumsum(np.random.default_rng(seed).exponential(size=60) ** 3)
        hull = lower_hull(seconds, 7, 50)
        assert (np.diff(hull[7:51], 2) >= -1e-9).all()
        assert (hull <= seconds + 1e-9).all()
        assert (hull[[7, 50]] == seconds[[7, 50]]).all()


def test_a_convex_curve_is_its_own_hull() -> None:
    seconds = np.arange(30.0) ** 2
    assert lower_hull(seconds, 3, 29) == pytest.approx(seconds)


# Tables


TABLE = CostTable(
    {16: Curve((1, 8, 32), (0.010, 0.012, 0.02), padded_to=8), 1024: Curve((1, 8, 32), (0.02, 0.024, 0.04))},
    Curve((1, 4), (0.001, 0.002)),
    {"model": "small", "device": "cpu"},
)


def test_a_saved_table_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "cost.json"
    TABLE.save(path)
    assert CostTable.load(path) == TABLE


def test_a_table_has_at_least_one_target_curve() -> None:
    with pytest.raises(ConfigError, match="no target curve"):
        CostTable({}, NO_COST)


def test_a_table_without_contexts_has_one_target_curve() -> None:
    assert CostTable.of(LINE, NO_COST).target == LINE


def test_the_target_is_the_curve_of_the_shortest_context() -> None:
    assert TABLE.target == TABLE.targets[16]


def of_contexts(ratio: float) -> CostTable:
    short = Curve((1, 8), (0.01, 0.02))
    return CostTable({16: short, 1024: Curve(short.sizes, tuple(ratio * value for value in short.seconds))}, NO_COST)


def test_contexts_that_cost_the_same_collapse() -> None:
    assert set(of_contexts(1.02).without_needless_contexts().targets) == {16}


def test_contexts_that_cost_more_stay() -> None:
    table = of_contexts(1.2)
    assert table.without_needless_contexts() is table


# SGLang's files


ADDITIVE = {
    "bias_seconds": 0.01,
    "bs_probes": [1, 8],
    "alpha_seconds": [0.0, 0.002],
    "m_probes": [1, 16],
    "theta_seconds": [0.0, 0.03],
}
FLAT = {"sample_batch_tokens": [1, 4, 8], "sample_steps_per_sec": [50.0, 40.0, 25.0], "max_batch_tokens": 16}


def test_an_additive_table_is_bias_plus_theta_and_alpha() -> None:
    table = CostTable.from_sglang(ADDITIVE)
    assert seconds_at(table.target, 1, 16) == pytest.approx([0.01, 0.04])
    assert seconds_at(table.draft, 1, 8) == pytest.approx([0.0, 0.002])


def test_an_additive_table_is_written_as_it_was_read() -> None:
    written = CostTable.from_sglang(ADDITIVE).to_sglang_additive()
    assert written.keys() == ADDITIVE.keys()
    assert all(written[key] == pytest.approx(ADDITIVE[key]) for key in ADDITIVE)


def test_a_flat_table_holds_each_value_up_to_the_next_measured_size() -> None:
    seconds = seconds_at(CostTable.from_sglang(FLAT).target, 1, 3, 4, 7, 8, 16)
    assert seconds == pytest.approx([0.02, 0.02, 0.025, 0.025, 0.04, 0.04])


def test_a_flat_table_knows_no_cost_of_drafts() -> None:
    assert CostTable.from_sglang(FLAT).draft == NO_COST


def test_a_flat_table_is_written_for_whole_rounds() -> None:
    table = CostTable.of(Curve((6, 12), (0.01, 0.02)), Curve((1, 2), (0.002, 0.005)))
    written = table.to_sglang_flat(rows_per_request=6)
    assert written["sample_batch_tokens"] == [6, 12]
    assert written["sample_steps_per_sec"] == pytest.approx([1 / 0.012, 1 / 0.025])
    assert written["max_batch_tokens"] == 12


@pytest.mark.parametrize("raw", [ADDITIVE, FLAT], ids=["additive", "flat"])
def test_sglangs_files_can_be_loaded(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(raw))
    assert CostTable.load(path) == CostTable.from_sglang(raw)


# Files that cannot be used


CURVE = {"sizes": [1, 2], "seconds": [0.1, 0.2]}
BAD_FILES = {
    "not JSON": ("{", "not JSON"),
    "a list": ([1], r"the table is \[1\]: expected an object"),
    "no key of any table": ({}, "key 'targets_by_context' is missing"),
    "no contexts": ({"targets_by_context": {}, "draft": CURVE}, "no target curve"),
    "contexts in a list": ({"targets_by_context": [1], "draft": CURVE}, r"targets_by_context is \[1\]"),
    "no draft": ({"targets_by_context": {"1": CURVE}}, "key 'draft' is missing"),
    "no seconds": ({"targets_by_context": {"1": {"sizes": [1]}}, "draft": CURVE}, "key 'seconds' is missing"),
    "words": ({"targets_by_context": {"1": {**CURVE, "seconds": ["a", 1]}}, "draft": CURVE}, "seconds has 'a'"),
    "half a row": ({"targets_by_context": {"1": {**CURVE, "sizes": [0.5, 1]}}, "draft": CURVE}, "sizes has 0.5"),
    "too many": ({"targets_by_context": {"1": {**CURVE, "sizes": [1]}}, "draft": CURVE}, "1 sizes and 2 seconds"),
    "additive without theta": ({"bias_seconds": 0.1}, "key 'theta_seconds' is missing"),
    "flat without rates": ({"sample_batch_tokens": [1]}, "key 'sample_steps_per_sec' is missing"),
    "flat that never ends": ({**FLAT, "sample_steps_per_sec": [1, 0, 1]}, "sample_steps_per_sec has 0"),
    "flat without sizes": ({**FLAT, "sample_batch_tokens": []}, r"sample_batch_tokens is \[\]"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_named_with_what_is_wrong(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=f"table.json: .*{message}"):
        CostTable.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        CostTable.load(tmp_path / "none.json")


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        CostTable.load(tmp_path)


# The model in use


SIZES = (1, 8, 16, 32, 64)
PROFILED = Curve(SIZES, (0.010, 0.011, 0.013, 0.018, 0.030))
DRAFT = Curve((1, 8), (0.001, 0.003))
MAX_ROWS, MAX_REQUESTS = 64, 8


def model() -> CostModel:
    return CostModel(CostTable.of(PROFILED, DRAFT), MAX_ROWS, MAX_REQUESTS)


def run(costs: CostModel, seconds: Callable[[int], float], draft_factor: float = 1.0, num_steps: int = 3000) -> None:
    """Let `costs` see steps of all sizes, with the pauses and the noise of a real machine."""
    rng = np.random.default_rng(1)
    draft = DRAFT.table(MAX_REQUESTS)
    for _ in range(num_steps):
        rows, num_drafted = int(rng.integers(1, MAX_ROWS + 1)), int(rng.integers(0, MAX_REQUESTS + 1))
        noise = rng.lognormal(0, 0.05) * (10.0 if rng.random() < 0.002 else 1.0)
        draft_seconds = draft_factor * draft[num_drafted] if num_drafted else 0.0
        costs.observe(rows, 100.0, seconds(rows) * noise, num_drafted, draft_seconds)


TRUTH = PROFILED.table(MAX_ROWS)


def test_a_new_model_says_what_was_profiled() -> None:
    np.testing.assert_allclose(model().target_seconds(100.0), TRUTH)
    np.testing.assert_allclose(model().draft_seconds()[1:], DRAFT.table(MAX_REQUESTS)[1:])


def test_no_draft_costs_nothing() -> None:
    assert model().draft_seconds()[0] == 0.0


def test_a_model_of_a_true_table_stays_where_it_is() -> None:
    costs = model()
    run(costs, lambda rows: TRUTH[rows])
    np.testing.assert_allclose(costs.target_seconds(100.0), TRUTH, rtol=0.05)
    assert costs.drift == pytest.approx(1.0, rel=0.05)


def test_a_model_follows_a_machine_that_becomes_slower() -> None:
    costs = model()
    run(costs, lambda rows: 1.5 * TRUTH[rows], draft_factor=1.5)
    np.testing.assert_allclose(costs.target_seconds(100.0), 1.5 * TRUTH, rtol=0.05)
    np.testing.assert_allclose(costs.draft_seconds()[1:], 1.5 * DRAFT.table(MAX_REQUESTS)[1:], rtol=0.05)


def test_the_drift_is_measured_over_profiled_seconds() -> None:
    costs = model()
    run(costs, lambda rows: 1.5 * TRUTH[rows])
    assert costs.drift == pytest.approx(1.5, rel=0.05)


def test_a_slower_machine_does_not_change_which_size_is_better() -> None:
    costs = model()
    before = costs.target_seconds(100.0)
    run(costs, lambda rows: 1.5 * TRUTH[rows], num_steps=100)
    after = costs.target_seconds(100.0)
    np.testing.assert_allclose(after[8] / after[32], before[8] / before[32], rtol=0.05)


def test_a_size_that_was_profiled_wrongly_is_put_right() -> None:
    costs, truth = model(), TRUTH * np.interp(np.arange(MAX_ROWS + 1), SIZES, (1.0, 1.0, 1.3, 1.0, 1.0))
    run(costs, lambda rows: truth[rows])
    np.testing.assert_allclose(costs.target_seconds(100.0)[[8, 16, 32, 64]], truth[[8, 16, 32, 64]], rtol=0.05)


def test_one_pause_of_the_process_says_little() -> None:
    costs = model()
    for seconds in (1000.0, *[TRUTH[16]] * 20):
        costs.observe(16, 100.0, seconds, 0, 0.0)
    np.testing.assert_allclose(costs.target_seconds(100.0), TRUTH, rtol=0.06)


def test_more_rows_never_seem_cheaper() -> None:
    costs = model()
    run(costs, lambda rows: 0.5 * TRUTH[rows] if rows == 32 else TRUTH[rows])
    assert (np.diff(costs.target_seconds(100.0)) >= 0).all()


def test_a_size_that_is_cheaper_than_a_smaller_one_does_not_pull_the_others_down() -> None:
    costs, truth, rng = model(), TRUTH.copy(), np.random.default_rng(2)
    truth[16] = 0.6 * truth[8]
    for step in range(20_000):
        rows = 16 if step % 10 else int(rng.choice(SIZES))
        costs.observe(rows, 100.0, truth[rows], 0, 0.0)
    np.testing.assert_allclose(costs.target_seconds(100.0)[[8, 32, 64]], truth[[8, 32, 64]], rtol=0.05)


def test_sizes_beyond_the_largest_teach_the_largest() -> None:
    costs = model()
    for _ in range(50):
        costs.observe(10 * MAX_ROWS, 100.0, 1.5 * TRUTH[-1], 10 * MAX_REQUESTS, 0.003)
    assert costs.target_seconds(100.0)[-1] > 1.3 * TRUTH[-1]


def test_between_profiled_contexts_seconds_lie_on_a_line() -> None:
    costs = CostModel(CostTable({0: Curve((1,), (0.01,)), 128: Curve((1,), (0.03,))}, NO_COST), 4, 1)
    assert [costs.target_seconds(context)[1] for context in (0, 32, 64, 128)] == pytest.approx(
        [0.01, 0.015, 0.02, 0.03]
    )


def test_outside_profiled_contexts_seconds_are_level() -> None:
    costs = CostModel(CostTable({10: Curve((1,), (0.01,)), 100: Curve((1,), (0.03,))}, NO_COST), 4, 1)
    assert [costs.target_seconds(context)[1] for context in (0, 1000)] == pytest.approx([0.01, 0.03])


def test_between_three_contexts_the_neighbours_count() -> None:
    targets = {context: Curve((1,), (seconds,)) for context, seconds in ((0, 0.01), (128, 0.02), (256, 0.06))}
    costs = CostModel(CostTable(targets, NO_COST), 4, 1)
    assert [costs.target_seconds(context)[1] for context in (64, 128, 192)] == pytest.approx([0.015, 0.02, 0.04])


def test_where_nothing_is_profiled_nothing_is_learned() -> None:
    costs = CostModel(CostTable.of(NO_COST, NO_COST), 4, 1)
    for _ in range(50):
        costs.observe(2, 0.0, 1.0, 1, 1.0)
    assert costs.target_seconds(0.0).tolist() == [0.0] * 5
