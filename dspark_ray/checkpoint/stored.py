"""Parameters that keep the form in which a checkpoint quantised them, with their scales beside them.

    X.weight [out, in] in E4M3                 X.scale [ceil(out/128), ceil(in/128)]
    ffn.experts.w13 [E, 2I, d] in E4M3         ffn.experts.w13_scale [E, 2I/128, ceil(d/128)]
    ffn.experts.w13 [E, 2I, d/2] in E2M1       ffn.experts.w13_scale [E, 2I, d/32]

Only what an operation can compute with stays so; everything else is dequantised when it is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dspark_kernels.formats import ACTIVATION_GROUP, FP4_BLOCK, FP8_BLOCK
from dspark_ray.checkpoint.layout import FP8_WEIGHTS, Piece, local_name, pieces_of
from dspark_ray.config import ModelConfig
from dspark_ray.model.parallel import ParallelGroup

BLOCKS = {"F8_E4M3": FP8_BLOCK, "I8": FP4_BLOCK}
"""Channels (output, input) under one scale, by the dtype of a quantised weight as safetensors spells it."""

_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
_LINEAR = FP8_WEIGHTS - {"attn.wo_a.weight"}
"""wo_a is one matrix per group, for which there is no quantised product: the official program dequantises it too."""
_EXPERTS = ("ffn.experts.w13", "ffn.experts.w2")

StoredDtype = Callable[[str], str | None]
"""dtype of a tensor of the checkpoint, None where it has no such tensor"""


def keep_stored(module: nn.Module, config: ModelConfig, group: ParallelGroup, dtype_of: StoredDtype) -> None:
    """Give parameters of `module`, which must be on the meta device, the form that their tensors are stored in."""
    pieces_by_name: dict[str, list[Piece]] = {}
    for name, piece in pieces_of(module, config, group):
        pieces_by_name.setdefault(name, []).append(piece)
    stay = {name: dtype for name, pieces in pieces_by_name.items() if (dtype := _staying_dtype(name, pieces, dtype_of))}
    for name, dtype in stay.items():
        # Both products of an expert are quantised, or none is.
        if all(name.removesuffix(local_name(name)) + partner in stay for partner in _partners(name)):
            _keep(module, name, dtype)


def _partners(name: str) -> tuple[str, ...]:
    """Parameters, as local names, without which this one cannot stay."""
    return _EXPERTS if local_name(name) in _EXPERTS else ()


def _staying_dtype(name: str, pieces: list[Piece], dtype_of: StoredDtype) -> str | None:
    """The stored dtype of a parameter that can stay as it is stored; None of another."""
    dtypes = {dtype_of(piece.name) for piece in pieces}
    dtype, local = dtypes.pop(), local_name(name)
    if dtypes or dtype not in BLOCKS:
        return None
    known = local in _EXPERTS or (local in _LINEAR and dtype == "F8_E4M3")
    return dtype if known and all(_is_computable(piece, dtype) for piece in pieces) else None


def _is_computable(piece: Piece, dtype: str) -> bool:
    """Whether a part begins and ends with a block of scales, in tensor and parameter, and its inputs can be rounded."""
    for (start, stop), size, total in zip(piece.region, BLOCKS[dtype], piece.shape, strict=True):
        if start % size or (stop % size and stop != total):
            return False
    first, stop = piece.region[-1]
    stacked = [part.start % BLOCKS[dtype][0] == 0 for part in piece.target if isinstance(part, slice)]
    return (stop - first) % ACTIVATION_GROUP == 0 and all(stacked)


def _keep(module: nn.Module, name: str, dtype: str) -> None:
    owner, attribute = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    dense = owner.get_parameter(attribute).shape
    setattr(owner, attribute, _empty(_stored_shape(dense, dtype), _DTYPES[dtype]))
    setattr(owner, scale_attribute(attribute), _empty(scale_shape(dense, dtype), torch.float8_e8m0fnu))


def scale_attribute(weight: str) -> str:
    """Name of the scales beside a parameter called `weight` in its module."""
    return "scale" if weight == "weight" else f"{weight}_scale"


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter keeps its stored form."""
    return parameter.dtype in _DTYPES.values()


def scale_target(piece: Piece, dtype: str) -> tuple[int | slice, ...]:
    """Where the scales of `piece` go, from where its weights go."""
    rows = BLOCKS[dtype][0]
    return tuple(
        slice(part.start // rows, -(-part.stop // rows)) if isinstance(part, slice) else part for part in piece.target
    )


def scale_shape(dense: torch.Size, dtype: str) -> tuple[int, ...]:
    """Shape of the scales of weights [..., out, in]."""
    *stack, rows, columns = dense
    row_block, column_block = BLOCKS[dtype]
    return (*stack, -(-rows // row_block), -(-columns // column_block))


def _stored_shape(dense: torch.Size, dtype: str) -> tuple[int, ...]:
    return (*dense[:-1], dense[-1] // 2) if dtype == "I8" else tuple(dense)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
