"""From saturation to a threshold: how curves are followed, and how goodput is searched."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import pytest
from pydantic import ValidationError

from autoscale.goodput import GoodputSearch
from autoscale.signals import LoadSample
from autoscale.thresholds import FixedThreshold, LoadCurve, Regulator

CURVE = LoadCurve(curve=((0.2, 0.1), (0.6, 0.5)), dead_band=0.05, slew_per_second=0.02, smoothing_seconds=5.0)
"""The threshold is the saturation less 0.1 in between."""
FREE = LoadCurve(curve=((0.0, 0.8),))
"""A bound that is always the same."""


def sample(
    threshold: float = 0.0, tokens_per_second: float = 1000.0, running: float = 50.0, busy: float = 1.0
) -> LoadSample:
    return LoadSample(
        replica="one",
        places=(),
        seconds=1.0,
        num_steps=50,
        num_running=running,
        num_waiting=0.0,
        max_running=100,
        cache_usage=0.0,
        rows_per_step=200.0,
        budget_per_request=3.0,
        accepted_length=3.0,
        tokens_per_second=tokens_per_second,
        busy_share=busy,
        slowness=1.0,
        threshold=threshold,
        policy_version=0,
    )


def follow(regulator: Regulator, saturations: Iterator[float] | list[float], start: float = 0.0) -> list[float]:
    """Thresholds, a second apart."""
    return [regulator.update(sample(), saturation, start + second) for second, saturation in enumerate(saturations)]


class Replica:
    """One whose goodput has its top at a threshold, and falls by `loss` at a distance of 0.1 from it."""

    def __init__(self, best: float, loss: float = 0.02, noise: float = 0.005, seed: int = 1) -> None:
        self.best, self._loss, self._noise = best, loss, noise
        self._rng = random.Random(seed)
        self.running, self.growth = 50.0, 0.0
        self.now = 0.0

    def run(
        self, regulator: Regulator, seconds: int, threshold: float, saturation: Callable[[float], float] = lambda _: 0.5
    ) -> list[float]:
        """Thresholds in force, a second each."""
        thresholds = []
        for _ in range(seconds):
            lost = self._loss * ((threshold - self.best) / 0.1) ** 2
            goodput = 1000.0 * math.exp(self._rng.gauss(self.growth * self.now, self._noise) - lost)
            seen = sample(threshold, goodput * self.running / 50.0, self.running)
            threshold = regulator.update(seen, saturation(self.now), self.now)
            self.now += 1.0
            thresholds.append(threshold)
        return thresholds


# Fixed


def test_a_fixed_threshold_is_the_same_at_any_load_and_has_no_range() -> None:
    regulator = FixedThreshold(threshold=0.3).regulator(0.0)
    assert follow(regulator, [0.0, 1.0, 0.5]) == [0.3, 0.3, 0.3]
    assert regulator.range_used is None


# Curves


@pytest.mark.parametrize(("saturation", "threshold"), [(0.0, 0.1), (0.2, 0.1), (0.3, 0.2), (0.6, 0.5), (1.0, 0.5)])
def test_a_curve_is_straight_between_its_points_and_level_outside(saturation: float, threshold: float) -> None:
    assert CURVE.threshold_at(saturation) == pytest.approx(threshold)


@pytest.mark.parametrize("saturation", [0.3, 0.4, 0.5])
def test_the_threshold_comes_to_the_curve_up_to_the_dead_band(saturation: float) -> None:
    for start in (0.1, 0.5):
        last = follow(CURVE.regulator(start), [saturation] * 200)[-1]
        assert abs(last - CURVE.threshold_at(saturation)) <= CURVE.dead_band + 1e-9


@pytest.mark.parametrize(
    ("saturation", "end", "range_used"), [(0.0, 0.1, 0.0), (0.2, 0.1, 0.0), (0.6, 0.5, 1.0), (1.0, 0.5, 1.0)]
)
def test_the_ends_are_reached_exactly(saturation: float, end: float, range_used: float) -> None:
    regulator = CURVE.regulator(0.3)
    assert follow(regulator, [saturation] * 100)[-1] == end
    assert regulator.range_used == range_used


def test_an_end_that_an_average_only_approaches_is_reached_too() -> None:
    regulator = CURVE.regulator(0.1)
    follow(regulator, [0.0] * 20)
    # The smoothed saturation approaches 0.6 from below and never reaches it.
    assert follow(regulator, [0.6] * 200, start=20.0)[-1] == 0.5


def test_noise_narrower_than_twice_the_dead_band_moves_nothing() -> None:
    regulator = LoadCurve(curve=CURVE.curve, smoothing_seconds=0.0).regulator(0.3)
    follow(regulator, [0.45, 0.35] * 20)
    noisy = follow(regulator, [0.449, 0.351] * 100, start=40.0)
    assert max(noisy) == min(noisy)


def test_wider_noise_moves_the_threshold_by_what_is_beyond_the_band() -> None:
    regulator = LoadCurve(curve=CURVE.curve, smoothing_seconds=0.0, slew_per_second=1.0).regulator(0.3)
    thresholds = follow(regulator, [0.47, 0.33] * 100)[2:]
    assert max(thresholds) - min(thresholds) == pytest.approx(2 * (0.07 - 0.05))


def test_an_end_that_the_curve_only_touches_is_not_met() -> None:
    regulator = LoadCurve(curve=CURVE.curve, smoothing_seconds=0.1, slew_per_second=100.0).regulator(0.3)
    touching = [0.5, 0.5, 0.0, 0.0] * 50
    thresholds = [regulator.update(sample(), value, 0.1 * number) for number, value in enumerate(touching)]
    assert min(thresholds) == pytest.approx(0.1 + CURVE.dead_band)


def test_saturation_is_averaged_over_its_time_constant() -> None:
    regulator = CURVE.regulator(0.1)
    regulator.update(sample(), 0.0, 0.0)
    regulator.update(sample(), 1.0, CURVE.smoothing_seconds)
    assert regulator.saturation == pytest.approx(1 - math.exp(-1))


def test_a_threshold_moves_no_faster_than_the_slew() -> None:
    thresholds = follow(CURVE.regulator(0.1), [0.0] * 5 + [1.0] * 50 + [0.0] * 50)
    moves = [abs(after - before) for before, after in itertools.pairwise(thresholds)]
    assert max(moves) == pytest.approx(CURVE.slew_per_second)


def test_the_slew_counts_seconds_not_samples() -> None:
    regulator = CURVE.regulator(0.1)
    regulator.update(sample(), 1.0, 0.0)
    assert regulator.update(sample(), 1.0, 10.0) == pytest.approx(0.1 + 10 * CURVE.slew_per_second)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.33, 0.5, 0.8])
@pytest.mark.parametrize("policy", [CURVE, GoodputSearch(bound=FREE)])
def test_a_restarted_controller_goes_on_from_the_threshold_in_force(
    policy: LoadCurve | GoodputSearch, threshold: float
) -> None:
    assert policy.regulator(threshold).update(sample(threshold), 0.4, 1000.0) == threshold


def test_range_used_stays_between_0_and_1_for_thresholds_outside_of_the_curve() -> None:
    assert CURVE.regulator(0.0).range_used == 0.0
    assert CURVE.regulator(0.9).range_used == 1.0


def test_range_used_is_what_the_curve_asks_for_as_far_as_the_threshold_is_there() -> None:
    regulator = LoadCurve(curve=CURVE.curve, smoothing_seconds=0.0).regulator(0.1)
    follow(regulator, [0.0] * 20)
    follow(regulator, [0.4] * 5, start=20.0)
    assert regulator.range_used == pytest.approx((5 * 0.02 + 0.05) / 0.4), "the threshold is still on its way"
    follow(regulator, [0.4] * 100, start=25.0)
    assert regulator.range_used == pytest.approx(0.5)


# The search


@pytest.mark.parametrize("best", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("start", [0.0, 0.4, 0.8])
def test_the_search_climbs_to_the_best_threshold_and_stays_within_a_step(best: float, start: float) -> None:
    search = GoodputSearch(bound=FREE)
    regulator = search.regulator(start)
    replica = Replica(best)
    replica.run(regulator, 2000, start)
    found = replica.run(regulator, 3000, start)
    away = sum(abs(threshold - best) > search.step + 1e-6 for threshold in found) / len(found)
    assert abs(sum(found) / len(found) - best) <= search.step
    assert away < 0.25, "only its trials go further than its base, and most of the time it rests"


def test_the_search_is_not_led_astray_by_a_load_that_drifts() -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.0)
    replica = Replica(0.3)
    threshold = 0.0
    for second in range(4000):
        replica.running = 60.0 + 30.0 * math.sin(second / 300.0)
        threshold = replica.run(regulator, 1, threshold)[0]
    tail = replica.run(regulator, 500, threshold)
    assert abs(sum(tail) / len(tail) - 0.3) <= 0.1


@pytest.mark.parametrize("growth", [-0.01, 0.01])
def test_goodput_that_grows_by_itself_is_no_gain_of_the_threshold(growth: float) -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.3)
    replica = Replica(0.3, noise=0.001)
    replica.growth = growth
    found = {round(threshold, 6) for threshold in replica.run(regulator, 400, 0.3)}
    assert found <= {0.2, 0.3, 0.4}, "the base and its neighbours"


@pytest.mark.parametrize("best", [0.1, 0.6])
def test_the_search_goes_on_above_a_floor(best: float) -> None:
    regulator = GoodputSearch(bound=LoadCurve(curve=((0.0, 0.1), (1.0, 0.8)))).regulator(0.0, 0.3)
    replica = Replica(best, noise=0.001)
    found = replica.run(regulator, 600, 0.3, lambda now: 0.0 if now < 60 else 1.0)
    assert min(found) >= 0.3
    assert abs(sum(found[-200:]) / 200 - max(best, 0.3)) <= 0.1


def test_turns_at_different_loads_are_not_compared() -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.3)
    replica = Replica(0.3, loss=0.0)
    threshold, thresholds = 0.3, []
    for second in range(1000):
        replica.running = 60.0 if second // 5 % 2 else 40.0
        threshold = replica.run(regulator, 1, threshold)[0]
        thresholds.append(threshold)
    assert max(thresholds) - min(thresholds) <= 0.1 + 1e-9


def test_a_new_base_has_not_rested_before() -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.4)
    replica = Replica(0.4, noise=0.001)
    threshold = replica.run(regulator, 4000, 0.4)[-1]
    replica.best = 0.6
    rests = [length for value, length in runs_of(replica.run(regulator, 2000, threshold)) if length >= 60]
    assert rests[0] > 100, "of the old base, which ends by itself"
    assert 60 <= rests[1] <= 70


def test_where_nothing_is_to_be_won_the_search_rests_longer_and_longer() -> None:
    search = GoodputSearch(bound=FREE, rest_seconds=(60.0, 600.0))
    regulator = search.regulator(0.4)
    thresholds = Replica(0.4, noise=0.001).run(regulator, 6000, 0.4)
    *rests, _unfinished = [length for value, length in runs_of(thresholds) if value == 0.4 and length >= 60]
    assert rests == sorted(rests)
    assert 600 <= max(rests) <= 620
    assert max(thresholds) - min(thresholds) <= 2 * search.step + 1e-9


def test_another_load_ends_a_rest() -> None:
    regulator = GoodputSearch(bound=FREE, rest_seconds=(10_000.0, 10_000.0)).regulator(0.4)
    replica = Replica(0.4, noise=0.001)
    replica.run(regulator, 1000, 0.4)
    assert set(replica.run(regulator, 200, 0.4)) == {0.4}
    replica.running = 100.0
    assert set(replica.run(regulator, 100, 0.4)) != {0.4}


def test_a_bound_that_moves_ends_a_rest() -> None:
    bound = LoadCurve(curve=((0.0, 0.5), (1.0, 0.9)), slew_per_second=1.0)
    regulator = GoodputSearch(bound=bound, rest_seconds=(10_000.0, 10_000.0)).regulator(0.4)
    replica = Replica(0.4, noise=0.001)
    replica.run(regulator, 1000, 0.4, lambda _: 0.0)
    assert set(replica.run(regulator, 200, 0.4, lambda _: 0.0)) == {0.4}
    assert set(replica.run(regulator, 100, 0.4, lambda _: 1.0)) != {0.4}


def test_the_search_never_goes_above_its_bound() -> None:
    bound = LoadCurve(curve=((0.0, 0.0), (1.0, 0.6)))
    regulator, limit = GoodputSearch(bound=bound).regulator(0.0), bound.regulator(0.0)
    replica = Replica(best=0.8)
    threshold = highest = 0.0
    for second in range(3000):
        saturation = 0.5 + 0.5 * math.sin(second / 100.0)
        threshold = replica.run(regulator, 1, threshold, lambda _: saturation)[0]  # noqa: B023
        assert 0.0 <= threshold <= limit.update(sample(), saturation, float(second)) + 1e-12
        highest = max(highest, threshold)
    assert highest > 0.1


def test_samples_of_an_idle_replica_are_ignored() -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.2)
    threshold = 0.2
    bases = set()
    for second in range(2000):
        threshold = regulator.update(sample(threshold, 0.0, 0.0, busy=0.0), 0.0, float(second))
        bases.add(round(threshold, 6))
    assert bases <= {0.1, 0.2, 0.3}, "the base and its neighbours"


def test_samples_at_an_operators_threshold_are_ignored() -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.4)
    thresholds = {regulator.update(sample(0.7), 0.5, float(second)) for second in range(500)}
    assert thresholds == {0.4}


def test_answers_that_take_effect_a_heartbeat_late_do_not_stop_the_search() -> None:
    regulator = GoodputSearch(bound=FREE).regulator(0.0)
    replica = Replica(0.4)
    sent, in_force = 0.0, 0.0
    for _ in range(4000):
        sent, in_force = replica.run(regulator, 1, in_force)[0], sent
    assert abs(sent - 0.4) <= 0.1 + 1e-9


# Settings


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [
        (lambda: FixedThreshold(threshold=1.5), "threshold", "1.5"),
        (lambda: LoadCurve(curve=()), "curve", "()"),
        (lambda: LoadCurve(curve=((0.5, 0.0), (0.5, 0.4))), "curve", "(0.5, 0.4)"),
        (lambda: LoadCurve(curve=((0.5, 0.4), (0.9, 0.3))), "curve", "(0.9, 0.3)"),
        (lambda: LoadCurve(curve=((1.5, 0.0),)), "curve", "1.5"),
        (lambda: LoadCurve(curve=((0.5, 2.0),)), "curve", "2.0"),
        (lambda: LoadCurve(dead_band=-0.1), "dead_band", "-0.1"),
        (lambda: LoadCurve(slew_per_second=0.0), "slew_per_second", "0.0"),
        (lambda: LoadCurve(smoothing_seconds=-1.0), "smoothing_seconds", "-1.0"),
        (lambda: GoodputSearch(step=0.0), "step", "0.0"),
        (lambda: GoodputSearch(bound=FREE, step=0.9), "step", "0.9"),
        (lambda: GoodputSearch(epoch_seconds=0.0), "epoch_seconds", "0.0"),
        (lambda: GoodputSearch(least_gain=-0.1), "least_gain", "-0.1"),
        (lambda: GoodputSearch(num_pairs=2), "num_pairs", "2"),
        (lambda: GoodputSearch(rest_seconds=(60.0, 30.0)), "rest_seconds", "30.0"),
    ],
)
def test_an_invalid_setting_is_refused_by_key_and_value(build: Callable[[], object], key: str, value: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build()
    (error,) = caught.value.errors()
    assert error["loc"][0] == key
    assert value in repr(error["input"])


def runs_of(values: list[float]) -> list[tuple[float, int]]:
    """(value, how often in a row)."""
    runs: list[tuple[float, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs
