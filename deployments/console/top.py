"""`dspark-ray top`: a live picture of an application's nodes, devices and replicas, as its load controller sees them.

The server's JSON becomes a `View`, a view becomes a `picture`, and `watch` draws pictures until Ctrl-C. This is the
only module that needs rich.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Generic, Literal, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
Row = TypeVar("Row")

_DASH = "-"
_SEPARATOR = " · "
_GAP = 2
"""Columns between two columns of a table."""
_MAX_NOTES = 4
_BAR_CELLS = 5
_BAR_PARTS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_SILENT_NODE_SECONDS = 5.0
"""Probes are asked every second; one that has not answered for so long has a line of its own to say."""
_SILENT_HEARTBEATS = 3.0
_NUM_ID_CHARACTERS = 8
_PIPE_LINES = 1000
"""Drawing many more takes many seconds; programs ask for the JSON."""
_UTILIZATION_REMARK = "GPU util alone says nothing: one request drives it to 100 %"
_OVERRIDE_REMARK = "* set by hand"
_THROTTLES = {
    "sw_power_cap": "sw power cap",
    "sw_thermal_slowdown": "sw thermal",
    "hw_thermal_slowdown": "hw thermal",
    "hw_power_brake_slowdown": "hw power brake",
    "hw_slowdown": "hw slowdown",
}
"""Those clock events that cost speed which the device could have, in few words."""
_STATE_STYLES = {"ok": "green", "lost": "bold white on red", "unreadable": "bold red"}


# What the server says.


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Shares and activities are 0 to 1, memory is bytes; None is what the device does not say."""

    kind: str
    index: int
    name: str
    state: str
    note: str
    utilization: float | None = None
    sm_activity: float | None = None
    tensor_activity: float | None = None
    dram_activity: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    memory_used: float | None = None
    memory_total: float | None = None
    clock_events: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A MIG instance has its GPU's index."""
        return f"{self.kind} {self.index}" if self.kind in ("gpu", "mig") else self.kind

    @property
    def throttles(self) -> list[str]:
        """What keeps its clock low, other than having nothing to do."""
        return [_THROTTLES[event] for event in self.clock_events if event in _THROTTLES]

    @property
    def busyness(self) -> float:
        """Of two devices, which one an operator wants to see first."""
        if self.kind == "cpu":
            return self.utilization or 0.0
        power, limit = self.power_watts, self.power_limit_watts
        return max(self.tensor_activity or 0.0, power / limit if power and limit else 0.0)


_NO_DEVICE = Device(kind=_DASH, index=0, name="", state="unreadable", note="")
"""In the place of a node's devices when nothing is known of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one probe said, or why it says nothing."""

    host: str
    source: str
    note: str
    age_seconds: float
    devices: tuple[Device, ...]
    probe_error: str = ""

    @property
    def is_silent(self) -> bool:
        return self.age_seconds > _SILENT_NODE_SECONDS

    @property
    def is_troubled(self) -> bool:
        return bool(self.probe_error) or self.is_silent or any(device.state != "ok" for device in self.devices)

    @property
    def notes(self) -> list[tuple[str, str]]:
        """(whose, text), without what the node and its devices say twice."""
        own = [(self.host, text) for text in (self.probe_error, self.note) if text]
        devices = [(f"{self.host} {device.label}", device.note) for device in self.devices]
        return own + [(whose, text) for whose, text in devices if text and text != self.note]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A heartbeat, and what the controller made of it."""

    replica: str
    seconds: float
    num_steps: int
    num_running: float
    num_waiting: float
    max_running: int
    cache_usage: float
    rows_per_step: float
    budget_per_request: float
    accepted_length: float
    tokens_per_second: float
    busy_share: float
    slowness: float
    threshold: float
    max_draft_tokens: int | None
    bypass: bool
    overridden: bool
    saturation: float
    limiting: str | None
    age_seconds: float
    is_silent: bool

    @property
    def num_tokens(self) -> float:
        """That this heartbeat tells of."""
        return self.tokens_per_second * self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What there is to show, in the order in which it is shown: trouble, then load."""

    application: str
    policy: str
    num_probes: int
    num_read: int
    """Nodes that a probe has ever read; `nodes` also has those where none could."""
    nodes: tuple[Node, ...]
    replicas: tuple[Replica, ...]


