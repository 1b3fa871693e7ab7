"""A member may record or profile for longer than a silent member may live; once the gang serves, silence ends it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import gang_spec, start_members
from small_model import request, run, save_small_checkpoint

from dspark_ray.ranks import gang as runtime
from dspark_ray.ranks.executor import TargetRank
from dspark_ray.ranks.gang import GangSpec, build_engine, join_as_drafter, join_as_follower, join_as_leader, leave_gang
from dspark_ray.speculative.cost_table import CostTable, Curve

PEER_TIMEOUT = 5.0
LONGER = 1.6 * PEER_TIMEOUT
REQUEST = request((1, 2, 3), max_tokens=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("small"))


def spec_of(checkpoint: Path, size: int, drafter: str, **engine: object) -> GangSpec:
    return replace(gang_spec(checkpoint, size, drafter, **engine), timeout_seconds=PEER_TIMEOUT)


def record_slowly(rank: TargetRank) -> None:
    """On a CPU there is nothing to record; on a GPU it takes minutes."""
    time.sleep(LONGER)


def profile_slowly(*args: Any) -> CostTable:
    time.sleep(LONGER)
    return CostTable.of(Curve((1, 64), (1.0, 1.01)), Curve((1, 8), (0.01, 0.02)))


def meet(rank: int, spec: GangSpec, folder: Path) -> None:
    """Wait until every process has imported what it needs, so that the short timeout starts for all at once."""
    torch.set_num_threads(1)
    (folder / f"imported.{rank}").touch()
    while len(list(folder.glob("imported.*"))) < spec.world_size:
        time.sleep(0.05)


def start_slowly(rank: int, spec: GangSpec, slow_ranks: tuple[int, ...], results: Path) -> None:
    meet(rank, spec, results.parent)
    if rank in slow_ranks:
        TargetRank.record_graphs = record_slowly  # type: ignore[method-assign]
    runtime.load_or_profile = profile_slowly
    if rank == spec.tensor_parallel_size:
        join_as_drafter(spec).run()
    elif rank > 0:
        join_as_follower(spec, rank).run()
    else:
        engine = join_as_leader(spec)
        torch.save(run(engine, REQUEST), results)
        engine.close()
    leave_gang()


@pytest.mark.parametrize(
    ("size", "drafter", "slow_ranks"),
    [(1, "actor", (0,)), (2, "actor", (0, 1)), (2, "inline", (1,))],
)
def test_a_start_longer_than_the_peer_timeout_loses_no_member(size, drafter, slow_ranks, checkpoint, tmp_path):
    spec = spec_of(checkpoint, size, drafter)
    results = tmp_path / "texts.pt"
    start_members(start_slowly, (spec, slow_ranks, results), spec.world_size)
    alone = run(build_engine(checkpoint, replace(spec.engine, speculation=False)), REQUEST)
    assert torch.load(results, weights_only=True) == alone


def fall_silent(rank: int, spec: GangSpec, results: Path) -> None:
    meet(rank, spec, results)
    if rank == 0:
        join_as_leader(spec)
        time.sleep(4 * PEER_TIMEOUT)  # says nothing, and the others must not wait for it any more
        return
    member = join_as_drafter(spec) if rank == spec.tensor_parallel_size else join_as_follower(spec, rank)
    started = time.monotonic()
    try:
        member.run()
    except RuntimeError:
        (results / f"waited.{rank}").write_text(str(time.monotonic() - started))


def test_once_the_gang_serves_silence_counts_as_death_again(checkpoint, tmp_path):
    spec = spec_of(checkpoint, 2, "actor", schedule="fixed")
    start_members(fall_silent, (spec, tmp_path), spec.world_size)
    waited = {path.name: float(path.read_text()) for path in tmp_path.glob("waited.*")}
    assert set(waited) == {"waited.1", "waited.2"}
    # The leader leaves after 4 timeouts, which would end the others too.
    assert max(waited.values()) < 3.5 * PEER_TIMEOUT, "the timeout of loading is still in force"
