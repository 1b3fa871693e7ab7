"""Times of the tiles that launchers choose and of others: mhc_read by rows, and the experts of one rank of eight."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import Case
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.records import TileTime

CHOSEN = "as chosen"
JOBS = ("mhc_read", "moe")

_MHC_ROWS = (1, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 128, 192)
_MHC_TILES: dict[str, tuple[int, int] | None] = {CHOSEN: None, "16 rows": (16, 128), "64 rows": (64, 128)}
"""(rows, columns) of a step of the projection."""
_MOE_ROWS = (6, 12, 24, 32, 40, 48, 96, 192, 256, 384)
_MOE_TILES: dict[str, str | None] = {CHOSEN: None, "few": "_FEW_TILINGS", "many": "_MANY_TILINGS"}
"""Tables of `dspark_kernels.gpu.moe`."""
_RANKS = 8
_DRY_ROWS = (1, 3)


def times(device: Device, op: str) -> Iterator[TileTime]:
    """Of `mhc_read` or `moe`."""
    for rows, tile, call in _calls(device, op):
        try:
            with torch.inference_mode():
                yield TileTime(op, rows, tile, device.microseconds(call), "")
        except Exception as error:
            yield TileTime(op, rows, tile, None, f"{type(error).__name__}: {str(error)[:300]}")


def run_once(device: Device, op: str) -> None:
    """Fill Triton's cache with the kernels that `times` needs."""
    with torch.inference_mode():
        for _, _, call in _calls(device, op):
            call()


Call = tuple[int, str, Callable[[], object]]
"""(rows, tile, the call), to be made before the next one is asked for"""


def _calls(device: Device, op: str) -> Iterator[Call]:
    yield from _mhc_calls(device) if op == "mhc_read" else _moe_calls(device)


def _mhc_calls(device: Device) -> Iterator[Call]:
    from dspark_kernels import gpu

    module = importlib.import_module("dspark_kernels.gpu.mhc")
    for rows in _DRY_ROWS if device.is_dry else _MHC_ROWS:
        args = Inputs(device.shapes(0), rows, device.torch).of(Case("mhc_read", ""))
        for name, tile in _MHC_TILES.items():
            with _replaced(module, "_tile_of", _always(tile)):
                yield rows, name, partial(gpu.mhc_read, *args)


def _moe_calls(device: Device) -> Iterator[Call]:
    """FP4 experts of rank 0 of eight: an eighth of the experts, choices among all of them."""
    from dspark_kernels import gpu

    module = importlib.import_module("dspark_kernels.gpu.moe")
    for rows in _DRY_ROWS if device.is_dry else _MOE_ROWS:
        inputs = Inputs(device.shapes(0), rows, device.torch)
        hidden, weights, experts, w13, w2, *numbers, w13_scale, w2_scale = inputs.of(Case("moe", "FP4"))
        local = len(w13) // _RANKS
        stored = [weight[:local].clone() for weight in (w13, w2, w13_scale, w2_scale)]
        del w13, w2, w13_scale, w2_scale
        args = (hidden, weights, experts, *stored[:2], *numbers, *stored[2:])
        for name, table in _MOE_TILES.items():
            # The moe of FP4 weights alone: its blocks are those of that format.
            blocks = _always(getattr(module, table)[module.FP4]) if table else None
            with _replaced(module, "_tiling_of", blocks):
                yield rows, name, partial(gpu.moe, *args)


def _always(result: object | None) -> Callable[..., Any] | None:
    """A function of any arguments that returns `result`; None for None."""
    return None if result is None else lambda *_: result


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any] | None) -> Iterator[None]:
    """`module.name` is `function` within; None leaves it as it is."""
    before = getattr(module, name)
    if function is not None:
        setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)
