"""Putting an engine together: in one process, or as one member of a gang.

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
"""Temperatures of the confidences, beside the checkpoint they belong to."""


@dataclass(frozen=True, kw_only=True)
class GangSpec:
    """What every member of a gang must agree on."""

    checkpoint: str
    engine: EngineConfig = field(default_factory=EngineConfig)
    tensor_parallel_size: int = 1
    drafter: DrafterPlacement = "inline"
    init_method: str | None = None
    """Where torch.distributed meets, e.g. tcp://10.0.0.1:23456; None for a gang of one process."""
    timeout_seconds: float = 60.0
    """A member that is silent for longer counts as dead, once the gang serves."""
    load_timeout_seconds: float = 1800.0
    """How long members wait for the slowest before: to read its weights, to record its graphs, to profile."""

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise ConfigError(f"tensor_parallel_size={self.tensor_parallel_size}: expected 1 or more")
        if self.world_size > 1 and self.init_method is None:
            raise ConfigError(f"init_method is missing: a gang of {self.world_size} processes has to meet somewhere")

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
    """Be verifier rank 0, which runs the step loop; `progress` hears how far the profiling of costs is.

    Without `temperatures`, those of the config or of the checkpoint apply. Raises ConfigError before the gang meets,
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
    engine = Engine(config, model_config, target, drafter)
    engine.planner = Planner(config, _cost_table(spec, engine, progress), temperatures)
    engine.start()
    meeting.limit_silence(spec.timeout_seconds)
    return engine


def _temperatures(spec: GangSpec, config: ResolvedConfig) -> Temperatures | None:
    """Those that the config names, or those beside the checkpoint; None where there are none."""
    path = Path(config.sts_path) if config.sts_path is not None else Path(spec.checkpoint) / STS_FILE
    if not config.speculation or (config.sts_path is None and not path.exists()):
        return None
    temperatures = Temperatures.load(path)
    try:
        return temperatures.for_gamma(config.gamma)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _cost_table(spec: GangSpec, engine: Engine, progress: Progress | None) -> CostTable | None:
    """None where nothing depends on costs."""
    if not engine.can_draft or engine.config.schedule == "fixed":
        return None
    gang = {"tensor_parallel_size": spec.tensor_parallel_size, "drafter": spec.drafter}
    return load_or_profile(engine, Path(spec.checkpoint), gang, progress)


def join_as_follower(spec: GangSpec, rank: int) -> Follower:
    """Be verifier rank 1 .. TP-1, which does what rank 0 says. Raises as `join_as_leader`."""
    model_config, config = spec.resolve()
    meeting = _join(spec, rank)
    target_rank = _load_target_rank(
        Checkpoint.open(spec.checkpoint), model_config, config, meeting.group, with_projector=False
    )
    _record_together(spec, target_rank)
    return Follower(target_rank, meeting.channel, partial(meeting.limit_silence, spec.timeout_seconds))


def join_as_drafter(spec: GangSpec) -> DraftServer:
    """Load the draft module and meet rank 0; the drafter's rank is the last of the world."""
    model_config, config = spec.resolve()
    meeting = _join(spec, spec.tensor_parallel_size)
    worker = _load_draft_worker(Checkpoint.open(spec.checkpoint), model_config, config)
    _record_together(spec, None)
    assert meeting.link is not None
    return DraftServer(worker, meeting.link, partial(meeting.limit_silence, spec.timeout_seconds))


def leave_gang() -> None:
    """Call last in every member, after close() or run(): a process that ends with open connections ends badly."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Meeting:
    """What a member has once the gang has met."""

    group: ParallelGroup = field(default_factory=ParallelGroup)
    """Tensors: NCCL on GPUs, gloo elsewhere."""
    channel: Broadcast = field(default_factory=lambda: Broadcast(None))
    """Commands, always through the CPU."""
    link: Pair | None = None
    """Between rank 0 and the drafter."""
    groups: tuple[dist.ProcessGroup, ...] = ()
    """All that this member belongs to."""

    def limit_silence(self, seconds: float) -> None:
        """From now on a member that is silent for longer counts as dead."""
        timeout = timedelta(seconds=seconds)
        for group in self.groups:
            limit_silence(group, timeout)
        if self.link is not None:
            self.link.timeout = timeout


def _join(spec: GangSpec, rank: int) -> _Meeting:
    """Meet the world and form the target's groups; a single process needs neither.

    Until the gang serves, members may be silent for as long as loading may take: one may still read weights, compile or
    record while another has nothing to say.
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
    # Every member of the world has to take part in making a group, the drafter too.
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
    """Record the graphs of a verifier rank when all members have loaded; return when all have recorded."""
    _wait_for_all(spec)
    if rank is not None:
        rank.record_graphs()
    _wait_for_all(spec)


def _sum_in_float32() -> None:
    """Keep cuBLAS from adding up parts of a bfloat16 product in bfloat16, which torch allows it by default."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _wait_for_all(spec: GangSpec) -> None:
    """Let the slowest member catch up. A monitored barrier would wait with the timeout that the world was made with."""
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
    """What records steps; None where each is launched anew."""
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
    # A single rank holds the whole embedding and head: the drafter beside it uses the same memory.
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
    """Modules made here have shapes and the engine's dtype but no memory until they are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
