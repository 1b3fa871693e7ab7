"""Figures with their spread as JSON, table and picture, and the origin of a measurement."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    label: str
    unit: str
    target: str


ROWS = (
    Row(
        "speedup_single_stream",
        "Speculation on over off, one stream, over HTTP (tokens/s)",
        "x",
        "at least 1.5",
    ),
    Row("http_over_engine", "HTTP over the bare gang in process, one stream (tokens/s)", "x", "at least 0.8"),
    Row("http_over_engine_8_streams", "The same with 8 streams at once", "x", ""),
    Row("actor_over_inline", "Drafter in its own actor over drafter inside rank 0 (tokens/s)", "x", ""),
    Row(
        "coupled_over_rejection",
        "Coupled over rejection verification (accepted length, temperature 1)",
        "x",
        "",
    ),
    Row("accepted_length_greedy", "Accepted length, temperature 0", "tokens", "3.0, no less than 2.5"),
    Row("accepted_length_sampled", "Accepted length, temperature 1", "tokens", "2.3, no less than 2.0"),
    Row("loop_seconds_per_round", "Engine loop outside draft and target, per round", "ms", ""),
)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Smallest, median and largest of the repeats, and the repeats."""
    values = [round(value, 6) for value in values]
    return {"min": min(values), "median": round(statistics.median(values), 6), "max": max(values), "repeats": values}


def provenance(root: Path, command: str) -> dict[str, Any]:
    """Origin of a measurement: command, commit, date, machine, versions."""
    packages = ("torch", "triton", "ray", "transformers", "numpy", "fastapi", "pyzmq")
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    return {
        "command": command,
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages if name in installed},
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| | median | smallest, largest | aim |", "|---|--:|---|---|"]
    for row in ROWS:
        low, middle, high = (_format(results[row.key][name], row.unit) for name in ("min", "median", "max"))
        unit = "" if row.unit == "x" else f" {row.unit}"
        lines.append(f"| {row.label} | {middle}{unit} | {low}, {high} | {row.target} |")
    lines += ["", origin(results, len(results["speedup_single_stream"]["repeats"]))]
    return "\n".join(lines)


def origin(results: dict[str, Any], repeats: int) -> str:
    """The origin of a measurement in a sentence."""
    machine, versions = results["machine"], results["versions"]
    return (
        f"{repeats} repeats on {machine['cores']} cores ({machine['processor']}), {results['date'][:10]}, "
        f"commit {results['commit'][:10]}, torch {versions['torch']}, ray {versions['ray']}."
    )


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` between the two marks of `name` in a Markdown page. Raises ValueError where it has none."""
    try:
        page.write_text(filled(page.read_text(), name, text))
    except ValueError as error:
        raise ValueError(f"{page.name}: {error}") from None


def filled(page: str, name: str, text: str) -> str:
    """`page` with `text` between the two marks of `name`. Raises ValueError where it has none."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the marks {start} and {end} are missing")
    return pattern.sub(lambda _: f"{start}\n{text}\n{end}", page)


def picture(results: dict[str, Any], path: Path) -> None:
    """Accepted length by kind of text on the left, the ratios on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_lengths(left, results["accepted_length_by_kind"])
    _draw_ratios(right, results)
    figure.savefig(path, dpi=120)


def _draw_lengths(axes: Any, by_kind: dict[str, dict[str, float]]) -> None:
    kinds = list(next(iter(by_kind.values())))
    width = 0.8 / len(by_kind)
    for number, (name, lengths) in enumerate(by_kind.items()):
        places = [place + (number - (len(by_kind) - 1) / 2) * width for place in range(len(kinds))]
        bars = axes.bar(places, [lengths[kind] for kind in kinds], width, label=name.replace("_", " "))
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("tokens per round")
    axes.set_title("Accepted length on held-out prompts")
    axes.margins(y=0.2)
    axes.legend(ncols=3, fontsize=8, loc="upper center")


def _draw_ratios(axes: Any, results: dict[str, Any]) -> None:
    keys = [row.key for row in reversed(ROWS) if row.unit == "x"]
    for place, key in enumerate(keys):
        value = results[key]
        axes.plot([value["min"], value["max"]], [place, place], linewidth=3, color="tab:blue", alpha=0.5)
        axes.plot(value["median"], place, "o", color="tab:blue")
        axes.annotate(
            f"{value['median']:.2f}",
            (value["median"], place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
        )
    axes.axvline(1, color="lightgrey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(keys)), [key.replace("_", " ") for key in keys])
    axes.set_xlim(left=0)
    axes.set_ylim(-0.5, len(keys) - 0.3)
    axes.set_title("Ratios: median, smallest, largest")


def _format(value: float, unit: str) -> str:
    return f"{value * 1000:.2f}" if unit == "ms" else f"{value:.2f}"


def _machine() -> dict[str, Any]:
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor_name() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.processor() or "unknown"


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def command_line() -> str:
    """How this program was called, in the form that works from the repository root."""
    return " ".join(["python", "-m", "benchmarks.first_light", *sys.argv[1:]])
