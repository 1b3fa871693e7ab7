"""Temperatures of confidences: facts by hand, and synthetic drafters whose true temperature is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dspark_ray.config import ConfigError
from dspark_ray.speculative.calibration import (
    NUM_BINS,
    TEMPERATURE_GRID,
    OnlineCalibration,
    Temperatures,
    area_under_curve,
    calibrated,
    expected_calibration_error,
    fit_temperatures,
    logits,
    reliability,
    survival_errors,
)

GAMMA = 3


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


class SyntheticDrafter:
    """States confidences that are too sure (above 1) or too unsure (below) by known temperatures."""

    def __init__(self, *true_temperatures: float, seed: int = 0) -> None:
        self.true_temperatures = np.array(true_temperatures)
        self._rng = np.random.default_rng(seed)

    def rounds(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Confidences [count, G], admitted and accepted [count], with everything verified."""
        gamma = len(self.true_temperatures)
        stated = self._rng.normal(1.5, 1.5, (count, gamma))
        stands = self._rng.random((count, gamma)) < sigmoid(stated / self.true_temperatures)
        return sigmoid(stated), np.full(count, gamma), np.cumprod(stands, axis=1).sum(1)

    def error(self, temperatures: np.ndarray) -> float:
        """Mean calibration error under `temperatures` over so many rounds that noise hardly counts."""
        return float(np.mean(survival_errors(*self.rounds(100_000), temperatures)))


# Applying.


def test_temperature_one_gives_back_the_same_array():
    confidences = np.random.default_rng(0).random((4, GAMMA), dtype=np.float32)
    assert calibrated(confidences, np.ones(GAMMA)) is confidences


def test_a_temperature_divides_the_logit():
    # logit(0.9) = 2.197; half of it is the logit of 0.75
    result = calibrated(np.array([[0.9, 0.9, 0.5]]), np.array([1.0, 2.0, 7.0]))
    np.testing.assert_allclose(result, [[0.9, 0.75, 0.5]], atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 4.0])
def test_calibration_keeps_the_order_within_a_position(temperature):
    confidences = np.linspace(0.01, 0.99, 99)[:, None]
    assert (np.diff(calibrated(confidences, np.array([temperature]))[:, 0]) >= 0).all()


def test_certain_confidences_stay_finite():
    extremes = np.array([[0.0, 1.0]], dtype=np.float32)
    result = calibrated(extremes, np.array([0.01, 2.0]))
    assert result.dtype == np.float64  # a high power of small odds does not fit into less
    np.testing.assert_allclose(result, [[0.0, 0.999]], atol=1e-4)
    assert np.isfinite(logits(extremes)).all()


# Measuring.


def test_predictions_that_come_true_have_no_error():
    predicted = np.repeat([0.25, 0.75], 4)
    stood = np.array([1, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    assert expected_calibration_error(predicted, stood) == pytest.approx(0)


def test_the_error_of_constant_overconfidence_is_the_gap():
    stood = np.array([True, False, False, False, False])
    assert expected_calibration_error(np.full(5, 0.9), stood) == pytest.approx(0.7)


def test_errors_of_opposite_sign_cancel_within_a_bin_and_add_up_between_bins():
    stood = np.array([True, False])
    assert expected_calibration_error(np.array([0.5, 0.5]), stood) == pytest.approx(0)
    assert expected_calibration_error(np.array([0.3, 0.7]), stood) == pytest.approx(0.7)


def test_a_bin_begins_with_its_lower_edge_and_the_last_one_includes_certainty():
    found = reliability(np.array([0.0, 1 / NUM_BINS, 1.0]), np.array([False, True, True]))
    assert np.flatnonzero(found.counts).tolist() == [0, 1, NUM_BINS - 1]
    assert found.stood[[0, 1, NUM_BINS - 1]].tolist() == [0, 1, 1]
    assert np.isnan(found.predicted[2])


def test_the_error_of_nothing_is_unknown():
    assert math.isnan(expected_calibration_error(np.empty(0), np.empty(0, dtype=bool)))


@pytest.mark.parametrize(
    ("predicted", "stood", "area"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 1.0),
        ([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0], 0.0),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 0.5),
        ([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1], 0.875),  # of 4 pairs three right and one tied
        ([0.3, 0.9, 0.6], [0, 0, 1], 0.5),
    ],
)
def test_the_area_under_the_curve_counts_pairs(predicted, stood, area):
    assert area_under_curve(np.array(predicted), np.array(stood, dtype=bool)) == pytest.approx(area)


@pytest.mark.parametrize("stood", [[True, True], [False, False], []])
def test_the_area_of_one_kind_is_unknown(stood):
    assert math.isnan(area_under_curve(np.full(len(stood), 0.5), np.array(stood, dtype=bool)))


def test_a_position_with_too_few_outcomes_has_no_error():
    confidences, admitted, accepted = SyntheticDrafter(1, 1, 1).rounds(10)
    admitted[3:] = 2
    errors = survival_errors(confidences, admitted, np.minimum(accepted, admitted), np.ones(GAMMA), min_outcomes=4)
    assert [math.isnan(error) for error in errors] == [False, False, True]


