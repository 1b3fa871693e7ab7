"""Writes a target and its drafter in the official file layout, plain or quantised like a release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark_kernels.formats import FP8_SCALE_TILE, quantise_fp4, quantise_fp8
from dspark_ray.checkpoint.headers import INDEX_FILE
from dspark_ray.checkpoint.layout import FP8_WEIGHTS, local_name, scale_name
from dspark_ray.checkpoint.stored import is_quantised
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.model.deepseek_v4 import DeepSeekV4

Tensors = dict[str, Tensor]

_FLOAT32_ENDINGS = (".attn_sink", ".ape", ".gate.bias")

QUANTISATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": list(FP8_SCALE_TILE),
    "activation_scheme": "dynamic",
}


def save_checkpoint(
    directory: Path | str,
    model: DeepSeekV4,
    drafter: DSparkModule | None,
    raw_config: dict[str, Any],
    max_shard_bytes: int = 4 * 2**30,
    quantise: bool = False,
) -> None:
    """Write shards, index and config.json; `quantise` stores linears in FP8 and routed experts in FP4.

    Plain weights become BF16. Raises ValueError for one rank of several, which has only a part of the weights, and for
    weights that are kept quantised.
    """
    if model.group.size != 1:
        raise ValueError(f"tensor-parallel rank {model.group.rank} of {model.group.size}: expected the whole target")
    modules = [model] if drafter is None else [model, drafter]
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        if is_quantised(parameter):
            raise ValueError(f"{name} is kept quantised ({parameter.dtype}): expected dequantised weights")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    bundles = (bundle for module in modules for bundle in _bundles(module, quantise))
    _write_shards(directory, bundles, max_shard_bytes)
    _write_json(directory / "config.json", _config(raw_config, quantise))


def _bundles(module: nn.Module, quantise: bool) -> Iterator[Tensors]:
    """Tensors to be stored in the same shard: a weight, with its scale if it has one."""
    for name, parameter in module.state_dict().items():
        for official, values in _unstacked(name, parameter):
            yield _stored(official, values, quantise)


def _unstacked(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    local = local_name(name)
    if local not in ("ffn.experts.w13", "ffn.experts.w2"):
        yield name, parameter
        return
    prefix = name.rsplit(".", 1)[0]
    for expert, values in enumerate(parameter):
        parts = zip(("w1", "w3"), values.chunk(2)) if local.endswith("w13") else [("w2", values)]
        for part, weight in parts:
            yield f"{prefix}.{expert}.{part}.weight", weight


def _stored(name: str, values: Tensor, quantise: bool) -> Tensors:
    local = local_name(name)
    if quantise and local.startswith("ffn.experts."):
        weight, scale = quantise_fp4(values)
    elif quantise and local in FP8_WEIGHTS:
        weight, scale = quantise_fp8(values)
    else:
        # A copy, because safetensors refuses tensors that share memory.
        return {name: values.to("cpu", _plain_dtype(name, values), copy=True).contiguous()}
    return {name: weight.cpu().contiguous(), scale_name(name): scale.cpu().contiguous()}


def _plain_dtype(name: str, values: Tensor) -> torch.dtype:
    if not values.is_floating_point():
        return values.dtype
    is_float32 = local_name(name).startswith("hc_") or name.endswith(_FLOAT32_ENDINGS)
    return torch.float32 if is_float32 else torch.bfloat16


def _write_shards(directory: Path, bundles: Iterator[Tensors], max_shard_bytes: int) -> None:
    """Write shards one by one, then rename them once their number is known."""
    parts: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(bundles, max_shard_bytes):
        part = directory / f"model-{len(parts) + 1:05d}.part"
        save_file(shard, part, metadata={"format": "pt"})
        parts.append((part, list(shard)))
        total += _num_bytes(shard)
    weight_map: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(bundles: Iterator[Tensors], max_shard_bytes: int) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for bundle in bundles:
        if shard and size + _num_bytes(bundle) > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard |= bundle
        size += _num_bytes(bundle)
    if shard:
        yield shard


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _config(raw: dict[str, Any], quantise: bool) -> dict[str, Any]:
    """The configuration, with the quantisation of the written weights."""
    plain = {key: value for key, value in raw.items() if key not in ("quantization_config", "expert_dtype")}
    if not quantise:
        return plain
    return plain | {"quantization_config": QUANTISATION_CONFIG, "expert_dtype": "fp4"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
