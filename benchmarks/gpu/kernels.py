"""Measures every kernel at DeepSeek-V4-Flash's shapes on a GPU, beside its floor and its reference under torch.compile.

    python -m benchmarks.gpu.kernels                              measure all that benchmarks/results/kernels.json lacks
    python -m benchmarks.gpu.kernels --ops mhc_read,moe --requests 1,32
    python -m benchmarks.gpu.kernels --without-baseline           without the references, which take long to compile
    python -m benchmarks.gpu.kernels --readme                     fill the tables of kernels/README.md, measure nothing
    python -m benchmarks.gpu.kernels --interpret-smoke            on a CPU: a test of this program without measurements

Needs torch and triton; where this project is not installed, set PYTHONPATH=kernels.

First every case runs in a process of its own, several at a time: the kernel is compared with its reference on the
inputs that are timed later, and compilers fill their caches. Cases whose results are equal are then timed one after the
other in one process. Kernel and compiled reference take turns; both are replayed as CUDA graphs, over more copies of
the inputs than fit into L2. Results are written after every measurement, and a second run of the same commit continues
from them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import floors as kernel_floors
from benchmarks.gpu.floors import CASES, FLASH, OPERATIONS, REQUESTS, TINY, Card, Case
from benchmarks.gpu.inputs import Args, Inputs
from benchmarks.harness import report
from dspark_kernels import reference

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "kernels.json"
README = ROOT / "kernels" / "README.md"

# Timing: all cases at five numbers of requests take ten minutes of a GPU.
FLUSH_BYTES = 256 * 2**20
COPIED_BYTES = 4 * 2**30
"""Largest total size of the copies of a case's inputs."""
MOST_COPIES = 32
REPLAY_SECONDS = 400e-6
"""Aim for the duration of a replay: starting one takes about a percent of this."""
TURNS = 11
WARM_SECONDS = 0.05
"""Clocks are low after idle time."""
MINUTES = 9.0
WORKERS = 12
"""Most of the preparation is compiling, one core per case."""
PREPARE_SECONDS = 300
"""Of one case."""
PREPARE_SHARE = 0.6
"""Largest share of the time; cases that are not prepared by then are left for the next run."""
LATER = "no time left"

SAME_INTEGERS = 0.98
"""Share of token ids and bytes that must equal the reference's: scores may differ by less than rounding errors."""
EAGER = ("moe",)
"""References that torch.compile is not asked to compile: a loop over experts, each looked up by the host."""
WRITTEN = {"compress": (6, 7), "store_raw": (4, 5), "store_window": (5, 6)}
"""Of operations that return nothing: their arguments that are the pool and the rows of it to write."""


