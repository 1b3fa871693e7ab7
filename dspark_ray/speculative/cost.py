"""What a step costs: seconds of the target by rows, and seconds of the drafter by requests.

Seconds, not steps per second: times add. A `Curve` holds what was measured, a `CostTable` the curves of one
deployment, and `CostModel` the table in use, which follows what steps really take.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dspark_ray.config import ConfigError

_CONTEXT_MATTERS = 1.05
"""Curves of a short and a long context are told apart when they differ by this factor."""


@dataclass(frozen=True)
class Curve:
    """Seconds by size: rows of a target forward, or requests of a draft.

    Sizes up to `padded_to` run as the next measured size, as captured graphs do; larger ones lie on the line between
    their measured neighbours, which begins at the first measured size above the padded ones. Beyond the last size the
    last two go on. Measured seconds that fall with size are noise: the running maximum counts.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    padded_to: int = 0

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.seconds) or not self.sizes:
            raise ConfigError(f"cost curve: {len(self.sizes)} sizes and {len(self.seconds)} seconds: expected as many")
        if any(low >= high for low, high in zip((0, *self.sizes), self.sizes, strict=False)):
            raise ConfigError(f"cost curve: sizes {list(self.sizes)}: expected positive numbers that rise")
        bad = [value for value in self.seconds if not (math.isfinite(value) and value >= 0)]
        if bad:
            raise ConfigError(f"cost curve: {bad[0]} seconds: expected finite numbers of at least 0")

    def table(self, max_size: int) -> np.ndarray:
        """[max_size + 1] seconds of every size; size 0 costs what the smallest does."""
        wanted = np.arange(max_size + 1)
        sizes, seconds = np.array(self.sizes), np.maximum.accumulate(self.seconds)
        last = len(sizes) - 1
        stair_ends = sizes[min(last, int(np.searchsorted(sizes, self.padded_to, side="right")))]
        next_measured = np.searchsorted(sizes, wanted).clip(max=last)
        return np.where(wanted <= stair_ends, seconds[next_measured], _on_line(wanted, sizes, seconds))


