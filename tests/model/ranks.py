"""One process of the tensor-parallel test; imported by spawned processes, so it imports little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from serving import Serving
from torch import Tensor

from dspark_ray.config import ModelConfig
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import ParallelGroup

SIZES = (2, 4)


def work(model: DeepSeekV4) -> tuple[Tensor, Tensor]:
    """(logits [N, V / size], features [N, T*d]) of a prompt, then a verify block beside a second prompt."""
    serving = Serving(model, num_sequences=2, gamma=5)
    text = [(7 * position) % model.config.vocab_size for position in range(90)]
    outputs = [serving.output({0: (0, text[:50])}), serving.output({1: (0, text[:33]), 0: (50, text[50:55])})]
    features = [output.context_features for output in outputs if output.context_features is not None]
    return torch.cat([model.logits(output.hidden) for output in outputs]), torch.cat(features)


def run_rank(rank: int, folder: str) -> None:
    """Join a world of max(SIZES) ranks, work in a group of each size, save what this rank has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=rank, world_size=max(SIZES))
    config: ModelConfig = torch.load(Path(folder) / "config.pt", weights_only=False)
    state = torch.load(Path(folder) / "weights.pt")
    for size in SIZES:
        handle = dist.new_group(list(range(size)))
        if rank < size:
            model = slice_of(config, state, ParallelGroup(rank, size, handle))
            torch.save(work(model), Path(folder) / f"{size}-{rank}.pt")
    dist.destroy_process_group()


def slice_of(config: ModelConfig, state: dict[str, Tensor], group: ParallelGroup) -> DeepSeekV4:
    """One rank's model: along the dimension that is split, its part begins where those of lower ranks end."""
    with torch.device("meta"):
        lower = [DeepSeekV4(config, replace(group, rank=rank)).state_dict() for rank in range(group.rank)]
    model = DeepSeekV4(config, group)
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parts = {}
    for name, whole in state.items():
        split = [dim for dim in range(whole.dim()) if whole.shape[dim] != mine[name][dim]]
        for dim in split:
            whole = whole.narrow(dim, sum(other[name].shape[dim] for other in lower), mine[name][dim])
        parts[name] = whole
    model.load_state_dict(parts)
    return model.requires_grad_(False)
