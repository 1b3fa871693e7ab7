"""Measured seconds by size: the curves of one deployment, and their file formats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dspark_ray.config import ConfigError

_CONTEXT_MATTERS = 1.05
"""Separate curves for a short and a long context are kept where they differ by at least this factor."""


@dataclass(frozen=True)
class Curve:
    """Seconds by size: rows of a target forward, or requests of a draft.

    Sizes up to `padded_to` cost as much as the next measured size, as captured graphs do. Larger sizes are interpolated
    linearly, beginning at the first measured size above `padded_to`, and extrapolated from the last two. Seconds that
    fall with size are noise: the running maximum is used.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    padded_to: int = 0

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.seconds) or not self.sizes:
            raise ConfigError(f"cost curve: {len(self.sizes)} sizes and {len(self.seconds)} seconds: expected as many")
        if any(low >= high for low, high in zip((0, *self.sizes), self.sizes, strict=False)):
            raise ConfigError(f"cost curve: sizes {list(self.sizes)}: expected rising positive numbers")
        bad = [value for value in self.seconds if not (math.isfinite(value) and value >= 0)]
        if bad:
            raise ConfigError(f"cost curve: {bad[0]} seconds: expected finite numbers of at least 0")

    def table(self, max_size: int) -> np.ndarray:
        """[max_size + 1] seconds by size; size 0 costs as much as the smallest measured one."""
        wanted = np.arange(max_size + 1)
        sizes, seconds = np.array(self.sizes), np.maximum.accumulate(self.seconds)
        last = len(sizes) - 1
        stair_ends = sizes[min(last, int(np.searchsorted(sizes, self.padded_to, side="right")))]
        next_measured = np.searchsorted(sizes, wanted).clip(max=last)
        return np.where(wanted <= stair_ends, seconds[next_measured], _on_line(wanted, sizes, seconds))


def _on_line(wanted: np.ndarray, sizes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Linear between sizes, constant below the first, with the last slope beyond the last."""
    inside = np.interp(wanted, sizes, seconds)
    if len(sizes) == 1:
        return inside
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return inside + slope * np.maximum(wanted - sizes[-1], 0)


@dataclass(frozen=True)
class CostTable:
    """The curves of one deployment, which `key` identifies, so that a saved table is not used for another."""

    targets: Mapping[int, Curve]
    """By context length in tokens; a single entry where costs do not depend on it."""
    draft: Curve
    key: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("cost table: no target curve: expected at least one")

    @staticmethod
    def of(target: Curve, draft: Curve) -> CostTable:
        """A table whose costs do not depend on the context length."""
        return CostTable({1: target}, draft)

    @property
    def target(self) -> Curve:
        """The curve of the shortest context."""
        return self.targets[min(self.targets)]

    def without_needless_contexts(self) -> CostTable:
        """With the shortest context alone, where the longest costs at most a few percent more."""
        short, long = self.targets[min(self.targets)], self.targets[max(self.targets)]
        ratio = sum(long.table(short.sizes[-1])) / max(sum(short.table(short.sizes[-1])), 1e-12)
        if len(self.targets) == 1 or ratio >= _CONTEXT_MATTERS:
            return self
        return CostTable({min(self.targets): short}, self.draft, self.key)

    # The package's own file format.

    def save(self, path: Path) -> None:
        """Write JSON, creating folders as needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = {str(context): asdict(curve) for context, curve in sorted(self.targets.items())}
        content = {"key": dict(self.key), "targets_by_context": targets, "draft": asdict(self.draft)}
        path.write_text(json.dumps(content, indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> CostTable:
        """Read the package's JSON or either of SGLang's formats; raises ConfigError with the file and the key."""
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

    # SGLang's file formats.

    @staticmethod
    def from_sglang(raw: Mapping[str, Any]) -> CostTable:
        """SGLang's flat table (steps per second by batch tokens) or its additive one (bias, alpha, theta).

        SGLang looks the flat one up at the largest measured size that is not above the wanted one.
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
        # A value is valid from its size up to the next one: the same as padding to the end of that range.
        ends = (*(size - 1 for size in sizes[1:]), last)
        return CostTable.of(Curve(ends, seconds, padded_to=last), NO_COST)

    def to_sglang_additive(self) -> dict[str, Any]:
        """Without contexts and padding: bias is the target's first row, alpha the drafter, theta the remaining rows."""
        target, bias = self.target, self.target.seconds[0]
        return {
            "bias_seconds": bias,
            "bs_probes": list(self.draft.sizes),
            "alpha_seconds": list(self.draft.seconds),
            "m_probes": list(target.sizes),
            "theta_seconds": [max(0.0, seconds - bias) for seconds in target.seconds],
        }

    def to_sglang_flat(self, rows_per_request: int) -> dict[str, Any]:
        """Steps per second of whole rounds in which every request has `rows_per_request` rows."""
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