def copied(args: Args) -> Args:
    """A copy in separate memory."""

    def copy(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return copied(arg)
        return arg.clone() if isinstance(arg, Tensor) else arg

    return tuple(copy(arg) for arg in args)


def num_bytes(values: Iterable[Any]) -> int:
    """Of the tensors among them."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def results_of(function: Callable[..., Any], case: Case, args: Args) -> tuple[Tensor, ...]:
    """What a call returns; of one that writes a pool, the rows that it should write, and the pool without them."""
    if case.op not in WRITTEN:
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)
    args = copied(args)
    assert function(*args) is None
    pool, rows = (args[place] for place in WRITTEN[case.op])
    rows = rows[rows >= 0]
    return pool[rows], pool.index_fill(0, rows, 0)


# Equality.


class Different(Exception):
    """The results of a kernel and its reference differ."""


def compare(case: Case, args: Args, gpu: ModuleType) -> None:
    """Raise Different unless the kernel is within the tests' bounds of its reference.

    Rows whose token ids differ are left out where numbers are compared: they belong to another token.
    """
    pairs = list(zip(*(results_of(getattr(module, case.op), case, args) for module in (gpu, reference)), strict=True))
    same_rows: list[Tensor] = []
    for actual, expected in pairs:
        if expected.is_floating_point():
            continue
        same = _chosen_by_both(actual, expected) if case.op == "indexer_topk" else actual == expected
        share = same.double().mean().item() if same.numel() else 1.0
        if share < SAME_INTEGERS:
            raise Different(f"{share:.4f} of the integers are the reference's: expected {SAME_INTEGERS}")
        same_rows.append(same.flatten(1).all(1) if same.dim() > 1 else same)
    for actual, expected in pairs:
        if not expected.is_floating_point():
            continue
        for rows in same_rows:
            actual, expected = actual[rows], expected[rows]
        try:
            of_tests("compare").assert_close(actual, expected, torch.bfloat16 if case.op == "moe" else None)
        except AssertionError as error:
            raise Different(str(error)) from None


@cache
def of_tests(name: str) -> ModuleType:
    """A module that kernel tests share."""
    folder = str(ROOT / "tests" / "kernels")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _chosen_by_both(actual: Tensor, expected: Tensor) -> Tensor:
    """[N, K] whether an ascending row of `actual` has what is in the same row of `expected`."""
    expected = expected.contiguous()
    places = torch.searchsorted(expected, actual.contiguous()).clamp(max=expected.shape[1] - 1)
    return expected.gather(1, places) == actual


# Preparation, in one process per case, so that a crashing kernel affects no other case.


def prepare(case: Case, requests: int, device: torch.device, with_baseline: bool) -> dict[str, Any]:
    """Compare, compile, and determine how each side can be replayed."""
    from dspark_kernels import gpu

    args = Inputs(FLASH, requests, device).of(case)
    try:
        compare(case, args, gpu)
        check = "equal"
    except torch.OutOfMemoryError:
        check = "not compared: out of memory"
    functions: dict[str, Callable[..., Any]] = {"kernel": getattr(gpu, case.op)}
    how = ""
    if with_baseline:
        functions["baseline"], how = baseline_of(case, args)
    graphs = {name: _can_record(function, args) for name, function in functions.items()}
    return {"check": check, "baseline": how, "graphs": graphs}


def baseline_of(case: Case, args: Args) -> tuple[Callable[..., Any], str]:
    """The reference, compiled where that is possible, and what it is.

    In the default mode: autotuning takes minutes, and matrix products are cuBLAS's with it or without.
    """
    function = getattr(reference, case.op)
    if case.op in EAGER:
        function(*args)
        return function, "eager"
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    # Boolean masks then break no graph; sizes that depend on them are still asked of the device.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    compiled = torch.compile(function, dynamic=False)
    try:
        compiled(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        print(f"{case.name}: {type(error).__name__} when compiled: {str(error)[:300]}", file=sys.stderr)
        function(*args)
        return function, "eager"
    return compiled, "compiled in parts" if counters["stats"]["unique_graphs"] > 1 else "compiled"


def _can_record(function: Callable[..., Any], args: Args) -> bool:
    """Whether a call can be a CUDA graph, which excludes calls that read from the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*args)
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    try:
        Recorded(function, [args])()
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"cannot be recorded: {str(error)[:300]}", file=sys.stderr)
        return False
    return True


def prepare_here(case: Case, requests: Sequence[int], with_baseline: bool) -> None:
    """Be the process of one case: one JSON line for each number of requests."""
    device = torch.device("cuda")
    for number in requests:
        prepared: dict[str, Any] = {}
        for attempt in range(6):
            try:
                prepared = prepare(case, number, device, with_baseline)
            except torch.OutOfMemoryError:
                # Other processes use the same memory.
                prepared = {"problem": "out of memory"}
                torch.cuda.empty_cache()
                time.sleep(5 + 2 * attempt)
                continue
            except Exception as error:
                prepared = {"problem": f"{type(error).__name__}: {str(error)[:400]}"}
            break
        torch.cuda.empty_cache()
        print(json.dumps({"requests": number, **prepared}), flush=True)