# Fitting.


def grid_step(temperature: float) -> int:
    """Place of a temperature in the grid."""
    return int(np.argmin(np.abs(TEMPERATURE_GRID - temperature)))


@pytest.mark.parametrize("true", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (2.0, 1.0, 4.0)])
def test_the_fit_finds_the_true_temperatures(true):
    confidences, _, accepted = SyntheticDrafter(*true).rounds(40_000)
    fitted = fit_temperatures(logits(confidences), accepted)
    for found, wanted in zip(fitted.temperatures, true, strict=True):
        assert abs(grid_step(found) - grid_step(wanted)) <= 1
    assert max(fitted.ece_after) < 0.015


def test_rounds_cut_short_by_their_confidences_do_not_bias_the_fit():
    true = (2.0, 2.0, 2.0)
    confidences, _, accepted = SyntheticDrafter(*true).rounds(60_000)
    # As a scheduler does it: what is likely to stand is verified, the rest is not.
    admitted = (np.cumprod(confidences, axis=1) > 0.5).sum(1)
    fitted = fit_temperatures(logits(confidences), np.minimum(accepted, admitted), admitted)
    assert [abs(grid_step(found) - grid_step(2.0)) <= 1 for found in fitted.temperatures] == [True] * GAMMA
    # Taking what was not verified for fallen would.
    blind = fit_temperatures(logits(confidences), np.minimum(accepted, admitted))
    assert min(blind.temperatures[1:]) > 4


def test_of_equally_good_temperatures_the_lowest_is_taken():
    fitted = fit_temperatures(np.zeros((6, 1)), np.array([1, 0, 1, 0, 1, 0]))
    assert fitted.temperatures == (pytest.approx(0.1),)


def test_a_position_that_was_never_verified_keeps_its_fallback():
    confidences, _, accepted = SyntheticDrafter(2, 2, 2).rounds(500)
    fitted = fit_temperatures(logits(confidences), np.minimum(accepted, 2), np.full(500, 2), fallback=(1, 1, 1.7))
    assert fitted.temperatures[2] == 1.7
    assert math.isnan(fitted.ece_before[2])
    assert math.isnan(fitted.ece_after[2])
    assert fit_temperatures(np.zeros((0, 2)), np.zeros(0)).temperatures == (1, 1)


# Online.


EAGER = {"steps_between_refits": 1, "steps_between_errors": 16}


def test_refits_are_not_due_more_often_than_steps_allow():
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, steps_between_refits=3 * 2048 // 16)
    observe(calibration, SyntheticDrafter(3, 3, 3), 3 * 2048 - 16)
    assert calibration.num_refits + calibration.num_refused == 0
    observe(calibration, SyntheticDrafter(3, 3, 3), 16)
    assert calibration.num_refits + calibration.num_refused == 1


def observe(calibration: OnlineCalibration, drafter: SyntheticDrafter, count: int, at_a_time: int = 16) -> None:
    confidences, admitted, accepted = drafter.rounds(count)
    for start in range(0, count, at_a_time):
        step = slice(start, start + at_a_time)
        calibration.observe(confidences[step], admitted[step], accepted[step])


def test_a_refit_follows_a_drafter_that_became_too_sure():
    drafter = SyntheticDrafter(2, 2, 2)
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, **EAGER)
    observe(calibration, drafter, 2047)
    assert calibration.num_refits == 0
    before = drafter.error(calibration.temperatures)
    observe(calibration, drafter, 1)
    assert (calibration.num_refits, calibration.num_refused) == (1, 0)
    assert drafter.error(calibration.temperatures) < before / 3


@pytest.mark.parametrize("seed", range(6))
def test_a_refit_is_refused_where_only_noise_speaks_for_it(seed):
    drafter = SyntheticDrafter(1.2, 1, 0.9, seed=seed)
    calibration = OnlineCalibration(Temperatures((1.2, 1, 0.9)), GAMMA, **EAGER)
    observe(calibration, drafter, 3 * 2048)
    assert (calibration.num_refits, calibration.num_refused) == (0, 3)
    assert calibration.temperatures.tolist() == [1.2, 1, 0.9]


@pytest.mark.parametrize("seed", range(4))
def test_refits_never_end_worse_than_they_began(seed):
    drafter = SyntheticDrafter(*np.random.default_rng(seed).uniform(0.6, 1.8, 3), seed=seed)
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, **EAGER)
    before = drafter.error(calibration.temperatures)
    observe(calibration, drafter, 4 * 2048)
    assert drafter.error(calibration.temperatures) <= before + 0.003


def test_without_refits_the_temperatures_stay_and_the_error_is_still_measured():
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, refit=False)
    observe(calibration, SyntheticDrafter(3, 3, 3), 5000)
    assert calibration.num_refits == calibration.num_refused == 0
    assert calibration.temperatures.tolist() == [1] * GAMMA
    assert min(calibration.ece()) > 0.05


