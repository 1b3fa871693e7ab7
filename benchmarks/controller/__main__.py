"""Simulates load control: thresholds, numbers of replicas, steadiness, and the controller's own CPU time.

    python -m benchmarks.controller                writes benchmarks/results/controller.json and its four pictures
    python -m benchmarks.controller --readme       also fills the table in docs/performance.md
    python -m benchmarks.controller --replicas N   size of the largest cluster whose CPU time is measured

Runs for about an hour on one core of a CPU. The controller, its policies and the replica rule are those of `autoscale`;
replicas and traffic are simulated with DeepSeek-V4-Flash's measured costs (benchmarks/controller/world.py). Finished
parts are kept in .build/, and an interrupted run continues from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.controller import days as controller_days
from benchmarks.controller import pictures as controller_pictures
from benchmarks.controller import replicas as controller_replicas
from benchmarks.controller import steady as controller_steady
from benchmarks.controller.traffic import FaultConfig
from benchmarks.harness import report
from benchmarks.harness.notebook import Notebook

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".build" / "controller"

SEEDS = (1, 2)
REPLICAS = 10_000
_SCALE_SECONDS = 60
_SIZES = (0.1, 0.25, 0.5, 1.0)
"""Sizes of the measured clusters, over that of the largest."""
HEADLINE_ENGINE = "full"
"""The engine's default schedule."""

_CORE = tuple(f"autoscale/{name}.py" for name in ("controller", "goodput", "saturation", "signals", "thresholds"))
_WORLD = ("traffic", "world", "signals", "bandit", "figures", "days")
_CODE = (*_CORE, "benchmarks/schedule/simulation.py", *(f"benchmarks/controller/{name}.py" for name in _WORLD))
_STEADY = (*_CODE, "benchmarks/controller/steady.py")
_REPLICAS = (
    *_CODE,
    "benchmarks/controller/replicas.py",
    "autoscale/replicas.py",
    *(f"autoscale/presets/{name}.yaml" for name in controller_replicas.PRESETS),
)


def _notebook(files: tuple[str, ...]) -> Notebook:
    """Finished parts, valid as long as these files do not change."""
    digest = hashlib.sha256()
    for name in files:
        digest.update((ROOT / name).read_bytes())
    return Notebook(SCRATCH / "parts.jsonl", digest.hexdigest()[:16])


