"""Calls of `route`, `moe` and `linear_fp8` at DeepSeek-V4-Flash shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dspark_kernels import gpu

_BFLOAT16 = torch.bfloat16
_D, _INNER, _EXPERTS, _TOP_K = 4096, 2048, 256, 6
_LINEARS = [
    (1024, 4096),
    (32768, 1024),
    (512, 4096),
    (8192, 4096),
    (4096, 8192),
    (2048, 4096),
    (4096, 2048),
    (4096, 12288),
]
"""(out, in) of the FP8 weights."""


def _rows(num_rows: int, width: int) -> Tensor:
    return torch.empty(num_rows, width, dtype=_BFLOAT16)


def _scale(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float8_e8m0fnu)


def _route(num_rows: int, hash_experts: bool) -> object:
    chosen = torch.empty(num_rows, _TOP_K, dtype=torch.int64) if hash_experts else None
    bias = None if hash_experts else torch.empty(_EXPERTS)
    return gpu.route(_rows(num_rows, _D), _rows(_EXPERTS, _D), bias, chosen, _TOP_K, 1.5, True)


def _moe(num_rows: int, kind: str) -> object:
    hidden, weights = _rows(num_rows, _D), torch.empty(num_rows, _TOP_K)
    experts = torch.empty(num_rows, _TOP_K, dtype=torch.int64)
    shapes = [(_EXPERTS, 2 * _INNER, _D), (_EXPERTS, _D, _INNER)]
    if kind == "plain":
        return gpu.moe(
            hidden, weights, experts, *(torch.empty(*shape, dtype=_BFLOAT16) for shape in shapes), 10.0, _EXPERTS
        )
    if kind == "fp8":
        w13, w2 = (torch.empty(*shape, dtype=torch.float8_e4m3fn) for shape in shapes)
        scales = [_scale(e, rows // 128, columns // 128) for e, rows, columns in shapes]
    else:
        w13, w2 = (torch.empty(e, rows, columns // 2, dtype=torch.int8) for e, rows, columns in shapes)
        scales = [_scale(e, rows, columns // 32) for e, rows, columns in shapes]
    return gpu.moe(hidden, weights, experts, w13, w2, 10.0, _EXPERTS, 0, *scales)


def _linear(num_rows: int, out_channels: int, in_channels: int) -> object:
    weight = torch.empty(out_channels, in_channels, dtype=torch.float8_e4m3fn)
    return gpu.linear_fp8(_rows(num_rows, in_channels), weight, _scale(-(-out_channels // 128), in_channels // 128))


def flash_calls() -> dict[str, Callable[[], object]]:
    """By name, for `compiling.compiled_kernels`."""
    calls: dict[str, Callable[[], object]] = {}
    for n in (6, 1536):
        calls[f"route [N={n}]"] = partial(_route, n, False)
        calls[f"route hashed [N={n}]"] = partial(_route, n, True)
        for kind in ("fp4", "fp8", "plain"):
            calls[f"moe {kind} [N={n}]"] = partial(_moe, n, kind)
        for shape in _LINEARS:
            calls[f"linear_fp8 {shape[0]}x{shape[1]} [N={n}]"] = partial(_linear, n, *shape)
    return calls
