"""Reports of simulated probes and replicas, and the real controller that answers them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from autoscale.controller import ControllerConfig, Decision, LoadController
from autoscale.signals import DeviceLoad, LoadSample, NodeLoad, Place
from autoscale.thresholds import ThresholdPolicy
from benchmarks.controller.world import Observed, World

POWER_LIMIT_WATTS, MAX_CLOCK_MHZ, MEMORY_BYTES = 1100.0, 1920.0, 288 * 2**30
CACHE_AT_FULL = 0.6
"""Share of the cache in use with all slots taken: memory does not limit these replicas."""
ACTIVITY_NOISE = 0.03
"""Relative standard deviation of a probe's activities and power."""


@dataclass(frozen=True)
class Reporter:
    """Names and places of the replicas of a world; one device each."""

    names: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]
    nodes: tuple[tuple[str, range], ...]
    """Node ids and their replicas."""

    @staticmethod
    def of(world: World) -> Reporter:
        node_of = world.traffic.node_of
        first = np.searchsorted(node_of, np.arange(world.traffic.num_nodes + 1))
        names = tuple(f"replica-{number}" for number in range(len(node_of)))
        places = tuple(
            (Place(node_id=f"node-{node}", accelerators=(str(number - first[node]),)),)
            for number, node in enumerate(node_of)
        )
        nodes = tuple((f"node-{node}", range(first[node], first[node + 1])) for node in range(world.traffic.num_nodes))
        return Reporter(names, places, nodes)

    def samples(
        self, world: World, seen: Observed, fleet: int, versions: list[int], reports: np.ndarray
    ) -> list[LoadSample]:
        """Heartbeats of a second, from the replicas that report."""
        running, rows, steps, tokens = seen.running[fleet], seen.rows[fleet], seen.steps[fleet], seen.tokens[fleet]
        most = int(world.max_running[fleet, 0])
        rounds = np.maximum(1e-9, running * steps)
        columns = (
            np.rint(steps).astype(int),
            running.astype(float),
            seen.waiting[fleet].astype(float),
            CACHE_AT_FULL * running / most,
            rows,
            np.where(running > 0, (rows - running) / np.maximum(1, running), 0.0),
            np.where(running > 0, tokens / rounds, 0.0),
            tokens,
            np.where(running > 0, 1.0, 0.0),
            seen.slowness[fleet],
            world.thresholds[fleet],
        )
        numbers = zip(*(column.tolist() for column in columns))
        return [
            LoadSample(
                replica=self.names[place],
                places=self.places[place],
                seconds=1.0,
                num_steps=values[0],
                num_running=values[1],
                num_waiting=values[2],
                max_running=most,
                cache_usage=values[3],
                rows_per_step=values[4],
                budget_per_request=values[5],
                accepted_length=values[6],
                tokens_per_second=values[7],
                busy_share=values[8],
                slowness=values[9],
                threshold=values[10],
                policy_version=versions[place],
            )
            for place, values in enumerate(numbers)
            if reports[place]
        ]

    def node_loads(self, seen: Observed, fleet: int, dead: np.ndarray, rng: np.random.Generator) -> list[NodeLoad]:
        """Reports of the probes on live nodes."""
        size = len(self.names)
        noise = 1 + ACTIVITY_NOISE * rng.standard_normal((3, size))
        tensor = np.clip(seen.tensor[fleet] * noise[0], 0.0, 1.0).tolist()
        busy = seen.running[fleet] > 0
        dram = np.where(busy, np.clip((0.95 - seen.tensor[fleet]) * noise[1], 0.0, 1.0), 0.0).tolist()
        power = (POWER_LIMIT_WATTS * np.clip(seen.power[fleet] * noise[2], 0.0, 1.0)).tolist()
        clock, is_busy = seen.clock[fleet].tolist(), busy.tolist()
        return [
            NodeLoad(
                node_id=node_id,
                host=node_id,
                source="nvml",
                devices=tuple(
                    _device(
                        number,
                        place - places[0],
                        is_busy[place],
                        tensor[place],
                        dram[place],
                        power[place],
                        clock[place],
                    )
                    for number, place in enumerate(places)
                ),
            )
            for node_id, places in self.nodes
            if not dead[places[0]]
        ]


def _device(number: int, index: int, busy: bool, tensor: float, dram: float, power: float, clock: float) -> DeviceLoad:
    return DeviceLoad(
        kind="gpu",
        index=index,
        uuid=f"GPU-{number}",
        name="simulated",
        utilization=1.0 if busy else 0.0,
        sm_activity=0.9 if busy else 0.0,
        tensor_activity=tensor,
        dram_activity=dram,
        power_watts=power,
        power_limit_watts=POWER_LIMIT_WATTS,
        sm_clock_mhz=MAX_CLOCK_MHZ * clock,
        max_sm_clock_mhz=MAX_CLOCK_MHZ,
        clock_events=("sw_power_cap",) if clock < 0.999 else (),
        memory_total=MEMORY_BYTES,
    )


class Controlled:
    """One fleet under the real controller; thresholds take effect a second after the reports."""

    def __init__(self, world: World, fleet: int, policy: ThresholdPolicy, seed: int) -> None:
        # A heartbeat per replica and second: longer intervals would lower the measured CPU time.
        self.controller = LoadController(ControllerConfig(max_heartbeats_per_second=1e9), policy)
        self.seconds = 0.0
        """CPU time in the controller."""
        self.range_used = np.zeros(world.shape[1])
        """By replica, from its last answer; NaN for a policy without a range."""
        self._world, self._fleet = world, fleet
        self._reporter = Reporter.of(world)
        self._rng = np.random.default_rng((seed, 3))
        self._versions = [0] * world.shape[1]
        self._now = 0.0

    def second(self, seen: Observed, dead: np.ndarray, reports: np.ndarray | None = None) -> None:
        """Pass all reports of a second to the controller and apply its answers."""
        reports = ~dead if reports is None else reports & ~dead
        self._now += 1.0
        nodes = self._reporter.node_loads(seen, self._fleet, dead, self._rng)
        samples = self._reporter.samples(self._world, seen, self._fleet, self._versions, reports)
        started = time.thread_time()
        decisions = self._decide(nodes, samples)
        self.seconds += time.thread_time() - started
        for place, decision in zip(np.flatnonzero(reports).tolist(), decisions):
            self._versions[place] = decision.version
            self.range_used[place] = np.nan if decision.range_used is None else decision.range_used
            self._world.thresholds[self._fleet, place] = decision.bounds.confidence_threshold

    def _decide(self, nodes: list[NodeLoad], samples: list[LoadSample]) -> list[Decision]:
        controller, now = self.controller, self._now
        for node in nodes:
            controller.on_node(node, now)
        decisions = [controller.on_sample(sample, now) for sample in samples]
        controller.forget_silent(now)
        return decisions
