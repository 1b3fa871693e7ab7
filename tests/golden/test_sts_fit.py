"""Fitted temperatures and calibration errors against those of the published fitting program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from golden_files import case_files, case_name

from dspark_ray.speculative.calibration import NUM_BINS, TEMPERATURE_GRID, Temperatures, fit_temperatures

TOLERANCE = 1e-6


def cases() -> Iterator[Any]:
    for path in case_files("schedulers/*.json"):
        found = json.loads(path.read_text()).get("sts_fit", [])
        for number, facts in enumerate([found] if isinstance(found, dict) else found):
            yield pytest.param(facts, id=f"{case_name(path)}-{number}")


@pytest.fixture(params=list(cases()))
def facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def fitted(facts: dict[str, Any]) -> Temperatures:
    return fit_temperatures(np.array(facts["logits"]), np.array(facts["accepted_len"]))


def test_candidates_and_bins_are_the_recorded_ones(facts: dict[str, Any]) -> None:
    np.testing.assert_array_equal(TEMPERATURE_GRID, np.array(facts["grid"], dtype=np.float32))
    assert facts["num_bins"] == NUM_BINS


def test_temperatures_equal_the_recorded_ones(facts: dict[str, Any], fitted: Temperatures) -> None:
    assert fitted.temperatures == pytest.approx(facts["temperatures"], rel=TOLERANCE)
    assert fitted.num_samples == len(facts["logits"])


@pytest.mark.parametrize("errors", ["ece_before", "ece_after"])
def test_errors_equal_the_recorded_ones(facts: dict[str, Any], fitted: Temperatures, errors: str) -> None:
    assert getattr(fitted, errors) == pytest.approx(facts[errors], abs=TOLERANCE)
