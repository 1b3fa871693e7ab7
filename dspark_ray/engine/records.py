"""Step records as JSON, and as a table of what each step decided and what resulted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from dspark_ray.types import StepRecord

_HEADINGS = (
    "step",
    "decoding",
    "drafted",
    "prefill",
    "budget",
    "expected",
    "accepted",
    "draft ms",
    "target ms",
    "schedule us",
    "threshold",
    "lengths",
    "bypass",
)
_NUM_TEXT_COLUMNS = 2
"""The last columns hold text and are aligned left; the others hold numbers and are aligned right."""


def to_json(record: StepRecord) -> dict[str, Any]:
    """All fields and the derived sums."""
    sums = {"num_drafted": record.num_drafted, "budget": record.budget, "num_accepted": record.num_accepted}
    return {**asdict(record), **sums}


def from_json(raw: Mapping[str, Any]) -> StepRecord:
    """The inverse of `to_json`; unknown keys are ignored. Raises TypeError for a missing field."""
    known = {field.name for field in fields(StepRecord)} & raw.keys()
    values: dict[str, Any] = {name: tuple(raw[name]) if isinstance(raw[name], list) else raw[name] for name in known}
    return StepRecord(**values)


def explain(records: Sequence[StepRecord]) -> str:
    """An aligned table of one line per step, and the totals.

    Milliseconds are predicted/measured; lengths read `5x3 0x1`: five drafts verified of three requests, none of one.
    """
    if not records:
        return "no steps yet"
    lines = _aligned([_HEADINGS, *(_row(record) for record in records)])
    return "\n".join([*lines, "", _token_summary(records), _time_summary(records)])


def _row(record: StepRecord) -> tuple[str, ...]:
    return (
        str(record.step),
        str(record.num_decoding),
        str(record.num_drafted),
        str(record.num_prefill_rows),
        str(record.budget),
        f"{record.expected:.1f}",
        str(record.num_accepted),
        _milliseconds(record.predicted_draft_seconds, record.measured_draft_seconds),
        _milliseconds(record.predicted_target_seconds, record.measured_target_seconds),
        f"{record.schedule_seconds * 1e6:.0f}",
        f"{record.confidence_threshold:.2f}",
        _histogram(record.lengths),
        record.bypass or "",
    )


def _milliseconds(predicted: float, measured: float) -> str:
    return f"{predicted * 1e3:.1f}/{measured * 1e3:.1f}"


def _histogram(lengths: Sequence[int]) -> str:
    return " ".join(f"{length}x{count}" for length, count in sorted(Counter(lengths).items(), reverse=True))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    num_numbers = len(widths) - _NUM_TEXT_COLUMNS
    return [
        "  ".join(
            cell.rjust(width) if column < num_numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _token_summary(records: Sequence[StepRecord]) -> str:
    drafted = sum(record.num_drafted * record.gamma for record in records)
    verified = sum(record.budget for record in records)
    expected = sum(record.expected for record in records)
    accepted = sum(record.num_accepted for record in records)
    return (
        f"tokens:  {drafted} drafted, {verified} verified,"
        f" {expected:.1f} expected to be accepted, {accepted} accepted{_ratio(accepted, expected)}"
    )


def _time_summary(records: Sequence[StepRecord]) -> str:
    predicted = sum(record.predicted_draft_seconds + record.predicted_target_seconds for record in records)
    measured = sum(record.measured_draft_seconds + record.measured_target_seconds for record in records)
    schedule = sum(record.schedule_seconds for record in records)
    share = f" ({schedule / measured:.1%} of measured)" if measured > 0 else ""
    return (
        f"seconds: {predicted:.3f} predicted, {measured:.3f} measured{_ratio(measured, predicted)},"
        f" {schedule:.4f} to decide{share}"
    )


def _ratio(actual: float, expected: float) -> str:
    """`actual` as a share of `expected`; empty where nothing was expected."""
    return f" ({actual / expected:.2f} of that)" if expected > 0 else ""
