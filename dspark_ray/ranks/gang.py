"""Builds an engine, in one process or as one member of a gang.

A gang is a torch.distributed world: ranks 0 .. TP-1 verify, and rank TP drafts where the drafter has a process of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.checkpoint.reader import Checkpoint, load_drafter, load_projector, load_target
from dspark_ray.config import ConfigError, EngineConfig, ModelConfig, ResolvedConfig
from dspark_ray.drafters.dspark import DSparkModule, FeatureProjector
from dspark_ray.drafters.protocol import Drafter
from dspark_ray.engine.profiler import Progress, load_or_profile
from dspark_ray.engine.step_loop import Engine
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.ranks.channel import Broadcast, Pair, limit_silence
from dspark_ray.ranks.device import check_device
from dspark_ray.ranks.draft_link import DraftServer, RemoteDrafter
from dspark_ray.ranks.draft_worker import DraftWorker, InlineDrafter
from dspark_ray.ranks.executor import Follower, LeadingTarget, LocalTarget, TargetRank
from dspark_ray.runner.decode import TargetGraphs
from dspark_ray.runner.graphs import Capture, CudaCapture
from dspark_ray.speculative.calibration import Temperatures
from dspark_ray.speculative.cost_table import CostTable
from dspark_ray.speculative.planner import Planner

DrafterPlacement = Literal["inline", "actor"]

STS_FILE = "sts.json"
"""File of confidence temperatures in a checkpoint folder."""


@dataclass(frozen=True, kw_only=True)
class GangSpec:
    """What every member of a gang must agree on."""

    checkpoint: str
    engine: EngineConfig = field(default_factory=EngineConfig)
    tensor_parallel_size: int = 1
    drafter: DrafterPlacement = "inline"
    init_method: str | None = None
    """Rendezvous of torch.distributed, such as tcp://10.0.0.1:23456; None for a gang of one process."""
    timeout_seconds: float = 60.0
    """Once the gang serves, a member that is silent for longer is treated as dead."""
    load_timeout_seconds: float = 1800.0
    """The same during start-up, while members read weights, record graphs and profile."""

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise ConfigError(f"tensor_parallel_size={self.tensor_parallel_size}: expected 1 or more")
        if self.world_size > 1 and self.init_method is None:
            raise ConfigError(f"init_method is missing: expected a rendezvous for {self.world_size} processes")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size + (self.has_draft_process)

    @property
    def has_draft_process(self) -> bool:
        return self.drafter == "actor" and self.engine.speculation

    def resolve(self) -> tuple[ModelConfig, ResolvedConfig]:
        """Read the checkpoint's config and check everything against it. Raises ConfigError."""
        model = ModelConfig.from_file(Path(self.checkpoint))
        engine = self.engine
        check_device(engine.device)
        if model.dspark is None and engine.speculation:
            if self.drafter == "actor":
                raise ConfigError(
                    f"drafter='actor': {self.checkpoint} has no DSpark module: expected speculation=False"
                )
            engine = replace(engine, speculation=False)
        for name in ("o_groups", "num_attention_heads"):
            if getattr(model, name) % self.tensor_parallel_size:
                raise ConfigError(
                    f"tensor_parallel_size={self.tensor_parallel_size}: expected a divisor of"
                    f" {name}={getattr(model, name)}"
                )
        return model, engine.for_model(model)


def build_engine(
    checkpoint: str | Path,
    config: EngineConfig | None = None,
    progress: Progress | None = None,
    temperatures: Temperatures | None = None,
) -> Engine:
    """An engine in this process: one rank, the drafter inline, no torch.distributed."""
    spec = GangSpec(checkpoint=str(checkpoint), engine=config or EngineConfig())
    return join_as_leader(spec, progress, temperatures)


