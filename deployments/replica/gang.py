"""Starts the actors of one replica, each in its bundle of the replica's placement group."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from autoscale.signals import Place
from deployments.args import AppArgs, Resources
from deployments.replica.workers import DrafterWorker, VerifierWorker

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Gang:
    """The actors of one replica, which owns them, so that they end with it."""

    actors: list[ActorHandle]
    runs: dict[str, Future[None]]
    """The one task of each actor, by the actor's name; the gang is lost when one of them ends. Ray's threads complete
    these futures, not the event loop."""
    places: tuple[Place, ...]
    """The place of each actor, in the same order."""

    def raise_end(self) -> None:
        """Raise the error of a run that has ended, unchanged: for that of a dead actor, Serve restarts at once."""
        for name, run in self.runs.items():
            if run.done():
                run.result()
                raise RuntimeError(f"{name} ended its run")


async def start_gang(args: AppArgs, channel_address: str) -> Gang:
    """Start all actors, let them import torch, and connect them. Call it in a replica's constructor only.

    Ray cancels calls that are made while a request is handled together with that request.
    """
    actors = _create_actors(args)
    places: list[Place] = await asyncio.gather(*(actor.prepare.remote() for actor in actors))
    spec = _spec(args, await actors[0].meeting_point.remote())
    refs = {"verifier 0": actors[0].lead.remote(spec, channel_address, os.getpid(), args.health.step_timeout_s)}
    for rank in range(1, args.tensor_parallel_size):
        refs[f"verifier {rank}"] = actors[rank].follow.remote(spec, rank)
    if args.has_draft_actor:
        refs["drafter"] = actors[-1].draft.remote(spec)
    for name, place in zip(refs, places, strict=True):
        logger.info("%s is on node %s, with accelerators %s", name, place.node_id, place.accelerators)
    return Gang(actors, {name: ref.future() for name, ref in refs.items()}, tuple(places))


def _spec(args: AppArgs, meeting_point: str) -> dict[str, Any]:
    """The fields of a GangSpec; its module imports torch, which the replica does without."""
    return {
        "checkpoint": str(args.checkpoint),
        "engine": args.engine_config(),
        "tensor_parallel_size": args.tensor_parallel_size,
        "drafter": args.dspark.drafter.placement,
        "init_method": meeting_point,
        "timeout_seconds": args.health.peer_timeout_s,
        "load_timeout_seconds": args.health.startup_timeout_s,
    }


def _create_actors(args: AppArgs) -> list[ActorHandle]:
    """The verifier ranks in order, then the drafter where it is an actor."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "Serve starts replicas with placement_group_bundles in a group"
    bundles = bundle_order(args, placement_group_table(group)["bundles_to_node_id"])
    classes = [VerifierWorker] * args.tensor_parallel_size + [DrafterWorker] * args.has_draft_actor
    return [
        ray.remote(worker_class)  # type: ignore[misc]
        .options(
            **actor_options(resources),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            runtime_env={"env_vars": args.placement.environment} if args.placement.environment else None,
        )
        .remote(args.num_threads)
        for worker_class, resources, bundle in zip(classes, args.worker_resources(), bundles, strict=True)
    ]


def bundle_order(args: AppArgs, node_of_bundle: dict[int, str]) -> list[int]:
    """The bundle of every worker. Ranks with the same resources are ordered by node, rank 0's node first.

    Neighbouring ranks should share a node, and bundle indices are not ordered by node.
    """
    bundles = args.bundle_of_worker()
    if isinstance(args.placement.verifier, list):
        return bundles
    size = args.tensor_parallel_size
    first_node = node_of_bundle[0]
    ranks = sorted(bundles[:size], key=lambda b: (b != 0, node_of_bundle[b] != first_node, node_of_bundle[b], b))
    return [*ranks, *bundles[size:]]


def actor_options(resources: Resources) -> dict[str, Any]:
    """Resources as Ray's actor options."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        "resources": custom,
    }
