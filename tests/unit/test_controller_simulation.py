"""The simulation of benchmarks/controller on worlds that are small enough to check by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoscale.replicas import ReplicaLoad, ReplicaRule
from autoscale.thresholds import FixedThreshold, LoadCurve
from benchmarks.controller import __main__ as controller_main
from benchmarks.controller import replicas as controller_replicas
from benchmarks.controller import steady as controller_steady
from benchmarks.controller.figures import FleetFigures
from benchmarks.controller.replicas import Delay, ServeDefault, SpeculationAware
from benchmarks.controller.signals import Controlled, Reporter
from benchmarks.controller.traffic import (
    MEAN_TOKENS,
    NO_FAULTS,
    FaultConfig,
    Traffic,
    TrafficConfig,
    shares_at,
)
from benchmarks.controller.world import Costs, Fleet, Observed, World, _share

BUSY = TrafficConfig(low=0.8, high=0.8, burst=(1.0, 1.0), nominal_replicas=8.0)
EVERYTHING = FaultConfig(deaths_per_day=200.0, death_seconds=60.0)
BOTH = (Fleet("fixed", "fixed"), Fleet("full", "full"))


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs.load()


def world(
    costs: Costs,
    traffic: TrafficConfig = BUSY,
    faults: FaultConfig = NO_FAULTS,
    fleets: tuple[Fleet, ...] = BOTH,
    seed: int = 1,
) -> World:
    return World(costs, fleets, Traffic(traffic, faults, 8, 4, seed), seed)


def run(world: World, seconds: int) -> list[Observed]:
    return [world.step()[1] for _ in range(seconds)]


def tokens(seen: list[Observed]) -> np.ndarray:
    """Of every fleet."""
    return np.sum([each.tokens.sum(1) for each in seen], axis=0)


# Costs


def test_a_higher_threshold_leaves_fewer_rows_and_fewer_tokens(costs: Costs) -> None:
    assert (np.diff(costs.rows, axis=0) <= 1e-12).all()
    assert (np.diff(costs.tokens, axis=0) <= 1e-12).all()
    assert (costs.tokens <= costs.rows + 1e-12).all()
    assert costs.rows[0] == pytest.approx([5.0, 5.0, 5.0])
    assert costs.rows[-1] == pytest.approx([0.0, 0.0, 0.0])


def test_all_drafts_stand_as_often_as_the_papers_figure_2_says(costs: Costs) -> None:
    math_tokens = np.cumprod([0.905, 0.890, 0.888, 0.885, 0.887]).sum()
    assert costs.tokens[0][0] == pytest.approx(math_tokens, rel=0.01)


# Books


@pytest.mark.parametrize("kind", ["open", "closed"])
@pytest.mark.parametrize("load", [0.2, 0.8, 1.5])
def test_every_request_is_somewhere(costs: Costs, kind: str, load: float) -> None:
    small = world(costs, replace(BUSY, low=load, high=load, kind=kind), EVERYTHING)
    run(small, 150)
    inside = small.running.sum(1) + small.waiting.sum(1)
    assert (small.arrived == small.finished + small.refused + inside).all()


def test_tokens_are_those_of_the_answers(costs: Costs) -> None:
    small = world(costs)
    run(small, 100)
    before = small.finished.copy()
    committed = tokens(run(small, 600))
    assert committed == pytest.approx((small.finished - before) @ MEAN_TOKENS, rel=0.03)


def test_a_load_that_fits_is_answered_whole(costs: Costs) -> None:
    config = replace(BUSY, low=0.6, high=0.6)
    small = world(costs, config)
    run(small, 100)
    offered = 0.6 * config.nominal_replicas * config.nominal_tokens_per_second
    assert tokens(run(small, 600)) / 600 == pytest.approx(offered, rel=0.03)
    assert small.refused.sum() == 0


def test_nothing_is_negative_and_no_bound_is_broken(costs: Costs) -> None:
    small = world(costs, replace(BUSY, low=1.6, high=1.6), EVERYTHING)
    for seen in run(small, 200):
        for name in vars(seen):
            assert (getattr(seen, name) >= 0).all(), name
        assert (seen.running <= small.max_running).all()
        assert (seen.waiting <= small.max_running).all()
        assert (seen.clock <= 1.0).all()
        assert (seen.power <= 1.0 + 1e-9).all()
        assert (seen.tensor <= 1.0).all()
    assert small.refused.sum() > 0


def test_shares_of_traffic_are_shares() -> None:
    for day in np.linspace(0.0, 1.0, 50):
        shares = shares_at(float(day))
        assert shares.sum() == pytest.approx(1.0)
        assert (shares >= 0).all()


def test_whole_requests_are_shared_and_no_more_than_there_is_room() -> None:
    requests = np.array([[[3, 5, 9], [1, 0, 0], [0, 0, 0], [7, 7, 7]]])
    places = np.array([[10, 10, 10, 0]])
    taken = _share(requests, places)
    assert taken.sum(2).tolist() == [[10, 1, 0, 0]]
    assert (taken <= requests).all()
    assert (taken >= 0).all()


# Chance


def test_the_same_seed_gives_the_same_world(costs: Costs) -> None:
    first, again = (run(world(costs, faults=EVERYTHING, seed=5), 60) for _ in range(2))
    other = run(world(costs, faults=EVERYTHING, seed=6), 60)
    assert np.array_equal(first[-1].tokens, again[-1].tokens)
    assert not np.array_equal(first[-1].tokens, other[-1].tokens)


def test_all_fleets_meet_the_same_requests(costs: Costs) -> None:
    small = world(costs)
    run(small, 50)
    assert np.array_equal(small.arrived[0], small.arrived[1])


# Speed


def test_a_slow_gpu_commits_less(costs: Costs) -> None:
    small = world(costs, replace(BUSY, low=1.5, high=1.5), replace(NO_FAULTS, slow_share=0.5))
    committed = np.sum([seen.tokens for seen in run(small, 200)], axis=0)
    slow = small.traffic.device_factor > 1
    assert slow.sum() == 4
    assert (committed[:, slow].max(1) < committed[:, ~slow].min(1)).all()


def test_a_neighbour_slows_the_steps_and_the_replica_says_so(costs: Costs) -> None:
    faults = replace(NO_FAULTS, neighbour_share=1.0, neighbour_seconds=(1e9, 1.0), neighbour_factor=1.4)
    seen = run(world(costs, faults=faults), 60)[-1]
    assert np.median(seen.slowness) == pytest.approx(1.4, rel=0.1)


def test_replicas_on_one_power_budget_slow_each_other_down(costs: Costs) -> None:
    crowd = replace(BUSY, low=1.5, high=1.5)
    free, capped = (run(world(costs, crowd, replace(NO_FAULTS, capped_share=share)), 100)[-1] for share in (0.0, 1.0))
    assert (free.clock == 1.0).all()
    assert (capped.clock < 0.95).all()
    assert (capped.slowness > free.slowness).all()


def test_a_threshold_leaves_more_power_for_the_neighbours(costs: Costs) -> None:
    small = world(costs, replace(BUSY, low=1.5, high=1.5), replace(NO_FAULTS, capped_share=1.0))
    small.thresholds[:] = 0.0
    before = run(small, 100)[-1].clock[0, 0]
    small.thresholds[0, 1:4] = 0.8
    assert run(small, 5)[-1].clock[0, 0] > before


def test_a_dead_node_serves_no_request_and_its_requests_continue_elsewhere(costs: Costs) -> None:
    faults = replace(NO_FAULTS, deaths_per_day=1e9, death_seconds=1e9)
    small = world(costs, faults=faults)
    seen = run(small, 60)[-1]
    dead = small.traffic.node_of == small.traffic._dead_node
    assert (seen.tokens[:, dead] == 0).all()
    assert (seen.tokens[:, ~dead] > 0).all()
    assert np.array_equal(
        small.arrived.sum(1), (small.finished + small.refused).sum(1) + (small.running + small.waiting).sum((1, 2))
    )


def test_an_engine_that_schedules_is_no_slower_than_any_threshold(costs: Costs) -> None:
    fleets = (Fleet("full", "full"), *(Fleet(str(number), "fixed") for number in range(9)))
    small = world(costs, replace(BUSY, low=1.5, high=1.5), fleets=fleets)
    small.thresholds[1:] = np.arange(9)[:, None] / 10
    run(small, 50)
    rates = tokens(run(small, 200))
    assert rates[0] >= 0.995 * rates[1:].max()


def test_the_controllers_threshold_cuts_after_an_engines_own_choice(costs: Costs) -> None:
    small = world(costs)
    small.thresholds[:] = 1.0
    seen = run(small, 50)[-1]
    assert seen.rows == pytest.approx(seen.running)


# Reports to the controller


def test_replicas_and_probes_say_what_the_world_saw(costs: Costs) -> None:
    small = world(costs, faults=replace(NO_FAULTS, capped_share=1.0))
    seen = run(small, 60)[-1]
    reporter = Reporter.of(small)
    everyone = np.ones(8, dtype=bool)
    samples = reporter.samples(small, seen, 0, [0] * 8, everyone)
    assert [sample.replica for sample in samples] == list(reporter.names)
    for place, sample in enumerate(samples):
        assert sample.tokens_per_second == pytest.approx(seen.tokens[0, place])
        assert sample.rows_per_step == pytest.approx(sample.num_running * (1 + sample.budget_per_request))
        assert sample.busy_share == 1.0
        assert 1.0 < sample.accepted_length < 6.0
    nodes = reporter.node_loads(seen, 0, np.repeat([False, True], 4), np.random.default_rng(1))
    assert [node.node_id for node in nodes] == ["node-0"]
    assert [device.index for device in nodes[0].devices] == [0, 1, 2, 3]
    assert all(device.power_watts <= device.power_limit_watts for device in nodes[0].devices)


def test_memory_bound_load_is_busy_memory_and_idle_tensor_cores(costs: Costs) -> None:
    small = world(costs, replace(BUSY, low=0.05, high=0.05))
    seen = run(small, 60)[-1]
    node = Reporter.of(small).node_loads(seen, 0, np.zeros(8, dtype=bool), np.random.default_rng(1))[0]
    device = node.devices[int(seen.running[0, :4].argmax())]
    assert device.tensor_activity < 0.15
    assert device.dram_activity > 0.7


def test_answers_of_the_controller_come_into_force(costs: Costs) -> None:
    small = world(costs)
    controlled = Controlled(small, 1, FixedThreshold(threshold=0.3), seed=1)
    second, seen = small.step()
    controlled.second(seen, second.dead)
    assert (small.thresholds[1] == 0.3).all()
    assert (small.thresholds[0] == 0.0).all()
    assert controlled.seconds > 0.0


def test_thresholds_of_the_load_curve_stand_still_at_constant_load(costs: Costs) -> None:
    small = world(costs)
    controlled = Controlled(small, 0, LoadCurve(), seed=1)
    controlled_thresholds = []
    for _ in range(400):
        second, seen = small.step()
        controlled.second(seen, second.dead)
        controlled_thresholds.append(small.thresholds[0].copy())
    settled = np.array(controlled_thresholds[200:])
    assert np.ptp(settled, axis=0).max() <= LoadCurve().dead_band


# Figures


def test_figures_count_tokens_and_users(costs: Costs) -> None:
    small = world(costs)
    fleet_figures, seen = FleetFigures(small), []
    for _ in range(120):
        second, observed = small.step()
        fleet_figures.add(second, observed)
        seen.append(observed)
    figures = fleet_figures.figures()
    assert [each["tokens_per_second"] for each in figures] == pytest.approx(tokens(seen) / 120)
    assert all(0 < each["slowest_percent"] < each["median_user"] for each in figures)
    assert len(fleet_figures.trace) == 2


def test_movement_and_settling_are_measured_against_the_band() -> None:
    still, waving = np.full(100, 0.3), np.where(np.arange(100) % 10 < 5, 0.3, 0.37)
    movement = controller_steady._movement(np.stack([still, waving], axis=1), band=0.05)
    assert movement["oscillation"] == pytest.approx(0.02)
    assert movement["reversals_per_replica_hour"] == pytest.approx((0 + 18) / 2 * 36)
    stepped = np.concatenate([np.zeros(40), np.full(160, 0.4)])[:, None]
    assert controller_steady._settling(stepped, band=0.05)["longest_seconds"] == 40


# Numbers of replicas


def test_serves_default_asks_for_ongoing_requests_over_the_target() -> None:
    loads = [ReplicaLoad(running=30.0, waiting=10.0, max_running=40.0, range_used=None)] * 3
    assert ServeDefault(20.0)(loads, 3) == 6.0
    assert SpeculationAware(ReplicaRule())(loads, 3) > 3


def test_a_change_takes_effect_after_its_delay() -> None:
    delay = Delay()
    up = [delay.target(6, 4, now) for now in range(controller_replicas.UPSCALE_DELAY + 1)]
    assert up == [4] * controller_replicas.UPSCALE_DELAY + [6]
    down = [delay.target(4, 6, now) for now in range(1000, 1000 + controller_replicas.DOWNSCALE_DELAY + 1)]
    assert down[:-1] == [6] * controller_replicas.DOWNSCALE_DELAY
    assert down[-1] == 4


def test_a_change_of_direction_starts_the_delay_again() -> None:
    delay = Delay()
    for now in range(20):
        delay.target(6, 4, now)
    delay.target(4, 4, 20)
    assert [delay.target(6, 4, now) for now in range(21, 45)] == [4] * 24


def test_equal_hardware_is_never_less_and_takes_the_better_of_smaller_fleets() -> None:
    def arm(size: float, rate: float) -> dict[str, float]:
        return dict.fromkeys(controller_replicas._KEYS, rate) | {"mean_replicas": size}

    sizes = range(10, 10 + len(controller_replicas.TARGETS))
    rates = [100.0, 130.0, 120.0, 140.0] + [150.0] * (len(sizes) - 4)
    arms = {f"serve_{target}": arm(size, rate) for target, size, rate in zip(controller_replicas.TARGETS, sizes, rates)}

    def default_at(size: float) -> float:
        return controller_replicas._equal_hardware(arms | {"ours": arm(size, 0.0)}, "ours")["tokens_per_second"]

    assert default_at(10.5) == 115.0
    assert default_at(12.0) == 130.0
    assert default_at(5.0) == 100.0


# Finished parts of the benchmark


def test_a_finished_part_is_kept_for_the_files_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest reads every file, so a file that was moved is noticed here and not at the next measurement."""
    monkeypatch.setattr(controller_main, "SCRATCH", tmp_path)
    notebook = controller_main._notebook(controller_main._REPLICAS)
    calls = []

    def run(progress: object) -> dict[str, float]:
        calls.append(progress)
        return {"tokens": 1.0}

    for _ in range(2):
        assert controller_main._kept(notebook, "a part", run) == {"tokens": 1.0}
    assert len(calls) == 1
    assert controller_main._notebook(controller_main._STEADY).entries("a part") == []
