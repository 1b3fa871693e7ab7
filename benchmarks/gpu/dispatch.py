"""Measures the overhead of calling an operation by name on a CPU: `dspark_kernels.<op>`, which looks up the device of
its tensors, over `reference.<op>`.

    python -m benchmarks.gpu.dispatch              on one core; writes benchmarks/results/dispatch.json

One engine on the tiny checkpoint decodes the same requests in short turns, with the package's operations and with the
references in their place. Ratios are those of pairs of turns, so that other load on the machine affects both sides.
Seconds are CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import dspark_kernels
from benchmarks.harness import report
from dspark_kernels import reference
from dspark_ray.config import EngineConfig
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import build_engine
from dspark_ray.types import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "deployments" / "tiny"
RESULT = ROOT / "benchmarks" / "results" / "dispatch.json"

NUM_REQUESTS = (1, 16)
PAIRS = 300
_STEPS_PER_TURN = 2
_PAIRS_PER_TEXT = 30
"""Before requests start again: 120 steps of 6 tokens at most stay within the longest text."""
_WARM_STEPS = 5
_PROMPT_TOKENS = 32
_CALLS = 20000
"""Of one operation in a row, to time a single call."""

Operations = dict[str, Callable[..., Any]]


def dispatched() -> Operations:
    """By name, as the package offers them: those that have a kernel, too."""
    offered = {name: getattr(dspark_kernels, name) for name in dspark_kernels.__all__}
    return {name: function for name, function in offered.items() if hasattr(function, "__wrapped__")}


def direct() -> Operations:
    """The references of the same names."""
    return {name: getattr(reference, name) for name in dispatched()}


@contextmanager
def bound(operations: Operations) -> Iterator[None]:
    """Bind these in place of `dspark_kernels.<op>`."""
    before = {name: getattr(dspark_kernels, name) for name in operations}
    for name, function in operations.items():
        setattr(dspark_kernels, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dspark_kernels, name, function)


def add_requests(engine: Engine, count: int, generator: random.Random) -> None:
    """Requests that do not end by themselves."""
    vocabulary = engine.model_config.vocab_size
    for number in range(count):
        prompt = tuple(generator.randrange(2, vocabulary - 1) for _ in range(_PROMPT_TOKENS))
        longest = engine.config.max_model_len - _PROMPT_TOKENS
        sampling = SamplingParams(temperature=1.0, max_tokens=longest, seed=generator.randrange(2**31), ignore_eos=True)
        engine.add_request(Request(request_id=f"{number}", prompt_token_ids=prompt, sampling=sampling))


def end_requests(engine: Engine) -> None:
    """Leave the engine empty."""
    for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.abort(sequence.request.request_id)
    while engine.has_unfinished():
        engine.step()


def seconds_per_step(engine: Engine, num_requests: int) -> float:
    """Of the processor, in one turn."""
    started = time.process_time()
    for _ in range(_STEPS_PER_TURN):
        record = engine.step().record
        assert record is not None
        assert record.num_decoding == num_requests
        assert record.num_prefill_rows == 0
    return (time.process_time() - started) / _STEPS_PER_TURN


def measure(engine: Engine, num_requests: int, num_pairs: int) -> dict[str, Any]:
    """Seconds of both arms, and their ratio pair by pair."""
    arms = {"dispatched": dispatched(), "direct": direct()}
    generator = random.Random(num_requests)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    calls = 0
    for pair in range(num_pairs):
        if pair % _PAIRS_PER_TEXT == 0:
            end_requests(engine)
            add_requests(engine, num_requests, generator)
            for _ in range(_WARM_STEPS):
                engine.step()
            calls = num_calls(engine)
        for name in generator.sample(list(arms), len(arms)):
            with bound(arms[name]):
                seconds[name].append(seconds_per_step(engine, num_requests))
    end_requests(engine)
    ratios = [over / under for over, under in zip(seconds["dispatched"], seconds["direct"], strict=True)]
    return {
        "cpu_ms_per_step": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "pairs": num_pairs,
        "calls_per_step": calls,
    }


def num_calls(engine: Engine) -> int:
    """Operations that a step calls."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with bound({name: counting(name, function) for name, function in dispatched().items()}):
        engine.step()
    return counts.total()


def microseconds_per_call(turns: int = 15) -> float:
    """That looking where the tensors are adds to the smallest operation there is."""
    args = (torch.zeros(1), torch.zeros(1), 1.0)
    seconds: dict[str, list[float]] = {"dispatched": [], "direct": []}
    for _ in range(turns):
        for name, operations in (("dispatched", dispatched()), ("direct", direct())):
            swiglu = operations["swiglu"]
            started = time.process_time()
            for _ in range(_CALLS):
                swiglu(*args)
            seconds[name].append((time.process_time() - started) / _CALLS)
    return 1e6 * (min(seconds["dispatched"]) - min(seconds["direct"]))


def describe(num_requests: int, figures: dict[str, Any], call_microseconds: float) -> str:
    """One number of requests as a line."""
    ratio, (low, high) = figures["ratio"], figures["ratio_quartiles"]
    milliseconds = figures["cpu_ms_per_step"]
    share = figures["calls_per_step"] * call_microseconds / (1e3 * milliseconds["direct"])
    return (
        f"{num_requests} requests: {milliseconds['dispatched']:.2f} ms a step, {milliseconds['direct']:.2f} directly;"
        f" ratio {ratio['median']:.4f} (half of the pairs {low:.4f} .. {high:.4f},"
        f" all {ratio['min']:.4f} .. {ratio['max']:.4f}), {figures['calls_per_step']} calls are {share:.2%} of a step"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.dispatch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = build_engine(CHECKPOINT, EngineConfig(schedule="fixed", max_num_seqs=32))
    results: dict[str, Any] = report.provenance(ROOT, " ".join(["python -m benchmarks.gpu.dispatch", *sys.argv[1:]]))
    with torch.no_grad():
        results["microseconds_per_call"] = microseconds_per_call()
    print(f"{results['microseconds_per_call']:.2f} us a call", flush=True)
    results["by_requests"] = {}
    for num_requests in NUM_REQUESTS:
        figures = measure(engine, num_requests, arguments.pairs)
        results["by_requests"][str(num_requests)] = figures
        print(describe(num_requests, figures, results["microseconds_per_call"]), flush=True)
    engine.close()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