def join_as_leader(
    spec: GangSpec, progress: Progress | None = None, temperatures: Temperatures | None = None
) -> Engine:
    """Become verifier rank 0, which runs the step loop; `progress` is called while costs are profiled.

    Without `temperatures`, those of the config or of the checkpoint apply. Raises ConfigError before the gang meets and
    CheckpointError before weights are read.
    """
    model_config, config = spec.resolve()
    if temperatures is None:
        temperatures = _temperatures(spec, config)
    meeting = _join(spec, rank=0)
    checkpoint = Checkpoint.open(spec.checkpoint)
    rank = _load_target_rank(checkpoint, model_config, config, meeting.group, with_projector=config.speculation)
    drafter = _drafter_of(meeting, checkpoint, rank.model, config)
    _record_together(spec, rank)
    target = LeadingTarget(rank, meeting.channel) if meeting.group.size > 1 else LocalTarget(rank)
    costs = _cost_table(spec, Engine(config, model_config, target, drafter), progress)
    engine = Engine(config, model_config, target, drafter, Planner(config, costs, temperatures))
    engine.start()
    meeting.limit_silence(spec.timeout_seconds)
    return engine


def _temperatures(spec: GangSpec, config: ResolvedConfig) -> Temperatures | None:
    """The temperatures named by the config or found in the checkpoint folder; None without either."""
    path = Path(config.sts_path) if config.sts_path is not None else Path(spec.checkpoint) / STS_FILE
    if not config.speculation or (config.sts_path is None and not path.exists()):
        return None
    temperatures = Temperatures.load(path)
    try:
        return temperatures.for_gamma(config.gamma)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _cost_table(spec: GangSpec, engine: Engine, progress: Progress | None) -> CostTable | None:
    """None where no decision depends on costs."""
    if not engine.can_draft or engine.config.schedule == "fixed":
        return None
    gang = {"tensor_parallel_size": spec.tensor_parallel_size, "drafter": spec.drafter}
    return load_or_profile(engine, Path(spec.checkpoint), gang, progress)


def join_as_follower(spec: GangSpec, rank: int) -> Follower:
    """Become verifier rank 1 .. TP-1, which runs the commands of rank 0. Raises as `join_as_leader`."""
    model_config, config = spec.resolve()
    meeting = _join(spec, rank)
    target_rank = _load_target_rank(
        Checkpoint.open(spec.checkpoint), model_config, config, meeting.group, with_projector=False
    )
    _record_together(spec, target_rank)
    return Follower(target_rank, meeting.channel, partial(meeting.limit_silence, spec.timeout_seconds))


def join_as_drafter(spec: GangSpec) -> DraftServer:
    """Become the drafter, whose rank is the last of the world. Raises as `join_as_leader`."""
    model_config, config = spec.resolve()
    meeting = _join(spec, spec.tensor_parallel_size)
    worker = _load_draft_worker(Checkpoint.open(spec.checkpoint), model_config, config)
    _record_together(spec, None)
    assert meeting.link is not None
    return DraftServer(worker, meeting.link, partial(meeting.limit_silence, spec.timeout_seconds))


