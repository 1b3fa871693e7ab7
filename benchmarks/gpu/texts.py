"""Texts on a GPU and on a CPU, and the time from the start of a process to the engine's first token."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from benchmarks.gpu.comparisons import PLAIN, SPECULATIVE
from benchmarks.gpu.device import Device
from benchmarks.gpu.engines import MAX_REQUESTS, DType, build, held_out_requests, run
from benchmarks.gpu.records import Record, StartUp, Text, TextRun

MAX_TOKENS, FEW_TOKENS = 200, 8
"""FEW_TOKENS, and four requests, in a dry run."""


def texts(device: Device, place: str, dtype: DType, steps: str) -> Iterator[Record]:
    """The same requests without speculation and with it; `place` is gpu or cpu, `steps` launched or replayed."""
    where = device.torch if place == "gpu" else torch.device("cpu")
    requests = held_out_requests(4 if device.is_dry else MAX_REQUESTS, FEW_TOKENS if device.is_dry else MAX_TOKENS)
    for kind in (PLAIN, SPECULATIVE):
        name = f"{place} {dtype} {steps} {kind}"
        engine = build(device, where, dtype, replayed=steps == "replayed", speculation=kind == SPECULATIVE)
        run(engine, held_out_requests(1, FEW_TOKENS))  # compiles what was not compiled yet
        started = time.perf_counter()
        output = run(engine, requests)
        seconds = time.perf_counter() - started
        engine.close()
        for request in requests:
            yield Text(name, int(request.request_id), output.token_ids[request.request_id])
        num_tokens = sum(map(len, output.token_ids.values()))
        accepted = output.accepted.mean if kind == SPECULATIVE else None
        yield TextRun(name, num_tokens, num_tokens / seconds, accepted)


def start_up(device: Device, cache: str) -> Iterator[StartUp]:
    """An engine as it serves, in bfloat16 with recorded steps; seconds count from the start of this process."""
    process_started, imported = psutil.Process().create_time(), time.time()
    engine = build(device, device.torch, "bfloat16", replayed=True, speculation=True)
    ready = time.time()
    [request] = held_out_requests(1, FEW_TOKENS)
    engine.add_request(request)
    while not any(output.token_ids for output in engine.step().sequences):
        pass
    first_token = time.time()
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    yield StartUp(
        cache,
        round(imported - process_started, 2),
        round(ready - process_started, 2),
        round(first_token - process_started, 2),
        sum(1 for _ in folder.rglob("*.cubin")),
    )
