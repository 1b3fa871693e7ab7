"""The load controller as a deployment, and the probes that it keeps on every node."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.schema import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoscale.controller import Bounds, ControllerConfig, Decision, LoadController
from autoscale.probe import LoadProbe
from autoscale.signals import LoadSample, NodeLoad
from deployments.metrics import LoadMetrics, failure_counter

logger = logging.getLogger("ray.serve")

POLL_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
"""A probe that takes longer is left for the next round."""
_RETRY_SECONDS = 15.0
"""Before a probe is started again on a node where it could not live."""


class NodeProbe:
    """One per node: samples its devices for as long as the controller lives, which owns it."""

    def __init__(self, node_id: str, host: str) -> None:
        self._probe = LoadProbe(node_id, host)

    def load(self) -> NodeLoad:
        """The smoothed load of this node's devices."""
        return self._probe.load()


@dataclass(frozen=True)
class _Failure:
    words: str
    at: float


class Probes:
    """A NodeProbe on every living node: started where one is missing, forgotten where the node has left."""

    def __init__(self) -> None:
        self._actors: dict[str, ActorHandle] = {}
        self._failures: dict[str, _Failure] = {}

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def errors(self) -> dict[str, str]:
        """What went wrong last, by node; a node that answers again has none."""
        return {node: failure.words for node, failure in self._failures.items()}

    async def poll(self) -> tuple[list[NodeLoad], list[str]]:
        """What every probe says, and the ids of nodes that have left. Trouble on one node stays on that node."""
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in await _nodes() if node["Alive"]}
        left = [node_id for node_id in {*self._actors, *self._failures} if node_id not in hosts]
        for node_id in left:
            self._actors.pop(node_id, None)
            self._failures.pop(node_id, None)
        for node_id, host in hosts.items():
            if node_id not in self._actors and self._may_start(node_id):
                self._actors[node_id] = _start_probe(node_id, host)
        answers = await asyncio.gather(*(self._ask(node_id) for node_id in list(self._actors)))
        return [load for load in answers if load is not None], left

    def _may_start(self, node_id: str) -> bool:
        failure = self._failures.get(node_id)
        return failure is None or time.monotonic() - failure.at > _RETRY_SECONDS

    async def _ask(self, node_id: str) -> NodeLoad | None:
        try:
            load: NodeLoad = await asyncio.wait_for(self._actors[node_id].load.remote(), _ANSWER_SECONDS)
        except TimeoutError:
            self._note(node_id, f"no answer in {_ANSWER_SECONDS} s")
            return None
        except Exception as error:
            # The probe or its node is gone; a later round starts another where there is a node.
            self._note(node_id, f"{type(error).__name__}: {error}".partition("\n")[0])
            del self._actors[node_id]
            return None
        self._failures.pop(node_id, None)
        return load

    def _note(self, node_id: str, words: str) -> None:
        if self.errors.get(node_id) != words:
            logger.warning("the probe of node %s: %s", node_id, words)
        self._failures[node_id] = _Failure(words, time.monotonic())


async def _nodes() -> list[dict[str, Any]]:
    return await asyncio.to_thread(ray.nodes)


def _start_probe(node_id: str, host: str) -> ActorHandle:
    logger.info("a probe starts on node %s (%s)", node_id, host)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=there).remote(node_id, host)  # type: ignore[return-value]


# Its calls are heartbeats: a line of the access log for each would bury the decisions.
@serve.deployment(name="LoadController", logging_config=LoggingConfig(enable_access_log=False))
class LoadControllerReplica:
    """Answers every replica's heartbeat with what it may verify; one for the whole application.

    When it dies, policies expire in the engines, and the next one goes on from the thresholds that replicas report.
    Of what it knows, only an operator's bounds are lost: heartbeats and probes bring everything else again.
    """

    async def __init__(self, config: ControllerConfig, model_name: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._controller = LoadController(config)
        self._metrics = LoadMetrics(model_name)
        self._count_failure = failure_counter(model_name)
        self._probes = Probes()
        self._watching = asyncio.create_task(self._watch())

    async def heartbeat(self, sample: LoadSample) -> Decision:
        """What the replica may verify until its next heartbeat, and some time beyond."""
        decision = self._controller.on_sample(sample, time.monotonic())
        self._metrics.on_decision(sample, decision)
        if decision.before is not None:
            logger.info(_sentence(sample, decision.before, decision))
        return decision

    async def view(self) -> dict[str, Any]:
        """All that is known of nodes and replicas, as JSON has it."""
        return {
            "application": serve.get_replica_context().app_name,
            "policy": self._controller.config.policy.kind,
            "heartbeat_seconds": self._controller.heartbeat_seconds,
            "num_probes": len(self._probes),
            "probe_errors": self._probes.errors,
            **self._controller.view(time.monotonic()),
        }

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        """Let an operator's bounds stand in for the policy's; the replicas that they are for, none if it is unknown."""
        if replica is not None and replica not in self._controller.replicas:
            return []
        self._controller.override(bounds, seconds, time.monotonic(), replica)
        logger.info("an operator set %s for %s, for %s s", bounds, replica or "all replicas", seconds)
        return self._controller.replicas if replica is None else [replica]

    async def end_override(self, replica: str | None) -> None:
        """Back to the policy."""
        self._controller.end_override(replica)
        logger.info("an operator gave %s back to the policy", replica or "all replicas")

    def check_health(self) -> None:
        """Raises when nobody watches the nodes any more."""
        if self._watching.done():
            self._watching.result()

    async def _watch(self) -> None:
        """Poll the probes, until cancelled.

        Ray's view of the nodes cannot be had while its head restarts; operators' bounds have to outlive that, so a
        failed round is logged and counted, and the next one is tried.
        """
        while True:
            started = time.monotonic()
            try:
                await self._watch_once()
            except Exception:
                logger.exception("the nodes could not be polled")
                self._count_failure("watch")
            await asyncio.sleep(max(0.0, POLL_SECONDS - (time.monotonic() - started)))

    async def _watch_once(self) -> None:
        loads, left = await self._probes.poll()
        now = time.monotonic()
        for load in loads:
            self._controller.on_node(load, now)
        for node_id in left:
            logger.info("node %s has left", node_id)
            self._controller.forget_node(node_id)
        for replica in self._controller.forget_silent(now):
            logger.info("replica %s is silent: forgotten", replica)
        self._metrics.on_nodes(loads)


def _sentence(sample: LoadSample, before: Bounds, decision: Decision) -> str:
    """A decision and its inputs in one line."""
    bounds, saturation = decision.bounds, decision.saturation
    parts = " ".join(f"{name}={value:.2f}" for name, value in _sorted(saturation.parts.items()))
    return (
        f"policy {decision.version} for {sample.replica}: threshold {before.threshold:.3f} -> {bounds.threshold:.3f},"
        f" max_draft_tokens={bounds.max_draft_tokens}, bypass={bounds.bypass}, spent={_share(decision.spent)};"
        f" saturation={saturation.value:.2f} by {saturation.limiting} ({parts});"
        f" running={sample.num_running:.1f}/{sample.max_running} waiting={sample.num_waiting:.1f}"
        f" cache={sample.cache_usage:.2f} slowness={sample.slowness:.2f}"
        f" budget={sample.budget_per_request:.2f} accepted_length={sample.accepted_length:.2f}"
        f" tokens/s={sample.tokens_per_second:.1f}"
    )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _sorted(parts: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    return sorted(parts, key=lambda part: -part[1])
