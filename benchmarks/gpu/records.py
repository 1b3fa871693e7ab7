"""Records of a `gpu_day` run: one dataclass per kind of figure, so that a dry run writes the same keys.

Times are seconds unless a name says otherwise. None stands for values that could not be measured, on a CPU for example.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, get_args


@dataclass(frozen=True)
class TestOutcome:
    """One test of the kernels against their references."""

    test: str
    outcome: str
    """passed, failed, error or skipped"""
    seconds: float
    message: str
    """The end of the traceback of a test that did not pass, else empty."""


@dataclass(frozen=True)
class RowBits:
    """Whether a row's result depends on the number of rows computed with it."""

    op: str
    rows: list[int]
    """Numbers of rows, ascending; the first is 1."""
    same_as_alone: list[bool]
    """By number of rows: whether row 0 has the same bits as alone."""
    changed: list[int]
    """By number of rows: how many rows have other bits than with the previous, smaller number."""
    problem: str
    """Empty where the operation ran."""


@dataclass(frozen=True)
class TileTime:
    """Time of an operation with the tile that its launcher chooses, or with another one."""

    op: str
    rows: int
    tile: str
    microseconds: float | None
    problem: str


@dataclass(frozen=True)
class RecordedStep:
    """Whether a step that is recorded as a CUDA graph makes the host wait for the device."""

    model: str
    """target or drafter"""
    size: int
    """Rows of the target's step, requests of the drafter's."""
    waits: str
    """The call that made the host wait; empty where none did."""
    replay_is_finite: bool


@dataclass(frozen=True)
class ServedBy:
    """Which body of an operation ran while an engine served requests."""

    op: str
    verification: str
    kernel_calls: int
    reference_calls: int


@dataclass(frozen=True)
class NanDraw:
    """Results of an operation for a row of NaN beside a good row."""

    op: str
    body: str
    """kernel or reference"""
    nan_row: list[int]
    good_row: list[int]
    problem: str


@dataclass(frozen=True)
class Text:
    """Token ids of one request."""

    run: str
    """`device dtype launched|replayed plain|speculative`"""
    request: int
    token_ids: list[int]


@dataclass(frozen=True)
class TextRun:
    """All requests of one engine, together."""

    run: str
    num_tokens: int
    tokens_per_second: float
    accepted_length: float | None


@dataclass(frozen=True)
class TextComparison:
    """Texts of one run against texts of another."""

    run: str
    against: str
    texts: int
    parted: int
    """Number of texts that differ."""
    places: list[int]
    """Index of the first different token, for every text that differs."""


@dataclass(frozen=True)
class StartUp:
    """Seconds since the process of an engine was started."""

    cache: str
    """Triton's: cold or warm."""
    imported: float
    engine_ready: float
    first_token: float
    kernels_in_cache: int


@dataclass(frozen=True)
class NvmlReading:
    """One device as `autoscale.nvml` reads it under one kind of load; fields of `autoscale.signals.DeviceLoad`."""

    load: str
    device: dict[str, Any]
    read_milliseconds: float


@dataclass(frozen=True)
class SignalReading:
    """A raw signal with the controller's scale for it."""

    load: str
    signal: str
    raw: float | None
    low: float | None
    high: float | None
    """Raw values that count as 0 and as 1; None where the signal is switched off."""
    saturation: float
    """0 for unreadable signals too."""


@dataclass(frozen=True)
class KernelTime:
    """One operation at V4-Flash's shapes, from benchmarks.gpu.kernels."""

    op: str
    requests: int
    check: str
    """equal, or what went wrong"""
    kernel_us: float | None
    floor_us: float | None
    bound: str
    over_floor: float | None
    baseline: str
    baseline_over_kernel: float | None


@dataclass(frozen=True)
class RoundTime:
    """One round of a V4-Flash-shaped model, from benchmarks.gpu.round."""

    requests: int
    rows: int
    layers: int
    launched_ms: float
    replayed_ms: float | None
    in_kernels_ms: float | None
    largest_kernels: list[str]
    """`name milliseconds`, largest first"""


Record: TypeAlias = (
    TestOutcome
    | RowBits
    | TileTime
    | RecordedStep
    | ServedBy
    | NanDraw
    | Text
    | TextRun
    | TextComparison
    | StartUp
    | NvmlReading
    | SignalReading
    | KernelTime
    | RoundTime
)
KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Record)}

STAGE_KINDS: dict[str, tuple[type, ...]] = {
    "tests": (TestOutcome,),
    "checks": (RowBits, TileTime, RecordedStep, ServedBy, NanDraw),
    "texts": (StartUp, Text, TextRun, TextComparison),
    "nvml": (NvmlReading, SignalReading),
    "benchmarks": (KernelTime, RoundTime),
}
"""Kinds of figures that a stage records, in the order in which stages run."""


def to_json(record: Record) -> dict[str, Any]:
    """Fields by name, and `kind`."""
    return {"kind": type(record).__name__, **asdict(record)}


def from_json(fields: dict[str, Any]) -> Record:
    """The record that `to_json` wrote. Raises KeyError for an unknown kind, TypeError for other fields."""
    kind = KINDS[fields["kind"]]
    record: Record = kind(**{name: value for name, value in fields.items() if name != "kind"})
    return record