def parse(raw: Any) -> View:
    """The answer of GET /admin/load. Raises AttributeError, KeyError or TypeError for anything else."""
    errors = {_printable(node_id): _printable(text) for node_id, text in raw["probe_errors"].items()}
    read = {node["node_id"]: _node(node, errors) for node in raw["nodes"]}
    unread = [_unread_node(node_id, text) for node_id, text in errors.items() if node_id not in read]
    patience = _SILENT_HEARTBEATS * raw["heartbeat_seconds"]
    replicas = [_replica(replica, patience) for replica in raw["replicas"]]
    return _pick(
        View,
        raw,
        num_read=len(read),
        nodes=tuple(sorted([*read.values(), *unread], key=_node_order)),
        replicas=tuple(sorted(replicas, key=lambda replica: (-round(replica.saturation, 2), replica.replica))),
    )


def _node(raw: Mapping[str, Any], errors: Mapping[str, str]) -> Node:
    devices = tuple(_device(device) for device in raw["devices"])
    return _pick(Node, raw, devices=devices or (_NO_DEVICE,), probe_error=errors.get(raw["node_id"], ""))


def _unread_node(node_id: str, error: str) -> Node:
    host = node_id[:_NUM_ID_CHARACTERS]
    return Node(host=host, source=_DASH, note="", age_seconds=0.0, devices=(_NO_DEVICE,), probe_error=error)


def _device(raw: Mapping[str, Any]) -> Device:
    return _pick(Device, raw, clock_events=tuple(_printable(event) for event in raw["clock_events"]))


def _replica(raw: Mapping[str, Any], patience: float) -> Replica:
    saturation = {"saturation": raw["saturation"]["value"], "limiting": raw["saturation"]["limiting"]}
    flat = {**raw["sample"], **raw["bounds"], **saturation}
    age, overridden = raw["age_seconds"], raw["overridden"]
    return _pick(Replica, {**flat, "age_seconds": age, "overridden": overridden}, is_silent=age > patience)


def _node_order(node: Node) -> tuple[bool, float, str]:
    """Busyness in coarse steps, so that nodes stay where they are while little changes."""
    busyness = max(device.busyness for device in node.devices)
    return not node.is_troubled, -round(busyness, 1), node.host


_ACCEPTED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, NoneType),
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, NoneType),
    "float": (int, float),
    "float | None": (int, float, NoneType),
}
"""What JSON may have for a field, by its annotation."""


def _pick(kind: type[T], raw: Mapping[str, Any], **made: Any) -> T:
    """The fields of a dataclass: those made already, and all others from the JSON, none of which may be missing."""
    values = dict(made)
    for field in fields(kind):  # type: ignore[arg-type]  # every T here is a dataclass
        if field.name in made:
            continue
        value = raw[field.name]
        if not isinstance(value, _ACCEPTED[str(field.type)]):
            raise TypeError(f"{field.name}={value!r}: expected {field.type}")
        values[field.name] = _printable(value) if isinstance(value, str) else value
    return kind(**values)


