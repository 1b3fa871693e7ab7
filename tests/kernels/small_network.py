"""A random DeepSeek-V4 with its drafter, tiny in every dimension, because interpreted kernels are slow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compare import DEVICE
from torch import Tensor, nn

if find_spec("dspark_ray") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dspark_kernels.formats import quantise_fp4, quantise_fp8, unpack_keys
from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.checkpoint.layout import FP8_WEIGHTS, local_name
from dspark_ray.checkpoint.stored import is_quantised, keep_stored, scale_attribute
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.model.deepseek_v4 import DeepSeekV4, TargetOutput
from dspark_ray.model.layers import Gate
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.model.rows import Segment, build_rows
from dspark_ray.training.initial import initialise

VOCAB_SIZE = 301
GAMMA = 3
NUM_SEQUENCES = 2
PAGE_SIZE = 16
NUM_PAGES = 4
"""Pages of one sequence."""
MAX_ROWS = 24
ALL_KINDS = (0, 4, 8)
"""Compression ratios of a sliding, a CSA and an HCA layer."""


def config_of(ratios: tuple[int, ...]) -> ModelConfig:
    """A target with a layer for each of these ratios, and a drafter of one stage that sees the last two."""
    return ModelConfig.from_dict(
        {
            "model_type": "deepseek_v4",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "num_hidden_layers": len(ratios),
            "num_attention_heads": 4,
            "head_dim": 96,
            "qk_rope_head_dim": 32,
            "q_lora_rank": 128,
            "o_groups": 2,
            "o_lora_rank": 64,
            "sliding_window": 8,
            "compress_ratios": [*ratios, 0],
            "index_n_heads": 4,
            "index_head_dim": 32,
            "index_topk": 2,
            "n_routed_experts": 3,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "num_hash_layers": 1,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "routed_scaling_factor": 1.5,
            "rope_scaling": {"factor": 16, "original_max_position_embeddings": 64},
            "dspark_block_size": GAMMA,
            "dspark_noise_token_id": VOCAB_SIZE - 1,
            "dspark_target_layer_ids": list(range(len(ratios)))[-2:],
            "dspark_markov_rank": 16,
        }
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def network(dtype: torch.dtype, stored: bool, ratios: tuple[int, ...] = ALL_KINDS) -> tuple[DeepSeekV4, DSparkModule]:
    """Target and drafter, with weights as a release quantises them where `stored`."""
    config = config_of(ratios)
    with default_dtype(dtype):
        target, drafter = DeepSeekV4(config), DSparkModule(config)
        for seed, module in enumerate((target, drafter)):
            _fill(module, seed)
        with torch.no_grad():
            target.head.weight *= 0.5  # flat enough that shared noise often makes drafter and target agree
        if stored:
            target, drafter = _stored(target), _stored(drafter)
    target, drafter = target.to(DEVICE).requires_grad_(False), drafter.to(DEVICE).requires_grad_(False)
    drafter.share(target.embed.weight, target.head.weight)
    return target, drafter


def in_float32(module: Any) -> Any:
    """A copy that computes in float32, with the same weights."""
    copied = deepcopy(module)
    for part in copied.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dtype == torch.bfloat16:
                setattr(part, name, nn.Parameter(parameter.float(), requires_grad=False))
    return copied


@torch.no_grad()
def _fill(module: nn.Module, seed: int) -> None:
    """Values whose loss or misplacement changes results."""
    initialise(module, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 or name.endswith(("ape", "_fn")):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for gate in module.modules():
        if isinstance(gate, Gate) and gate.bias is not None and gate.weight.dtype != torch.float32:
            # Rounding to bfloat16 decides between experts that are nearly equal: here none are.
            gate.bias += 2 * torch.randperm(len(gate.bias), generator=generator)


def _stored(module: Any) -> Any:
    """The same network with linears in FP8 and routed experts in FP4."""
    with torch.device("meta"):
        kept = type(module)(module.config)
    keep_stored(kept, module.config, ParallelGroup(), _stored_dtype)
    kept.to_empty(device="cpu")
    parameters, dense = kept.state_dict(), module.state_dict()
    for name, values in dense.items():
        if not is_quantised(parameters[name]):
            parameters[name].copy_(values)
            continue
        owner, _, attribute = name.rpartition(".")
        quantise = quantise_fp4 if parameters[name].dtype == torch.int8 else quantise_fp8
        pairs = [quantise(matrix) for matrix in (values if values.dim() == 3 else [values])]
        for target, parts in zip(
            (name, f"{owner}.{scale_attribute(attribute)}"), zip(*pairs, strict=True), strict=True
        ):
            whole = torch.stack([part.view(torch.uint8) for part in parts])
            parameters[target].view(torch.uint8).copy_(whole if values.dim() == 3 else whole[0])
    return kept


def _stored_dtype(name: str) -> str:
    if ".ffn.experts." in name:
        return "I8"
    return "F8_E4M3" if local_name(name) in FP8_WEIGHTS else "BF16"


def new_cache(target: DeepSeekV4, packed: bool) -> CacheTensors:
    """A cache full of NaN: bytes of ones are NaN in every format of a packed key."""
    shape = CacheShape.of(target.config, GAMMA, PAGE_SIZE, NUM_SEQUENCES, MAX_ROWS)
    dtype = target.norm.weight.dtype
    tensors = CacheTensors(target.config, shape, NUM_SEQUENCES * NUM_PAGES, dtype, DEVICE, packed)
    for layer in tensors.layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor):
                tensor.fill_(255 if tensor.dtype == torch.uint8 else float("nan"))
    return tensors


def keys_in(tensors: CacheTensors, config: ModelConfig) -> dict[str, Tensor]:
    """Everything in a cache as numbers, by name."""
    return {
        f"layer {number} {name}": unpack_keys(tensor, config.head_dim, config.qk_rope_head_dim)
        if tensor.dtype == torch.uint8
        else tensor.float()
        for number, layer in enumerate(tensors.layers)
        for name, tensor in vars(layer).items()
        if isinstance(tensor, Tensor)
    }


def run(target: DeepSeekV4, cache: CacheTensors, pieces: list[Segment]) -> TargetOutput:
    """One forward of `pieces`."""
    return target(build_rows(pieces, cache.shape, DEVICE), cache)


def segment(sequence: int, start: int, count: int, draft: int = 0) -> Segment:
    """`count` tokens from `start` on; another `draft` puts other tokens in the same places."""
    tokens = [(37 * (start + n) + 101 * sequence + 53 * draft) % VOCAB_SIZE for n in range(count)]
    pages = [NUM_SEQUENCES * page + sequence for page in reversed(range(NUM_PAGES))]
    return Segment(slot=1 - sequence, start=start, token_ids=tokens, pages=pages)
