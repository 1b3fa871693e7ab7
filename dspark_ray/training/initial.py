"""Initial values of a network that is trained from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_ray.model.layers import Gate


def initialise(model: nn.Module, seed: int, residual_scale: float = 1.0) -> None:
    """Fill every parameter of `model` in place; the same seed gives the same values.

    residual_scale shrinks the projections that write into the streams (wo_b and w2).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, generator, residual_scale)
        for module in model.modules():
            if isinstance(module, Gate) and module.tid2eid is not None:
                _fill_hash_table(module, generator)


def _fill(name: str, parameter: Tensor, generator: torch.Generator, residual_scale: float) -> None:
    leaf = name.rsplit(".", 1)[-1]
    if "norm" in name:
        parameter.fill_(1.0)
    elif name.endswith(("attn_base", "ffn_base")):
        _fill_mix_base(parameter, generator)
    elif leaf.endswith("_scale"):
        parameter.fill_(0.1)
    elif parameter.dim() == 1 or leaf == "ape":
        parameter.zero_()
    elif name.startswith("embed."):
        parameter.normal_(0.0, 1.0, generator=generator)
    else:
        writes_streams = name.endswith(("wo_b.weight", "experts.w2", "shared_experts.w2.weight"))
        std = parameter.shape[-1] ** -0.5 * (residual_scale if writes_streams else 1.0)
        parameter.normal_(0.0, std, generator=generator)


def _fill_mix_base(base: Tensor, generator: torch.Generator) -> None:
    """Streams start almost independent: a sublayer reads their mean and writes to all, and streams hardly mix."""
    m = next(m for m in range(1, 64) if (2 + m) * m == len(base))
    base.normal_(0.0, 0.5, generator=generator)
    base[2 * m :] += 3.0 * torch.eye(m).flatten()


def _fill_hash_table(gate: Gate, generator: torch.Generator) -> None:
    """Draw the experts of every token without replacement."""
    assert gate.tid2eid is not None
    config = gate.config
    scores = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
    gate.tid2eid.copy_(scores.argsort(dim=1)[:, : config.num_experts_per_tok])
