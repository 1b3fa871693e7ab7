"""The routes for operators with a load controller in this process; test_http.py has those without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from byte_tokenizer import EOS, NUM_TOKENS
from echo_engine import EchoEngine
from http_server import HTTP, Server, running_server

from autoscale.controller import Bounds, ControllerConfig, LoadController
from autoscale.signals import DeviceLoad, NodeLoad
from autoscale.thresholds import FixedThreshold
from deployments.http.interfaces import EngineBusy
from deployments.replica.heartbeat import LoadWindow
from dspark_ray.text.tokenizer import Tokenizer

SAMPLE = LoadWindow("replica-1", 8).take(1.0)
GPU = DeviceLoad(kind="gpu", index=0, uuid="GPU-0", name="a GPU", tensor_activity=0.5)


class LocalController:
    """A ControllerClient around a real LoadController, with a clock that does not advance."""

    def __init__(self) -> None:
        self.is_gone = False
        self.controller = LoadController(ControllerConfig(policy=FixedThreshold(threshold=0.1)))
        self.controller.on_node(NodeLoad(node_id="n", host="host", source="nvml", devices=(GPU,)), 0.0)
        self.beat()

    def beat(self) -> list[Bounds]:
        """Heartbeats of two replicas; returns their bounds."""
        return [self.controller.on_sample(replace(SAMPLE, replica=f"replica-{n}"), 0.0).bounds for n in (1, 2)]

    async def view(self) -> dict[str, Any]:
        if self.is_gone:
            raise EngineBusy("the load controller did not answer")
        settings = {"policy": "fixed", "preset": None, "lowest_threshold": 0.0, "problem": None}
        probes = {"heartbeat_seconds": 1.0, "num_probes": 1, "probe_errors": {}}
        return {"application": "app", **settings, **probes, **self.controller.view(2.0)}

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        if replica is not None and replica not in self.controller.replicas:
            return []
        self.controller.override(bounds, seconds, 0.0, replica)
        return self.controller.replicas if replica is None else [replica]

    async def end_override(self, replica: str | None) -> None:
        self.controller.end_override(replica)


@pytest.fixture
def controller() -> LocalController:
    return LocalController()


@pytest.fixture
def server(tokenizer: Tokenizer, controller: LocalController) -> Iterator[Server]:
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), controller) as running:
        yield running


def post(server: Server, policy: dict[str, object]) -> httpx.Response:
    return HTTP.post(f"{server.url}/admin/policy", json=policy)


def error(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


def test_the_load_of_nodes_and_replicas_is_shown(server):
    answer = HTTP.get(f"{server.url}/admin/load").raise_for_status().json()
    assert answer["application"] == "app"
    assert answer["nodes"][0]["devices"][0]["tensor_activity"] == 0.5
    assert [replica["sample"]["replica"] for replica in answer["replicas"]] == ["replica-1", "replica-2"]
    assert answer["replicas"][0]["bounds"] == {"confidence_threshold": 0.1, "max_draft_tokens": None, "bypass": False}


def test_a_policy_is_for_all_replicas(server, controller):
    answer = post(server, {"confidence_threshold": 0.25, "max_draft_tokens": 2, "valid_seconds": 30})
    assert answer.json() == {
        "replicas": ["replica-1", "replica-2"],
        "policy": {"confidence_threshold": 0.25, "max_draft_tokens": 2, "bypass": False, "valid_seconds": 30},
    }
    assert controller.beat() == [Bounds(0.25, 2)] * 2


def test_a_policy_can_be_for_one_replica_and_be_taken_back(server, controller):
    assert post(server, {"bypass": True, "replica": "replica-2"}).json()["replicas"] == ["replica-2"]
    assert controller.beat() == [Bounds(0.1), Bounds(0.0, None, True)]
    answer = httpx.delete(f"{server.url}/admin/policy", params={"replica": "replica-2"})
    assert answer.json() == {"replica": "replica-2"}
    assert controller.beat() == [Bounds(0.1)] * 2


def test_a_policy_for_all_is_taken_back_as_well(server, controller):
    post(server, {"confidence_threshold": 0.9})
    httpx.delete(f"{server.url}/admin/policy").raise_for_status()
    assert controller.beat() == [Bounds(0.1)] * 2


def test_ending_a_policy_for_all_ends_those_of_single_replicas(server, controller):
    post(server, {"bypass": True, "replica": "replica-2"})
    httpx.delete(f"{server.url}/admin/policy").raise_for_status()
    assert controller.beat() == [Bounds(0.1)] * 2


def test_an_unknown_replica_is_named(server, controller):
    answer = post(server, {"bypass": True, "replica": "nobody"})
    assert error(answer) == (404, "replica")
    assert "'nobody'" in answer.json()["error"]["message"]
    assert controller.beat() == [Bounds(0.1)] * 2


@pytest.mark.parametrize(
    ("policy", "param"),
    [
        ({"version": 3}, "version"),
        ({"confidence_threshold": 1.5}, "confidence_threshold"),
        ({"replica": 3}, "replica"),
        ({"max_draft_tokens": 9223372036854775808}, "max_draft_tokens"),
        ({"max_draft_tokens": 1025}, "max_draft_tokens"),
        ({"max_draft_tokens": -1}, "max_draft_tokens"),
        ({"max_draft_tokens": 1.5}, "max_draft_tokens"),
        ({"valid_seconds": 1e300}, "valid_seconds"),
        ({"valid_seconds": 0}, "valid_seconds"),
        ({"bypass": 7}, "bypass"),
    ],
)
def test_a_bad_policy_is_named_and_changes_nothing(server, controller, policy, param):
    assert error(post(server, policy)) == (400, param)
    assert controller.beat() == [Bounds(0.1)] * 2


@pytest.mark.parametrize("replica", ["", "a b", "a\nERROR forged", "x" * 257])
def test_a_name_that_no_replica_has_does_not_reach_the_log(server, controller, replica):
    assert error(post(server, {"bypass": True, "replica": replica})) == (400, "replica")
    assert error(HTTP.delete(f"{server.url}/admin/policy", params={"replica": replica})) == (400, "replica")
    assert controller.beat() == [Bounds(0.1)] * 2


def test_an_unknown_word_in_the_query_is_named(server):
    assert error(httpx.delete(f"{server.url}/admin/policy", params={"relpica": "x"})) == (400, "relpica")


def test_a_controller_that_is_away_is_a_503(server, controller):
    controller.is_gone = True
    answer = HTTP.get(f"{server.url}/admin/load")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(("method", "path"), [("GET", "/admin/load"), ("DELETE", "/admin/policy")])
def test_without_a_controller_its_routes_say_so(shared_server, method, path):
    answer = HTTP.request(method, f"{shared_server.url}{path}")
    assert answer.status_code == 404
    assert "load_controller is null" in answer.json()["error"]["message"]


def test_without_a_controller_nobody_can_choose_a_replica(shared_server):
    answer = HTTP.post(f"{shared_server.url}/admin/policy", json={"replica": "replica-1"})
    assert error(answer) == (400, "replica")
