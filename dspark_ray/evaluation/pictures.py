"""Reliability diagrams; the only file that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspark_ray.speculative.calibration import NUM_BINS, Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE, _AFTER = "tab:orange", "tab:blue"


@dataclass(frozen=True)
class ReliabilityPanel:
    """One drafted position before and after its temperature."""

    title: str
    before: Reliability
    after: Reliability


def draw_reliability(panels: Sequence[ReliabilityPanel], path: Path) -> None:
    """Write a PNG with one column per position: acceptance rate by prediction above, histogram of predictions below.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(panels), 4.0), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, panel in enumerate(panels):
        _draw_curves(axes[0, column], panel)
        _draw_histogram(axes[1, column], panel)
    axes[0, 0].set_ylabel("share accepted")
    axes[1, 0].set_ylabel("share of rounds")
    axes[0, 0].legend(loc="upper left", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _draw_curves(axes: Axes, panel: ReliabilityPanel) -> None:
    axes.plot((0, 1), (0, 1), color="grey", linewidth=1, linestyle=":")
    for found, color, label in ((panel.before, _BEFORE, "before"), (panel.after, _AFTER, "after")):
        # The size of a dot shows the number of rounds in its bin, its weight in the error.
        share = found.counts / max(1, found.counts.sum())
        axes.plot(found.predicted, found.stood, color=color, linewidth=1)
        axes.scatter(found.predicted, found.stood, s=6 + 150 * share, color=color, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(panel.title, fontsize="small")


def _draw_histogram(axes: Axes, panel: ReliabilityPanel) -> None:
    edges = np.linspace(0, 1, NUM_BINS + 1)
    for found, color in ((panel.before, _BEFORE), (panel.after, _AFTER)):
        share = found.counts / max(1, found.counts.sum())
        axes.stairs(share, edges, color=color, fill=color == _AFTER, alpha=0.35 if color == _AFTER else 1)
    axes.set_xlabel("predicted survival")
