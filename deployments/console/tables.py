"""The tables of `dspark-ray top`: what each column shows, and which columns fit a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deployments.console.view import DASH, NUM_ID_CHARACTERS, Device, Node, Replica

Row = TypeVar("Row")

NUM_HEADING_LINES = 2
_GAP = 2
"""Characters between two columns."""
_BAR_CELLS = 5
_BAR_PARTS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_STATE_STYLES = {"ok": "green", "lost": "bold white on red", "unreadable": "bold red"}


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device, and the node to which it belongs."""

    node: Node
    device: Device
    is_first: bool
    """Whether this is the node's first row, the only one that shows its name."""

    @property
    def state(self) -> Text:
        """The device's state; of a device that is ok, whether its node is silent or its clock throttled."""
        device, node = self.device, self.node
        if device.state == "ok" and node.is_silent:
            return Text(f"silent {node.age_seconds:.0f} s", "yellow")
        if device.state == "ok" and device.throttles:
            return Text("throttled", "yellow")
        return Text(device.state, _STATE_STYLES.get(device.state, "red"))


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One column of a table of `Row`s; cells never wrap."""

    heading: str
    width: int
    importance: int
    """Columns with large numbers are dropped first when the terminal is narrow; 1 is dropped last."""
    cell: Callable[[Row], Text]
    justify: Literal["left", "right"] = "right"
    max_width: int = 0
    """The width to which it may grow where the terminal has room."""
    keeps_ends: bool = False
    """Whether a text that is too long loses its middle instead of its end: names may differ at either end."""


def cut_table(
    columns: Sequence[Column[Row]],
    rows: Sequence[Row],
    num_lines: int,
    width: int,
    noun: str,
    is_dim: Callable[[Row], bool],
) -> Iterable[RenderableType]:
    """A table with at most `num_lines` lines below the headings; where rows are left out, the last line counts them."""
    if not rows:
        yield one_line(f"no {noun} has reported yet", "dim")
        return
    shown = rows if len(rows) <= num_lines else rows[: max(1, num_lines - 1)]
    yield _table(columns, shown, width, is_dim)
    if len(shown) < len(rows):
        yield more(len(rows) - len(shown), noun)


def one_line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def more(count: int, noun: str) -> Text:
    return one_line(f"... and {count:,} more {noun}{'' if count == 1 else 's'}", "dim")


def _table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int, is_dim: Callable[[Row], bool]
) -> RenderableType:
    cells = [[column.cell(row) for column in columns] for row in rows]
    widths = _fitting(columns, cells, width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold cyan")
    for index, column_width in widths.items():
        column = columns[index]
        table.add_column(column.heading, width=column_width, justify=column.justify, no_wrap=True, overflow="ellipsis")
    for row, texts in zip(rows, cells, strict=True):
        shown = (_shortened(texts[index], columns[index], column_width) for index, column_width in widths.items())
        table.add_row(*shown, style="dim" if is_dim(row) else None)
    return table


def _shortened(text: Text, column: Column[Any], width: int) -> Text:
    """Without its middle where the column keeps both ends; rich cuts the end of all other texts."""
    if not column.keeps_ends or text.cell_len <= width:
        return text
    num_first = (width - 1) // 2
    return Text.assemble(text[:num_first], "…", text[num_first + 1 - width :])


def _fitting(columns: Sequence[Column[Row]], cells: Sequence[Sequence[Text]], width: int) -> dict[int, int]:
    """Widths of the columns that fit, by index, from left to right.

    Empty columns are dropped first, then the less important. Rich would shrink all columns instead. Widths do not
    depend on numbers, so that columns keep their places when numbers change.
    """
    is_empty = [all(row[index].plain in ("", DASH) for row in cells) for index in range(len(columns))]
    order = sorted(range(len(columns)), key=lambda index: (is_empty[index], columns[index].importance))
    widths, left = dict[int, int](), width + _GAP
    for index in order:
        need = columns[index].width + _GAP
        if need <= left:
            widths[index], left = columns[index].width, left - need
    # Texts get the room that is left, again by importance.
    for index in widths:
        widest = max((row[index].cell_len for row in cells), default=0)
        growth = min(left, max(0, min(widest, columns[index].max_width) - widths[index]))
        widths[index], left = widths[index] + growth, left - growth
    return dict(sorted(widths.items()))


# Cells.


def _number(value: float | None, form: str, factor: float = 1.0) -> Text:
    return Text(DASH if value is None else format(value * factor, form))


def _percent(value: float | None) -> Text:
    return _number(value, ".0f", 100)


def _fraction(used: float | None, total: float | None, form: str = ".0f", factor: float = 1.0) -> Text:
    """`used/total`."""
    if used is None and total is None:
        return Text(DASH)
    return Text("/").join((_number(used, form, factor), _number(total, form, factor)))


def _memory(device: Device) -> Text:
    form = ".1f" if (device.memory_total or 0.0) < 1000 * 2**30 else ".0f"
    return _fraction(device.memory_used, device.memory_total, form, 2.0**-30)


def _heat(value: float) -> str:
    return "green" if value < 0.5 else "yellow" if value < 0.85 else "red"


def _saturation(replica: Replica) -> Text:
    value = replica.saturation
    full, rest = divmod(round(min(max(value, 0.0), 1.0) * _BAR_CELLS * 8), 8)
    bar = ("█" * full + _BAR_PARTS[rest]).ljust(_BAR_CELLS)
    return Text.assemble((bar, f"{_heat(value)} on grey23"), f" {value:.2f}")


def _threshold(replica: Replica) -> Text:
    text = "bypass" if replica.bypass else f"{replica.confidence_threshold:.2f}"
    return Text(f"*{text}" if replica.overridden else text, "magenta" if replica.overridden else "")


def _utilization(device: Device) -> Text:
    """Dim for a GPU, where it is no measure of load."""
    text = _percent(device.utilization)
    text.stylize("" if device.kind == "cpu" else "dim")
    return text


def _throttles(device: Device) -> Text:
    return Text(", ".join(device.throttles), "yellow") if device.throttles else Text(DASH)


def _age(replica: Replica) -> Text:
    return Text(f"{replica.age_seconds:.0f}", "yellow" if replica.is_silent else "")


def _of_steps(replica: Replica, value: float) -> float | None:
    """An average over the steps of a heartbeat; None where there were no steps."""
    return value if replica.num_steps else None


def _short_id(name: str) -> str:
    """The end of a replica's id, which is its random part."""
    return name.rpartition("#")[2][-NUM_ID_CHARACTERS:]


