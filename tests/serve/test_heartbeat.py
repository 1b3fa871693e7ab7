"""A replica's heartbeats to the load controller, with and without answers."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from autoscale.controller import Bounds, ControllerConfig, Decision, LoadController
from autoscale.policies import number_of
from autoscale.saturation import Saturation
from autoscale.signals import LoadSample, Place
from autoscale.thresholds import FixedThreshold
from deployments.replica.heartbeat import HeartbeatLoop, LoadWindow
from dspark_ray.types import SequenceOutput, StepOutput, StepRecord, VerificationPolicy

RECORD = StepRecord(
    step=0,
    ended_at=0.0,
    num_decoding=4,
    num_prefill_rows=10,
    bypass=None,
    lengths=(3, 3, 2, 0),
    accepted=(2, 1, 0, 0),
    gamma=5,
    measured_draft_seconds=0.1,
    measured_target_seconds=0.3,
    confidence_threshold=0.2,
    policy_version=9,
    cost_drift=1.25,
)
STEP = StepOutput(
    sequences=(SequenceOutput(request_id="a", token_ids=(1, 2, 3)), SequenceOutput(request_id="b", token_ids=(4,))),
    record=RECORD,
    num_running=4,
    num_waiting=1,
    cache_usage=0.5,
)
DECISION = Decision(Bounds(0.3, 2, False), 10, 5.0, 1.0, 0.75, Saturation(0.8, "cpu", {"cpu": 0.8}))


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def window(clock: Clock) -> LoadWindow:
    window = LoadWindow("r", 8)
    window.places = (Place(node_id="n", accelerators=("0",)),)
    window.start(clock.now)
    return window


def test_a_window_adds_up_its_steps(window):
    window.on_step(STEP)
    window.on_step(replace(STEP, num_running=2, num_waiting=0, cache_usage=0.25))
    sample = window.take(102.0)
    assert sample == LoadSample(
        replica="r",
        places=(Place(node_id="n", accelerators=("0",)),),
        seconds=2.0,
        num_steps=2,
        num_running=3.0,
        num_waiting=0.5,
        max_running=8,
        cache_usage=0.25,
        rows_per_step=4 + 8 + 10,
        budget_per_request=2.0,
        accepted_length=1.75,
        tokens_per_second=4.0,
        busy_share=pytest.approx(0.4),
        slowness=1.25,
        threshold=0.2,
        policy_version=9,
    )


def test_an_idle_window_is_idle_and_remembers_what_is_in_force(window):
    window.on_step(STEP)
    window.take(101.0)
    sample = window.take(103.0)
    assert (sample.num_steps, sample.num_running, sample.tokens_per_second, sample.busy_share) == (0, 0.0, 0.0, 0.0)
    assert (sample.accepted_length, sample.slowness) == (0.0, 1.0)
    assert (sample.threshold, sample.policy_version) == (0.2, 9)


def test_a_window_without_time_divides_by_nothing(window):
    assert window.take(100.0).tokens_per_second == 0.0


def loop_of(window, clock, ask, period=0.02) -> tuple[HeartbeatLoop, list[VerificationPolicy]]:
    applied: list[VerificationPolicy] = []
    return HeartbeatLoop(window, ask, applied.append, period, clock), applied


async def test_an_answer_reaches_the_engine(window, clock):
    async def ask(sample: LoadSample) -> Decision:
        return DECISION

    loop, applied = loop_of(window, clock, ask)
    await loop.beat()
    assert applied == [
        VerificationPolicy(confidence_threshold=0.3, max_draft_tokens=2, bypass=False, version=10, valid_seconds=5.0)
    ]
    assert loop.stats() == {"range_used": 0.75, "threshold": 0.3, "saturation": 0.8}


async def test_what_a_policy_takes_is_not_reported_beyond_its_time(window, clock):
    async def ask(sample: LoadSample) -> Decision:
        return DECISION

    loop, _ = loop_of(window, clock, ask)
    assert loop.stats() == {}
    await loop.beat()
    clock.now += 5.0
    assert loop.stats() == {}


async def test_the_engine_says_its_load_without_a_controller(window):
    window.on_step(STEP)
    assert window.stats() == {"running": 4.0, "waiting": 1.0, "max_running": 8.0, "cache_usage": 0.5}


@pytest.mark.parametrize("fault", ["raises", "hangs"])
async def test_a_controller_in_trouble_costs_one_line_and_nothing_else(window, clock, fault, caplog):
    async def ask(sample: LoadSample) -> Decision:
        if fault == "raises":
            raise RuntimeError("no controller\nwith a long story")
        await asyncio.sleep(60)
        raise AssertionError

    loop, applied = loop_of(window, clock, ask)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        await loop.beat()
        await loop.beat()
    assert applied == []
    assert len(caplog.records) == 1
    assert "no usable answer" in caplog.text
    assert "story" not in caplog.text


async def test_a_controller_that_is_back_is_followed_again(window, clock, caplog):
    answers = iter([RuntimeError("gone"), DECISION])

    async def ask(sample: LoadSample) -> Decision:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    loop, applied = loop_of(window, clock, ask)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        await loop.beat()
        await loop.beat()
    assert [policy.version for policy in applied] == [10]
    assert "answers again" in caplog.text


async def test_the_controller_says_when_the_next_heartbeat_is_due(window, clock):
    asked = asyncio.Event()
    boss = LoadController(ControllerConfig(policy=FixedThreshold(threshold=0.1), heartbeat_seconds=30.0))

    async def ask(sample: LoadSample) -> Decision:
        asked.set()
        return boss.on_sample(sample, clock.now)

    loop, applied = loop_of(window, clock, ask)
    task = asyncio.create_task(loop.run())
    try:
        await asyncio.wait_for(asked.wait(), 10)
        asked.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked.wait(), 0.3)  # fifteen of the old periods
    finally:
        task.cancel()
    assert [policy.confidence_threshold for policy in applied] == [0.1]


async def test_a_policy_that_never_moves_says_nothing_about_replicas(window, clock):
    async def ask(sample: LoadSample) -> Decision:
        return replace(DECISION, range_used=None)

    loop, _ = loop_of(window, clock, ask)
    await loop.beat()
    assert loop.stats() == {"threshold": 0.3, "saturation": 0.8}


async def test_a_preset_other_than_that_of_the_autoscaling_policy_is_warned_of_once(caplog):
    async def ask(sample: LoadSample) -> Decision:
        return replace(DECISION, preset=presets.pop(0))

    presets = ["cost", "cost", "latency", "cost"]
    loop = HeartbeatLoop(LoadWindow("r", 8), ask, lambda policy: None, 1.0, rule_preset="latency")
    with caplog.at_level("WARNING", logger="ray.serve"):
        for _ in range(4):
            await loop.beat()
    assert caplog.text.count("by preset 'latency' and the load controller decides by 'cost'") == 1
    assert loop.stats()["preset"] == number_of("cost")
