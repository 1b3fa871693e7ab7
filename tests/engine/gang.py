"""A gang of processes on this machine, without Ray: what the Serve application does with actors."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from small_model import COST_TABLE, run
from torch.multiprocessing import start_processes

from dspark_ray.config import EngineConfig
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import GangSpec, join_as_drafter, join_as_follower, join_as_leader, leave_gang
from dspark_ray.types import Request


def run_in_gang(spec: GangSpec, requests: list[Request], results: Path) -> dict[str, list[int]]:
    """Start all members, serve `requests` together, close; raises when a member fails."""
    start_members(_member, (spec, requests, results), spec.world_size)
    return torch.load(results, weights_only=True)


def start_members(function: Callable[..., None], arguments: tuple[object, ...], count: int) -> None:
    """Run `function(rank, *arguments)` in `count` processes; raises when one fails.

    They are forked from a process that has imported torch and the engine, which takes seconds, once.
    """
    multiprocessing.set_forkserver_preload(["dspark_ray.ranks.gang", "dspark_ray.training.initial"])
    start_processes(function, args=arguments, nprocs=count, start_method="forkserver")


def gang_spec(checkpoint: Path, tensor_parallel_size: int, drafter: str, **engine: object) -> GangSpec:
    """A gang that meets on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "page_size": 32}
    defaults |= {"cost_table": str(checkpoint / COST_TABLE)}
    return GangSpec(
        checkpoint=str(checkpoint),
        engine=EngineConfig(**{**defaults, **engine}),  # type: ignore[arg-type]
        tensor_parallel_size=tensor_parallel_size,
        drafter=drafter,  # type: ignore[arg-type]
        init_method=f"tcp://127.0.0.1:{port}",
    )


def _member(rank: int, spec: GangSpec, requests: list[Request], results: Path) -> None:
    torch.set_num_threads(1)
    if rank == spec.tensor_parallel_size:
        join_as_drafter(spec).run()
    elif rank > 0:
        join_as_follower(spec, rank).run()
    else:
        _lead(join_as_leader(spec), requests, results)
    leave_gang()


def _lead(engine: Engine, requests: list[Request], results: Path) -> None:
    engine.keep_alive()
    torch.save(run(engine, *requests), results)
    engine.close()
