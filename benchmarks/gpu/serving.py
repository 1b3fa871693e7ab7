"""Checks of a serving engine: waits in recorded steps, bodies of operations, and rows of NaN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

import dspark_kernels
from benchmarks.gpu.device import Device
from benchmarks.gpu.engines import build, held_out_requests, run
from benchmarks.gpu.floors import OPERATIONS
from benchmarks.gpu.kernels import of_tests as kernel_tests
from benchmarks.gpu.records import NanDraw, RecordedStep, ServedBy
from dspark_kernels import reference
from dspark_kernels.philox import STREAM_SAMPLE
from dspark_ray.config import VerificationMode

_VERIFICATIONS: tuple[VerificationMode, ...] = ("coupled", "rejection")


# Recorded steps.


def recorded_steps(device: Device) -> Iterator[RecordedStep]:
    """Each function that is recorded: once to compile it, once with waits refused, then recorded and replayed."""
    with torch.inference_mode():
        yield from _target_steps(device)
        yield _draft_step(device)


def _target_steps(device: Device) -> Iterator[RecordedStep]:
    from dspark_ray.runner.decode import TargetGraphs

    small = kernel_tests("small_network")
    target, _ = small.network(torch.float32, False)
    cache = small.new_cache(target, packed=False)
    small.run(target, cache, [small.segment(0, 0, 7), small.segment(1, 0, 4)])
    graphs = TargetGraphs(target, cache, small.NUM_SEQUENCES, small.NUM_PAGES * small.PAGE_SIZE, device.capture())
    steps = {5: [small.segment(0, 7, 3), small.segment(1, 4, 2)], 8: [small.segment(0, 7, 4), small.segment(1, 4, 4)]}
    for size, pieces in steps.items():
        waits = ""
        for length in graphs._lengths:
            waits = waits or _waits(device, partial(graphs._forward, (size, length)))
        finite = False if waits else bool(graphs.run(pieces).hidden.isfinite().all())
        yield RecordedStep("target", size, waits, finite)


def _draft_step(device: Device) -> RecordedStep:
    from dspark_ray.drafters.pools import DraftPools
    from dspark_ray.runner.decode import DraftGraphs

    small = kernel_tests("small_network")
    _, module = small.network(torch.float32, False)
    pools = DraftPools(module, small.NUM_SEQUENCES)
    for pool in pools.tensors:
        pool.zero_()
    graphs = DraftGraphs(module, pools, small.NUM_SEQUENCES, device.capture())
    waits = _waits(device, lambda: graphs._draft(2))
    finite = False
    if not waits:
        anchors, starts, slots, seeds = (
            torch.tensor(x, device=device.torch) for x in ([7, 9], [13, 5], [0, 1], [3, 4])
        )
        temperatures = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device.torch)
        finite = bool(graphs.run(anchors, starts, slots, seeds, temperatures)[1].isfinite().all())
    return RecordedStep("drafter", 2, waits, finite)


def _waits(device: Device, function: Callable[[], object]) -> str:
    function()
    try:
        with device.refusing_waits():
            function()
    except RuntimeError as error:
        return str(error)[:300]
    return ""


# Which body of an operation serves.


def served_by(device: Device) -> Iterator[ServedBy]:
    """Counts calls while an engine serves greedy, sampled, filtered and penalised requests with logprobs."""
    for verification in _VERIFICATIONS:
        kernel_calls: Counter[str] = Counter()
        reference_calls: Counter[str] = Counter()
        with _counted(kernel_calls, reference_calls):
            engine = build(
                device, device.torch, "bfloat16", replayed=False, speculation=True, verification=verification
            )
            run(engine, held_out_requests(4, 12, every_kind_of_sampling=True))
            engine.close()
        for op in OPERATIONS:
            yield ServedBy(op, verification, kernel_calls[op], reference_calls[op])


@contextmanager
def _counted(kernel_calls: Counter[str], reference_calls: Counter[str]) -> Iterator[None]:
    """Rebuild every operation of dspark_kernels from bodies that count their calls."""
    from dspark_kernels import gpu

    def counting(function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return counted

    before = {op: (getattr(dspark_kernels, op), getattr(gpu, op)) for op in OPERATIONS}
    try:
        for op in OPERATIONS:
            setattr(gpu, op, counting(getattr(gpu, op), kernel_calls))
            counted_reference = counting(getattr(reference, op), reference_calls)
            setattr(dspark_kernels, op, dspark_kernels._operation(counted_reference))
        yield
    finally:
        for op, (operation, kernel) in before.items():
            setattr(dspark_kernels, op, operation)
            setattr(gpu, op, kernel)


# Rows of NaN.


def nan_draws(device: Device) -> Iterator[NanDraw]:
    """A row of NaN, then a good one, through kernel and reference."""
    from dspark_kernels import gpu

    for body, module in (("kernel", gpu), ("reference", reference)):
        for op, draw in _DRAWS.items():
            try:
                ids = draw(module, device)
                yield NanDraw(op, body, _integers(ids[0]), _integers(ids[1]), "")
            except Exception as error:
                yield NanDraw(op, body, [], [], f"{type(error).__name__}: {str(error)[:300]}")


def _integers(ids: Tensor) -> list[int]:
    return [int(number) for number in ids.reshape(-1).tolist()]


def _gumbel_argmax(module: Any, device: Device) -> Tensor:
    logits = _with_nan_row(2, 300, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device.torch)
    temperatures = torch.ones(2, dtype=torch.float64, device=device.torch)
    ids: Tensor = module.gumbel_argmax(logits, temperatures, zeros, zeros, STREAM_SAMPLE, 5)[1]
    return ids


def _markov_sample(module: Any, device: Device) -> Tensor:
    logits = _with_nan_row(2, 3, 300, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device.torch)
    temperatures = torch.ones(2, dtype=torch.float64, device=device.torch)
    w1, w2 = (_normal(300, 16, device=device).to(torch.bfloat16) for _ in range(2))
    ids: Tensor = module.markov_sample(logits, zeros, w1, w2, temperatures, zeros, zeros, STREAM_SAMPLE)[0]
    return ids


def _route(module: Any, device: Device) -> Tensor:
    hidden = _with_nan_row(2, 128, device=device).to(torch.bfloat16)
    gate, bias = _normal(16, 128, device=device).to(torch.bfloat16), _normal(16, device=device)
    experts: Tensor = module.route(hidden, gate, bias, None, 4, 1.5, True)[1]
    return experts


_DRAWS: dict[str, Callable[[Any, Device], Tensor]] = {
    "gumbel_argmax": _gumbel_argmax,
    "markov_sample": _markov_sample,
    "route": _route,
}


def _normal(*shape: int, device: Device) -> Tensor:
    return torch.randn(*shape, device=device.torch)


def _with_nan_row(*shape: int, device: Device) -> Tensor:
    values = _normal(*shape, device=device)
    values[0] = torch.nan
    return values