DEVICE_COLUMNS: tuple[Column[DeviceRow], ...] = (
    Column("host", 10, 1, lambda row: Text(row.node.host if row.is_first else "", "bold"), "left", 24, True),
    Column("source", 6, 13, lambda row: Text(row.node.source if row.is_first else "", "dim"), "left"),
    Column("device", 6, 2, lambda row: Text(row.device.label), "left"),
    Column("name", 10, 12, lambda row: Text(row.device.name.removeprefix("NVIDIA ") or DASH), "left", 32, True),
    Column("state", 11, 3, lambda row: row.state, "left"),
    Column("SM\n%", 3, 5, lambda row: _percent(row.device.sm_activity)),
    Column("tensor\n%", 6, 4, lambda row: _percent(row.device.tensor_activity)),
    Column("DRAM\n%", 4, 9, lambda row: _percent(row.device.dram_activity)),
    Column("util\n%", 4, 8, lambda row: _utilization(row.device)),
    Column("power\nW", 9, 7, lambda row: _fraction(row.device.power_watts, row.device.power_limit_watts)),
    Column("clock\nMHz", 9, 11, lambda row: _fraction(row.device.sm_clock_mhz, row.device.max_sm_clock_mhz)),
    Column("memory\nGiB", 11, 6, lambda row: _memory(row.device)),
    Column("throttled by", 12, 10, lambda row: _throttles(row.device), "left", 40),
)
REPLICA_COLUMNS: tuple[Column[Replica], ...] = (
    Column("replica", NUM_ID_CHARACTERS, 1, lambda replica: Text(_short_id(replica.replica), "bold"), "left"),
    Column("running", 7, 6, lambda replica: _number(replica.num_running, ".1f")),
    Column("waiting", 7, 8, lambda replica: _number(replica.num_waiting, ".1f")),
    Column("slots", 5, 16, lambda replica: _number(replica.max_running, ".0f")),
    Column("cache\n%", 5, 10, lambda replica: _percent(replica.cache_usage)),
    Column("saturation", 10, 3, _saturation),
    Column("limited\nby", 8, 7, lambda replica: Text(replica.limiting or DASH), "left"),
    Column("threshold", 9, 5, _threshold),
    Column("max\nlength", 6, 11, lambda replica: _number(replica.max_draft_tokens, ".0f")),
    Column("budget\n/request", 8, 9, lambda replica: _number(_of_steps(replica, replica.budget_per_request), ".2f")),
    Column("accepted\nlength", 8, 4, lambda replica: _number(replica.accepted_length or None, ".2f")),
    Column("rows\n/step", 6, 14, lambda replica: _number(_of_steps(replica, replica.rows_per_step), ".1f")),
    Column("tokens/s", 8, 2, lambda replica: _number(replica.tokens_per_second, ",.0f")),
    Column("slowness", 8, 12, lambda replica: _number(replica.slowness, ".2f")),
    Column("busy\n%", 4, 15, lambda replica: _percent(replica.busy_share)),
    Column("age\ns", 3, 13, _age),
)
