"""Checks whether the bits of a row depend on the number of rows that an operation computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import CASES, EDITS_PER_ROW, FLASH, OPERATIONS, Case
from benchmarks.gpu.inputs import Args, Inputs
from benchmarks.gpu.kernels import WRITTEN, results_of
from benchmarks.gpu.records import RowBits

MOST_ROWS, FEW_ROWS = 263, 11
"""Primes, so that no other dimension of an argument is as large; FEW_ROWS in a dry run."""
COUNTS = (1, 2, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 129, 192, 257)
FEW_COUNTS = (1, 2, 7)

INTEGERS = ("accept_coupled", "admit_prefixes", "pack_rows")
"""Operations that sum no numbers."""
BY_REQUEST = ("markov_sample", "sparse_attention drafter")
"""Cases whose rows are whole blocks of drafts; elsewhere every request has one row."""
LIBRARY = ("torch.bmm wo_a", "torch.linear compressor", "torch.linear weights_proj")
"""Products that the model leaves to cuBLAS."""

JOBS = (*(op for op in OPERATIONS if op not in INTEGERS), "library")


def check(device: Device, job: str) -> Iterator[RowBits]:
    """All cases of one operation, or the library's products."""
    if job == "library":
        yield from (_compared(name, *_library_product(device, name), device) for name in LIBRARY)
        return
    yield from (_compared(case.name, *_of_kernel(device, case), device) for case in CASES if case.op == job)


def _of_kernel(device: Device, case: Case) -> tuple[Callable[[Args], tuple[Tensor, ...]], Args]:
    from dspark_kernels import gpu

    block = 2 if device.is_dry else FLASH.gamma
    gamma = block if case.name.startswith(BY_REQUEST) else 0
    args = Inputs(device.shapes(gamma), _most(device), device.torch).of(case)
    writes_pool = case.op in WRITTEN

    def call(args: Args) -> tuple[Tensor, ...]:
        results = results_of(getattr(gpu, case.op), case, args)
        return results[:1] if writes_pool else results

    return call, args


def _library_product(device: Device, name: str) -> tuple[Callable[[Args], tuple[Tensor, ...]], Args]:
    shapes = device.shapes(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device.torch) * shape[-1] ** -0.5).to(torch.bfloat16)

    if name == "torch.bmm wo_a":
        width = shapes.heads * shapes.head_dim // shapes.o_groups
        weights = normal(shapes.o_groups, shapes.o_lora, width)

        def grouped(args: Args) -> tuple[Tensor, ...]:
            return (torch.bmm(args[0].transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1),)

        return grouped, (normal(_most(device), shapes.o_groups, width),)
    outputs = 2 * shapes.head_dim if name.endswith("compressor") else shapes.index_heads
    weight = normal(outputs, shapes.hidden)
    return lambda args: (F.linear(args[0], weight),), (normal(_most(device), shapes.hidden),)


def _compared(name: str, call: Callable[[Args], tuple[Tensor, ...]], args: Args, device: Device) -> RowBits:
    """The first rows by themselves, in growing numbers."""
    counts = FEW_COUNTS if device.is_dry else COUNTS
    same_as_alone: list[bool] = []
    changed: list[int] = []
    alone: tuple[Tensor, ...] = ()
    before: tuple[Tensor, ...] = ()
    try:
        for count in counts:
            results = tuple(_bits(result) for result in call(first_rows(args, _most(device), count)))
            alone = alone or results
            before = before or results
            same_as_alone.append(all(torch.equal(now[:1], then[:1]) for now, then in zip(results, alone)))
            changed.append(max(_changed(now, then) for now, then in zip(results, before)))
            before = results
    except Exception as error:
        return RowBits(name, list(counts), same_as_alone, changed, f"{type(error).__name__}: {str(error)[:300]}")
    return RowBits(name, list(counts), same_as_alone, changed, "")


def first_rows(args: Args, most: int, count: int) -> Args:
    """Arguments for `count` rows out of those for `most`; tensors that all rows share stay as they are."""
    lengths = {most: count, most + 1: count + 1, most * EDITS_PER_ROW: count * EDITS_PER_ROW}

    def cut(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return first_rows(arg, most, count)
        if isinstance(arg, Tensor) and arg.dim() > 0:
            return arg[: lengths.get(len(arg), len(arg))]
        return arg

    return tuple(cut(arg) for arg in args)


def _bits(result: Tensor) -> Tensor:
    """As integers, so that NaN equals NaN and 0 differs from -0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()]
    return result.contiguous().view(integer)


def _changed(now: Tensor, then: Tensor) -> int:
    """Rows of `then` that have other bits in `now`; accept_rejection returns one more offset than rows."""
    count = min(len(now), len(then))
    return int((now[:count] != then[:count]).reshape(count, -1).any(1).sum())


def _most(device: Device) -> int:
    return FEW_ROWS if device.is_dry else MOST_ROWS