def _printable(text: str) -> str:
    """On one line, and without what would move the cursor."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


# Cells.


def _number(value: float | None, form: str, factor: float = 1.0) -> Text:
    return Text(_DASH if value is None else format(value * factor, form))


def _percent(value: float | None) -> Text:
    return _number(value, ".0f", 100)


def _part(used: float | None, whole: float | None, form: str = ".0f", factor: float = 1.0) -> Text:
    """`used/whole`."""
    if used is None and whole is None:
        return Text(_DASH)
    return Text("/").join((_number(used, form, factor), _number(whole, form, factor)))


def _memory(device: Device) -> Text:
    form = ".1f" if (device.memory_total or 0.0) < 1000 * 2**30 else ".0f"
    return _part(device.memory_used, device.memory_total, form, 2.0**-30)


def _heat(value: float) -> str:
    return "green" if value < 0.5 else "yellow" if value < 0.85 else "red"


def _saturation(replica: Replica) -> Text:
    value = replica.saturation
    full, rest = divmod(round(min(max(value, 0.0), 1.0) * _BAR_CELLS * 8), 8)
    bar = ("█" * full + _BAR_PARTS[rest]).ljust(_BAR_CELLS)
    return Text.assemble((bar, f"{_heat(value)} on grey23"), f" {value:.2f}")


def _threshold(replica: Replica) -> Text:
    text = "bypass" if replica.bypass else f"{replica.threshold:.2f}"
    return Text(f"*{text}" if replica.overridden else text, "magenta" if replica.overridden else "")


def _utilization(device: Device) -> Text:
    """Of a GPU it is no measure of load."""
    text = _percent(device.utilization)
    text.stylize("" if device.kind == "cpu" else "dim")
    return text


def _throttles(device: Device) -> Text:
    return Text(", ".join(device.throttles), "yellow") if device.throttles else Text(_DASH)


def _age(replica: Replica) -> Text:
    return Text(f"{replica.age_seconds:.0f}", "yellow" if replica.is_silent else "")


def _of_steps(replica: Replica, value: float) -> float | None:
    """An average over no steps is none."""
    return value if replica.num_steps else None


def _short_id(name: str) -> str:
    """Serve's ids are random at their end."""
    return name.rpartition("#")[2][-_NUM_ID_CHARACTERS:]


