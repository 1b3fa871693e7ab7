"""One job of a `gpu_day` run: checks in a process of their own, which append their results to a file.

python -m benchmarks.gpu.job NAME... --records FILE [--dry-run]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu import driver, row_bits, serving, texts, tiles
from benchmarks.gpu.device import Device
from benchmarks.gpu.records import Record
from benchmarks.gpu.stage import append


def records_of(name: str, device: Device) -> Iterator[Record]:
    """Results of the job `name`. Raises KeyError for an unknown job."""
    job, _, detail = name.partition(":")
    if job == "rows":
        for op in detail.split(","):
            yield from row_bits.check(device, op)
    elif job == "compile-tiles":
        tiles.run_once(device, detail)
    elif job == "tiles":
        yield from tiles.times(device, detail)
    elif job == "recorded-steps":
        yield from serving.recorded_steps(device)
    elif job == "served-by":
        yield from serving.served_by(device)
    elif job == "nan-draws":
        yield from serving.nan_draws(device)
    elif job == "start-up":
        yield from texts.start_up(device, detail)
    elif job == "texts":
        place, dtype, steps = detail.split("-")
        yield from texts.texts(device, place, dtype, steps)  # type: ignore[arg-type]
    elif job == "nvml":
        yield from driver.readings(device)
    else:
        raise KeyError(name)


def interpret_as_a_gpu() -> None:
    """Let the interpreter round as a GPU does, until the process ends."""
    import pytest

    from benchmarks.gpu.kernels import of_tests

    of_tests("interpreting").compute_as_a_gpu(pytest.MonkeyPatch())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.dry_run:
        interpret_as_a_gpu()
    device = Device(arguments.dry_run)
    for name in arguments.names:
        for record in records_of(name, device):
            append(arguments.records, record)
            print(record, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