def _kept(notebook: Notebook, part: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The part's figures, from the notebook if they are there."""
    if not notebook.entries(part):
        notebook.add(
            part, {"figures": run(*arguments, lambda share: print(f"{part}: {100 * share:.0f} %", flush=True))}
        )
    return dict(notebook.entries(part)[-1]["figures"])


# The parts.


def days() -> list[dict[str, Any]]:
    """Thresholds over days at fixed hardware."""
    notebook = _notebook(_CODE)
    runs = []
    for name, day in controller_days.DAYS.items():
        for seed in SEEDS if name in controller_days.MAIN else SEEDS[:1]:
            figures = _kept(notebook, f"day {name}, seed {seed}", controller_days.run_day, day, seed)
            runs.append({"day": name, "seed": seed, **figures})
    return runs


def steady() -> list[dict[str, Any]]:
    """Constant loads."""
    notebook = _notebook(_STEADY)
    return [
        {
            "traffic": kind,
            "load": load,
            "fleets": _kept(notebook, f"steady {kind} {load}", controller_steady.run_steady, kind, load, SEEDS[0]),
        }
        for kind, load in controller_steady.LOADS
    ]


def settling() -> dict[str, Any]:
    """A load that rises and falls in steps."""
    return _kept(_notebook(_STEADY), "step", controller_steady.run_step, SEEDS[0])


def replicas() -> list[dict[str, Any]]:
    """Days on which the number of replicas follows the load."""
    notebook = _notebook(_REPLICAS)
    return [
        {"seed": seed, **_kept(notebook, f"replicas, seed {seed}", controller_replicas.run_replicas, seed)}
        for seed in SEEDS
    ]


def scale(largest: int) -> list[dict[str, Any]]:
    """CPU time of the controller."""
    notebook = _notebook(_STEADY)
    sizes = [(int(share * largest), policy) for policy in controller_days.SHIPPED for share in _SIZES]
    run = controller_steady.run_scale
    return [
        _kept(notebook, f"{size} replicas, {policy}", run, size, policy, _SCALE_SECONDS, SEEDS[0])
        for size, policy in sizes
    ]


# Results.


def collect(largest: int) -> dict[str, Any]:
    """All figures as JSON values."""
    day_runs, still, stepped = days(), steady(), settling()
    scaled, costs = replicas(), scale(largest)
    by_day, by_preset = controller_days.summary(day_runs), controller_replicas.summary(scaled)
    ours = by_preset[HEADLINE_ENGINE][controller_replicas.HEADLINE]
    return {
        **report.provenance(ROOT, "python -m benchmarks.controller"),
        **_over_fixed(by_day),
        "throughput_over_serve_default": ours["tokens_over_serve_default"],
        "slowest_users_over_serve_default": ours["slowest_percent_over_serve_default"],
        "oscillation": _largest_oscillation(still, "load_curve"),
        "oscillation_goodput": _largest_oscillation(still, "goodput"),
        f"core_share_at_{largest}": max(each["core_share"] for each in costs if each["replicas"] == largest),
        "settings": _settings(largest),
        "days": by_day,
        "steady": still,
        "settling": stepped,
        "replicas": by_preset,
        "replicas_by_seed": scaled,
        "scale": costs,
        "course": {"day": controller_days.MAIN[0], "seed": SEEDS[0], **day_runs[0]["course"]},
    }


def _over_fixed(by_day: dict[str, Any]) -> dict[str, Any]:
    """Figures of the better of both policies on the main days, averaged over these days and both engines."""

    def over(engine: str, policy: str, key: str) -> float:
        return statistics.fmean(by_day[engine][day]["arms"][policy][key] for day in controller_days.MAIN)

    key = "tokens_over_best_fixed"
    engines = controller_days.ENGINES
    better = max(controller_days.SHIPPED, key=lambda policy: sum(over(engine, policy, key) for engine in engines))
    slowest = "slowest_percent_over_best_fixed"
    return {
        "throughput_over_fixed": over(HEADLINE_ENGINE, better, key),
        "throughput_over_fixed_policy": better,
        "throughput_over_fixed_engine": HEADLINE_ENGINE,
        "throughput_over_fixed_by_engine": {engine: over(engine, better, key) for engine in engines},
        "throughput_over_no_threshold_by_engine": {
            engine: over(engine, better, "tokens_over_no_threshold") for engine in engines
        },
        "slowest_users_over_fixed_by_engine": {engine: over(engine, better, slowest) for engine in engines},
        "throughput_of_every_steps_best_over_fixed": {day: _headroom(by_day, day) for day in controller_days.DAYS},
    }


def _headroom(by_day: dict[str, Any], day: str) -> float:
    """Upper limit of what a policy can gain over the best single threshold, apart from effects between replicas: an
    engine that knows its costs and chooses in every step, over one that verifies above that threshold."""
    best = by_day["fixed"][day]["arms"][by_day["fixed"][day]["best_fixed"]]
    return float(by_day["full"][day]["arms"]["0"]["tokens_per_second"] / best["tokens_per_second"])


def _largest_oscillation(still: list[dict[str, Any]], policy: str) -> float:
    """Largest excess of a threshold's movement over its band, at constant load, over all replicas and loads."""
    fleets = [each for point in still for each in point["fleets"].items()]
    return max(figures["oscillation"] for name, figures in fleets if name.endswith(f" {policy}"))


def _settings(largest: int) -> dict[str, Any]:
    return {
        "seeds": list(SEEDS),
        "largest_cluster": largest,
        "days": {name: asdict(day) for name, day in controller_days.DAYS.items()},
        "faults": asdict(FaultConfig()),
        "replicas_of_a_day": controller_days.NUM_REPLICAS,
        "replicas_per_node_of_a_day": controller_days.REPLICAS_PER_NODE,
        "policies": {name: asdict(make()) for name, make in controller_days.SHIPPED.items()},  # type: ignore[call-overload]
        "scaling": {
            "traffic": asdict(controller_replicas.TRAFFIC),
            "bounds": [controller_replicas.FEWEST, controller_replicas.MOST],
            "start_seconds": controller_replicas.START_SECONDS,
            "upscale_delay_seconds": controller_replicas.UPSCALE_DELAY,
            "downscale_delay_seconds": controller_replicas.DOWNSCALE_DELAY,
            "look_back_seconds": controller_replicas.LOOK_BACK,
        },
    }


def draw(results: dict[str, Any]) -> None:
    """Write the pictures beside the JSON."""
    day = controller_days.DAYS[controller_days.MAIN[0]].traffic
    controller_pictures.day(results["course"], day.day_seconds, RESULTS / "controller_day.png")
    controller_pictures.arms(results["days"], RESULTS / "controller_thresholds.png")
    seconds = controller_replicas.TRAFFIC.day_seconds
    controller_pictures.replicas(results["replicas_by_seed"][0], seconds, RESULTS / "controller_replicas.png")
    controller_pictures.scale(results["scale"], RESULTS / "controller_scale.png")


# The table.


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| tokens per second, simulated | verifies all above the threshold | schedules every step |",
        "|---|--:|--:|",
    ]
    lines += _day_lines(results["days"])
    lines += ["", "| replicas | tokens per second over Serve's default | slowest 1 % of users | replicas, mean |"]
    lines += ["|---|--:|--:|--:|", *_preset_lines(results["replicas"][HEADLINE_ENGINE])]
    largest = results["settings"]["largest_cluster"]
    share, band = results[f"core_share_at_{largest}"], results["settings"]["policies"]["load_curve"]["dead_band"]
    lines += [
        "",
        f"The controller takes {100 * share:.1f} % of a core at {largest} replicas with a heartbeat a second.",
    ]
    lines += [f"At constant load, thresholds exceed a dead band of {band:g} by {results['oscillation']:.3f} at most."]
    machine = results["machine"]
    lines += ["", f"{machine['processor']}, {results['date'][:10]}, commit {results['commit'][:10]}."]
    return "\n".join(lines)


