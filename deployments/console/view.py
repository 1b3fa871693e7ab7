"""The answer of GET /admin/load as typed values: devices by node, and replicas.

Checked by hand: importing pydantic would take longer than everything else that `dspark-ray top` does before it draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, TypeVar

T = TypeVar("T")

DASH = "-"
"""Stands for a value that is not known."""
NUM_ID_CHARACTERS = 8
"""Of a node's or replica's id that are shown."""
_SILENT_NODE_SECONDS = 5.0
"""Probes are polled every second; a node whose probe has not answered for longer than this is shown as silent."""
_SILENT_HEARTBEATS = 3.0
"""A replica that has missed more than this many heartbeats is shown as silent."""
_THROTTLES = {
    "sw_power_cap": "sw power cap",
    "sw_thermal_slowdown": "sw thermal",
    "hw_thermal_slowdown": "hw thermal",
    "hw_power_brake_slowdown": "hw power brake",
    "hw_slowdown": "hw slowdown",
}
"""Labels of NVML's clock events that slow a device down; the others, such as gpu_idle, cost no speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Shares and activities are 0 to 1, memory is in bytes; None stands for a value that the device does not report."""

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
        """Labels of the clock events that slow the device down."""
        return [_THROTTLES[event] for event in self.clock_events if event in _THROTTLES]

    @property
    def busyness(self) -> float:
        """Sorting key, 0 to 1: busy devices are shown first. GPU utilisation is no measure of load."""
        if self.kind == "cpu":
            return self.utilization or 0.0
        power, limit = self.power_watts, self.power_limit_watts
        return max(self.tensor_activity or 0.0, power / limit if power and limit else 0.0)


NO_DEVICE = Device(kind=DASH, index=0, name="", state="unreadable", note="")
"""Placeholder for the devices of a node on which none could be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """The last answer of one node's probe, or the error of a probe that has never answered."""

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
        """(source, text) of every note of the node and its devices; a device's copy of the node's note is left out."""
        own = [(self.host, text) for text in (self.probe_error, self.note) if text]
        devices = [(f"{self.host} {device.label}", device.note) for device in self.devices]
        return own + [(source, text) for source, text in devices if text and text != self.note]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A replica's last heartbeat, and the controller's decision for it."""

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
    confidence_threshold: float
    max_draft_tokens: int | None
    bypass: bool
    overridden: bool
    saturation: float
    limiting: str | None
    age_seconds: float
    is_silent: bool

    @property
    def num_tokens(self) -> float:
        """Tokens generated during the interval of this heartbeat."""
        return self.tokens_per_second * self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The whole answer, sorted: nodes in trouble first, then by load."""

    application: str
    policy: str
    num_probes: int
    num_read: int
    """Nodes whose probe has answered at least once; `nodes` also has those whose probe never did."""
    nodes: tuple[Node, ...]
    replicas: tuple[Replica, ...]


def parse(raw: Any) -> View:
    """Raises AttributeError, KeyError or TypeError where `raw` is not an answer of GET /admin/load."""
    errors = {printable(node_id): printable(text) for node_id, text in raw["probe_errors"].items()}
    read = {node["node_id"]: _node(node, errors) for node in raw["nodes"]}
    unread = [_unread_node(node_id, text) for node_id, text in errors.items() if node_id not in read]
    silent_after_seconds = _SILENT_HEARTBEATS * raw["heartbeat_seconds"]
    replicas = [_replica(replica, silent_after_seconds) for replica in raw["replicas"]]
    return _pick(
        View,
        raw,
        num_read=len(read),
        nodes=tuple(sorted([*read.values(), *unread], key=_node_order)),
        replicas=tuple(sorted(replicas, key=lambda replica: (-round(replica.saturation, 2), replica.replica))),
    )


def printable(text: str) -> str:
    """`text` on one line, with control characters replaced by spaces: they could move the cursor."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def _node(raw: Mapping[str, Any], errors: Mapping[str, str]) -> Node:
    devices = tuple(_device(device) for device in raw["devices"])
    return _pick(Node, raw, devices=devices or (NO_DEVICE,), probe_error=errors.get(raw["node_id"], ""))


def _unread_node(node_id: str, error: str) -> Node:
    host = node_id[:NUM_ID_CHARACTERS]
    return Node(host=host, source=DASH, note="", age_seconds=0.0, devices=(NO_DEVICE,), probe_error=error)


def _device(raw: Mapping[str, Any]) -> Device:
    return _pick(Device, raw, clock_events=tuple(printable(event) for event in raw["clock_events"]))


def _replica(raw: Mapping[str, Any], silent_after_seconds: float) -> Replica:
    saturation = {"saturation": raw["saturation"]["value"], "limiting": raw["saturation"]["limiting"]}
    flat = {**raw["sample"], **raw["bounds"], **saturation}
    age, overridden = raw["age_seconds"], raw["overridden"]
    fields = {**flat, "age_seconds": age, "overridden": overridden}
    return _pick(Replica, fields, is_silent=age > silent_after_seconds)


def _node_order(node: Node) -> tuple[bool, float, str]:
    """Sorting key. Busyness is rounded, so that nodes keep their places while it changes little."""
    busyness = max(device.busyness for device in node.devices)
    return not node.is_troubled, -round(busyness, 1), node.host


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, NoneType),
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, NoneType),
    "float": (int, float),
    "float | None": (int, float, NoneType),
}
"""Types that a JSON value may have, by the annotation of its field."""


def _pick(kind: type[T], raw: Mapping[str, Any], **known: Any) -> T:
    """A `kind` with the `known` fields, and every other field from `raw`.

    Raises KeyError for a missing field and TypeError for one of another type.
    """
    values = dict(known)
    for field in fields(kind):  # type: ignore[arg-type]  # every T here is a dataclass
        if field.name in known:
            continue
        value = raw[field.name]
        if not isinstance(value, _JSON_TYPES[str(field.type)]):
            raise TypeError(f"{field.name}={value!r}: expected {field.type}")
        values[field.name] = printable(value) if isinstance(value, str) else value
    return kind(**values)
