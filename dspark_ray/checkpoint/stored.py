"""Parameters kept in their quantised form, with their scales.

    X.weight [out, in] in E4M3                 X.scale [ceil(out/128), ceil(in/128)]
    ffn.experts.w13 [E, 2I, d] in E4M3         ffn.experts.w13_scale [E, 2I/128, ceil(d/128)]
    ffn.experts.w13 [E, 2I, d/2] in E2M1       ffn.experts.w13_scale [E, 2I, d/32]

A parameter stays quantised only if there is an operation for its form; others are dequantised when they are read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dspark_kernels.formats import ACTIVATION_GROUP, FP4_SCALE_TILE, FP8_SCALE_TILE
from dspark_ray.checkpoint.layout import FP8_WEIGHTS, TensorPart, local_name, parts_of
from dspark_ray.config import ModelConfig
from dspark_ray.model.parallel import ParallelGroup

SCALE_TILES = {"F8_E4M3": FP8_SCALE_TILE, "I8": FP4_SCALE_TILE}
"""(output, input) channels per scale, by safetensors' dtype of a quantised weight."""

_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
_LINEAR = FP8_WEIGHTS - {"attn.wo_a.weight"}
"""wo_a is one matrix per group and has no quantised product; the official program dequantises it too."""
_EXPERTS = ("ffn.experts.w13", "ffn.experts.w2")

StoredDtype = Callable[[str], str | None]
"""Name of a tensor -> its stored dtype, None if it is missing."""


def keep_stored(module: nn.Module, config: ModelConfig, group: ParallelGroup, dtype_of: StoredDtype) -> None:
    """Replace parameters of `module`, which must be on the meta device, by their stored form where possible."""
    parts_by_name: dict[str, list[TensorPart]] = {}
    for name, part in parts_of(module, config, group):
        parts_by_name.setdefault(name, []).append(part)
    stay = {name: dtype for name, parts in parts_by_name.items() if (dtype := _staying_dtype(name, parts, dtype_of))}
    for name, dtype in stay.items():
        # Either both products of an expert are quantised or none.
        if all(name.removesuffix(local_name(name)) + partner in stay for partner in _partners(name)):
            _keep(module, name, dtype)


def _partners(name: str) -> tuple[str, ...]:
    """Local names of parameters that must stay quantised together with this one."""
    return _EXPERTS if local_name(name) in _EXPERTS else ()


def _staying_dtype(name: str, parts: list[TensorPart], dtype_of: StoredDtype) -> str | None:
    """The stored dtype of a parameter that can stay quantised, else None."""
    dtypes = {dtype_of(part.name) for part in parts}
    dtype, local = dtypes.pop(), local_name(name)
    if dtypes or dtype not in SCALE_TILES:
        return None
    known = local in _EXPERTS or (local in _LINEAR and dtype == "F8_E4M3")
    return dtype if known and all(_is_computable(part, dtype) for part in parts) else None


def _is_computable(part: TensorPart, dtype: str) -> bool:
    """Whether a part is aligned to scale tiles, in tensor and parameter, and its input to activation groups."""
    for (start, stop), size, total in zip(part.region, SCALE_TILES[dtype], part.shape, strict=True):
        if start % size or (stop % size and stop != total):
            return False
    first, stop = part.region[-1]
    stacked = [index.start % SCALE_TILES[dtype][0] == 0 for index in part.target if isinstance(index, slice)]
    return (stop - first) % ACTIVATION_GROUP == 0 and all(stacked)


def _keep(module: nn.Module, name: str, dtype: str) -> None:
    owner, attribute = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    dense = owner.get_parameter(attribute).shape
    setattr(owner, attribute, _empty(_stored_shape(dense, dtype), _DTYPES[dtype]))
    setattr(owner, scale_attribute(attribute), _empty(scale_shape(dense, dtype), torch.float8_e8m0fnu))


def scale_attribute(weight: str) -> str:
    """Attribute of the scales of a parameter called `weight`."""
    return "scale" if weight == "weight" else f"{weight}_scale"


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter is kept in its quantised form."""
    return parameter.dtype in _DTYPES.values()


def scale_target(part: TensorPart, dtype: str) -> tuple[int | slice, ...]:
    """Index of the scales of `part` in their parameter."""
    rows = SCALE_TILES[dtype][0]
    return tuple(
        slice(index.start // rows, -(-index.stop // rows)) if isinstance(index, slice) else index
        for index in part.target
    )


def scale_shape(dense: torch.Size, dtype: str) -> tuple[int, ...]:
    """Shape of the scales of weights [..., out, in]."""
    *stack, rows, columns = dense
    tile_rows, tile_columns = SCALE_TILES[dtype]
    return (*stack, -(-rows // tile_rows), -(-columns // tile_columns))


def _stored_shape(dense: torch.Size, dtype: str) -> tuple[int, ...]:
    return (*dense[:-1], dense[-1] // 2) if dtype == "I8" else tuple(dense)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
