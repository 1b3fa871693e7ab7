"""Claims of the project about GPUs, each checked against the figures of a `gpu_day` run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from benchmarks.gpu.records import (
    KernelTime,
    NanDraw,
    NvmlReading,
    Record,
    RecordedStep,
    RoundTime,
    RowBits,
    ServedBy,
    SignalReading,
    StartUp,
    TestOutcome,
    TextComparison,
    TileTime,
)

_FEW_ROWS = 8
_STEP_UP = 1.25
"""mhc_read between 16 and 17 rows, at most."""
_TILE_MARGIN = 1.05
"""A chosen tile over the fastest, at most."""
_PEER_TIMEOUT_SECONDS = 60.0
"""GangSpec.timeout_seconds: in a start that takes longer, ranks would count one another as dead."""
_OVER_FLOOR, _LONG_MICROSECONDS = 1.5, 10.0
_OVER_BASELINE = 3.0
_BASELINE_OPS = ("mhc_read", "mhc_head", "mhc_write", "markov_sample", "accept_rejection")
_IN_KERNELS = 0.9
"""Of a replayed round."""
_NVML_FIELDS = (
    "utilization",
    "sm_activity",
    "tensor_activity",
    "dram_activity",
    "power_watts",
    "power_limit_watts",
    "sm_clock_mhz",
    "max_sm_clock_mhz",
    "memory_used",
    "memory_total",
)
_NVML_MILLISECONDS = 20.0

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Verdict:
    """One claim."""

    claim: str
    holds: bool | None
    """None where the run has no figures for it."""
    evidence: str


def verdicts(records: Iterable[Record]) -> list[dict[str, Any]]:
    """All claims, in the order of the stages."""
    found = list(records)
    return [asdict(Verdict(claim, *_judge(found))) for claim, _judge in CLAIMS.items()]


Judgement = tuple[bool | None, str]


def _of(records: list[Record], kind: type[Kind]) -> list[Kind]:
    return [record for record in records if isinstance(record, kind)]


def _without_exception(found: list[Any], wrong: list[str], evidence: str) -> Judgement:
    """(verdict, evidence): None without figures, else whether `wrong` is empty, with its first entries."""
    if not found:
        return None, "no figures"
    return not wrong, "; ".join(wrong[:12]) + (f"; and {len(wrong) - 12} more" * (len(wrong) > 12)) or evidence


def _tests_pass(records: list[Record]) -> Judgement:
    outcomes = _of(records, TestOutcome)
    wrong = [f"{one.test} {one.outcome}" for one in outcomes if one.outcome in ("failed", "error")]
    return _without_exception(outcomes, wrong, f"{len(outcomes)} tests")


def _kernels_keep_bits(records: list[Record]) -> Judgement:
    bits = [one for one in _of(records, RowBits) if not _is_library(one)]
    wrong = [problem for one in bits for problem in _differing(one, lambda count: count <= _FEW_ROWS)]
    return _without_exception(bits, wrong, f"{len(bits)} cases keep row 0's bits up to {_FEW_ROWS} rows")


def _kernels_keep_bits_everywhere(records: list[Record]) -> Judgement:
    bits = [one for one in _of(records, RowBits) if not _is_library(one)]
    wrong = [problem for one in bits for problem in _differing(one, lambda _: True)]
    return _without_exception(bits, wrong, f"{len(bits)} cases")


def _library_keeps_bits(records: list[Record]) -> Judgement:
    bits = [one for one in _of(records, RowBits) if _is_library(one)]
    wrong = [problem for one in bits for problem in _differing(one, lambda _: True)]
    return _without_exception(bits, wrong, f"{len(bits)} products")


def _is_library(bits: RowBits) -> bool:
    return bits.op.startswith(("torch.", "linear_float32"))


def _differing(bits: RowBits, wanted: Callable[[int], bool]) -> list[str]:
    if bits.problem:
        return [f"{bits.op}: {bits.problem}"]
    at = [str(rows) for rows, same in zip(bits.rows, bits.same_as_alone) if wanted(rows) and not same]
    return [f"{bits.op} at {', '.join(at)}"] if at else []


def _mhc_has_no_step(records: list[Record]) -> Judgement:
    times = {one.rows: one.microseconds for one in _of(records, TileTime) if one.op == "mhc_read" and _chosen(one)}
    few, more = times.get(16), times.get(17)
    if few is None or more is None:
        return None, "no figures"
    return more <= _STEP_UP * few, f"16 rows {few:.2f} us, 17 rows {more:.2f} us"


def _chosen(time: TileTime) -> bool:
    return time.tile == "as chosen"


def _chosen_tiles_are_fastest(records: list[Record]) -> Judgement:
    times = [one for one in _of(records, TileTime) if one.microseconds is not None]
    wrong = [f"{one.op} {one.rows} rows, {one.tile}: {one.problem}" for one in _of(records, TileTime) if one.problem]
    for one in times:
        others = [other for other in times if (other.op, other.rows) == (one.op, one.rows)]
        best = min(others, key=lambda other: other.microseconds or 0.0)
        assert one.microseconds is not None and best.microseconds is not None
        if _chosen(one) and one.microseconds > _TILE_MARGIN * best.microseconds:
            wrong.append(f"{one.op} {one.rows} rows {one.microseconds:.1f} us, {best.tile} {best.microseconds:.1f} us")
    return _without_exception(times or wrong, wrong, f"{len(times)} times")


def _steps_do_not_wait(records: list[Record]) -> Judgement:
    steps = _of(records, RecordedStep)
    wrong = [
        f"{one.model} {one.size}: {one.waits or 'not finite'}" for one in steps if one.waits or not one.replay_is_finite
    ]
    return _without_exception(steps, wrong, f"{len(steps)} recorded functions")


def _kernels_serve(records: list[Record]) -> Judgement:
    served = [one for one in _of(records, ServedBy) if one.kernel_calls + one.reference_calls]
    wrong = [f"{one.op} ({one.verification}): reference" for one in served if one.reference_calls]
    return _without_exception(served, wrong, f"{len({one.op for one in served})} operations were called")


def _nan_is_noticed(records: list[Record]) -> Judgement:
    draws = _of(records, NanDraw)
    wrong = [f"{one.op} {one.body}: {one.problem}" for one in draws if one.problem]
    wrong += [
        f"{one.op} {one.body} draws {one.nan_row}"
        for one in draws
        if one.op == "gumbel_argmax" and not one.problem and one.nan_row != [-1]
    ]
    return _without_exception(draws, wrong, f"{len(draws)} draws")


def _texts_agree(dtype: str, same_place: bool, kind: str) -> Callable[[list[Record]], Judgement]:
    """For one dtype: speculative against plain on the GPU, or plain on the GPU against plain on the CPU."""

    def judge(records: list[Record]) -> Judgement:
        found = [
            one
            for one in _of(records, TextComparison)
            if one.run.startswith(f"gpu {dtype}")
            and one.run.endswith(kind)
            and one.against.startswith("gpu" if same_place else "cpu")
            and one.against.endswith(f"{dtype} {one.run.split()[2]} plain" if same_place else "launched plain")
        ]
        wrong = [f"{one.run}: {one.parted} of {one.texts} at {one.places}" for one in found if one.parted]
        return _without_exception(found, wrong, ", ".join(f"{one.run}: 0 of {one.texts}" for one in found))

    return judge


def _starts_in_time(records: list[Record]) -> Judgement:
    starts = [one for one in _of(records, StartUp) if one.cache == "cold"]
    wrong = [f"{one.first_token:.0f} s" for one in starts if one.first_token > _PEER_TIMEOUT_SECONDS]
    evidence = ", ".join(f"{one.first_token:.1f} s, {one.kernels_in_cache} kernels" for one in starts)
    return _without_exception(starts, wrong, evidence)


def _nvml_answers(records: list[Record]) -> Judgement:
    readings = _of(records, NvmlReading)
    wrong = [
        f"{one.load}: {field} is None ({one.device['note']})"
        for one in readings
        for field in _NVML_FIELDS
        if one.device[field] is None
    ]
    return _without_exception(readings, wrong, f"{len(readings)} readings")


def _nvml_is_quick(records: list[Record]) -> Judgement:
    readings = _of(records, NvmlReading)
    wrong = [
        f"{one.load}: {one.read_milliseconds} ms" for one in readings if one.read_milliseconds > _NVML_MILLISECONDS
    ]
    slowest = max((one.read_milliseconds for one in readings), default=0.0)
    return _without_exception(readings, wrong, f"at most {slowest:.1f} ms")


def _scales_fit(loads: tuple[str, ...], low: float, high: float) -> Callable[[list[Record]], Judgement]:
    """Whether the largest signal under each of these loads lies between two saturations."""

    def judge(records: list[Record]) -> Judgement:
        signals = [one for one in _of(records, SignalReading) if one.load in loads]
        known = [one for one in signals if one.raw is not None]
        largest = {
            load: max((one for one in known if one.load == load), key=_saturation, default=None) for load in loads
        }
        texts = [
            f"{load}: {one.signal} {one.saturation:.2f} (raw {one.raw:.2f})" for load, one in largest.items() if one
        ]
        if not texts:
            return None, "no figures"
        return all(one is not None and low <= one.saturation <= high for one in largest.values()), "; ".join(texts)

    return judge


def _saturation(signal: SignalReading) -> float:
    return signal.saturation


def _benchmarked_kernels_are_right(records: list[Record]) -> Judgement:
    times = _of(records, KernelTime)
    wrong = [f"{one.op}, {one.requests} requests: {one.check}" for one in times if one.check != "equal"]
    return _without_exception(times, wrong, f"{len(times)} cases")


def _kernels_are_near_floors(records: list[Record]) -> Judgement:
    times = [
        one
        for one in _of(records, KernelTime)
        if one.over_floor is not None and one.bound == "memory" and (one.floor_us or 0.0) > _LONG_MICROSECONDS
    ]
    wrong = [
        f"{one.op}, {one.requests} requests: {one.over_floor:.2f}"
        for one in times
        if one.over_floor is not None and one.over_floor > _OVER_FLOOR
    ]
    return _without_exception(times, wrong, f"{len(times)} cases")


def _kernels_beat_compiled(records: list[Record]) -> Judgement:
    times = [one for one in _of(records, KernelTime) if one.op.startswith(_BASELINE_OPS) and one.baseline_over_kernel]
    wrong = [
        f"{one.op}, {one.requests} requests: {one.baseline_over_kernel:.2f}"
        for one in times
        if one.baseline_over_kernel is not None and one.baseline_over_kernel < _OVER_BASELINE
    ]
    return _without_exception(times, wrong, f"{len(times)} cases")


def _round_is_in_kernels(records: list[Record]) -> Judgement:
    rounds = [one for one in _of(records, RoundTime) if one.replayed_ms and one.in_kernels_ms]
    texts = []
    for one in rounds:
        assert one.replayed_ms is not None and one.in_kernels_ms is not None
        texts.append((one.in_kernels_ms / one.replayed_ms, f"{one.requests} requests: {one.replayed_ms:.2f} ms"))
    wrong = [f"{text}, in kernels {share:.0%}" for share, text in texts if share < _IN_KERNELS]
    return _without_exception(rounds, wrong, "; ".join(f"{text}, in kernels {share:.0%}" for share, text in texts))


CLAIMS: dict[str, Callable[[list[Record]], Judgement]] = {
    "Kernels equal their references (tests/kernels)": _tests_pass,
    f"Up to {_FEW_ROWS} rows, kernels give a row the same bits whatever the number of rows": _kernels_keep_bits,
    "Kernels give a row the same bits at any number of rows": _kernels_keep_bits_everywhere,
    "cuBLAS gives a row the same bits at any number of rows": _library_keeps_bits,
    "mhc_read has no step up from 16 to 17 rows": _mhc_has_no_step,
    "Launchers choose the fastest of the tiles that were tried": _chosen_tiles_are_fastest,
    "Recorded steps do not block the host": _steps_do_not_wait,
    "Every operation of a serving step runs as a kernel": _kernels_serve,
    "For a row of NaN, the drawn token is -1": _nan_is_noticed,
    "In float32, speculation changes no text": _texts_agree("float32", True, "speculative"),
    "In bfloat16, speculation changes no text": _texts_agree("bfloat16", True, "speculative"),
    "In float32, texts on the GPU equal those on the CPU": _texts_agree("float32", False, "plain"),
    "In bfloat16, texts on the GPU equal those on the CPU": _texts_agree("bfloat16", False, "plain"),
    f"An engine starts from an empty Triton cache within {_PEER_TIMEOUT_SECONDS:.0f} s": _starts_in_time,
    "NVML answers every field that autoscale reads": _nvml_answers,
    f"Reading a GPU takes at most {_NVML_MILLISECONDS:.0f} ms": _nvml_is_quick,
    "Idle and under one stream, every signal of the GPU is at most 0.1": _scales_fit(
        ("idle", "one stream", "one row"), 0.0, 0.1
    ),
    "Under a large matrix product, a signal of the GPU is at least 0.9": _scales_fit(("matrix product",), 0.9, 1.0),
    "Benchmarked kernels equal their references": _benchmarked_kernels_are_right,
    f"Memory-bound kernels of more than {_LONG_MICROSECONDS:.0f} us take at most {_OVER_FLOOR} times their floor": (
        _kernels_are_near_floors
    ),
    f"mhc, markov_sample and acceptance are {_OVER_BASELINE:.0f} times as fast as their compiled references": (
        _kernels_beat_compiled
    ),
    f"A replayed round is {_IN_KERNELS:.0%} kernels": _round_is_in_kernels,
}
