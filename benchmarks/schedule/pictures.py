"""Pictures of the prefix schedule, in the form of the DSpark paper's figures for comparison."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.schedule.simulation import GAMMA, MAIN_MIX, PAPER_FIGURE_8, SCHEDULED

SCHEDULED_COLOUR, OFF_COLOUR, PAPER_COLOUR = "#c2410c", "#6b7280", "#111827"
FIXED_COLOURS = ("#bfdbfe", "#93c5fd", "#60a5fa", "#3b82f6", "#1d4ed8", "#1e3a8a", "#172554")
"""From short lengths to long ones."""
OFFERED_COLOUR, ACCEPTED_COLOUR = "#bfdbfe", "#1d4ed8"
PANEL_WIDTH = 3.8
"""Inches"""
NUM_GPUS = 4
"""GPUs of the simulated machine; the paper's figures are per GPU."""


# The simulation.


def figure_8(simulation: dict[str, Any], path: Path) -> None:
    """Budget, throughput and gain against concurrency, simulated, beside the points of the paper's Figure 8."""
    mixes = simulation["runs"][f"gamma_{GAMMA}"]
    figure, (budget, throughput, gain) = _panels(1, 3, (3 * PANEL_WIDTH, 4.0))
    _draw_simulated_budget(budget, mixes)
    _draw_simulated_throughput(throughput, mixes[MAIN_MIX]["points"])
    _draw_simulated_gain(gain, mixes[MAIN_MIX]["points"])
    for axes in (budget, throughput, gain):
        axes.set_xlabel("requests")
        axes.set_xlim(0, 265)
    _save(figure, path)


def _draw_simulated_budget(axes: Any, mixes: dict[str, Any]) -> None:
    for mix, curves in mixes.items():
        budgets = [point["arms"][SCHEDULED]["budget_per_request"] for point in curves["points"]]
        style = _bold() if mix == MAIN_MIX else {"color": SCHEDULED_COLOUR, "linewidth": 1, "alpha": 0.35}
        axes.plot(_concurrencies(curves["points"]), budgets, **style)
    # The other mixes share one entry of the legend.
    axes.plot([], [], color=SCHEDULED_COLOUR, linewidth=1, alpha=0.35, label="other mixes")
    axes.plot([], [], **_bold(), label=f"scheduled, {MAIN_MIX} mix")
    _draw_paper(axes, "budget", "read from the paper")
    axes.axhline(2, color=FIXED_COLOURS[2], linewidth=1.2, label="MTP-1")
    axes.set_ylim(0, 1.1 * (1 + GAMMA))
    axes.set_title("Verified tokens per request")
    axes.legend(fontsize=8, loc="lower left")


def _draw_simulated_throughput(axes: Any, points: list[dict[str, Any]]) -> None:
    arms = {
        "clairvoyant": {"color": PAPER_COLOUR, "linewidth": 1, "linestyle": ":"},
        SCHEDULED: _bold(),
        "fixed_1": {"color": FIXED_COLOURS[2], "linewidth": 1.5},
        "off": {"color": OFF_COLOUR, "linewidth": 1.5},
    }
    labels = {SCHEDULED: "scheduled", "fixed_1": "MTP-1"}
    for arm, style in arms.items():
        rates = [point["arms"][arm]["tokens_per_second"] / NUM_GPUS for point in points]
        axes.plot(_concurrencies(points), rates, **style, label=labels.get(arm, arm))
    # The paper does not name its machine: the curves' shapes can be compared, their heights cannot.
    _draw_paper(axes, "dspark", "paper, DSpark, another machine")
    _draw_paper(axes, "mtp_1", "paper, MTP-1, another machine", filled=False)
    axes.set_ylim(0, 1.55 * max(PAPER_FIGURE_8["dspark"]))
    axes.set_title("Tokens per second and GPU")
    axes.legend(fontsize=8, loc="upper left")


def _draw_simulated_gain(axes: Any, points: list[dict[str, Any]]) -> None:
    concurrencies = _concurrencies(points)
    dear, free = ([point[key] for point in points] for key in ("gain_over_mtp_1", "gain_over_free_mtp_1"))
    axes.plot(concurrencies, dear, **_bold(), label="MTP-1 drafts at DSpark's price")
    axes.plot(concurrencies, free, color=SCHEDULED_COLOUR, linewidth=1.2, label="MTP-1 drafts cost nothing")
    axes.fill_between(concurrencies, free, dear, color=SCHEDULED_COLOUR, alpha=0.12, linewidth=0)
    _draw_paper(axes, "gain", "read from the paper")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0.5, 2.1)
    axes.set_title("Gain over MTP-1")
    axes.legend(fontsize=8, loc="lower left")


def _draw_paper(axes: Any, name: str, label: str, filled: bool = True) -> None:
    """Points as they were read from the paper's figure."""
    places = [(x, y) for x, y in zip(PAPER_FIGURE_8["concurrency"], PAPER_FIGURE_8[name]) if y is not None]
    face = PAPER_COLOUR if filled else "white"
    axes.plot(*zip(*places), "o", color=PAPER_COLOUR, markerfacecolor=face, markersize=4.5, zorder=4, label=label)


# The measured run.


def figure_7(results: dict[str, Any], path: Path) -> None:
    """Throughput against tokens per second and user, a panel per traffic and a line per arm over concurrency."""
    traffics = _traffics(results["points"])
    figure, panels = _panels(1, len(traffics), (PANEL_WIDTH * len(traffics), 4.0))
    for axes, traffic in zip(panels, traffics):
        points = _points_of(results["points"], traffic)
        for arm in _arms(points):
            users, rates = ([point["arms"][arm][key] for point in points] for key in _FIGURE_7_AXES)
            axes.plot(users, rates, **_style(arm), label=_label(arm))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_title(traffic)
        axes.set_xlabel("tokens per second and user")
    panels[0].set_ylabel("tokens per second, all users")
    panels[-1].legend(fontsize=8)
    _save(figure, path)