# Tables.


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device and the node that it is grouped under."""

    node: Node
    device: Device
    is_first: bool
    """Of its node: only this row names it."""

    @property
    def state(self) -> Text:
        """What the device is in, or else what keeps it from what it could be."""
        device, node = self.device, self.node
        if device.state == "ok" and node.is_silent:
            return Text(f"silent {node.age_seconds:.0f} s", "yellow")
        if device.state == "ok" and device.throttles:
            return Text("throttled", "yellow")
        return Text(device.state, _STATE_STYLES.get(device.state, "red"))


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """How one thing is shown; a cell never wraps."""

    heading: str
    width: int
    importance: int
    """1 is dropped last when the terminal is narrow."""
    cell: Callable[[Row], Text]
    justify: Literal["left", "right"] = "right"
    max_width: int = 0
    """Up to which it takes what the others leave."""
    keeps_ends: bool = False
    """Names that are too long differ at either end."""


DEVICE_COLUMNS: tuple[Column[DeviceRow], ...] = (
    Column("host", 10, 1, lambda row: Text(row.node.host if row.is_first else "", "bold"), "left", 24, True),
    Column("source", 6, 13, lambda row: Text(row.node.source if row.is_first else "", "dim"), "left"),
    Column("device", 6, 2, lambda row: Text(row.device.label), "left"),
    Column("name", 10, 12, lambda row: Text(row.device.name.removeprefix("NVIDIA ") or _DASH), "left", 32, True),
    Column("state", 11, 3, lambda row: row.state, "left"),
    Column("SM\n%", 3, 5, lambda row: _percent(row.device.sm_activity)),
    Column("tensor\n%", 6, 4, lambda row: _percent(row.device.tensor_activity)),
    Column("DRAM\n%", 4, 9, lambda row: _percent(row.device.dram_activity)),
    Column("util\n%", 4, 8, lambda row: _utilization(row.device)),
    Column("power\nW", 9, 7, lambda row: _part(row.device.power_watts, row.device.power_limit_watts)),
    Column("clock\nMHz", 9, 11, lambda row: _part(row.device.sm_clock_mhz, row.device.max_sm_clock_mhz)),
    Column("memory\nGiB", 11, 6, lambda row: _memory(row.device)),
    Column("throttled by", 12, 10, lambda row: _throttles(row.device), "left", 40),
)
REPLICA_COLUMNS: tuple[Column[Replica], ...] = (
    Column("replica", _NUM_ID_CHARACTERS, 1, lambda replica: Text(_short_id(replica.replica), "bold"), "left"),
    Column("running", 7, 6, lambda replica: _number(replica.num_running, ".1f")),
    Column("waiting", 7, 8, lambda replica: _number(replica.num_waiting, ".1f")),
    Column("slots", 5, 16, lambda replica: _number(replica.max_running, ".0f")),
    Column("cache\n%", 5, 10, lambda replica: _percent(replica.cache_usage)),
    Column("saturation", 10, 3, _saturation),
    Column("limited\nby", 8, 7, lambda replica: Text(replica.limiting or _DASH), "left"),
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
_NUM_HEADING_LINES = 2


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
    """Without its middle, where that is what the column wants; rich cuts the end of others."""
    if not column.keeps_ends or text.cell_len <= width:
        return text
    num_first = (width - 1) // 2
    return Text.assemble(text[:num_first], "…", text[num_first + 1 - width :])


def _fitting(columns: Sequence[Column[Row]], cells: Sequence[Sequence[Text]], width: int) -> dict[int, int]:
    """Widths of the columns that there is room for, by index, from the left.

    Who has nothing to show goes first, then the less important; widths do not depend on numbers, so that nothing jumps
    when they change.
    """
    is_empty = [all(row[index].plain in ("", _DASH) for row in cells) for index in range(len(columns))]
    order = sorted(range(len(columns)), key=lambda index: (is_empty[index], columns[index].importance))
    widths, left = dict[int, int](), width + _GAP
    for index in order:
        need = columns[index].width + _GAP
        if need <= left:
            widths[index], left = columns[index].width, left - need
    # What is left goes to words, again by importance.
    for index in widths:
        widest = max((row[index].cell_len for row in cells), default=0)
        more = min(left, max(0, min(widest, columns[index].max_width) - widths[index]))
        widths[index], left = widths[index] + more, left - more
    return dict(sorted(widths.items()))


# The picture.


@dataclass(frozen=True, slots=True)
class Silence:
    """Since when the server does not answer, and why."""

    seconds: float
    reason: str


def picture(view: View, width: int, height: int, silence: Silence | None = None) -> RenderableType:
    """All of it, cut to a terminal's size."""
    head, notes, foot = _head(view, width), _notes(view), _foot(view)
    devices = [DeviceRow(node, device, index == 0) for node in view.nodes for index, device in enumerate(node.devices)]
    texts = len(head) + len(notes) + len(foot) + (silence is not None)
    shares = _shares(height - texts - 2 * (1 + _NUM_HEADING_LINES), len(devices), len(view.replicas))
    body = Group(
        *head,
        "",
        *_cut_table(DEVICE_COLUMNS, devices, shares[0], width, "device", lambda row: row.node.is_silent),
        *notes,
        "",
        *_cut_table(REPLICA_COLUMNS, view.replicas, shares[1], width, "replica", lambda replica: replica.is_silent),
        *foot,
    )
    return body if silence is None else Group(_silence_line(silence), Styled(body, "dim"))


def _silence_line(silence: Silence) -> Text:
    return _line(f"stale: no answer for {silence.seconds:.0f} s: {_printable(silence.reason)}", "bold black on yellow")


def _head(view: View, width: int) -> list[Text]:
    devices = sum(device is not _NO_DEVICE for node in view.nodes for device in node.devices)
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
        Text(f"accepted length {accepted / tokens:.2f}" if tokens else f"accepted length {_DASH}"),
        Text(f"{sum(replica.num_running for replica in view.replicas):,.0f} running"),
        Text(f"{sum(replica.num_waiting for replica in view.replicas):,.0f} waiting"),
    ]
    return _flow(parts + _alerts(view), width)


def _nodes_read(view: View) -> str:
    nodes = _counted(max(view.num_probes, len(view.nodes)), "node")
    return nodes if nodes == _counted(view.num_read, "node") else f"{view.num_read:,} of {nodes}"


