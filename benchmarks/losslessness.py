"""Counts texts that speculation changes, by dtype and by number of requests decoded together; on one core of a CPU.

    python -m benchmarks.losslessness                 writes benchmarks/results/losslessness.json
    python -m benchmarks.losslessness --readme        also fills the table in docs/lossless.md

Coupled verification accepts a draft only where it equals the target's own token, so a text can change in one way only:
a step with more rows rounds a logit differently, and two nearly tied tokens change places. 16 held-out prompts, half of
them greedy, 200 tokens each, every draft verified.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.comparisons import PLAIN, SPECULATIVE, compared
from benchmarks.gpu.device import Device
from benchmarks.gpu.engines import DTYPES, MAX_REQUESTS, DType, build, held_out_requests, run
from benchmarks.harness import report

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "losslessness.json"
AT_ONCE = (1, 8, 16)
MAX_TOKENS = 200


def texts(device: Device, dtype: DType, at_once: int, speculation: bool) -> dict[int, list[int]]:
    """Token ids by request, from an engine that decodes `at_once` requests together."""
    engine = build(device, torch.device("cpu"), dtype, replayed=False, speculation=speculation, max_num_seqs=at_once)
    output = run(engine, held_out_requests(MAX_REQUESTS, MAX_TOKENS))
    engine.close()
    return {int(request): ids for request, ids in output.token_ids.items()}


def measure() -> list[dict[str, Any]]:
    """One line per dtype and number of requests."""
    device, lines = Device(dry_run=False), []
    for dtype in DTYPES:
        for at_once in AT_ONCE:
            plain, speculative = (texts(device, dtype, at_once, speculation) for speculation in (False, True))
            found = compared(SPECULATIVE, speculative, PLAIN, plain)
            lines.append({"dtype": dtype, "at_once": at_once, "texts": found.texts, "places": found.places})
            outcome = f"{found.parted} of {found.texts} texts differ, at {found.places}"
            print(f"{dtype}, {at_once} at once: {outcome}", flush=True)
    return lines


def table(content: dict[str, Any]) -> str:
    """Numbers of changed texts, in Markdown."""
    counts = " | ".join(str(at_once) for at_once in AT_ONCE)
    title = f"texts of {MAX_TOKENS} tokens that differ, by requests at once"
    lines = [f"| {title} | {counts} |", f"|---|{'---|' * len(AT_ONCE)}"]
    for dtype in DTYPES:
        cells = [f"{len(one['places'])} of {one['texts']}" for one in content["lines"] if one["dtype"] == dtype]
        lines.append(f"| {dtype} | {' | '.join(cells)} |")
    origin = content["origin"]
    lines += ["", f"{origin['machine']['processor']}, {origin['date'][:10]}, torch {origin['versions']['torch']}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losslessness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--readme", action="store_true", help="fill the table in docs/lossless.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = report.provenance(ROOT, " ".join(["python -m benchmarks.losslessness", *sys.argv[1:]]))
    content = {"origin": origin, "lines": measure()}
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.readme:
        report.fill(ROOT / "docs" / "lossless.md", "losslessness", table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