def test_the_running_error_is_that_of_the_remembered_rounds():
    calibration = OnlineCalibration(Temperatures((1.5,) * GAMMA), GAMMA, capacity=128, refit=False)
    drafter = SyntheticDrafter(1, 1, 1)
    observe(calibration, drafter, 100)
    rounds = drafter.rounds(128)
    calibration.observe(*rounds)
    assert calibration.ece() == pytest.approx(survival_errors(*rounds, np.full(GAMMA, 1.5)))


def test_the_running_error_is_unknown_at_first_and_measured_now_and_then():
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, **EAGER)
    drafter = SyntheticDrafter(2, 2, 2)
    observe(calibration, drafter, 63)
    assert all(math.isnan(error) for error in calibration.ece())
    observe(calibration, drafter, 256)
    first = calibration.ece()
    assert not any(math.isnan(error) for error in first)
    observe(calibration, drafter, 15 * 16)
    assert calibration.ece() is first
    observe(calibration, drafter, 16)
    assert calibration.ece() is not first


def test_the_running_error_falls_with_a_refit():
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, **EAGER)
    drafter = SyntheticDrafter(3, 3, 3)
    observe(calibration, drafter, 2047)
    before = calibration.ece()
    observe(calibration, drafter, 1)
    assert max(calibration.ece()) < min(before)


def test_rounds_of_which_nothing_was_verified_are_not_remembered():
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, **EAGER)
    confidences, _, accepted = SyntheticDrafter(1, 1, 1).rounds(3000)
    calibration.observe(confidences, np.zeros(3000, dtype=int), np.zeros_like(accepted))
    calibration.observe(confidences[:0], accepted[:0], accepted[:0])
    assert calibration.num_refused == 0
    assert all(math.isnan(error) for error in calibration.ece())


def test_a_step_larger_than_the_memory_leaves_its_end():
    calibration = OnlineCalibration(Temperatures.identity(GAMMA), GAMMA, capacity=100, refit=False)
    confidences, admitted, accepted = SyntheticDrafter(1, 1, 1).rounds(250)
    calibration.observe(confidences, admitted, accepted)
    last = (confidences[150:], admitted[150:], accepted[150:])
    assert calibration.ece() == pytest.approx(survival_errors(*last, np.ones(GAMMA)))


def test_without_drafts_there_is_nothing_to_calibrate():
    calibration = OnlineCalibration(Temperatures.identity(0), 0)
    assert calibration.ece() == ()
    assert calibration.calibrate(np.empty((2, 0))).shape == (2, 0)


# The file.


def test_a_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "sts.json"
    saved = Temperatures((1.5, 0.7), "traffic", 400, (0.1, 0.2), (0.01, 0.02))
    saved.save(path)
    assert Temperatures.load(path) == saved
    assert set(json.loads(path.read_text())) == {"temperatures", "dataset", "num_samples", "ece_before", "ece_after"}


def test_an_unknown_error_is_null_in_the_file(tmp_path):
    path = tmp_path / "sts.json"
    Temperatures((1.5,), ece_before=(math.nan,)).save(path)
    assert json.loads(path.read_text())["ece_before"] == [None]
    assert math.isnan(Temperatures.load(path).ece_before[0])


def test_temperatures_alone_make_a_file(tmp_path):
    path = tmp_path / "sts.json"
    path.write_text('{"temperatures": [2, 1.25], "more": true}')
    assert Temperatures.load(path) == Temperatures((2.0, 1.25))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1.0]", "a list: expected an object with the key temperatures"),
        ("{}", "key temperatures is missing"),
        ('{"temperatures": []}', "temperatures=[]: expected a list of positive numbers"),
        ('{"temperatures": 1.5}', "temperatures=1.5: expected a list of numbers"),
        ('{"temperatures": ["1"]}', "temperatures has '1': expected numbers"),
        ('{"temperatures": [true]}', "temperatures has True: expected numbers"),
        ('{"temperatures": [1, 0]}', "temperatures has 0.0: expected positive finite numbers"),
        ('{"temperatures": [-2]}', "temperatures has -2.0: expected positive finite numbers"),
        ('{"temperatures": [NaN]}', "temperatures has nan: expected positive finite numbers"),
        ('{"temperatures": [Infinity]}', "temperatures has inf: expected positive finite numbers"),
        ('{"temperatures": [1], "dataset": 3}', "dataset=3: expected a string"),
        ('{"temperatures": [1], "num_samples": -1}', "num_samples=-1: expected a whole number"),
        ('{"temperatures": [1], "num_samples": "many"}', "num_samples='many': expected a whole number"),
        ('{"temperatures": [1], "ece_before": 0.1}', "ece_before=0.1: expected a list of numbers"),
        ('{"temperatures": [1], "ece_after": [{}]}', "ece_after has {}: expected numbers"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "sts.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Temperatures.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.json: No such file"):
        Temperatures.load(tmp_path / "missing.json")


def test_the_first_positions_serve_a_smaller_gamma_and_too_few_are_refused():
    temperatures = Temperatures((1.5, 2.0, 2.5), ece_before=(0.1, 0.2, 0.3))
    assert temperatures.for_gamma(2) == Temperatures((1.5, 2.0), ece_before=(0.1, 0.2))
    with pytest.raises(ConfigError, match="3 temperatures: expected at least gamma=4"):
        temperatures.for_gamma(4)
