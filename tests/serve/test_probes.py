"""Probes with fake nodes and a fake clock; the load controller's deployment; and names of devices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.serve._private.config import DeploymentConfig

from autoscale.controller import Bounds, Decision
from autoscale.errors import PolicyError
from autoscale.signals import LoadSample, NodeLoad, Place
from deployments.args import LoadControllerArgs
from deployments.load_controller import LoadControllerReplica, check_alone
from deployments.probes import Probes
from deployments.replica.heartbeat import LoadWindow
from deployments.replica.workers import named_by_driver

HOSTS = {"a": "host-a", "b": "host-b", "c": "host-c"}


class FakeProbe:
    """Answers at once, unless it hangs or fails."""

    def __init__(self, node_id: str, host: str) -> None:
        self.node_id, self.host, self.num_calls = node_id, host, 0
        self.hangs, self.error = False, None

    def load(self) -> asyncio.Future[NodeLoad]:
        self.num_calls += 1
        call = asyncio.get_running_loop().create_future()
        if self.error is not None:
            call.set_exception(self.error)
        elif not self.hangs:
            call.set_result(NodeLoad(node_id=self.node_id, host=self.host, source="psutil", devices=()))
        return call


class Fleet:
    """Probes with fakes behind them; counts the polls that had to wait."""

    def __init__(self, answer_seconds: float = 30.0) -> None:
        self.now, self.started = 0.0, []
        self.fakes: dict[str, FakeProbe] = {}
        self.probes = Probes(self._start, lambda: self.now, answer_seconds)

    def _start(self, node_id: str, host: str) -> FakeProbe:
        self.started.append(node_id)
        self.fakes[node_id] = FakeProbe(node_id, host)
        return self.fakes[node_id]

    async def poll(self, *wanted: str, hosts: dict[str, str] = HOSTS) -> tuple[list[str], list[str]]:
        loads, ended = await self.probes.poll(hosts, wanted)
        return sorted(load.node_id for load in loads), sorted(ended)


async def test_a_probe_starts_where_one_is_wanted_and_nowhere_else():
    fleet = Fleet()
    assert await fleet.poll("a", "b") == (["a", "b"], [])
    assert await fleet.poll("b", "c") == (["b", "c"], ["a"])
    assert (fleet.started, len(fleet.probes)) == (["a", "b", "c"], 2)


async def test_a_node_that_has_left_loses_its_probe():
    fleet = Fleet()
    await fleet.poll("a", "b")
    assert await fleet.poll("a", "b", hosts={"a": "host-a"}) == (["a"], ["b"])


async def test_without_anybody_who_wants_to_know_all_probes_end():
    fleet = Fleet()
    await fleet.poll("a", "b")
    assert sorted(fleet.probes.end()) == ["a", "b"]
    assert len(fleet.probes) == 0
    await fleet.poll("a")
    assert fleet.started == ["a", "b", "a"]


async def test_a_probe_that_hangs_is_waited_for_once_and_asked_once():
    fleet = Fleet(answer_seconds=0.01)
    await fleet.poll("a", "b")
    fleet.fakes["b"].hangs = True
    assert await fleet.poll("a", "b") == (["a"], [])
    fleet.probes._answer_seconds = 3600.0  # A poll that waited for it now would not end.
    for _ in range(3):
        assert await asyncio.wait_for(fleet.poll("a", "b"), 30) == (["a"], [])
    assert (fleet.fakes["a"].num_calls, fleet.fakes["b"].num_calls) == (5, 2)
    fleet.now = 2.0
    await fleet.poll("a", "b")
    assert fleet.probes.errors == {"b": "no answer in 2 s"}


async def test_a_probe_that_answers_late_is_heard_and_asked_again():
    fleet = Fleet(answer_seconds=0.01)
    await fleet.poll("a")
    probe = fleet.fakes["a"]
    probe.hangs = True
    await fleet.poll("a")
    call = fleet.probes._nodes["a"].call
    call.set_result(NodeLoad(node_id="a", host="host-a", source="psutil", devices=()))
    probe.hangs = False
    assert await fleet.poll("a") == (["a"], [])
    assert fleet.probes.errors == {}


async def test_a_probe_that_still_starts_has_no_error():
    fleet = Fleet()
    fleet._start = None
    started = FakeProbe("a", "host-a")
    started.hangs = True
    fleet.probes._start = lambda node_id, host: started
    for second in range(29):
        fleet.now = float(second)
        assert await asyncio.wait_for(fleet.poll("a"), 30) == ([], [])
    assert (fleet.probes.errors, started.num_calls) == ({}, 1)
    fleet.now = 30.0
    await fleet.poll("a")
    assert fleet.probes.errors == {"a": "no answer in 30 s"}


async def test_a_probe_that_died_is_started_again_after_a_while():
    fleet = Fleet()
    await fleet.poll("a", "b")
    fleet.fakes["a"].error = RuntimeError("the actor died\nwith a long story")
    assert await fleet.poll("a", "b") == (["b"], [])
    assert fleet.probes.errors == {"a": "RuntimeError: the actor died"}
    fleet.now = 14.0
    assert await fleet.poll("a", "b") == (["b"], [])
    fleet.now = 16.0
    assert await fleet.poll("a", "b") == (["a", "b"], [])
    assert fleet.probes.errors == {}


class Metrics:
    """Metrics that ignore everything."""

    def __init__(self, model_name: str) -> None: ...

    def on_nodes(self, loads: list[NodeLoad]) -> None: ...

    def on_decision(self, sample: LoadSample, decision: Decision) -> None: ...


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Replacements for Ray, its nodes and its actors."""
    fleet = Fleet()
    context = SimpleNamespace(_deployment_config=DeploymentConfig(), app_name="app")

    async def living_nodes() -> dict[str, str]:
        return HOSTS

    monkeypatch.setattr("deployments.load_controller.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("deployments.load_controller.LoadMetrics", Metrics)
    monkeypatch.setattr("deployments.load_controller.failure_counter", lambda model_name: lambda task: None)
    monkeypatch.setattr("deployments.load_controller.Probes", lambda: fleet.probes)
    monkeypatch.setattr("deployments.load_controller.living_nodes", living_nodes)
    monkeypatch.setattr("deployments.load_controller.POLL_SECONDS", 0.01)
    return fleet


@asynccontextmanager
async def running_controller(own_threshold: float = 0.0, **settings: object) -> AsyncIterator[Any]:
    """The load controller's deployment after a heartbeat from a replica on node `b`."""
    cls = LoadControllerReplica.func_or_class
    controller = cls.__new__(cls)
    await cls.__init__(controller, LoadControllerArgs(**settings), own_threshold, "model")
    await controller.reconfigure(None, 0)
    controller.check_health()
    sample = LoadWindow("r", 8).take(1.0)
    await controller.heartbeat(replace(sample, places=(Place(node_id="b"),)))
    try:
        yield controller
    finally:
        controller._watching.cancel()


async def test_devices_are_read_while_somebody_looks(fleet, monkeypatch):
    async with running_controller(policy={"threshold": 0.1}) as controller:
        await asyncio.sleep(0.1)  # Several polls.
        assert fleet.started == []
        view = await controller.view()
        assert [node["node_id"] for node in view["nodes"]] == ["b"] == fleet.started
        monkeypatch.setattr("deployments.load_controller.VIEWER_SECONDS", 0.0)
        while len(fleet.probes):
            await asyncio.sleep(0.01)
        assert fleet.started == ["b"]


async def test_a_policy_that_follows_the_load_reads_the_nodes_with_a_gang(fleet):
    async with running_controller(preset="throughput"):
        while not fleet.fakes or fleet.fakes["b"].num_calls < 3:
            await asyncio.sleep(0.01)
        assert fleet.started == ["b"]


def threshold_of(controller: Any) -> Awaitable[float]:
    async def ask() -> float:
        decision = await controller.heartbeat(LoadWindow("r", 8).take(1.0))
        return decision.bounds.confidence_threshold

    return ask()


async def test_a_user_config_stands_in_for_the_args_until_it_is_gone(fleet):
    async with running_controller(0.1, policy={"threshold": 0.2}) as controller:
        assert await threshold_of(controller) == 0.2
        await controller.reconfigure({"policy": {"threshold": 0.4}}, 0)
        assert await threshold_of(controller) == 0.4
        await controller.reconfigure({"lowest_threshold": 0.3}, 0)
        assert await threshold_of(controller) == 0.3
        await controller.reconfigure({}, 0)
        assert await threshold_of(controller) == 0.1
        await controller.reconfigure({"preset": "cost"}, 0)
        assert (await controller.view())["policy"] == "load_curve"
        await controller.reconfigure(None, 0)
        assert await threshold_of(controller) == 0.2


async def test_a_bad_user_config_is_shown_and_changes_nothing(fleet, caplog):
    async with running_controller(policy={"threshold": 0.2}) as controller:
        await controller.reconfigure({"policy": {"threshold": 1.4}}, 0)
        assert await threshold_of(controller) == 0.2
        expected = "LoadController.user_config.policy.threshold=1.4: expected less than or equal to 1"
        assert (await controller.view())["problem"] == expected
        assert expected in caplog.text
        await controller.reconfigure({"policy": {"threshold": 0.4}}, 0)
        assert (await controller.view())["problem"] is None


async def test_at_the_start_a_bad_user_config_ends_the_deployment(fleet):
    cls = LoadControllerReplica.func_or_class
    controller = cls.__new__(cls)
    await cls.__init__(controller, LoadControllerArgs(), 0.0, "model")
    with pytest.raises(PolicyError, match=r"LoadController\.user_config\.presets: unknown key"):
        await controller.reconfigure({"presets": "cost"}, 0)
    controller._watching.cancel()


async def test_a_controller_goes_on_when_the_nodes_cannot_be_listed(fleet, monkeypatch, caplog):
    num_failures, counted = 0, []

    async def fail() -> dict[str, str]:
        nonlocal num_failures
        num_failures += 1
        if num_failures > 3:
            return HOSTS
        raise ConnectionError("the head is restarting")

    monkeypatch.setattr("deployments.load_controller.living_nodes", fail)
    monkeypatch.setattr("deployments.load_controller.failure_counter", lambda model_name: counted.append)
    async with running_controller(preset="throughput") as controller:
        await controller.override(Bounds(confidence_threshold=0.5), None, None)
        while not fleet.started:
            await asyncio.sleep(0.01)
        controller.check_health()
        assert (await controller.heartbeat(LoadWindow("r", 8).take(1.0))).bounds == Bounds(confidence_threshold=0.5)
    assert counted == ["watch"] * 3
    assert "the head is restarting" in caplog.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_replicas": 2}, "LoadController.num_replicas=2: expected 1"),
        ({"autoscaling_config": {"max_replicas": 3}}, "LoadController.autoscaling_config: expected none"),
    ],
)
def test_several_load_controllers_are_refused(fields, expected):
    with pytest.raises(PolicyError, match=expected):
        check_alone(DeploymentConfig(**fields))


def test_one_load_controller_is_right():
    check_alone(DeploymentConfig())


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """UUIDs of the GPUs that torch sees; tests fill the list."""
    uuids: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    return uuids


def test_gpus_are_named_as_the_driver_names_them(gpus):
    gpus += ["2b7a", "9c01"]
    assert named_by_driver(("1", "0")) == ("GPU-2b7a", "GPU-9c01")
    gpus[0] = "GPU-2b7a"
    assert named_by_driver(("1", "0")) == ("GPU-2b7a", "GPU-9c01")


def test_names_that_are_no_numbers_stay(gpus):
    gpus += ["2b7a"]
    assert named_by_driver(("MIG-5",)) == ("MIG-5",)
    assert named_by_driver(()) == ()


def test_where_torch_does_not_see_what_ray_says_numbers_stay(gpus):
    assert named_by_driver(("1",)) == ("1",)
    gpus += ["2b7a", "9c01"]
    assert named_by_driver(("1",)) == ("1",)
