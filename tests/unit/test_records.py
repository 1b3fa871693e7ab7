"""The table that explains steps, on records made by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dspark_ray.engine.records import explain, from_json, to_json
from dspark_ray.types import StepRecord

SPECULATING = StepRecord(
    step=7,
    ended_at=1.7e9,
    num_decoding=6,
    num_prefill_rows=32,
    bypass=None,
    lengths=(5, 2, 5, 0, 5),
    accepted=(4, 2, 0, 0, 5),
    expected=12.25,
    gamma=5,
    predicted_draft_seconds=0.002,
    measured_draft_seconds=0.0025,
    predicted_target_seconds=0.01,
    measured_target_seconds=0.0125,
    schedule_seconds=0.00015,
    confidence_threshold=0.3,
    policy_version=2,
    calibration_error=(0.125, None),
)
BYPASSED = replace(
    SPECULATING,
    step=1008,
    bypass="predicted_loss",
    lengths=(),
    accepted=(),
    expected=0.0,
    predicted_draft_seconds=0.0,
    measured_draft_seconds=0.0,
)


def cells(line: str, headings: str) -> dict[str, str]:
    """What stands below each heading; numbers end where their heading ends, words begin where it begins."""
    found, start = {}, 0
    names = [name for name in headings.split("  ") if name]
    for name in map(str.strip, names):
        begins = headings.index(name, start)
        end = begins + len(name)
        is_word = name in ("lengths", "bypass")
        found[name] = (line[begins:].split("  ")[0] if is_word else line[start:end]).strip()
        start = end
    return found


def test_a_step_is_a_row_of_what_was_decided_and_what_came_of_it():
    headings, row, *_ = explain([SPECULATING]).splitlines()
    assert cells(row, headings) == {
        "step": "7",
        "decoding": "6",
        "drafted": "5",
        "prefill": "32",
        "budget": "17",
        "expected": "12.2",
        "accepted": "11",
        "draft ms": "2.0/2.5",
        "target ms": "10.0/12.5",
        "schedule us": "150",
        "threshold": "0.30",
        "lengths": "5x3 2x1 0x1",
        "bypass": "",
    }


def test_a_bypassed_step_says_why():
    headings, _, row, *_ = explain([SPECULATING, BYPASSED]).splitlines()
    found = cells(row, headings)
    assert (found["drafted"], found["budget"], found["lengths"]) == ("0", "0", "")
    assert found["bypass"] == "predicted_loss"


def test_columns_are_as_wide_as_their_widest_cell():
    headings, first, second, *_ = explain([SPECULATING, BYPASSED]).splitlines()
    assert first[: len("step")] == "   7"
    assert second[: len("step")] == "1008"
    assert headings.index("lengths") == first.index("5x3")
    assert headings.index("bypass") == second.index("predicted_loss")


def test_the_last_two_lines_compare_what_was_expected_with_what_came():
    *_, empty, tokens, seconds = explain([SPECULATING, BYPASSED]).splitlines()
    assert empty == ""
    assert tokens == ("tokens:  25 drafted, 17 verified, 12.2 expected to be accepted, 11 accepted (0.90 of that)")
    assert seconds == "seconds: 0.022 predicted, 0.028 measured (1.25 of that), 0.0003 to decide (1.1% of measured)"


def test_nothing_expected_is_nothing_to_compare_with():
    bare = StepRecord(step=0, ended_at=0.0, num_decoding=0, num_prefill_rows=0, bypass=None)
    *_, tokens, seconds = explain([bare]).splitlines()
    assert tokens == "tokens:  0 drafted, 0 verified, 0.0 expected to be accepted, 0 accepted"
    assert seconds == "seconds: 0.000 predicted, 0.000 measured, 0.0000 to decide"


def test_no_steps_are_explained_in_words():
    assert explain([]) == "no steps yet"


@pytest.mark.parametrize("record", [SPECULATING, BYPASSED])
def test_a_record_survives_json(record):
    assert from_json(json.loads(json.dumps(to_json(record), allow_nan=False))) == record


def test_json_has_the_sums_and_reading_it_leaves_them_out():
    raw = to_json(SPECULATING)
    assert (raw["num_drafted"], raw["budget"], raw["num_accepted"]) == (5, 17, 11)
    assert from_json({**raw, "colour": "red"}) == SPECULATING
