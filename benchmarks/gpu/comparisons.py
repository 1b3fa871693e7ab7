"""Compares the texts of two runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from benchmarks.gpu.records import Record, Text, TextComparison

PLAIN, SPECULATIVE = "plain", "speculative"


def comparisons(records: Iterable[Record]) -> Iterator[TextComparison]:
    """Speculative against plain of the same engine, replayed against launched, and a GPU against the CPU."""
    found: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for record in records:
        if isinstance(record, Text):
            found[record.run][record.request] = record.token_ids
    for name in found:
        for against in _counterparts(name):
            if against in found:
                yield compared(name, found[name], against, found[against])


def _counterparts(name: str) -> list[str]:
    place, dtype, steps, kind = name.split()
    names = []
    if kind == SPECULATIVE:
        names.append(f"{place} {dtype} {steps} {PLAIN}")
    if steps == "replayed":
        names.append(f"{place} {dtype} launched {kind}")
    if place == "gpu":
        names.append(f"cpu {dtype} launched {PLAIN}")
    if dtype == "bfloat16":
        names.append(f"{place} float32 {steps} {kind}")
    return names


def compared(run: str, texts: dict[int, list[int]], against: str, others: dict[int, list[int]]) -> TextComparison:
    """Index of the first different token of every text that differs."""
    places = []
    for request in sorted(texts.keys() & others.keys()):
        mine, theirs = texts[request], others[request]
        if mine != theirs:
            pairs = enumerate(zip(mine, theirs, strict=False))
            places.append(next((n for n, (a, b) in pairs if a != b), min(len(mine), len(theirs))))
    return TextComparison(run, against, len(texts.keys() & others.keys()), len(places), places)
