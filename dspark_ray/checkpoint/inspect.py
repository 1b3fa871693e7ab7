"""Describe a checkpoint from its configuration and headers, and search its weights for NaN and infinity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dspark_ray.checkpoint.headers import StoredTensor
from dspark_ray.checkpoint.layout import local_name, parts_of
from dspark_ray.checkpoint.reader import MAX_PROBLEMS, Checkpoint
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import ParallelGroup

Progress = Callable[[int, int], None]
"""(bytes read, bytes to read)"""

_KIND_TITLES = {"sliding": "sliding", "csa": "CSA", "hca": "HCA"}
_TARGET_PARTS = {"attn": "attention", "ffn": "router"}


@dataclass(frozen=True, kw_only=True)
class DrafterDescription:
    """The DSpark module."""

    stages: int
    gamma: int
    markov_rank: int
    markov_head: str
    confidence_head: bool
    target_layers: tuple[int, ...]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """The report of `dspark-ray inspect`."""

    path: str
    architecture: dict[str, int]
    """Sizes by name."""
    layers: dict[str, int]
    """Number of target layers by kind of attention and of MoE."""
    parameters: int
    """Parameters of the target; scales of quantised weights do not count."""
    active_parameters: int
    """Parameters of the target used for one token: without unchosen experts and the embedding table."""
    num_files: int
    num_tensors: int
    num_bytes: int
    bytes_by_part: dict[str, int]
    bytes_by_dtype: dict[str, int]
    drafter: DrafterDescription | None
    unused_tensors: int
    """Stored tensors that neither target nor drafter uses."""
    problems: tuple[str, ...] = field(default=())
    """Reasons why the checkpoint cannot be loaded."""
    values_read: bool = False
    """Whether weights were searched for NaN and infinity, besides the headers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def format(self) -> str:
        """Aligned text for a terminal."""
        rows = [*self._rows(), *self._drafter_rows(), *self._problem_rows()]
        width = max(len(title) for title, _ in rows)
        return "\n".join(f"{title:<{width}}  {value}".rstrip() for title, value in rows)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "checkpoint", self.path
        yield "files", f"{self.num_files} with {self.num_tensors} tensors, {_bytes(self.num_bytes)}"
        yield "architecture", ", ".join(f"{name} {size}" for name, size in self.architecture.items())
        yield "layers", ", ".join(f"{count} {kind}" for kind, count in self.layers.items())
        yield "parameters", f"{_count(self.parameters)}, {_count(self.active_parameters)} active per token"
        yield from _table_rows("bytes by part", self.bytes_by_part)
        yield from _table_rows("bytes by dtype", self.bytes_by_dtype)
        if self.unused_tensors:
            yield "not used", f"{self.unused_tensors} tensors"

    def _drafter_rows(self) -> Iterator[tuple[str, str]]:
        drafter = self.drafter
        if drafter is None:
            yield "drafter", "none: this checkpoint decodes one token at a time"
            return
        confidence = "with" if drafter.confidence_head else "without"
        yield (
            "drafter",
            f"{drafter.stages} stages, gamma {drafter.gamma}, {_count(drafter.parameters)} parameters",
        )
        yield (
            "",
            f"{drafter.markov_head} Markov head of rank {drafter.markov_rank}, {confidence} confidence head",
        )
        yield "", f"reads target layers {', '.join(map(str, drafter.target_layers))}"

    def _problem_rows(self) -> Iterator[tuple[str, str]]:
        if not self.problems:
            yield "problems", "none found" if self.values_read else "none found in the headers; no weights were read"
            return
        yield "problems", f"{len(self.problems)} found"
        yield from (("", problem) for problem in self.problems[:MAX_PROBLEMS])
        if len(self.problems) > MAX_PROBLEMS:
            yield "", f"and {len(self.problems) - MAX_PROBLEMS} more"


