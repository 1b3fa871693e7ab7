"""`dspark-ray top`: a live picture of the nodes, devices and replicas that a load controller sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.styled import Styled
from rich.text import Text

from deployments.console.tables import (
    DEVICE_COLUMNS,
    NUM_HEADING_LINES,
    REPLICA_COLUMNS,
    DeviceRow,
    cut_table,
    more,
    one_line,
)
from deployments.console.view import DASH, NO_DEVICE, View, printable

_SEPARATOR = " · "
_MAX_NOTES = 4
_PIPE_LINES = 1000
"""Height of a picture for a pipe or a file; drawing many more lines takes many seconds, and `--json` has them all."""
_UTILIZATION_REMARK = "GPU util alone says nothing: one request drives it to 100 %"
_OVERRIDE_REMARK = "* set by hand"


@dataclass(frozen=True, slots=True)
class Outage:
    """How long the server has not answered, and why."""

    seconds: float
    reason: str


def run(read: Callable[[], View], failure: type[Exception], interval_seconds: float | None) -> None:
    """Draw pictures until Ctrl-C; a single one where the interval is None or stdout is no terminal.

    Raises what `read` raises.
    """
    console = Console()
    with suppress(KeyboardInterrupt):
        if interval_seconds is None or not console.is_terminal:
            show(read, console)
        else:
            watch(read, failure, interval_seconds, console, time.monotonic, time.sleep)


def show(read: Callable[[], View], console: Console) -> None:
    """Draw one picture: as much as fits above a terminal's prompt, or up to _PIPE_LINES for a pipe or a file."""
    height = console.height - 1 if console.is_terminal else _PIPE_LINES
    console.print(picture(read(), console.width, height))


def watch(
    read: Callable[[], View],
    failure: type[Exception],
    interval_seconds: float,
    console: Console,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> None:
    """Draw a picture every interval until an exception ends it; the terminal is restored then.

    A `failure` of the first `read` is raised; later ones mark the last picture as stale.
    """
    view, outage, answered_at = read(), None, clock()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(picture(view, console.width, console.height, outage), refresh=True)
            sleep(interval_seconds)
            try:
                view = read()
            except failure as error:
                outage = Outage(clock() - answered_at, str(error))
            else:
                outage, answered_at = None, clock()


def picture(view: View, width: int, height: int, outage: Outage | None = None) -> RenderableType:
    """The whole view, cut to a terminal of `width` by `height` characters."""
    head, notes, foot = _head(view, width), _notes(view), _foot(view)
    devices = [DeviceRow(node, device, index == 0) for node in view.nodes for index, device in enumerate(node.devices)]
    num_texts = len(head) + len(notes) + len(foot) + (outage is not None)
    num_lines = _shares(height - num_texts - 2 * (1 + NUM_HEADING_LINES), len(devices), len(view.replicas))
    body = Group(
        *head,
        "",
        *cut_table(DEVICE_COLUMNS, devices, num_lines[0], width, "device", lambda row: row.node.is_silent),
        *notes,
        "",
        *cut_table(REPLICA_COLUMNS, view.replicas, num_lines[1], width, "replica", lambda replica: replica.is_silent),
        *foot,
    )
    if outage is None:
        return body
    stale = f"stale: no answer for {outage.seconds:.0f} s: {printable(outage.reason)}"
    return Group(one_line(stale, "bold black on yellow"), Styled(body, "dim"))


def _shares(num_lines: int, num_first: int, num_second: int) -> tuple[int, int]:
    """Lines of each of two tables: half for each, or more where the other one needs less."""
    first = min(num_first, max(num_lines // 2, num_lines - num_second))
    return first, min(num_second, num_lines - first)


def _head(view: View, width: int) -> list[Text]:
    devices = sum(device is not NO_DEVICE for node in view.nodes for device in node.devices)
    rate = sum(replica.tokens_per_second for replica in view.replicas)
    tokens = sum(replica.num_tokens for replica in view.replicas)
    accepted = sum(replica.accepted_length * replica.num_tokens for replica in view.replicas)
    parts = [
        Text(view.application, "bold"),
        Text(f"policy {view.policy}"),
        Text(_nodes_read(view)),
        Text(_counted(devices, "device")),
        Text(_counted(len(view.replicas), "replica")),
        Text(f"{format(rate, ',.1f' if rate < 1000 else ',.0f')} tokens/s", "bold green"),
        Text(f"accepted length {accepted / tokens:.2f}" if tokens else f"accepted length {DASH}"),
        Text(f"{sum(replica.num_running for replica in view.replicas):,.0f} running"),
        Text(f"{sum(replica.num_waiting for replica in view.replicas):,.0f} waiting"),
    ]
    return _flow(parts + _alerts(view), width)


def _nodes_read(view: View) -> str:
    nodes = _counted(max(view.num_probes, len(view.nodes)), "node")
    return nodes if nodes == _counted(view.num_read, "node") else f"{view.num_read:,} of {nodes}"


def _alerts(view: View) -> list[Text]:
    """Counts of devices, nodes and replicas in trouble, whose rows may have been cut off."""
    states = [device.state for node in view.nodes for device in node.devices if device is not NO_DEVICE]
    found = (
        (states.count("lost"), "device", "lost"),
        (states.count("unreadable"), "device", "unreadable"),
        (sum(bool(node.probe_error) for node in view.nodes), "probe", "failing"),
        (sum(node.is_silent for node in view.nodes), "node", "silent"),
        (sum(replica.is_silent for replica in view.replicas), "replica", "silent"),
    )
    return [Text(f"{_counted(count, noun)} {state}", "bold red") for count, noun, state in found if count]


def _notes(view: View) -> list[Text]:
    """The notes of nodes and devices; sources of the same text share a line."""
    sources_of: dict[str, list[str]] = {}
    troubles: set[str] = set()
    for node in view.nodes:
        for source, text in node.notes:
            sources_of.setdefault(text, []).append(source)
            if node.is_troubled:
                troubles.add(text)
    lines = [
        one_line(f"{_first_names(sources)}: {text}", "red" if text in troubles else "dim")
        for text, sources in sources_of.items()
    ]
    if len(lines) <= _MAX_NOTES:
        return lines
    return [*lines[: _MAX_NOTES - 1], more(len(lines) - _MAX_NOTES + 1, "note")]


def _foot(view: View) -> list[Text]:
    devices = (device for node in view.nodes for device in node.devices)
    remarks = []
    if any(device.kind != "cpu" and device.utilization is not None for device in devices):
        remarks.append(_UTILIZATION_REMARK)
    if any(replica.overridden for replica in view.replicas):
        remarks.append(_OVERRIDE_REMARK)
    return [one_line(_SEPARATOR.join(remarks), "dim")] if remarks else []


def _flow(parts: Sequence[Text], width: int) -> list[Text]:
    """The parts on as few lines as possible; rich would break lines within a part."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(_SEPARATOR) + part.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], (_SEPARATOR, "dim"), part, no_wrap=True, overflow="ellipsis")
        else:
            lines.append(Text.assemble(part, no_wrap=True, overflow="ellipsis"))
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]}, {names[1]} and {len(names) - 2:,} more"
