"""Calibration of confidences: temperatures that make predicted survival true on average (paper 3.2.1, STS).

    calibrated_j = sigmoid(logit(confidence_j) / T_j)
    survival_j   = calibrated_1 * ... * calibrated_j      predicted
    stood_j      = the first j drafts were all accepted   observed

A temperature keeps the order of confidences within a position and changes only their magnitude. `calibrated` applies
temperatures to confidences, `OnlineCalibration` owns the temperatures in use.

Letters: N recorded rounds, R requests of a step, G gamma, B bins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dspark_ray.config import ConfigError
from dspark_ray.speculative.prefix_schedule import survival

NUM_BINS = 15
TEMPERATURE_GRID = np.logspace(-1, 1, 41).astype(np.float32)
"""SGLang's candidates, 12 % apart; the middle one is exactly 1."""

_EPSILON = 1e-6
"""Confidences are kept this far from 0 and 1, where logits are infinite."""


@dataclass(frozen=True)
class Reliability:
    """Predictions and outcomes of one position by bin [B]; means of an empty bin are nan."""

    predicted: np.ndarray
    """Mean predicted survival"""
    stood: np.ndarray
    """Share of prefixes that were accepted"""
    counts: np.ndarray


@dataclass(frozen=True)
class Temperatures:
    """One temperature per drafted position, and the data they were fitted on; the file format is SGLang's STS JSON."""

    temperatures: tuple[float, ...]
    dataset: str = ""
    num_samples: int = 0
    ece_before: tuple[float, ...] = ()
    """By position, nan where nothing was recorded."""
    ece_after: tuple[float, ...] = ()

    @staticmethod
    def identity(gamma: int) -> Temperatures:
        """Temperatures of 1, which leave confidences unchanged."""
        return Temperatures((1.0,) * gamma)

    def for_gamma(self, gamma: int) -> Temperatures:
        """The first `gamma` positions; raises ConfigError where there are fewer."""
        if len(self.temperatures) < gamma:
            raise ConfigError(
                f"{len(self.temperatures)} temperatures: expected at least gamma={gamma}, one per position"
            )
        cut = (self.temperatures[:gamma], self.ece_before[:gamma], self.ece_after[:gamma])
        return replace(self, temperatures=cut[0], ece_before=cut[1], ece_after=cut[2])

    @staticmethod
    def load(path: Path) -> Temperatures:
        """Read SGLang's STS JSON, of which only `temperatures` is required; raises ConfigError naming file and key."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; expected temperatures in SGLang's STS JSON") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON: {error}") from None
        try:
            return _from_json(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write SGLang's STS JSON; nan becomes null."""
        content = {
            "temperatures": list(self.temperatures),
            "dataset": self.dataset,
            "num_samples": self.num_samples,
            "ece_before": [None if math.isnan(error) else error for error in self.ece_before],
            "ece_after": [None if math.isnan(error) else error for error in self.ece_after],
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _from_json(raw: Any) -> Temperatures:
    if not isinstance(raw, dict):
        raise ConfigError(f"a {type(raw).__name__}: expected an object with the key temperatures")
    if "temperatures" not in raw:
        raise ConfigError("key temperatures is missing: expected a list of positive numbers, one per drafted position")
    temperatures = _numbers(raw, "temperatures")
    if not temperatures:
        raise ConfigError("temperatures=[]: expected a list of positive numbers, one per drafted position")
    for value in temperatures:
        if not 0 < value < math.inf:  # nan is neither
            raise ConfigError(f"temperatures has {value}: expected positive finite numbers")
    dataset, num_samples = raw.get("dataset", ""), raw.get("num_samples", 0)
    if not isinstance(dataset, str):
        raise ConfigError(f"dataset={dataset!r}: expected a string")
    if not isinstance(num_samples, int) or num_samples < 0:
        raise ConfigError(f"num_samples={num_samples!r}: expected a whole number of at least 0")
    return Temperatures(temperatures, dataset, num_samples, _numbers(raw, "ece_before"), _numbers(raw, "ece_after"))


def _numbers(raw: dict[str, Any], key: str) -> tuple[float, ...]:
    """A list of numbers, with null as nan; empty where the key is absent."""
    values = raw.get(key)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise ConfigError(f"{key}={values!r}: expected a list of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ConfigError(f"{key} has {value!r}: expected numbers")
    return tuple(math.nan if value is None else float(value) for value in values)


# Applying temperatures.


def calibrated(confidences: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Confidences [..., G] at temperatures [G]; the same array where every temperature is 1."""
    if (temperatures == 1).all():
        return confidences
    return _tempered(confidences, _exponents(temperatures))


def _exponents(temperatures: np.ndarray) -> np.ndarray:
    return -1.0 / temperatures


def _tempered(confidences: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """sigmoid(logit(c) / T), computed as 1 / (1 + odds ** (-1 / T)), which takes half as many passes."""
    bounded = np.minimum(np.maximum(confidences.astype(np.float64), _EPSILON), 1 - _EPSILON)
    with np.errstate(over="ignore"):  # an infinite power gives the right limit, 0
        return 1.0 / (1.0 + (bounded / (1.0 - bounded)) ** exponents)


def logits(confidences: np.ndarray) -> np.ndarray:
    """log(c / (1 - c)) of confidences [...], finite also at 0 and 1."""
    bounded = np.clip(confidences, _EPSILON, 1 - _EPSILON)
    return np.log(bounded / (1 - bounded))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinite exp(-values) gives the right limit, 0
        return 1 / (1 + np.exp(-values))


# Measuring.


def expected_calibration_error(predicted: np.ndarray, stood: np.ndarray) -> float:
    """Mean distance of predictions [N] from outcomes [N] after averaging within bins; nan where N = 0.

    Bin b of 15 holds b/15 <= p < (b+1)/15, the last one also p = 1.
    """
    if not len(predicted):
        return math.nan
    # Within a bin, count * |mean predicted - mean stood| is |sum of differences|.
    gaps = np.bincount(_bins(predicted), weights=predicted - stood, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(predicted))


def reliability(predicted: np.ndarray, stood: np.ndarray) -> Reliability:
    """Predictions [N] and outcomes [N] averaged within the bins of the calibration error."""
    bins = _bins(predicted)
    counts = np.bincount(bins, minlength=NUM_BINS)
    sums = [np.bincount(bins, weights=values, minlength=NUM_BINS) for values in (predicted, stood)]
    means = [np.divide(total, counts, out=np.full(NUM_BINS, math.nan), where=counts > 0) for total in sums]
    return Reliability(means[0], means[1], counts)


def _bins(predicted: np.ndarray) -> np.ndarray:
    return np.minimum((predicted * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def area_under_curve(predicted: np.ndarray, stood: np.ndarray) -> float:
    """P(an accepted draft was predicted above a rejected one), ties counting half; nan where one kind is missing."""
    stood = np.asarray(stood, dtype=bool)
    num_stood, num_fell = int(stood.sum()), int((~stood).sum())
    if not num_stood or not num_fell:
        return math.nan
    _, place, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    middle_ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = middle_ranks[place][stood].sum()
    return float((rank_sum - num_stood * (num_stood + 1) / 2) / (num_stood * num_fell))


def survival_errors(
    confidences: np.ndarray,
    admitted: np.ndarray,
    accepted: np.ndarray,
    temperatures: np.ndarray,
    min_outcomes: int = 1,
) -> tuple[float, ...]:
    """Calibration error of survival by position, of confidences [N, G], over rounds that verified the position.

    nan where fewer than `min_outcomes` rounds did.
    """
    predicted = survival(calibrated(confidences, temperatures))
    errors = []
    for position in range(confidences.shape[1]):
        rows = admitted > position
        enough = np.count_nonzero(rows) >= min_outcomes
        stood = accepted[rows] > position
        errors.append(expected_calibration_error(predicted[rows, position], stood) if enough else math.nan)
    return tuple(errors)


# Fitting.


def fit_temperatures(
    confidence_logits: np.ndarray,
    accepted: np.ndarray,
    admitted: np.ndarray | None = None,
    *,
    dataset: str = "",
    fallback: Sequence[float] | None = None,
    min_outcomes: int = 1,
) -> Temperatures:
    """Sequential Temperature Scaling: from left to right, the temperature with the smallest error of survival.

    Logits [N, G]; of each round's admitted [N] drafts (None: all) accepted [N] were accepted. A round counts only for
    positions it had verified, even where an earlier draft was rejected: counting rejections alone would bias the fit.
    A position with fewer than `min_outcomes` keeps its `fallback` (1).
    """
    values = np.asarray(confidence_logits, dtype=np.float64)
    num_rounds, gamma = values.shape
    verified = np.full(num_rounds, gamma) if admitted is None else np.asarray(admitted)
    accepted = np.asarray(accepted)
    fitted = np.ones(gamma) if fallback is None else np.array(fallback, dtype=np.float64)
    prefix, errors = np.ones(num_rounds), []
    for position in range(gamma):
        rows = verified > position
        if np.count_nonzero(rows) >= min_outcomes:
            fitted[position] = _best_temperature(prefix[rows], values[rows, position], accepted[rows] > position)
        prefix = prefix * _sigmoid(values[:, position] / fitted[position])
        errors.append(expected_calibration_error(prefix[rows], accepted[rows] > position))
    before = survival(_sigmoid(values))
    return Temperatures(
        temperatures=tuple(fitted.tolist()),
        dataset=dataset,
        num_samples=num_rounds,
        ece_before=tuple(
            expected_calibration_error(before[verified > j, j], accepted[verified > j] > j) for j in range(gamma)
        ),
        ece_after=tuple(errors),
    )


def _best_temperature(prefix: np.ndarray, values: np.ndarray, stood: np.ndarray) -> float:
    """The best of the grid, given survival of the earlier positions [n] and logits [n]; in float64, as in SGLang."""
    grid = TEMPERATURE_GRID.astype(np.float64)
    errors = [expected_calibration_error(prefix * _sigmoid(values / temperature), stood) for temperature in grid]
    # Of equal errors the lowest temperature wins, as in SGLang.
    return float(grid[int(np.argmin(errors))])


class OnlineCalibration:
    """The temperatures in use, recent outcomes of drafts, and refits of the temperatures.

    A refit is fitted on every other recorded round and validated on the rounds between. It is adopted only where it
    lowers the calibration error there, so it never raises the error by more than noise.
    """

    _MIN_OUTCOMES = 64
    """Fewest outcomes of a position from which an error is computed."""
    _MARGIN = 0.25
    """A refit must lower the mean error by this over the root of the validation rounds (0.008 for 1024 rounds).
    In simulated rounds of a calibrated drafter this rejects all of 600 refits; half of it accepts 1 %."""
    _TOLERANCE = 0.001
    """Largest increase of the error of a single position."""

    def __init__(
        self,
        temperatures: Temperatures,
        gamma: int,
        capacity: int = 2048,
        refit: bool = True,
        steps_between_errors: int = 64,
        steps_between_refits: int = 512,
    ) -> None:
        """The latest `capacity` rounds (of one request each) are kept; a refit is due after as many new ones.

        Measuring the error costs as much as one or two scheduling decisions, and a refit about fifty, so both also
        wait for a minimum number of steps: with many requests, a step brings many rounds.
        """
        self.temperatures = np.ones(gamma)
        """[G] in use"""
        self._use(np.array(temperatures.for_gamma(gamma).temperatures, dtype=np.float64))
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """Rounds that are not in the ring yet: writing many at once costs little more than one."""
        self._num_pending = 0
        self.num_refits = 0
        self.num_refused = 0
        self._refits = refit
        self._steps_between_errors, self._steps_between_refits = steps_between_errors, steps_between_refits
        self._capacity = capacity
        self._confidences = np.zeros((capacity, gamma))
        self._admitted = np.zeros(capacity, dtype=np.int64)
        self._accepted = np.zeros(capacity, dtype=np.int64)
        self._num_observed = 0
        self._num_steps = 0
        self._refitted_at = 0
        self._refitted_at_step = 0
        self._errors = (math.nan,) * gamma
        self._errors_at: int | None = None

    def calibrate(self, confidences: np.ndarray) -> np.ndarray:
        """Confidences [R, G] at the temperatures in use."""
        return confidences if self._is_identity else _tempered(confidences, self._in_use)

    def observe(self, confidences: np.ndarray, admitted: np.ndarray, accepted: np.ndarray) -> None:
        """Record the outcome of a step: confidences [R, G] as drafted, verified and accepted drafts [R]."""
        self._pending.append((confidences, admitted, accepted))
        self._num_pending += len(admitted)
        self._num_steps += 1
        if self._num_pending >= self._capacity:
            self._flush()
        has_new_rounds = self._num_observed + self._num_pending - self._refitted_at >= self._capacity
        if self._refits and has_new_rounds and self._num_steps - self._refitted_at_step >= self._steps_between_refits:
            self._flush()
            if self._num_observed - self._refitted_at >= self._capacity:
                self._refitted_at, self._refitted_at_step = self._num_observed, self._num_steps
                self._refit()

    def ece(self) -> tuple[float, ...]:
        """Calibration error of survival by position over the recorded rounds; nan where they are too few."""
        at = self._errors_at
        if at is None or self._num_steps - at >= self._steps_between_errors:
            self._flush()
            self._errors_at = self._num_steps
            self._errors = self._measure(slice(0, self._num_observed), self.temperatures)
        return self._errors

    def _flush(self) -> None:
        """Write pending rounds into the ring, except those without a verified draft, which carry no information."""
        if not self._pending:
            return
        confidences, admitted, accepted = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._num_pending = [], 0
        verified = np.flatnonzero(admitted > 0)[-self._capacity :]
        places = (self._num_observed + np.arange(len(verified))) % self._capacity
        self._confidences[places] = confidences[verified]
        self._admitted[places] = admitted[verified]
        self._accepted[places] = accepted[verified]
        self._num_observed += len(verified)

    def _use(self, temperatures: np.ndarray) -> None:
        self.temperatures = temperatures
        self._is_identity = bool((temperatures == 1).all())
        self._in_use = _exponents(temperatures)

    def _measure(self, rounds: slice, temperatures: np.ndarray) -> tuple[float, ...]:
        return survival_errors(
            self._confidences[rounds],
            self._admitted[rounds],
            self._accepted[rounds],
            temperatures,
            self._MIN_OUTCOMES,
        )

    def _refit(self) -> None:
        fitted_on, compared_on = slice(0, None, 2), slice(1, None, 2)
        fitted = fit_temperatures(
            logits(self._confidences[fitted_on]),
            self._accepted[fitted_on],
            self._admitted[fitted_on],
            fallback=self.temperatures.tolist(),
            min_outcomes=self._MIN_OUTCOMES,
        )
        candidate = np.array(fitted.temperatures)
        changes = np.subtract(self._measure(compared_on, candidate), self._measure(compared_on, self.temperatures))
        changes = changes[~np.isnan(changes)]
        margin = self._MARGIN / math.sqrt(self._capacity // 2)
        if not len(changes) or changes.mean() > -margin or changes.max() > self._TOLERANCE:
            self.num_refused += 1
            return
        self._use(candidate)
        self.num_refits += 1
        self._errors_at = None