def describe(path: Path | str, read_values: bool = False, progress: Progress | None = None) -> Description:
    """Read headers and, with `read_values` and without problems in the headers, every used weight.

    Raises ConfigError and CheckpointError if configuration or headers cannot be read.
    """
    checkpoint = Checkpoint.open(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    wanted, problems = _compare(checkpoint)
    read_values = read_values and not problems
    if read_values:
        problems = _value_problems(checkpoint, wanted, progress)
    return Description(
        path=str(path),
        architecture=_architecture(config),
        layers=_layers(config),
        parameters=_num_parameters(_target_tensors(checkpoint)),
        active_parameters=_num_active(_target_tensors(checkpoint), config),
        num_files=len({tensor.file for tensor in tensors.values()}),
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        bytes_by_part=_summed((_part(name), tensor.num_bytes) for name, tensor in tensors.items()),
        bytes_by_dtype=_summed((tensor.dtype, tensor.num_bytes) for tensor in tensors.values()),
        drafter=_drafter(checkpoint),
        unused_tensors=sum(_owner(name) not in wanted for name in tensors),
        problems=tuple(problems),
        values_read=read_values,
    )


def _value_problems(checkpoint: Checkpoint, wanted: set[str], progress: Progress | None) -> list[str]:
    """One sentence per tensor that has NaN or infinity."""
    used = {name: tensor for name, tensor in checkpoint.tensors.items() if _owner(name) in wanted}
    done, total, problems = 0, sum(tensor.num_bytes for tensor in used.values()), []
    for name, tensor in used.items():
        problem = checkpoint.value_problem(name)
        if problem is not None:
            problems.append(problem)
        done += tensor.num_bytes
        if progress is not None:
            progress(done, total)
    return problems


def _compare(checkpoint: Checkpoint) -> tuple[set[str], list[str]]:
    """(names of the tensors that are loaded, problems of loading them)."""
    config = checkpoint.config
    with torch.device("meta"):
        modules = [DeepSeekV4(config)] + ([DSparkModule(config)] if config.dspark else [])
    parts = [part for module in modules for _, part in parts_of(module, config, ParallelGroup(), checkpoint.tensors)]
    return {part.name for part in parts}, checkpoint.validate(parts)


def _architecture(config: ModelConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "experts": config.n_routed_experts,
        "experts per token": config.num_experts_per_tok,
        "window": config.sliding_window,
        "streams": config.hc_mult,
        "vocabulary": config.vocab_size,
    }


def _layers(config: ModelConfig) -> dict[str, int]:
    numbers = range(config.num_hidden_layers)
    kinds = Counter(_KIND_TITLES[config.attention_kind(layer)] for layer in numbers)
    num_hash = min(config.num_hash_layers, len(numbers))
    return dict(kinds) | {"hash MoE": num_hash, "learned MoE": len(numbers) - num_hash}


def _drafter(checkpoint: Checkpoint) -> DrafterDescription | None:
    dspark = checkpoint.config.dspark
    if dspark is None:
        return None
    stages = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("mtp.")}
    return DrafterDescription(
        stages=dspark.num_stages,
        gamma=dspark.gamma,
        markov_rank=dspark.markov_rank,
        markov_head=dspark.markov_head_type,
        confidence_head=f"mtp.{dspark.num_stages - 1}.confidence_head.proj.weight" in stages,
        target_layers=dspark.target_layer_ids,
        parameters=_num_parameters(stages),
    )


def _target_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("mtp.")}


def _num_parameters(tensors: dict[str, StoredTensor]) -> int:
    return sum(_size(name, tensor) for name, tensor in tensors.items())


def _num_active(tensors: dict[str, StoredTensor], config: ModelConfig) -> int:
    experts = {name: tensor for name, tensor in tensors.items() if _is_expert(name)}
    others = {name: tensor for name, tensor in tensors.items() if name not in experts and name != "embed.weight"}
    chosen = _num_parameters(experts) * config.num_experts_per_tok // config.n_routed_experts
    return _num_parameters(others) + chosen


def _size(name: str, tensor: StoredTensor) -> int:
    """Number of parameters in a stored tensor: two per byte of FP4, none in scales and routing tables."""
    if _owner(name) != name or name.endswith(".tid2eid"):
        return 0
    return math.prod(tensor.shape) * (2 if tensor.dtype == "I8" else 1)


def _owner(name: str) -> str:
    """The weight of a scale; other names unchanged."""
    return name.removesuffix(".scale") + ".weight" if name.endswith(".scale") else name


def _is_expert(name: str) -> bool:
    return local_name(name).startswith("ffn.experts.")


def _part(name: str) -> str:
    if name.startswith("mtp."):
        return "drafter"
    if name.startswith(("embed.", "head.")):
        return "embedding and head"
    if _is_expert(name):
        return "routed experts"
    local = local_name(name)
    if local.startswith("ffn.shared_experts."):
        return "shared experts"
    return _TARGET_PARTS.get(local.split(".")[0], "norms and hyper-connections")


def _summed(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    """Totals by key, largest first."""
    totals: Counter[str] = Counter()
    for key, value in pairs:
        totals[key] += value
    return dict(totals.most_common())


def _table_rows(title: str, values: dict[str, int]) -> Iterator[tuple[str, str]]:
    width = max(map(len, values), default=0)
    for number, (name, value) in enumerate(values.items()):
        yield "" if number else title, f"{name:<{width}}  {_bytes(value):>9}"


def _count(number: int) -> str:
    return _scaled(number, 1000, ("", "K", "M", "B", "T")).replace(" ", "")


def _bytes(number: int) -> str:
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < base:
            return f"{number:.1f} {unit}" if unit != units[0] else f"{number:.0f} {unit}"
        number /= base
    return f"{number:.1f} {units[-1]}"