def _on_line(wanted: np.ndarray, sizes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Linear between sizes, level below the first, with the last slope beyond the last."""
    inside = np.interp(wanted, sizes, seconds)
    if len(sizes) == 1:
        return inside
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return inside + slope * np.maximum(wanted - sizes[-1], 0)


@dataclass(frozen=True)
class CostTable:
    """The curves of one deployment; `key` says which one, so that a saved table is not used for another."""

    targets: Mapping[int, Curve]
    """By context length in tokens: one entry where context does not matter."""
    draft: Curve
    key: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("cost table: no target curve: expected at least one")

    @staticmethod
    def of(target: Curve, draft: Curve) -> CostTable:
        """A table in which context does not matter."""
        return CostTable({1: target}, draft)

    @property
    def target(self) -> Curve:
        """The curve of the shortest context."""
        return self.targets[min(self.targets)]

    def without_needless_contexts(self) -> CostTable:
        """One curve where the longest context costs no more than a few percent above the shortest."""
        short, long = self.targets[min(self.targets)], self.targets[max(self.targets)]
        ratio = sum(long.table(short.sizes[-1])) / max(sum(short.table(short.sizes[-1])), 1e-12)
        if len(self.targets) == 1 or ratio >= _CONTEXT_MATTERS:
            return self
        return CostTable({min(self.targets): short}, self.draft, self.key)

    # Our file.

    def save(self, path: Path) -> None:
        """Write JSON; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = {str(context): asdict(curve) for context, curve in sorted(self.targets.items())}
        content = {"key": dict(self.key), "targets_by_context": targets, "draft": asdict(self.draft)}
        path.write_text(json.dumps(content, indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> CostTable:
        """Read our JSON or either of SGLang's two; raises ConfigError that names the file and what is wrong."""
        try:
            raw = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; expected a cost table in JSON") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not JSON: {error}") from None
        try:
            return _from_json(raw)
        except KeyError as error:
            raise ConfigError(f"{path}: key {error.args[0]!r} is missing") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None

    # SGLang's files.

    @staticmethod
    def from_sglang(raw: Mapping[str, Any]) -> CostTable:
        """SGLang's flat table (steps per second by batch tokens) or its additive one (bias, alpha, theta).

        The flat one is looked up at the largest measured size that is not above the wanted one.
        """
        if "bias_seconds" in raw:
            seconds = tuple(raw["bias_seconds"] + theta for theta in _numbers(raw, "theta_seconds"))
            target = Curve(_sizes(raw, "m_probes"), seconds)
            return CostTable.of(target, Curve(_sizes(raw, "bs_probes"), _numbers(raw, "alpha_seconds")))
        sizes, rates = _sizes(raw, "sample_batch_tokens"), _numbers(raw, "sample_steps_per_sec")
        if min(rates) <= 0:
            raise ConfigError(f"sample_steps_per_sec has {min(rates)}: expected positive numbers")
        seconds = tuple(1.0 / rate for rate in rates)
        last = max(int(raw.get("max_batch_tokens", 0)), sizes[-1])
        # A value that holds from its size up to the next is padding to the end of that stretch.
        ends = (*(size - 1 for size in sizes[1:]), last)
        return CostTable.of(Curve(ends, seconds, padded_to=last), NO_COST)

    def to_sglang_additive(self) -> dict[str, Any]:
        """Exact but for contexts and padding: bias is the target's first row, alpha the drafter, theta the rest."""
        target, bias = self.target, self.target.seconds[0]
        return {
            "bias_seconds": bias,
            "bs_probes": list(self.draft.sizes),
            "alpha_seconds": list(self.draft.seconds),
            "m_probes": list(target.sizes),
            "theta_seconds": [max(0.0, seconds - bias) for seconds in target.seconds],
        }

    def to_sglang_flat(self, rows_per_request: int) -> dict[str, Any]:
        """Steps per second of whole rounds in which every request brings `rows_per_request` rows."""
        sizes = self.target.sizes
        target, draft = self.target.table(sizes[-1]), self.draft.table(sizes[-1])
        seconds = [target[size] + draft[max(1, size // rows_per_request)] for size in sizes]
        return {
            "sample_batch_tokens": list(sizes),
            "sample_steps_per_sec": [1.0 / value for value in seconds],
            "max_batch_tokens": sizes[-1],
        }


NO_COST = Curve((1,), (0.0,))


def _from_json(raw: Any) -> CostTable:
    raw = _object(raw, "the table")
    if "targets_by_context" not in raw:
        if "bias_seconds" not in raw and "sample_batch_tokens" not in raw:
            raise KeyError("targets_by_context")
        return CostTable.from_sglang(raw)
    by_context = _object(raw["targets_by_context"], "targets_by_context")
    targets = {int(context): _curve(curve) for context, curve in by_context.items()}
    return CostTable(targets, _curve(raw["draft"]), _object(raw.get("key", {}), "key"))


def _curve(raw: Any) -> Curve:
    raw = _object(raw, "a curve")
    return Curve(_sizes(raw, "sizes"), _numbers(raw, "seconds"), raw.get("padded_to", 0))


def _object(raw: Any, what: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} is {raw!r}: expected an object")
    return raw


def _sizes(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    sizes = _numbers(raw, key)
    for size in sizes:
        if size % 1 != 0:
            raise ConfigError(f"{key} has {size}: expected whole numbers")
    return tuple(int(size) for size in sizes)


def _numbers(raw: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = raw[key]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key} is {values!r}: expected a list of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key} has {value!r}: expected numbers")
    return tuple(values)


def lower_hull(seconds: np.ndarray, first: int, last: int) -> np.ndarray:
    """`seconds` by size, with the largest convex curve below it between the sizes `first` and `last`."""
    corners = [first]
    while (corner := corners[-1]) < last:
        slopes = (seconds[corner + 1 : last + 1] - seconds[corner]) / np.arange(1, last - corner + 1)
        # The least steep way on, and of equal ones the longest.
        corners.append(last - int(slopes[::-1].argmin()))
    hull = seconds.copy()
    hull[first : last + 1] = np.interp(np.arange(first, last + 1), corners, seconds[corners])
    return hull


class CostModel:
    """The table in use. Measured steps move it: all sizes by a common factor at once, each size by its own slowly.

    What slows a whole machine slows every size, so the choice between sizes does not change with the factor;
    what was profiled wrongly at one size is put right there.
    """

    _SCALE_GAIN = 0.05
    _CLIP = (0.5, 2.0)
    """A single step says no more than this about its size: pauses of the process are not costs."""
    _STEPS_PER_TABLE = 8
    _CONTEXT_STEP = 32
    """Tokens; contexts that are nearer than this cost the same."""

    def __init__(self, table: CostTable, max_rows: int, max_requests: int) -> None:
        self.table = table
        self.drift = 1.0
        """Measured over profiled seconds of the target, smoothed: 1 where the table was right."""
        self._scale = 1.0
        self._contexts = np.array(sorted(table.targets))
        self._profiled_targets = np.stack([table.targets[context].table(max_rows) for context in self._contexts])
        self._profiled_draft = table.draft.table(max_requests)
        self._profiled_draft[0] = 0.0
        self._target_factors = _Factors(table.target.sizes, max_rows)
        self._draft_factors = _Factors(table.draft.sizes, max_requests)
        self._news: list[tuple[int, float, float, int, float]] = []
        self._latest: tuple[int, np.ndarray] | None = None
        self._make_tables()

    def target_seconds(self, context: float) -> np.ndarray:
        """[max_rows + 1] seconds of a forward by rows, where rows see `context` tokens on average."""
        near = round(context / self._CONTEXT_STEP)
        if self._latest is None or self._latest[0] != near:
            self._latest = near, _at_context(self._targets, self._contexts, near * self._CONTEXT_STEP)
        return self._latest[1]

    def draft_seconds(self) -> np.ndarray:
        """[max_requests + 1] seconds of a draft by requests; no request costs nothing."""
        return self._draft

    def observe(self, rows: int, context: float, target: float, num_drafted: int, draft: float) -> None:
        """Learn from a step: `rows` took `target` seconds, and the draft of `num_drafted` requests `draft` seconds.

        The tables change with every few steps only: single ones move little.
        """
        self._news.append((rows, context, target, num_drafted, draft))
        if len(self._news) >= self._STEPS_PER_TABLE:
            for step in self._news:
                self._learn(*step)
            self._news.clear()
            self._make_tables()

    def _learn(self, rows: int, context: float, target: float, num_drafted: int, draft: float) -> None:
        rows, num_drafted = min(rows, self._targets.shape[1] - 1), min(num_drafted, len(self._draft) - 1)
        expected_target = float(_at_context(self._learned_targets, self._contexts, context)[rows])
        expected_draft = float(self._learned_draft[num_drafted])
        if expected_draft > 0:
            self._draft_factors.learn(num_drafted, _clipped(draft / expected_draft, self._CLIP))
        if expected_target > 0:
            ratio = _clipped(target / expected_target, self._CLIP)
            self._target_factors.learn(rows, ratio)
            self._scale *= ratio**self._SCALE_GAIN
            profiled = float(_at_context(self._profiled_targets, self._contexts, context)[rows])
            self.drift *= _clipped(target / (profiled * self.drift), self._CLIP) ** self._SCALE_GAIN

    def _make_tables(self) -> None:
        # Steps are compared with what their own size has taught: a maximum over smaller ones could not be learned.
        self._learned_targets = self._scale * self._profiled_targets * self._target_factors.by_size()
        self._learned_draft = self._scale * self._profiled_draft * self._draft_factors.by_size()
        self._targets = np.maximum.accumulate(self._learned_targets, axis=-1)
        self._draft = np.maximum.accumulate(self._learned_draft)
        self._latest = None


def _at_context(seconds: np.ndarray, contexts: np.ndarray, context: float) -> np.ndarray:
    """Seconds [C, rows + 1] of contexts [C] at one context: linear between them, level outside."""
    if len(contexts) == 1:
        return seconds[0]
    place = float(np.interp(context, contexts, np.arange(len(contexts))))
    low = min(int(place), len(contexts) - 2)
    return seconds[low] + (place - low) * (seconds[low + 1] - seconds[low])


class _Factors:
    """What measured sizes have turned out to be, over what was profiled; between them a straight line."""

    _GAIN = 0.01
    """Weight of a step. The first ones at a size weigh more, in case it was disturbed when it was profiled."""
    _STEPS_TO_SETTLE = 20

    def __init__(self, sizes: Sequence[int], max_size: int) -> None:
        self._sizes = list(sizes)
        self._factors = np.ones(len(sizes))
        self._num_learned = np.zeros(len(sizes))
        self._wanted = np.arange(max_size + 1)

    def by_size(self) -> np.ndarray:
        """[max_size + 1]"""
        return np.interp(self._wanted, self._sizes, self._factors)

    def learn(self, size: int, ratio: float) -> None:
        """A step took `ratio` of what was expected: so do the neighbouring measured sizes, the nearer one more so."""
        right = min(bisect_left(self._sizes, size), len(self._sizes) - 1)
        left = max(0, right - 1)
        gap = self._sizes[right] - self._sizes[left]
        share = 1.0 if gap == 0 else min(1.0, max(0.0, (size - self._sizes[left]) / gap))
        for place, weight in ((right, share), (left, 1 - share)):
            gain = max(self._GAIN, 1 / (self._num_learned[place] + self._STEPS_TO_SETTLE))
            self._factors[place] *= ratio ** (weight * gain)
            self._num_learned[place] += weight


def _clipped(ratio: float, limits: tuple[float, float]) -> float:
    return min(max(ratio, limits[0]), limits[1])
