"""All checks and measurements that need a GPU, in under nine minutes: five stages, one file of figures.

    make gpu-day                                     on a machine with a GPU; results in .build/gpu_day
    make gpu-day ARGS="--output FOLDER"
    make gpu-day ARGS=--dry-run                      anywhere: every stage with the smallest shapes, on a CPU
    python -m benchmarks.gpu_day --report FILE       tables of a file of figures, in Markdown; measures nothing

Needs torch, triton, transformers, pytest with xdist and timeout, nvidia-ml-py and psutil; where this project is not
installed, PYTHONPATH=kernels:. before the command.

    tests       kernels against their references
    checks      bits of a row by number of rows, tiles, waits in recorded steps, which body serves, rows of NaN
    texts       start-up from an empty Triton cache; the tiny checkpoint's texts on the GPU and on the CPU
    nvml        NVML's values, idle and under load, beside the controller's scales
    benchmarks  the kernels that move most bytes, and a round of a V4-Flash-shaped model

Every job of a stage is a process with a time limit of its own, so that a job that fails or hangs loses only its own
figures. `gpu_day.json` is rewritten whenever a job starts or ends, and once a second. benchmarks/README.md explains it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.claims import verdicts
from benchmarks.gpu.comparisons import comparisons
from benchmarks.gpu.records import STAGE_KINDS, Record, to_json
from benchmarks.gpu.stage import Job, Stage, StageResult, StageRun, read_records
from benchmarks.gpu.tables import markdown
from benchmarks.gpu.timings import kernel_times, round_times
from benchmarks.harness import report

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / ".build" / "gpu_day"
FIGURES = "gpu_day.json"
KERNELS, ROUND = "kernels.json", "round.json"
"""As benchmarks.gpu.kernels and benchmarks.gpu.round write them, for the tables that they make."""

LIMITS = {"tests": 150.0, "checks": 90.0, "texts": 120.0, "nvml": 40.0, "benchmarks": 130.0}
"""Seconds of a stage; time that earlier stages left unused is added."""
DRY_SECONDS = 600.0
"""Of a stage of a dry run."""

MODULES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "pytest_timeout": "pytest-timeout",
    "pynvml": "nvidia-ml-py",
    "psutil": "psutil",
    "dspark_kernels": "dspark_kernels (PYTHONPATH=kernels)",
}
"""Packages to install, by the module that shows that they are there."""
WORKERS, DRY_WORKERS = 14, 2
LONG_TO_COMPILE = ("linear_fp8", "moe", "sparse_attention", "markov_sample")
COMPARED_OPS = "mhc_read,mhc_write,markov_sample,accept_rejection"
"""Operations that are also measured against their compiled references."""
ROUNDS = ("--layers", "6", "--requests", "1,32")
DRY_TESTS = ("tests/kernels/test_noise.py",)


def missing(dry_run: bool) -> list[str]:
    """Requirements that this machine lacks."""
    absent = [package for module, package in MODULES.items() if find_spec(module) is None]
    if not absent and not dry_run:
        import torch

        absent += [] if torch.cuda.is_available() else ["a CUDA device (--dry-run needs none)"]
    return absent


class Plan:
    """The jobs of all stages, as commands."""

    def __init__(self, records: Path, output: Path, dry_run: bool, commit: str | None) -> None:
        self._records, self._output, self._is_dry = records, output, dry_run
        self._commit = ["--commit", commit] if commit else []
        self.workers = min(WORKERS, max(1, (os.cpu_count() or 2) - 2)) if not dry_run else DRY_WORKERS

    def batches(self, stage: str) -> list[list[Job]]:
        """Of the stage of that name."""
        batches: list[list[Job]] = getattr(self, f"_{stage}")()
        return batches

    def _tests(self) -> list[list[Job]]:
        tests = DRY_TESTS if self._is_dry else ("tests/kernels",)
        options = ["-n", str(self.workers), "-q", "--timeout", "60", "--timeout-method", "thread"]
        options += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_records", "--records", str(self._records)]
        return [[self._python("kernels", "pytest", *tests, *options, seconds=LIMITS["tests"])]]

    def _checks(self) -> list[list[Job]]:
        from benchmarks.gpu import row_bits, tiles

        ops = sorted(row_bits.JOBS, key=lambda op: op not in LONG_TO_COMPILE)
        bits = [",".join(ops[::2]), ",".join(ops[1::2])] if self._is_dry else ops
        side_by_side = [*(f"rows:{op}" for op in bits), *(f"compile-tiles:{op}" for op in tiles.JOBS)]
        side_by_side += ["served-by", "recorded-steps", "nan-draws"]
        return [
            self._jobs(side_by_side, LIMITS["checks"]),
            *([self._job(f"tiles:{op}", 30)] for op in tiles.JOBS),
        ]

    def _texts(self) -> list[list[Job]]:
        from benchmarks.gpu.engines import DTYPES

        cache = {"TRITON_CACHE_DIR": str(self._records.parent / "triton")}
        names = [f"texts:cpu-{dtype}-launched" for dtype in DTYPES]
        names += [f"texts:gpu-{dtype}-{steps}" for dtype in DTYPES for steps in ("replayed", "launched")]
        jobs = [self._job("start-up:cold", LIMITS["texts"], cache), *self._jobs(names, LIMITS["texts"])]
        # The kernels of the benchmarks are compiled while cores are idle.
        rounds = ("--shape", "tiny", "--requests", "1", "--context", "128") if self._is_dry else ROUNDS
        jobs.append(
            self._python("compile-round", "benchmarks.gpu.round", *rounds, "--compile", seconds=LIMITS["texts"])
        )
        return [jobs, [self._job("start-up:warm", 40, cache)]]

    def _nvml(self) -> list[list[Job]]:
        return [[self._job("nvml", LIMITS["nvml"])]]

    def _benchmarks(self) -> list[list[Job]]:
        kernels = ["--json", str(self._output / KERNELS), *self._commit]
        rounds = ["--json", str(self._output / ROUND), *self._commit]
        if self._is_dry:
            kernels += ["--interpret-smoke", "--ops", "rms_norm,swiglu"]
            rounds += ["--shape", "tiny", "--requests", "1", "--context", "128"]
            compared = []
        else:
            rounds += ROUNDS
            workers = ["--workers", str(self.workers)]
            compared = [*kernels, *workers, "--ops", COMPARED_OPS, "--requests", "8", "--minutes", "1.5"]
            kernels += [*workers, "--requests", "1,32", "--minutes", "1.3", "--without-baseline"]
        jobs = [
            self._python("kernels", "benchmarks.gpu.kernels", *kernels, seconds=85),
            self._python("round", "benchmarks.gpu.round", *rounds, seconds=60),
        ]
        if compared:
            jobs.append(self._python("compiled references", "benchmarks.gpu.kernels", *compared, seconds=100))
        return [[job] for job in jobs]

    def _jobs(self, names: Sequence[str], seconds: float) -> list[Job]:
        """One job for each name; in a dry run one for each worker, because imports take longer than the checks."""
        if not self._is_dry:
            return [self._job(name, seconds) for name in names]
        return [self._job(" ".join(names[first :: self.workers]), seconds) for first in range(self.workers)]

    def _job(self, name: str, seconds: float, environment: dict[str, str] | None = None) -> Job:
        options = [*name.split(), "--records", str(self._records), *(["--dry-run"] if self._is_dry else [])]
        return self._python(name, "benchmarks.gpu.job", *options, seconds=seconds, environment=environment)

    def _python(
        self, name: str, module: str, *options: str, seconds: float, environment: dict[str, str] | None = None
    ) -> Job:
        added = dict(environment or {})
        if self._is_dry:
            added["TRITON_INTERPRET"] = "1"
        return Job(name, [sys.executable, "-m", module, *options], DRY_SECONDS if self._is_dry else seconds, added)


class Day:
    """A run of all stages, with its file of figures."""

    def __init__(self, output: Path, dry_run: bool, commit: str | None) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._output, self._is_dry, self._commit = output, dry_run, commit
        self._origin = report.provenance(ROOT, " ".join(["python -m benchmarks.gpu_day", *sys.argv[1:]]))
        self._origin |= {"driver": _driver_version()} | ({"commit": commit} if commit else {})
        self._stages = {name: StageResult(name, limit, []) for name, limit in LIMITS.items()}
        self._scratch = Path(tempfile.mkdtemp(prefix="gpu-day-"))

    def run(self, names: Sequence[str]) -> bool:
        """Whether all of these stages ended well."""
        started, ends_at = time.monotonic(), 0.0
        try:
            for name in names:
                ends_at += DRY_SECONDS if self._is_dry else LIMITS[name]
                self._run_stage(name, ends_at - (time.monotonic() - started))
        finally:
            self._write()
            shutil.rmtree(self._scratch, ignore_errors=True)
        return all(self._stages[name].status == "ended" for name in names)

    def figures(self) -> dict[str, Any]:
        """The contents of the file so far."""
        stages, everything = {}, []
        for name, result in self._stages.items():
            records = list(self._records_of(name))
            everything += records
            by_kind: dict[str, list[dict[str, Any]]] = {kind.__name__: [] for kind in STAGE_KINDS[name]}
            for record in records:
                fields = to_json(record)
                by_kind[fields.pop("kind")].append(fields)
            stages[name] = asdict(result) | {"figures": by_kind}
        return {
            "origin": self._origin,
            "dry_run": self._is_dry,
            "stages": stages,
            "claims": verdicts(everything),
        }

    def _run_stage(self, name: str, limit: float) -> None:
        plan = Plan(self._records_file(name), self._output, self._is_dry, self._commit)
        stage = Stage(name, limit, plan.batches(name), plan.workers)
        log = self._output / f"{name}.log"
        log.unlink(missing_ok=True)
        reported: dict[str, str] = {}

        def changed(result: StageResult) -> None:
            self._stages[name] = result
            for job in result.jobs:
                if reported.get(job.name, "not run") != job.status:
                    reported[job.name] = job.status
                    print(f"{name:10} {job.name:28} {job.status} {job.seconds or ''}", flush=True)
            self._write()

        result = StageRun(stage, log, ROOT, changed).run()
        print(f"{name:10} {result.status} after {result.seconds:.0f} of {limit:.0f} s", flush=True)

    def _records_of(self, name: str) -> Iterator[Record]:
        yield from read_records(self._records_file(name))
        if name == "texts":
            yield from comparisons(read_records(self._records_file(name)))
        if name == "benchmarks" and self._stages[name].status != "not run":
            yield from kernel_times(self._output / KERNELS)
            yield from round_times(self._output / ROUND)

    def _records_file(self, name: str) -> Path:
        return self._scratch / f"{name}.jsonl"

    def _write(self) -> None:
        """An interruption leaves the old file or the new one."""
        beside = self._output / f"{FIGURES}.part"
        beside.write_text(json.dumps(self.figures()) + "\n")
        beside.replace(self._output / FIGURES)


def _driver_version() -> str | None:
    """None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results (default: .build/gpu_day)")
    parser.add_argument("--dry-run", action="store_true", help="every stage on a CPU, with the smallest shapes")
    parser.add_argument("--stages", default=",".join(LIMITS), help="comma-separated (default: all)")
    parser.add_argument("--commit", help="commit of this copy, on a machine without the repository")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print tables of a file of figures")
    arguments = parser.parse_args()
    if arguments.report is not None:
        print(markdown(json.loads(arguments.report.read_text())))
        return 0
    names = arguments.stages.split(",")
    unknown = [name for name in names if name not in LIMITS]
    if unknown:
        parser.error(f"--stages {arguments.stages}: expected some of {', '.join(LIMITS)}")
    absent = missing(arguments.dry_run)
    if absent:
        print(f"gpu-day: missing here: {', '.join(absent)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _end)
    for name in (KERNELS, ROUND):
        (arguments.output / name).unlink(missing_ok=True)
    return 0 if Day(arguments.output.resolve(), arguments.dry_run, arguments.commit).run(names) else 1


if __name__ == "__main__":
    sys.exit(main())
