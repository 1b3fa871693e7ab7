"""Actors that read the devices of nodes, started and ended as the load controller needs them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoscale.probe import LoadProbe
from autoscale.signals import NodeLoad

logger = logging.getLogger("ray.serve")

_ANSWER_SECONDS = 2.0
"""Timeout of a poll. A probe that has not answered the previous poll is not waited for."""
_START_SECONDS = 30.0
"""Timeout for a probe to start and to answer for the first time."""
_RETRY_SECONDS = 15.0
"""Pause before a probe is started again on a node where it failed."""


class NodeProbe:
    """Samples the devices of its node; the load controller owns it."""

    def __init__(self, node_id: str, host: str) -> None:
        self._probe = LoadProbe(node_id, host)

    def load(self) -> NodeLoad:
        """The smoothed load of this node's devices."""
        return self._probe.load()


class Probe(Protocol):
    """A probe, in process or remote."""

    def load(self) -> asyncio.Future[NodeLoad]:
        """The load of the node; the future raises errors of the call."""
        ...


@dataclass(frozen=True)
class _Failure:
    reason: str
    at: float


@dataclass
class _Node:
    """One probe and the call to it that is in progress."""

    probe: Probe
    started_at: float
    call: asyncio.Future[NodeLoad] | None = None
    asked_at: float = 0.0
    has_answered: bool = False

    @property
    def timeout_seconds(self) -> float:
        return _ANSWER_SECONDS if self.has_answered else _START_SECONDS


class Probes:
    """One probe per wanted node; missing ones are started, unwanted ones ended."""

    def __init__(
        self,
        start: Callable[[str, str], Probe] | None = None,
        clock: Callable[[], float] = time.monotonic,
        answer_seconds: float = _ANSWER_SECONDS,
    ) -> None:
        """`start` makes the probe for a node id and host name; the clock is in seconds."""
        self._start, self._clock, self._answer_seconds = start or _start_actor, clock, answer_seconds
        self._nodes: dict[str, _Node] = {}
        self._failures: dict[str, _Failure] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def errors(self) -> dict[str, str]:
        """The last failure of each node whose probe does not answer."""
        return {node: failure.reason for node, failure in self._failures.items()}

    def end(self) -> list[str]:
        """End all probes; returns the ids of their nodes."""
        ended = list(self._nodes)
        self._nodes.clear()  # An actor ends with its last handle.
        self._failures.clear()
        return ended

    async def poll(self, hosts: dict[str, str], wanted: Collection[str]) -> tuple[list[NodeLoad], list[str]]:
        """(loads that probes report, ids of nodes whose probe was ended).

        `hosts` are the host names of the living nodes by id. A failure on one node does not affect the others.
        """
        known = {*self._nodes, *self._failures}
        ended = [node_id for node_id in known if node_id not in hosts or node_id not in wanted]
        for node_id in ended:
            self._nodes.pop(node_id, None)
            self._failures.pop(node_id, None)
        for node_id in wanted:
            if node_id in hosts and node_id not in self._nodes and self._may_start(node_id):
                self._nodes[node_id] = _Node(self._start(node_id, hosts[node_id]), self._clock())
        await self._ask_all()
        loads = [load for node_id in list(self._nodes) if (load := self._answer(node_id)) is not None]
        return loads, ended

    def _may_start(self, node_id: str) -> bool:
        failure = self._failures.get(node_id)
        return failure is None or self._clock() - failure.at > _RETRY_SECONDS

    async def _ask_all(self) -> None:
        """Call every probe that has no call in progress, and wait for these calls only."""
        asked = []
        for node in self._nodes.values():
            if node.call is None:
                node.call, node.asked_at = node.probe.load(), self._clock()
                if node.has_answered:
                    asked.append(node.call)
        if asked:
            await asyncio.wait(asked, timeout=self._answer_seconds)
        else:
            await asyncio.sleep(0)

    def _answer(self, node_id: str) -> NodeLoad | None:
        node = self._nodes[node_id]
        assert node.call is not None, "every probe was asked"
        if not node.call.done():
            if self._clock() - node.asked_at >= node.timeout_seconds:
                self._note(node_id, f"no answer in {node.timeout_seconds:.0f} s")
            return None
        call, node.call = node.call, None
        try:
            load = call.result()
        except Exception as error:
            # The probe or its node has ended; a later poll starts another one if the node is there.
            self._note(node_id, f"{type(error).__name__}: {error}".partition("\n")[0])
            del self._nodes[node_id]
            return None
        node.has_answered = True
        self._failures.pop(node_id, None)
        return load

    def _note(self, node_id: str, reason: str) -> None:
        if self.errors.get(node_id) != reason:
            logger.warning("the probe of node %s: %s", node_id, reason)
        self._failures[node_id] = _Failure(reason, self._clock())


async def living_nodes() -> dict[str, str]:
    """Host names by node id."""
    nodes: list[dict[str, Any]] = await asyncio.to_thread(ray.nodes)
    return {node["NodeID"]: node["NodeManagerHostname"] for node in nodes if node["Alive"]}


class _Actor:
    """A NodeProbe on its node."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def load(self) -> asyncio.Future[NodeLoad]:
        return asyncio.wrap_future(self._handle.load.remote().future())


def _start_actor(node_id: str, host: str) -> Probe:
    logger.info("a probe starts on node %s (%s)", node_id, host)
    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _Actor(ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=on_node).remote(node_id, host))  # type: ignore[arg-type]