def prepare_all(
    missing: dict[Case, list[int]], workers: int, until: float, options: Sequence[str]
) -> dict[tuple[Case, int], dict[str, Any]]:
    """By case and number of requests; `until` is a time.monotonic(), `options` are added to each process's command."""
    prepared: dict[tuple[Case, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(workers) as pool:
        for case, lines, problem in pool.map(lambda case: _prepare_apart(case, missing[case], until, options), missing):
            found = {line.pop("requests"): line for line in lines}
            for number in missing[case]:
                prepared[case, number] = found.get(number, {"problem": problem})
            said = [f"{number}: {prepared[case, number].get('problem', 'ready')}" for number in missing[case]]
            print(f"prepared {case.name}  {'  '.join(said)}", flush=True)
    return prepared


def _prepare_apart(
    case: Case, requests: list[int], until: float, options: Sequence[str]
) -> tuple[Case, list[dict[str, Any]], str]:
    """(case, output of its process, reason of its end)"""
    seconds = min(PREPARE_SECONDS, until - time.monotonic())
    if seconds <= 0:
        return case, [], LATER
    numbers = ",".join(map(str, requests))
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--prepare", case.name, "--requests", numbers]
    command += options
    # One compiler each: several processes compile at the same time.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        output, problem = done.stdout, f"the process ended with {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""  # bytes, whatever was asked for
        output = said.decode() if isinstance(said, bytes) else said
        problem = f"not ready after {seconds:.0f} s" if seconds == PREPARE_SECONDS else LATER
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return case, lines, problem


# Timing.


class Recorded:
    """Calls on several copies of the same arguments, as one CUDA graph."""

    def __init__(self, function: Callable[..., Any], copies: Sequence[Args]) -> None:
        for args in copies:
            function(*args)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            # Kept, so that every call writes to memory of its own.
            self._results = [function(*args) for args in copies]

    def __call__(self) -> None:
        self._graph.replay()


class Launched:
    """The same, launched anew every time."""

    def __init__(self, function: Callable[..., Any], copies: Sequence[Args]) -> None:
        self._function, self._copies = function, copies

    def __call__(self) -> None:
        for args in self._copies:
            self._function(*args)


class Clock:
    """Times work on the device with cold L2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH_BYTES // 4, device=device)

    def warm_up(self, work: Iterable[Callable[[], None]]) -> None:
        """Run until clocks are high."""
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_SECONDS:
            for run in work:
                self._flushed.fill_(1.0)
                run()
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], None]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.fill_(1.0)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3


def num_copies(args: Args, call_seconds: float) -> int:
    """As many as make a replay long enough and fit into memory."""
    by_memory = COPIED_BYTES // max(1, num_bytes(args))
    by_time = -(-REPLAY_SECONDS // max(call_seconds, 1e-7))
    return int(max(1, min(MOST_COPIES, by_memory, by_time)))


def measure(case: Case, requests: int, prepared: dict[str, Any], card: Card, clock: Clock) -> dict[str, Any]:
    """Kernel and compiled reference, taking turns."""
    from dspark_kernels import gpu

    floor = case.floor(requests)
    args = Inputs(FLASH, requests, clock.device).of(case)
    functions: dict[str, Callable[..., Any]] = {"kernel": getattr(gpu, case.op)}
    if prepared["baseline"]:
        functions["baseline"] = baseline_of(case, args)[0]
    copies = [args]
    runs: dict[str, Callable[[], None]] = {}
    counts: dict[str, int] = {}
    for name, function in functions.items():
        way = Recorded if prepared["graphs"][name] else Launched
        once = way(function, [args])
        clock.warm_up([once])
        counts[name] = num_copies(args, clock.seconds(once))
        copies += [copied(args) for _ in range(counts[name] - len(copies))]
        runs[name] = way(function, copies[: counts[name]])
    clock.warm_up(runs.values())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS):
        for name in sorted(runs, reverse=turn % 2 == 1):
            seconds[name].append(clock.seconds(runs[name]) / counts[name])
    kernel = statistics.median(seconds["kernel"])
    figures = {
        "kernel_us": _spread(seconds["kernel"]),
        "check": prepared["check"],
        "recorded": prepared["graphs"],
        "copies": counts,
        "floor_us": 1e6 * floor.seconds(card),
        "bound": floor.bound(card),
        "over_floor": kernel / floor.seconds(card),
    }
    if prepared["baseline"]:
        figures |= {
            "baseline": prepared["baseline"],
            "baseline_us": _spread(seconds["baseline"]),
            "baseline_over_kernel": statistics.median(seconds["baseline"]) / kernel,
        }
    return figures


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest, in microseconds."""
    numbers = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
    return {name: round(1e6 * value, 3) for name, value in numbers.items()}


# Results.


class Results:
    """A file of measurements of one commit on one machine; a file of another commit or machine is started anew."""

    def __init__(self, path: Path, commit: str | None) -> None:
        origin = report.provenance(ROOT, " ".join(["python -m benchmarks.gpu.kernels", *sys.argv[1:]]))
        self.origin = origin | {"sources": _sources()} | ({"commit": commit} if commit else {})
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        same = all(kept.get("origin", {}).get(key) == self.origin[key] for key in ("commit", "sources", "machine"))
        self.cases: dict[str, dict[str, Any]] = kept["results"] if same else {}

    def has(self, case: Case, requests: int) -> bool:
        return "kernel_us" in self.cases.get(case.name, {}).get(str(requests), {})

    def add(self, case: Case, requests: int, figures: dict[str, Any]) -> None:
        """Also write the file; an interruption leaves the old one or the new one."""
        self.cases.setdefault(case.name, {})[str(requests)] = figures
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps({"origin": self.origin, "results": self.cases}, indent=2) + "\n")
        beside.replace(self._path)


def _sources() -> str:
    """Changes with the kernels and with this program, committed or not."""
    digest = hashlib.sha256()
    benchmark = (ROOT / "benchmarks").glob("kernel*.py")
    for path in sorted([*(ROOT / "kernels" / "dspark_kernels").rglob("*.py"), *benchmark]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def describe(case: Case, requests: int, figures: dict[str, Any]) -> str:
    """One measurement as a line."""
    name = f"{case.name:28} {requests:4} requests"
    if "problem" in figures:
        return f"{name}  {figures['problem']}"
    kernel = figures["kernel_us"]
    line = (
        f"{name} {kernel['median']:10.2f} us ({kernel['min']:.2f} .. {kernel['max']:.2f})"
        f"  floor {figures['floor_us']:.2f} ({figures['bound']}), over it {figures['over_floor']:.2f}"
    )
    if "baseline_us" not in figures:
        return line
    median, ratio = figures["baseline_us"]["median"], figures["baseline_over_kernel"]
    return f"{line}  {figures['baseline']} {median:.2f}, over the kernel {ratio:.2f}"


def measured_table(content: dict[str, Any]) -> str:
    """Measurements in Markdown."""
    origin, cases = content["origin"], content["results"]
    counts = " | ".join(str(requests) for requests in REQUESTS)
    lines = [f"| by requests | {counts} | reference |", f"|---|{'--:|' * len(REQUESTS)}---|"]
    for case in CASES:
        if case.name in cases:
            cells = [_cell(cases[case.name].get(str(requests))) for requests in REQUESTS]
            ways = dict.fromkeys(figures.get("baseline", "") for figures in cases[case.name].values())
            lines.append(f"| {case.name} | {' | '.join(cells)} | {', '.join(way for way in ways if way)} |")
    lines += [
        "",
        f"Microseconds (over the floor; the reference over the kernel). {origin['machine']['gpu']},"
        f" {origin['date'][:10]}, commit {origin['commit'][:10]}, torch {origin['versions']['torch']},"
        f" triton {origin['versions']['triton']}.",
    ]
    return "\n".join(lines)


def _cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "problem" in figures:
        return "failed"
    # Operations that move very little take as long as a launch.
    over_floor = f"{figures['over_floor']:.1f}" if figures["floor_us"] >= 1 else "-"
    time_taken = kernel_floors.microseconds(1e-6 * figures["kernel_us"]["median"])
    over_kernel = f"{figures['baseline_over_kernel']:.1f}" if "baseline_over_kernel" in figures else "-"
    return f"{time_taken} ({over_floor}; {over_kernel})"


NOT_MEASURED = "No kernel has run on a GPU yet."


def tables(path: Path) -> dict[str, str]:
    """By their marks in kernels/README.md."""
    measured = measured_table(json.loads(path.read_text())) if path.exists() else NOT_MEASURED
    return {"floors": kernel_floors.table(), "measured": measured}


# Where there is no GPU.


def smoke(cases: Sequence[Case], results: Results | None) -> int:
    """Run every case once, interpreted, at tiny sizes; returns the number of failures. `results` gets each outcome."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    import pytest
    from triton.runtime.interpreter import InterpretedFunction

    from dspark_kernels import gpu

    inputs, launches = Inputs(TINY, 2, torch.device("cpu")), []
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(self.__name__)
        return run(self, *args, **kwargs)

    failed = 0
    for case in cases:
        launches.clear()
        started = time.perf_counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpretedFunction, "run", counted)
            of_tests("interpreting").compute_as_a_gpu(patch)
            try:
                compare(case, inputs.of(case), gpu)
                said = "equal"
            except Exception as error:
                failed += 1
                said = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        print(f"{case.name:28} {seconds:5.1f} s  launches {len(launches)}  {said}", flush=True)
        if results is not None:
            results.add(case, inputs.requests, {"check": said})
    return failed


def measure_all(arguments: argparse.Namespace) -> int:
    """Measure missing cases until time is up; returns 1 if a case could not be measured."""
    started, seconds = time.monotonic(), 60 * arguments.minutes
    results = Results(arguments.json or RESULT, arguments.commit)
    gpu_name = results.origin["machine"]["gpu"]
    card = kernel_floors.card_called(gpu_name)
    numbers = {case: [n for n in arguments.requests if not results.has(case, n)] for case in arguments.cases}
    missing = {case: found for case, found in numbers.items() if found}
    print(f"{sum(map(len, missing.values()))} to measure, {gpu_name}", flush=True)
    options = ["--without-baseline"] if arguments.without_baseline else []
    prepared = prepare_all(missing, arguments.workers, started + PREPARE_SHARE * seconds, options)
    clock = Clock(torch.device("cuda"))
    problems = 0
    for number, case in _in_order(arguments.requests, missing):
        figures = prepared[case, number]
        if figures.get("problem") == LATER or time.monotonic() > started + seconds:
            print(f"{case.name}, {number} requests: {LATER}; the same command goes on from here", flush=True)
            problems += 1
            continue
        if "problem" not in figures:
            try:
                figures = measure(case, number, figures, card, clock)
            except Exception as error:
                figures = {"problem": f"{type(error).__name__}: {str(error)[:400]}"}
            torch.cuda.empty_cache()
        problems += "problem" in figures
        results.add(case, number, figures)
        print(describe(case, number, figures), flush=True)
    return min(1, problems)


def _in_order(requests: Sequence[int], missing: dict[Case, list[int]]) -> Iterator[tuple[int, Case]]:
    """All cases at one number of requests, then at the next."""
    return ((number, case) for number in requests for case in missing if number in missing[case])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ops", help="comma-separated operations (default: all)")
    parser.add_argument(
        "--requests",
        type=lambda text: [int(number) for number in text.split(",")],
        default=list(REQUESTS),
        help="numbers of requests (default: 1,8,32,128,256)",
    )
    parser.add_argument(
        "--json", type=Path, help="results (default: benchmarks/results/kernels.json; none of a smoke test)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables, and measure nothing")
    parser.add_argument(
        "--readme", action="store_true", help="fill the tables of kernels/README.md, and measure nothing"
    )
    parser.add_argument("--interpret-smoke", action="store_true", help="every operation once, interpreted, tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="to stop after (default: %(default)s)")
    parser.add_argument("--without-baseline", action="store_true", help="compile and time no references")
    parser.add_argument("--workers", type=int, default=WORKERS, help="cases that are prepared at a time")
    parser.add_argument("--commit", help="commit of this copy, on a machine without the repository")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = arguments.ops.split(",") if arguments.ops else list(OPERATIONS)
    unknown = [op for op in wanted if op not in OPERATIONS]
    if unknown:
        parser.error(f"--ops {','.join(unknown)}: expected some of {', '.join(OPERATIONS)}")
    arguments.cases = [case for case in CASES if case.op in wanted]
    return arguments


def main() -> int:
    arguments = _parse()
    if arguments.markdown or arguments.readme:
        for name, text in tables(arguments.json or RESULT).items():
            if arguments.readme:
                report.fill(README, name, text)
            else:
                print(text, end="\n\n")
        return 0
    with torch.no_grad():
        if arguments.interpret_smoke:
            results = None if arguments.json is None else Results(arguments.json, arguments.commit)
            return min(1, smoke(arguments.cases, results))
        if not torch.cuda.is_available():
            print(kernel_floors.table())
            print("\nnot measured: no GPU")
            return 0
        if arguments.prepare is not None:
            case = next(case for case in CASES if case.name == arguments.prepare)
            prepare_here(case, arguments.requests, not arguments.without_baseline)
            return 0
        return measure_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
