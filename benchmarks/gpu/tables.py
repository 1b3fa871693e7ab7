"""The figures of a `gpu_day` run as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Figures = dict[str, Any]

_WORD = {True: "holds", False: "**refuted**", None: "no figures"}


def markdown(day: Figures) -> str:
    """Claims first, then a section for each kind of figure that was recorded."""
    sections = [_origin(day), _claims(day), _jobs(day)]
    for kind, table in _TABLES.items():
        records = [one for stage in day["stages"].values() for one in stage["figures"].get(kind, [])]
        if records:
            sections.append(table(records))
    return "\n\n".join(sections)


def _origin(day: Figures) -> str:
    origin = day["origin"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    machine = origin["machine"]
    cores = f"{machine['cores']} cores ({machine['processor']})"
    dry = "A dry run: its figures have no meaning. " if day["dry_run"] else ""
    return (
        f"{dry}{machine['gpu'] or 'No GPU'}, driver {origin['driver']}, {cores},"
        f" {origin['date'][:10]}, commit {origin['commit'][:10]}, {versions}."
    )


def _claims(day: Figures) -> str:
    rows = [(one["claim"], _WORD[one["holds"]], one["evidence"].replace("|", "/")) for one in day["claims"]]
    return _section("Claims", ("claim", "", "evidence"), rows)


def _jobs(day: Figures) -> str:
    rows = []
    for name, stage in day["stages"].items():
        wrong = [
            f"{job['name']} {job['status']} ({job['exit_code']})" for job in stage["jobs"] if job["status"] != "ended"
        ]
        rows.append(
            (name, stage["status"], f"{stage['seconds']:.0f} of {stage['limit_seconds']:.0f}", ", ".join(wrong))
        )
    return _section("Stages", ("stage", "status", "seconds", "failed jobs"), rows)


def _tests(records: list[Figures]) -> str:
    wrong = [one for one in records if one["outcome"] in ("failed", "error")]
    counts = {
        outcome: sum(one["outcome"] == outcome for one in records)
        for outcome in ("passed", "failed", "error", "skipped")
    }
    rows = [
        (one["test"], one["outcome"], (one["message"].strip().splitlines() or [""])[-1].replace("|", "/"))
        for one in wrong
    ]
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"### Kernels against references\n\n{summary}.\n\n" + _table(("test", "", "message"), rows)


def _row_bits(records: list[Figures]) -> str:
    """Numbers of rows whose bits differ from those with fewer rows; a dot for none."""
    counts = max((one["rows"] for one in records), key=len)
    rows = [
        (one["op"], *(str(changed) if changed else "." for changed in one["changed"]), one["problem"])
        for one in records
    ]
    return _section("Rows whose bits change, by number of rows", ("", *map(str, counts), ""), rows)


def _tiles(records: list[Figures]) -> str:
    tiles = list(dict.fromkeys(one["tile"] for one in records))
    lines: dict[tuple[str, int], dict[str, Figures]] = {}
    for one in records:
        lines.setdefault((one["op"], one["rows"]), {})[one["tile"]] = one
    rows = [
        (op, str(count), *(_number(by_tile[tile]["microseconds"]) if tile in by_tile else "" for tile in tiles))
        for (op, count), by_tile in lines.items()
    ]
    return _section("Tiles, microseconds", ("", "rows", *tiles), rows)


def _steps(records: list[Figures]) -> str:
    rows = [(one["model"], one["size"], one["waits"] or "none", one["replay_is_finite"]) for one in records]
    return _section("Recorded steps", ("", "size", "waits", "replay is finite"), rows)


def _served(records: list[Figures]) -> str:
    rows = [(one["op"], one["verification"], one["kernel_calls"], one["reference_calls"]) for one in records]
    called = [row for row in rows if row[2] or row[3]]
    return _section("Calls while serving", ("operation", "verification", "kernel", "reference"), called)


def _nan(records: list[Figures]) -> str:
    rows = [(one["op"], one["body"], one["nan_row"], one["good_row"], one["problem"]) for one in records]
    return _section("A row of NaN beside a good one", ("operation", "", "NaN", "good", ""), rows)


def _starts(records: list[Figures]) -> str:
    columns = ("cache", "imported", "engine_ready", "first_token", "kernels_in_cache")
    return _section("Start-up, seconds", columns, [tuple(one[name] for name in columns) for one in records])


def _runs(records: list[Figures]) -> str:
    rows = [
        (one["run"], one["num_tokens"], _number(one["tokens_per_second"]), _number(one["accepted_length"]))
        for one in records
    ]
    return _section("Runs of 16 texts together", ("", "tokens", "tokens per second", "accepted length"), rows)


def _comparisons(records: list[Figures]) -> str:
    rows = [(one["run"], one["against"], f"{one['parted']} of {one['texts']}", one["places"]) for one in records]
    return _section("Texts that differ", ("run", "against", "texts", "at token"), rows)


def _nvml(records: list[Figures]) -> str:
    fields = [name for name in records[0]["device"] if name not in ("kind", "index", "uuid", "processes")]
    rows = [(name, *(_value(one["device"][name]) for one in records)) for name in fields]
    rows.append(("milliseconds of a read", *(_number(one["read_milliseconds"]) for one in records)))
    rows.append(("processes", *(len(one["device"]["processes"]) for one in records)))
    return _section("NVML", ("", *(one["load"] for one in records)), rows)


def _signals(records: list[Figures]) -> str:
    rows = [
        (one["load"], one["signal"], _number(one["raw"]), f"{one['low']} to {one['high']}", _number(one["saturation"]))
        for one in records
    ]
    return _section("Signals and their scales", ("load", "signal", "raw", "scale", "saturation"), rows)


def _kernels(records: list[Figures]) -> str:
    rows = [
        (
            one["op"],
            one["requests"],
            _number(one["kernel_us"]),
            _number(one["floor_us"]),
            _number(one["over_floor"]),
            _number(one["baseline_over_kernel"]),
            one["check"].replace("|", "/"),
        )
        for one in records
    ]
    columns = ("operation", "requests", "us", "floor us", "over floor", "compiled reference over kernel", "check")
    return _section("Kernels at V4-Flash's shapes", columns, rows)


def _rounds(records: list[Figures]) -> str:
    rows = [
        (
            one["requests"],
            one["rows"],
            one["layers"],
            _number(one["launched_ms"]),
            _number(one["replayed_ms"]),
            _number(one["in_kernels_ms"]),
            ", ".join(one["largest_kernels"]),
        )
        for one in records
    ]
    columns = ("requests", "rows", "layers", "launched ms", "replayed ms", "in kernels ms", "largest")
    return _section("Rounds", columns, rows)


_TABLES = {
    "TestOutcome": _tests,
    "RowBits": _row_bits,
    "TileTime": _tiles,
    "RecordedStep": _steps,
    "ServedBy": _served,
    "NanDraw": _nan,
    "StartUp": _starts,
    "TextRun": _runs,
    "TextComparison": _comparisons,
    "NvmlReading": _nvml,
    "SignalReading": _signals,
    "KernelTime": _kernels,
    "RoundTime": _rounds,
}
"""By kind of figure; generated texts have no table."""


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return f"### {title}\n\n{_table(columns, rows)}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return "" if value is None else ", ".join(value) if isinstance(value, list) else str(value)