def _day_lines(by_day: dict[str, Any]) -> Iterator[str]:
    for day in controller_days.DAYS:
        for name, label in (("load_curve", "load curve"), ("goodput", "search")):
            cells = []
            for engine in controller_days.ENGINES:
                arm = by_day[engine][day]["arms"][name]
                over, plain = arm["tokens_over_best_fixed"], arm["tokens_over_no_threshold"]
                cells.append(f"{over:.3f} ({plain:.3f})")
            yield f"| {day.replace('_', ' ')}: {label} over the best fixed (over none) | {' | '.join(cells)} |"


def _preset_lines(presets: dict[str, Any]) -> Iterator[str]:
    for name, each in presets.items():
        tokens, slowest = each["tokens_over_serve_default"], each["slowest_percent_over_serve_default"]
        yield f"| {name.replace('_', ' ')} | {tokens:.3f} | {slowest:.3f} | {each['mean_replicas']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controller", description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=REPLICAS, help="size of the largest measured cluster")
    parser.add_argument("--readme", action="store_true", help="fill the table in docs/performance.md")
    arguments = parser.parse_args()
    results = collect(arguments.replicas)
    (RESULTS / "controller.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results)
    print(table(results))
    if arguments.readme:
        report.fill(ROOT / "docs" / "performance.md", "controller", table(results))


if __name__ == "__main__":
    main()
