"""Every kernel compiles for an H200 at the shapes of DeepSeek-V4, and fits there; no GPU is needed.

    python tests/kernels/test_compiles.py          all calls of all calls_*.py, a line per kernel
    python tests/kernels/test_compiles.py mhc      those whose name begins so

The tests compile, of each operation, the call with most rows, and of operations that are other code with fewer rows
those calls too; of variants that differ in the sizes of a matrix alone, the smallest and the largest. The whole list
takes seven minutes and is for when a launcher changes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"

COMPOSED = {"linear_float32": "is cuBLAS's product"}
"""Ops that have no kernel of their own, by what they are instead."""

MAY_SPILL = {
    "_attention_kernel": (64, "put away before its loop over keys, and fetched behind it"),
    "_markov_step_kernel": (24, "with Pro's 512 channels and 17 to 32 requests, in the first step alone"),
}
"""Bytes that a kernel may spill, with the reason why they do not matter."""


OTHER_CODE = {"linear_fp8": (1, 6), "moe": (1, 6), "sparse_attention": (1, 6), "mhc_read": (24,)}
"""Numbers of rows, beside the most, at which operations launch other kernels, or kernels with other tiles."""

SIZES_ALONE = {"linear_fp8": ("Flash 512x4096", "Flash 4096x12288", "Pro 512x7168", "Pro 7168x21504")}
"""Representative variants of an operation; its others differ in sizes only."""

# One process compiles for all tests of this file; two cores take minutes.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]


@dataclass(frozen=True)
class Report:
    """Result of one call."""

    call: str
    """`op variant [N=rows]`"""
    kernels: list[dict[str, Any]]
    """Fields of `compiling.Compiled`."""
    error: str | None


def sample(calls: list[str]) -> list[str]:
    """The names that tests compile, of names that differ in their final `[N=rows]` only."""
    by_variant: dict[str, dict[int, str]] = {}
    for call in calls:
        variant, _, rows = call.partition(" [")
        found = re.search(r"\d+", rows)
        by_variant.setdefault(variant, {})[int(found[0]) if found else 0] = call
    kept = []
    for variant, by_rows in by_variant.items():
        op, _, rest = variant.partition(" ")
        if rest not in SIZES_ALONE.get(op, (rest,)):
            continue
        wanted = {max(by_rows), *OTHER_CODE.get(op, ())}
        kept += [by_rows[rows] for rows in sorted(wanted & by_rows.keys())]
    return kept


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """From a process of its own: kernels are either compiled or interpreted as long as a process lives."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, __file__, "--sample", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Report(**json.loads(line)) for line in done.stdout.splitlines()]


def test_every_op_has_a_call_that_is_compiled(reports: list[Report]) -> None:
    from dspark_kernels import gpu

    called = {re.match(r"\w*", report.call)[0] for report in reports}
    assert called | set(COMPOSED) == set(gpu.__all__)


def test_variants_that_stand_for_others_exist(reports: list[Report]) -> None:
    compiled = {report.call.partition(" [")[0] for report in reports}
    assert {f"{op} {variant}" for op, variants in SIZES_ALONE.items() for variant in variants} <= compiled


def test_every_call_compiles(reports: list[Report]) -> None:
    assert [f"{report.call}: {report.error}" for report in reports if report.error] == []
    assert [report.call for report in reports if not report.kernels] == []


def test_no_kernel_spills_registers(reports: list[Report]) -> None:
    spilling = [
        f"{report.call}: {kernel['name']} spills {kernel['spilled_bytes']} bytes"
        for report in reports
        for kernel in report.kernels
        if kernel["spilled_bytes"] > MAY_SPILL.get(kernel["name"], (0, ""))[0]
    ]
    assert spilling == []


def test_no_kernel_needs_more_shared_memory_than_there_is(reports: list[Report]) -> None:
    from compiling import SHARED_BYTES

    too_large = [
        f"{report.call}: {kernel['name']} uses {kernel['shared_bytes']} bytes, of {SHARED_BYTES}"
        for report in reports
        for kernel in report.kernels
        if kernel["shared_bytes"] > SHARED_BYTES
    ]
    assert too_large == []


# --- the process that compiles ------------------------------------------------------------------------------------

_calls: dict[str, Any] = {}


def _compile(call: str) -> Report:
    from compiling import compiled_kernels

    try:
        return Report(call, [asdict(kernel) for kernel in compiled_kernels(_calls[call])], None)
    except Exception as error:
        return Report(call, [], f"{type(error).__name__}: {error}"[:600])


def main() -> None:
    """Compile, with as many processes as there are cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", nargs="?", default="", help="of the names of the calls to compile; all without it")
    parser.add_argument("--sample", action="store_true", help="those that the tests compile")
    parser.add_argument("--json", action="store_true", help="a line per call, to be read by a program")
    arguments = parser.parse_args()
    sys.path.insert(0, str(KERNELS))
    for file in sorted(HERE.glob("calls_*.py")):
        _calls.update(importlib.import_module(file.stem).calls())
    names = [name for name in _calls if name.startswith(arguments.start)]
    names = sample(names) if arguments.sample else names
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for report in pool.map(_compile, names):
            print(json.dumps(asdict(report)) if arguments.json else _described(report), flush=True)


def _described(report: Report) -> str:
    columns = "{name:28} {registers:4} registers {spilled_bytes:5} bytes spilled {shared_bytes:7} shared"
    lines = [report.error] if report.error else [columns.format(**kernel) for kernel in report.kernels]
    return "\n".join(f"{report.call:44} {line}" for line in lines)


if __name__ == "__main__":
    main()