def leave_gang() -> None:
    """Close the connections of this member; call last, after close() or run()."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Meeting:
    """The connections of a member after the rendezvous."""

    group: ParallelGroup = field(default_factory=ParallelGroup)
    """For tensors: NCCL on GPUs, gloo elsewhere."""
    channel: Broadcast = field(default_factory=lambda: Broadcast(None))
    """For commands, always through the CPU."""
    link: Pair | None = None
    """Between rank 0 and the drafter."""
    groups: tuple[dist.ProcessGroup, ...] = ()
    """All groups that this member belongs to."""

    def limit_silence(self, seconds: float) -> None:
        """From now on a member that is silent for longer is treated as dead."""
        timeout = timedelta(seconds=seconds)
        for group in self.groups:
            limit_silence(group, timeout)
        if self.link is not None:
            self.link.timeout = timeout


def _join(spec: GangSpec, rank: int) -> _Meeting:
    """Join the world and form the target's groups; a single process needs neither.

    Until the gang serves, the timeout is that of loading: a member may still read weights, compile or record graphs
    while the others wait.
    """
    _sum_in_float32()
    if spec.world_size == 1:
        return _Meeting()
    meeting = _form_groups(spec, rank)
    meeting.limit_silence(max(spec.load_timeout_seconds, spec.timeout_seconds))
    return meeting


def _form_groups(spec: GangSpec, rank: int) -> _Meeting:
    timeout = timedelta(seconds=spec.timeout_seconds)
    dist.init_process_group(
        "gloo", init_method=spec.init_method, world_size=spec.world_size, rank=rank, timeout=timeout
    )
    size = spec.tensor_parallel_size
    ranks = list(range(size))
    # new_group() is collective over the world, so the drafter calls it too.
    control = dist.new_group(ranks, timeout=timeout)
    on_gpu = torch.device(spec.engine.device).type == "cuda"
    tensors = dist.new_group(ranks, timeout=timeout, backend="nccl") if on_gpu and size > 1 else control
    link = None
    if spec.has_draft_process and rank in (0, size):
        link = Pair(peer=size - rank)
    assert dist.group.WORLD is not None
    if size == 1 or rank >= size:
        return _Meeting(link=link, groups=(dist.group.WORLD,))
    groups = tuple({id(group): group for group in (dist.group.WORLD, control, tensors)}.values())
    return _Meeting(ParallelGroup(rank, size, tensors), Broadcast(control), link, groups)


def _record_together(spec: GangSpec, rank: TargetRank | None) -> None:
    """Record the graphs of a verifier rank after all members have loaded; return after all have recorded."""
    _wait_for_all(spec)
    if rank is not None:
        rank.record_graphs()
    _wait_for_all(spec)


def _sum_in_float32() -> None:
    """Make cuBLAS accumulate bfloat16 products in float32; torch allows bfloat16 by default."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _wait_for_all(spec: GangSpec) -> None:
    """Wait for the slowest member. (A monitored barrier would use the timeout that the world was created with.)"""
    if spec.world_size > 1:
        dist.barrier()


def _load_target_rank(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    config: ResolvedConfig,
    group: ParallelGroup,
    with_projector: bool,
) -> TargetRank:
    projector = None
    with _unfilled(config):
        model = DeepSeekV4(model_config, group)
        if with_projector:
            projector = FeatureProjector(model_config)
    load_target(model, checkpoint, config.device, config.keep_quantised)
    if projector is not None:
        load_projector(projector, checkpoint, config.device, config.keep_quantised)
    shape = CacheShape.of(
        model_config, config.gamma, config.page_size, config.max_num_seqs, config.max_num_batched_tokens
    )
    cache = CacheTensors(
        model_config,
        shape,
        config.num_pages,
        getattr(torch, config.dtype),
        config.device,
        packed=config.kv_cache_dtype == "fp8",
    )
    capture, graphs = _capture(config), None
    if capture is not None:
        graphs = TargetGraphs(model.eval(), cache, config.max_num_seqs, config.max_model_len, capture)
    return TargetRank(model.eval(), cache, projector, graphs)


def _capture(config: ResolvedConfig) -> Capture | None:
    """Records steps as graphs; None where every kernel is launched anew."""
    if torch.device(config.device).type != "cuda" or config.enforce_eager:
        return None
    return CudaCapture()


def _drafter_of(
    meeting: _Meeting, checkpoint: Checkpoint, target: DeepSeekV4, config: ResolvedConfig
) -> Drafter | None:
    if not config.speculation:
        return None
    if meeting.link is not None:
        return RemoteDrafter(meeting.link)
    # A single rank holds the whole embedding and head, which an inline drafter shares.
    shared = (target.embed.weight, target.head.weight) if target.group.size == 1 else None
    return InlineDrafter(_load_draft_worker(checkpoint, target.config, config, shared))


def _load_draft_worker(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    config: ResolvedConfig,
    shared: tuple[Tensor, Tensor] | None = None,
) -> DraftWorker:
    with _unfilled(config):
        module = DSparkModule(model_config)
    load_drafter(module, checkpoint, config.device, shared, config.keep_quantised)
    return DraftWorker(module.eval(), config, _capture(config))


@contextmanager
def _unfilled(config: ResolvedConfig) -> Iterator[None]:
    """Modules created inside have shapes and the engine's dtype, but no memory until they are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
