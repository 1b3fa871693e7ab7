"""Starting the actors of one replica, each in the bundle that its placement names."""

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
    """Ordinary actors owned by the replica, so that they die when it does."""

    actors: list[ActorHandle]
    runs: dict[str, Future[None]]
    """What each actor does for life, by the actor's name; the end of one is the end of the gang. They end in Ray's
    threads and not in the event loop."""
    places: tuple[Place, ...]
    """Where each actor is, in the same order."""

    def raise_end(self) -> None:
        """Raise the error of a run that has ended, unchanged: Serve restarts at once for a dead actor's."""
        for name, run in self.runs.items():
            if run.done():
                run.result()
                raise RuntimeError(f"{name} ended its run")


async def start_gang(args: AppArgs, channel_address: str) -> Gang:
    """Start every actor, import what takes long, and let them meet; call it in a replica's constructor only.

    Actors called from a request would be cancelled with that request.
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
    """The fields of a GangSpec, whose module imports torch and is not for the replica."""
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
    """Every verifier rank, then the drafter where it is an actor."""
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
    """The bundle of every worker; interchangeable ranks are ordered by node, rank 0's node first.

    Bundle indices do not follow nodes, and neighbouring ranks should be near.
    """
    bundles = args.bundle_of_worker()
    if isinstance(args.placement.verifier, list):
        return bundles
    size = args.tensor_parallel_size
    first_node = node_of_bundle[0]
    ranks = sorted(bundles[:size], key=lambda b: (b != 0, node_of_bundle[b] != first_node, node_of_bundle[b], b))
    return [*ranks, *bundles[size:]]


def actor_options(resources: Resources) -> dict[str, Any]:
    """Resources in the form that Ray's actor options take."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        "resources": custom,
    }