def _alerts(view: View) -> list[Text]:
    """What must be seen also where its row or column was cut off."""
    states = [device.state for node in view.nodes for device in node.devices if device is not _NO_DEVICE]
    found = (
        (states.count("lost"), "device", "lost"),
        (states.count("unreadable"), "device", "unreadable"),
        (sum(bool(node.probe_error) for node in view.nodes), "probe", "failing"),
        (sum(node.is_silent for node in view.nodes), "node", "silent"),
        (sum(replica.is_silent for replica in view.replicas), "replica", "silent"),
    )
    return [Text(f"{_counted(count, noun)} {word}", "bold red") for count, noun, word in found if count]


def _notes(view: View) -> list[Text]:
    """What nodes and devices have to say; who says the same shares a line."""
    speakers: dict[str, list[str]] = {}
    troubles: set[str] = set()
    for node in view.nodes:
        for whose, text in node.notes:
            speakers.setdefault(text, []).append(whose)
            if node.is_troubled:
                troubles.add(text)
    lines = [_line(f"{_some(whose)}: {text}", "red" if text in troubles else "dim") for text, whose in speakers.items()]
    if len(lines) <= _MAX_NOTES:
        return lines
    return [*lines[: _MAX_NOTES - 1], _more(len(lines) - _MAX_NOTES + 1, "note")]


def _foot(view: View) -> list[Text]:
    devices = (device for node in view.nodes for device in node.devices)
    remarks = []
    if any(device.kind != "cpu" and device.utilization is not None for device in devices):
        remarks.append(_UTILIZATION_REMARK)
    if any(replica.overridden for replica in view.replicas):
        remarks.append(_OVERRIDE_REMARK)
    return [_line(_SEPARATOR.join(remarks), "dim")] if remarks else []


def _cut_table(
    columns: Sequence[Column[Row]],
    rows: Sequence[Row],
    num_lines: int,
    width: int,
    noun: str,
    is_dim: Callable[[Row], bool],
) -> Iterable[RenderableType]:
    """At most `num_lines` below the headings; the last one counts what is left out."""
    if not rows:
        yield _line(f"no {noun} has been heard of yet", "dim")
        return
    shown = rows if len(rows) <= num_lines else rows[: max(1, num_lines - 1)]
    yield _table(columns, shown, width, is_dim)
    if len(shown) < len(rows):
        yield _more(len(rows) - len(shown), noun)


def _shares(num_lines: int, num_first: int, num_second: int) -> tuple[int, int]:
    """Half for each, or more where the other needs less."""
    first = min(num_first, max(num_lines // 2, num_lines - num_second))
    return first, min(num_second, num_lines - first)


def _flow(parts: Sequence[Text], width: int) -> list[Text]:
    """As few lines as hold the parts, none of which is broken."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(_SEPARATOR) + part.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], (_SEPARATOR, "dim"), part, no_wrap=True, overflow="ellipsis")
        else:
            lines.append(Text.assemble(part, no_wrap=True, overflow="ellipsis"))
    return lines


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _more(count: int, noun: str) -> Text:
    return _line(f"... and {count:,} more {noun}{'' if count == 1 else 's'}", "dim")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]}, {names[1]} and {len(names) - 2:,} more"


# The terminal.


def run(read: Callable[[], View], failure: type[Exception], interval_seconds: float | None) -> None:
    """Pictures until Ctrl-C; one where the interval is None or where nobody watches. Raises what `read` raises."""
    console = Console()
    with suppress(KeyboardInterrupt):
        if interval_seconds is None or not console.is_terminal:
            show(read, console)
        else:
            watch(read, failure, interval_seconds, console, time.monotonic, time.sleep)


def show(read: Callable[[], View], console: Console) -> None:
    """One picture: as much as fits above a terminal's prompt, or nearly all of it for a pipe or a file."""
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
    """A picture every interval, for ever; the terminal is what it was when an exception ends this.

    A failure of the first `read` is the caller's; later ones mark the picture before them as stale.
    """
    view, silence, answered_at = read(), None, clock()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(picture(view, console.width, console.height, silence), refresh=True)
            sleep(interval_seconds)
            try:
                view = read()
            except failure as error:
                silence = Silence(clock() - answered_at, str(error))
            else:
                silence, answered_at = None, clock()
