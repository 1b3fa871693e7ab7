"""Pictures of the simulated load control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.controller.days import ENGINES, FIXED, SHIPPED
from benchmarks.controller.replicas import ALONE, HEADLINE, PRESETS, TARGETS
from benchmarks.schedule.pictures import (
    FIXED_COLOURS,
    OFF_COLOUR,
    PANEL_WIDTH,
    PAPER_COLOUR,
    SCHEDULED_COLOUR,
    _panels,
    _save,
)

KIND_COLOURS = ("#1d4ed8", "#6b7280", "#c2410c", "#15803d")
"""Colours of replicas: healthy, slow, with a neighbour, on a shared power budget."""
PRESET_COLOURS = dict(zip(PRESETS, (SCHEDULED_COLOUR, "#7c3aed", "#15803d")))
BANDIT_COLOUR = "#7c3aed"


def day(course: dict[str, Any], seconds: float, path: Path) -> None:
    """Load above; below, thresholds of a few replicas with `fixed` engines under each shipped policy."""
    figure, rows = _panels(3, 1, (2.6 * PANEL_WIDTH, 7.0), sharex=True)
    hours = _hours(course["load"], seconds)
    (load,), *policies = rows
    load.fill_between(hours, course["load"], color=FIXED_COLOURS[0], linewidth=0)
    load.axhline(1, color="black", linewidth=0.8)
    load.set_title("Load: 1 is the capacity of all replicas together")
    load.set_ylim(bottom=0)
    for (axes,), name in zip(policies, SHIPPED):
        for (kind, values), colour in zip(course["thresholds"][f"fixed {name}"].items(), KIND_COLOURS):
            axes.plot(hours, values, color=colour, linewidth=1.4, label=kind)
        axes.set_title(f"Threshold, {name}")
        axes.set_ylim(0, 0.62)
    policies[0][0].legend(fontsize=8, ncols=4, loc="upper center")
    policies[-1][0].set_xlabel("hours of the simulated day")
    policies[-1][0].set_xlim(0, seconds / 3600)
    _save(figure, path)


def arms(days: dict[str, Any], path: Path) -> None:
    """Throughput above and slowest users below, over the best fixed threshold; a column per engine and day."""
    columns = [(engine, name) for engine in ENGINES for name in days[engine]]
    figure, panels = _panels(2, len(columns), (2.7 * len(columns), 5.8), sharex=True)
    keys = ("tokens_over_best_fixed", "slowest_percent_over_best_fixed")
    for column, (engine, name) in enumerate(columns):
        panels[0][column].set_title(f"{engine}, {name.replace('_', ' ')}")
        for row, key in enumerate(keys):
            _draw_arms(panels[row][column], days[engine][name]["arms"], key)
        panels[1][column].set_xlabel("fixed threshold")
    panels[0][0].set_ylabel("tokens per second,\nover the best fixed")
    panels[1][0].set_ylabel("slowest 1 % of users,\nover the same")
    panels[0][-1].legend(fontsize=8, loc="lower center")
    _save(figure, path)


def _draw_arms(axes: Any, arms: dict[str, Any], key: str) -> None:
    places = list(FIXED)
    values = [arms[f"{threshold:g}"][key] for threshold in FIXED]
    axes.plot(places, values, color=FIXED_COLOURS[3], linewidth=1.5, marker="o", markersize=3.5, label="fixed")
    styles = {
        "load_curve": {"color": SCHEDULED_COLOUR, "linewidth": 2.4},
        "goodput": {"color": SCHEDULED_COLOUR, "linewidth": 2.0, "linestyle": "--"},
        "bandit": {"color": BANDIT_COLOUR, "linewidth": 1.2},
        "bandit_shared": {"color": BANDIT_COLOUR, "linewidth": 1.2, "linestyle": ":"},
    }
    for name, style in styles.items():
        axes.axhline(arms[name][key], label=name.replace("_", " "), **style)
    # Fixed thresholds far below the adaptive policies are cut off, because the other differences are small.
    lowest = min(arms[name][key] for name in styles)
    axes.set_ylim(lowest - 0.4 * (1.02 - lowest), None)


def replicas(part: dict[str, Any], seconds: float, path: Path) -> None:
    """Replicas over a day on the left, figures by mean number of replicas on the right; `full` engines."""
    figure, (course, tokens, slowest) = _panels(1, 3, (3.6 * PANEL_WIDTH, 4.0), width_ratios=(1.4, 1, 1))
    _draw_course(course, part["course"], part["arms"]["full"], seconds)
    for axes, key, title in (
        (tokens, "tokens_per_second", "Tokens per second, all replicas"),
        (slowest, "slowest_percent", "Tokens per second, slowest 1 % of users"),
    ):
        sweep = [part["arms"]["full"][f"serve_{target}"] for target in TARGETS]
        sweep.sort(key=lambda each: float(each["mean_replicas"]))
        sizes = [each["mean_replicas"] for each in sweep]
        label = "Serve's default, by target"
        axes.plot(sizes, [each[key] for each in sweep], "-o", color=OFF_COLOUR, markersize=3.5, label=label)
        for name in PRESETS:
            mine = part["arms"]["full"][name]
            axes.plot(
                mine["mean_replicas"],
                mine[key],
                "D",
                color=PRESET_COLOURS[name],
                markersize=7,
                label=f"preset {name}",
            )
        alone = part["arms"]["full"][ALONE]
        label = f"{HEADLINE}, thresholds at 0"
        style = {"color": SCHEDULED_COLOUR, "markersize": 10, "markerfacecolor": "none"}
        axes.plot(alone["mean_replicas"], alone[key], "D", label=label, **style)
        axes.set_title(title)
        axes.set_xlabel("replicas, on average")
    tokens.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def _draw_course(axes: Any, course: dict[str, Any], arms: dict[str, Any], seconds: float) -> None:
    hours = _hours(course["load"], seconds)
    ours = arms[HEADLINE]["mean_replicas"]
    nearest = min(TARGETS, key=lambda target: abs(arms[f"serve_{target}"]["mean_replicas"] - ours))
    axes.plot(
        hours,
        course["replicas"][f"serve_{nearest}"],
        color=OFF_COLOUR,
        linewidth=1.8,
        label=f"Serve's default, target {nearest}",
    )
    for name in PRESETS:
        style = {"color": PRESET_COLOURS[name], "linewidth": 2.4 if name == HEADLINE else 1.2}
        axes.plot(hours, course["replicas"][name], label=f"preset {name}", **style)
    top = max(max(values) for values in course["replicas"].values())
    other = axes.twinx()
    other.fill_between(hours, course["load"], color=FIXED_COLOURS[0], linewidth=0, zorder=0)
    other.set_ylim(0, 2.4 * max(course["load"]))
    other.set_yticks([])
    other.spines[["top", "right"]].set_visible(False)
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_ylim(0, 1.05 * top)
    axes.set_title("Replicas, and the load (blue)")
    axes.set_xlabel("hours of the simulated day")
    axes.legend(fontsize=8, loc="upper left")


def scale(points: list[dict[str, Any]], path: Path) -> None:
    """CPU time of the controller by number of replicas."""
    figure, (axes,) = _panels(1, 1, (1.5 * PANEL_WIDTH, 3.8))
    for name, style in zip(SHIPPED, ("-o", "--s")):
        mine = [point for point in points if point["policy"] == name]
        sizes = [point["replicas"] for point in mine]
        shares = [100 * point["core_share"] for point in mine]
        axes.plot(sizes, shares, style, color=SCHEDULED_COLOUR, label=name.replace("_", " "))
    axes.axhline(20, color=PAPER_COLOUR, linewidth=1, linestyle=":", label="aim")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("replicas, each with a heartbeat a second")
    axes.set_title("Controller, % of a core")
    axes.legend(fontsize=8, loc="upper left")
    _save(figure, path)


def _hours(values: list[float], seconds: float) -> list[float]:
    return [(number + 0.5) * seconds / len(values) / 3600 for number in range(len(values))]
