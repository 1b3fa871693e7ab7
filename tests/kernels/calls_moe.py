"""Calls of `route`, `moe` and `linear_fp8`, to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from model_shapes import FLASH, MODELS, ROWS, TOP_K, Model
from torch import Tensor

from dspark_kernels import gpu

_BFLOAT16 = torch.bfloat16
_RANKS = 8
"""Ranks that split Flash's experts in an additional call of `moe`."""


def _rows(num_rows: int, width: int) -> Tensor:
    return torch.empty(num_rows, width, dtype=_BFLOAT16)


def _scale(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float8_e8m0fnu)


def _route(model: Model, num_rows: int, hash_experts: bool) -> object:
    chosen = torch.empty(num_rows, TOP_K, dtype=torch.int64) if hash_experts else None
    bias = None if hash_experts else torch.empty(model.experts)
    gate = _rows(model.experts, model.hidden)
    return gpu.route(_rows(num_rows, model.hidden), gate, bias, chosen, TOP_K, 1.5, True)


def _moe(model: Model, num_rows: int, kind: str, local_experts: int) -> object:
    hidden, weights = _rows(num_rows, model.hidden), torch.empty(num_rows, TOP_K)
    experts = torch.empty(num_rows, TOP_K, dtype=torch.int64)
    shapes = [
        (local_experts, 2 * model.expert_width, model.hidden),
        (local_experts, model.hidden, model.expert_width),
    ]
    scales: list[Tensor] = []
    if kind == "plain":
        w13, w2 = (torch.empty(*shape, dtype=_BFLOAT16) for shape in shapes)
    elif kind == "fp8":
        w13, w2 = (torch.empty(*shape, dtype=torch.float8_e4m3fn) for shape in shapes)
        scales = [_scale(e, rows // 128, columns // 128) for e, rows, columns in shapes]
    else:
        w13, w2 = (torch.empty(e, rows, columns // 2, dtype=torch.int8) for e, rows, columns in shapes)
        scales = [_scale(e, rows, columns // 32) for e, rows, columns in shapes]
    return gpu.moe(hidden, weights, experts, w13, w2, 10.0, model.experts, 0, *scales)


def _linear(num_rows: int, out_channels: int, in_channels: int) -> object:
    weight = torch.empty(out_channels, in_channels, dtype=torch.float8_e4m3fn)
    return gpu.linear_fp8(_rows(num_rows, in_channels), weight, _scale(-(-out_channels // 128), in_channels // 128))


def calls() -> dict[str, Callable[[], object]]:
    """Calls to compile, by name and number of rows."""
    found: dict[str, Callable[[], object]] = {}
    for model in MODELS:
        for n in model.rows:
            found[f"route {model.name} [N={n}]"] = partial(_route, model, n, False)
            found[f"route {model.name} hashed [N={n}]"] = partial(_route, model, n, True)
            found[f"moe {model.name} fp4 [N={n}]"] = partial(_moe, model, n, "fp4", model.local_experts)
            for out, width in model.linears:
                found[f"linear_fp8 {model.name} {out}x{width} [N={n}]"] = partial(_linear, n, out, width)
    for n in ROWS:
        for kind in ("fp8", "plain"):
            found[f"moe {FLASH.name} {kind} [N={n}]"] = partial(_moe, FLASH, n, kind, FLASH.experts)
        share = FLASH.experts // _RANKS
        found[f"moe {FLASH.name} fp4, 1 of {_RANKS} ranks [N={n}]"] = partial(_moe, FLASH, n, "fp4", share)
    return found
