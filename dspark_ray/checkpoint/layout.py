"""Map parameters to tensors of a checkpoint (docs/model.md, Checkpoint layout).

A parameter has the name of its tensor in the checkpoint, except for the routed experts of a layer, which are stacked:

    ffn.experts.w13 [E, 2I, d]   <-  ffn.experts.K.w1.weight [I, d] above ffn.experts.K.w3.weight [I, d]
    ffn.experts.w2  [E, d, I]    <-  ffn.experts.K.w2.weight [d, I]
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dspark_ray.config import ModelConfig
from dspark_ray.model.parallel import ParallelGroup

Range = tuple[int, int]
"""[start, stop)"""

FUSED_W13 = "ffn.experts.gate_up_proj"
FUSED_W2 = "ffn.experts.down_proj"
"""Names of experts [E, ...] in checkpoints that store them stacked."""

FP8_WEIGHTS = frozenset(
    {
        *(f"attn.{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")),
        *(f"ffn.shared_experts.{name}.weight" for name in ("w1", "w2", "w3")),
        "main_proj.weight",
    }
)
"""Weights of a layer or stage that the releases store in FP8."""

SCALES_OF_EXPERTS = ("ffn.experts.w13_scale", "ffn.experts.w2_scale")
"""Parameters that hold the scales of quantised experts."""

_PREFIX = re.compile(r"^(?:layers|mtp)\.\d+\.")

# Names in other programs and their official spelling; applied in order, at most once each.
_ALIASES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.attn\.norm\.weight$", ".attn.kv_norm.weight"),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.weight_scale_inv$", ".scale"),
    )
)


def official_name(name: str) -> str:
    """The official name of a tensor written by another program."""
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name, count=1)
    return name


def scale_name(name: str) -> str:
    """Name of the scales of a quantised weight."""
    return name.removesuffix(".weight") + ".scale"


def local_name(name: str) -> str:
    """A name without the prefix `layers.N.` or `mtp.N.`."""
    return _PREFIX.sub("", name)


@dataclass(frozen=True)
class TensorPart:
    """A region of one tensor in a checkpoint, and its place in a parameter."""

    name: str
    shape: tuple[int, ...]
    """Shape of the complete tensor, before quantisation."""
    region: tuple[Range, ...]
    """Ranges to read, one per dimension."""
    target: tuple[int | slice, ...] = ()
    """Index into the parameter; empty for the complete parameter."""


def full_region(shape: tuple[int, ...]) -> tuple[Range, ...]:
    """The region that covers a tensor."""
    return tuple((0, size) for size in shape)


def parts_of(
    module: nn.Module, config: ModelConfig, group: ParallelGroup, stored: Container[str] = ()
) -> Iterator[tuple[str, TensorPart]]:
    """(parameter or buffer name, part) for everything that a rank's target, or a drafter, loads.

    `stored` has the official names in the checkpoint, from which follows whether experts are stacked there.
    """
    shards = _shards(config)
    for name, parameter in module.state_dict(keep_vars=True).items():
        local = local_name(name)
        if local.endswith((".scale", *SCALES_OF_EXPERTS)):
            continue  # loaded with its weight
        if local == "ffn.experts.w13":
            parts = _gate_up_parts(name, parameter, config, _experts_of(name, config, group), stored)
        elif local == "ffn.experts.w2":
            parts = _down_parts(name, parameter, config, _experts_of(name, config, group), stored)
        else:
            shard = None if name.startswith("mtp.") else shards.get(local)
            parts = [_plain_part(name, parameter, shard, group)]
        for part in parts:
            yield name, part


@dataclass(frozen=True)
class _Shard:
    """A dimension that is split over ranks in units of `width` channels."""

    dim: int
    num_units: int
    width: int = 1

    def range(self, group: ParallelGroup) -> Range:
        first, stop = group.range(self.num_units)
        return first * self.width, stop * self.width


def _shards(config: ModelConfig) -> dict[str, _Shard]:
    """Parameters that are split over ranks; all others are replicated."""
    heads, groups, rank = config.num_attention_heads, config.o_groups, config.o_lora_rank
    width = config.moe_intermediate_size * config.n_shared_experts
    return {
        "embed.weight": _Shard(0, config.vocab_size),
        "head.weight": _Shard(0, config.vocab_size),
        "attn.attn_sink": _Shard(0, heads),
        "attn.wq_b.weight": _Shard(0, heads, config.head_dim),
        "attn.wo_a.weight": _Shard(0, groups, rank),
        "attn.wo_b.weight": _Shard(1, groups, rank),
        "ffn.shared_experts.w1.weight": _Shard(0, width),
        "ffn.shared_experts.w3.weight": _Shard(0, width),
        "ffn.shared_experts.w2.weight": _Shard(1, width),
    }


def _plain_part(name: str, parameter: Tensor, shard: _Shard | None, group: ParallelGroup) -> TensorPart:
    shape, region = list(parameter.shape), list(full_region(tuple(parameter.shape)))
    if shard is not None:
        shape[shard.dim] = shard.num_units * shard.width
        region[shard.dim] = shard.range(group)
    return TensorPart(name, tuple(shape), tuple(region))


def _experts_of(name: str, config: ModelConfig, group: ParallelGroup) -> Range:
    return (0, config.n_routed_experts) if name.startswith("mtp.") else group.range(config.n_routed_experts)


def _gate_up_parts(
    name: str, parameter: Tensor, config: ModelConfig, experts: Range, stored: Container[str]
) -> list[TensorPart]:
    prefix, width = name.removesuffix("ffn.experts.w13"), config.moe_intermediate_size
    if prefix + FUSED_W13 in stored:
        return [_fused_part(prefix + FUSED_W13, parameter, config, experts)]
    shape = (width, config.hidden_size)
    return [
        TensorPart(
            f"{prefix}ffn.experts.{expert}.{matrix}.weight", shape, full_region(shape), (expert - experts[0], rows)
        )
        for expert in range(*experts)
        for matrix, rows in (("w1", slice(0, width)), ("w3", slice(width, 2 * width)))
    ]


def _down_parts(
    name: str, parameter: Tensor, config: ModelConfig, experts: Range, stored: Container[str]
) -> list[TensorPart]:
    prefix = name.removesuffix("ffn.experts.w2")
    if prefix + FUSED_W2 in stored:
        return [_fused_part(prefix + FUSED_W2, parameter, config, experts)]
    shape = (config.hidden_size, config.moe_intermediate_size)
    return [
        TensorPart(f"{prefix}ffn.experts.{expert}.w2.weight", shape, full_region(shape), (expert - experts[0],))
        for expert in range(*experts)
    ]


def _fused_part(name: str, parameter: Tensor, config: ModelConfig, experts: Range) -> TensorPart:
    inner = tuple(parameter.shape[1:])
    return TensorPart(name, (config.n_routed_experts, *inner), (experts, *full_region(inner)))