_FIGURE_7_AXES = ("tokens_per_second_per_user", "tokens_per_second")


def figure_8_measured(results: dict[str, Any], path: Path) -> None:
    """Throughput over no speculation above, budget below, against concurrency; a column per traffic."""
    traffics = _traffics(results["points"])
    figure, panels = _panels(2, len(traffics), (PANEL_WIDTH * len(traffics), 6.4), sharex=True)
    for column, traffic in enumerate(traffics):
        points = _points_of(results["points"], traffic)
        _draw_measured_gain(panels[0][column], points)
        _draw_measured_budget(panels[1][column], points)
        panels[0][column].set_title(traffic)
        panels[1][column].set_xlabel("requests")
    panels[0][0].set_ylabel("tokens per second, over none drafted")
    panels[1][0].set_ylabel("verified tokens per request and round")
    panels[0][-1].legend(fontsize=8)
    _save(figure, path)


def _draw_measured_gain(axes: Any, points: list[dict[str, Any]]) -> None:
    concurrencies = _concurrencies(points)
    for arm in _arms(points):
        off = [point["arms"]["off"]["tokens_per_second"] for point in points]
        gains = [point["arms"][arm]["tokens_per_second"] / plain for point, plain in zip(points, off)]
        axes.plot(concurrencies, gains, **_style(arm), label=_label(arm))
        if arm == "scheduled":
            low, high = ([pick(_repeated_gains(point, arm)) for point in points] for pick in (min, max))
            axes.fill_between(concurrencies, low, high, color=SCHEDULED_COLOUR, alpha=0.15, linewidth=0)
    _concurrency_axis(axes, concurrencies)
    axes.set_ylim(bottom=0)


def _repeated_gains(point: dict[str, Any], arm: str) -> list[float]:
    """Over no speculation in the same repeat, so that slow phases of the machine affect both sides."""
    mine, plain = (point["arms"][each]["repeats"] for each in (arm, "off"))
    return [rate / other for rate, other in zip(mine, plain)]


def _draw_measured_budget(axes: Any, points: list[dict[str, Any]]) -> None:
    concurrencies = _concurrencies(points)
    for arm in _arms(points):
        budgets = [point["arms"][arm]["budget_per_request"] for point in points]
        axes.plot(concurrencies, budgets, **_style(arm))
    _concurrency_axis(axes, concurrencies)
    axes.set_ylim(bottom=0)


def _concurrency_axis(axes: Any, concurrencies: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(concurrencies, [str(number) for number in concurrencies])
    axes.minorticks_off()


def figure_5(sweep: list[dict[str, Any]], path: Path) -> None:
    """Tokens per round offered and accepted by a static threshold, the share accepted above; a panel per traffic."""
    traffics = _traffics(sweep)
    figure, panels = _panels(1, len(traffics), (PANEL_WIDTH * len(traffics), 3.6), sharey=True)
    for axes, traffic in zip(panels, traffics):
        rows = sorted(_points_of(sweep, traffic), key=lambda row: row["threshold"])
        places = list(range(len(rows)))
        bars = axes.bar(places, [row["offered"] for row in rows], 0.8, color=OFFERED_COLOUR, label="offered")
        axes.bar(places, [row["accepted"] for row in rows], 0.8, color=ACCEPTED_COLOUR, label="accepted")
        axes.bar_label(bars, [f"{100 * row['acceptance_rate']:.0f} %" for row in rows], fontsize=8, padding=2)
        axes.set_xticks(places, [f"{row['threshold']:g}" for row in rows])
        axes.set_title(traffic)
        axes.set_xlabel("threshold")
        axes.margins(y=0.12)
    panels[0].set_ylabel("tokens per request and round")
    panels[-1].legend(fontsize=8, loc="upper right")
    _save(figure, path)


# Shared by all pictures.


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes: a list, or a list of lists where there are several rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for each in axes.flat:
        each.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bold() -> dict[str, Any]:
    return {"color": SCHEDULED_COLOUR, "linewidth": 2.8, "zorder": 3}


def _style(arm: str) -> dict[str, Any]:
    marker = {"marker": "o", "markersize": 3.5}
    if arm == "scheduled":
        return {**_bold(), **marker}
    if arm == "off":
        return {"color": OFF_COLOUR, "linewidth": 1.5, **marker}
    return {"color": FIXED_COLOURS[_length(arm) - 1], "linewidth": 1.5, **marker}


def _label(arm: str) -> str:
    if arm == "off":
        return "none drafted"
    return arm if arm == "scheduled" else f"always {_length(arm)}"


def _length(arm: str) -> int:
    return int(arm.removeprefix("fixed_"))


def _arms(points: list[dict[str, Any]]) -> list[str]:
    """Those that every point has: no drafts, fixed lengths from the shortest, scheduled."""
    common = set.intersection(*(set(point["arms"]) for point in points))
    fixed = sorted((arm for arm in common if arm.startswith("fixed_")), key=_length)
    return [arm for arm in ("off", *fixed, "scheduled") if arm in common]


def _traffics(rows: Iterable[dict[str, Any]]) -> list[str]:
    """In the order in which they first appear."""
    return list(dict.fromkeys(row["traffic"] for row in rows))


def _points_of(rows: Iterable[dict[str, Any]], traffic: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["traffic"] == traffic]


def _concurrencies(points: list[dict[str, Any]]) -> list[int]:
    return [point["concurrency"] for point in points]
