"""Every number of a request has bounds, and a value outside them is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dspark_ray.types import (
    MAX_DRAFT_TOKENS,
    MAX_INT64,
    MAX_LOGIT_BIASES,
    MAX_REQUEST_ID_LENGTH,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKEN_ID,
    MAX_TOP_K,
    MIN_INT64,
    Request,
    RequestError,
    SamplingParams,
    VerificationLimits,
    VerificationPolicy,
)

HUGE = 2**70
ENORMOUS = 1 << 100_000
"""Python refuses to write it in decimal."""
NOT_INTEGERS: list[Any] = [True, 1.0, "1", None, [1], HUGE, -HUGE, ENORMOUS, math.nan]
NOT_NUMBERS: list[Any] = [True, "1", None, [1.0], math.nan, math.inf, -math.inf, HUGE, ENORMOUS, 1e300]


@pytest.mark.parametrize("field", ["top_k", "seed", "max_tokens", "min_tokens", "logprobs"])
@pytest.mark.parametrize("value", NOT_INTEGERS, ids=type)
def test_integers_of_sampling_are_bounded(field, value):
    if field == "logprobs" and value is None:
        return
    with pytest.raises(RequestError, match=f"{field}=.*: expected an integer in") as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"],
)
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=type)
def test_numbers_of_sampling_are_bounded_and_finite(field, value):
    with pytest.raises(RequestError, match=f"{field}=.*: expected a number in") as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -1),
        ("top_k", MAX_TOP_K + 1),
        ("seed", MAX_INT64 + 1),
        ("seed", MIN_INT64 - 1),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("repetition_penalty", 1e-40),
        ("logprobs", 21),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("ignore_eos", 1),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", ("a",) * (MAX_STOP_STRINGS + 1)),
        ("stop", ("a" * (MAX_STOP_STRING_LENGTH + 1),)),
        ("stop_token_ids", (HUGE,)),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", [1]),
        ("stop_token_ids", tuple(range(MAX_STOP_TOKEN_IDS + 1))),
        ("logit_bias", [1]),
        ("logit_bias", {HUGE: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: True}),
        ("logit_bias", {1: -101.0}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)),
    ],
)
def test_sampling_just_outside_its_limits_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"^{field}.*: expected") as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field
    assert len(str(refused.value)) < 300


def test_sampling_at_its_limits_is_accepted():
    SamplingParams(
        temperature=100.0,
        top_k=MAX_TOP_K,
        top_p=5e-324,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2.0,
        repetition_penalty=0.01,
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIASES), -100.0),
        seed=MIN_INT64,
        max_tokens=MAX_TOP_K,
        min_tokens=MAX_TOP_K,
        stop=("a" * MAX_STOP_STRING_LENGTH,) * MAX_STOP_STRINGS,
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)),
        logprobs=20,
    )


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (VerificationLimits, "max_draft_tokens", [True, -1, 1.0, HUGE, MAX_DRAFT_TOKENS + 1]),
        (VerificationLimits, "confidence_threshold", [True, -0.1, 1.1, math.nan, math.inf, "0"]),
        (VerificationLimits, "bypass", [1, "yes", None]),
        (VerificationPolicy, "max_draft_tokens", [True, -1, 1.0, HUGE, ENORMOUS]),
        (VerificationPolicy, "confidence_threshold", [True, -0.1, 1.1, math.nan, HUGE]),
        (VerificationPolicy, "bypass", [1, None]),
        (VerificationPolicy, "version", [HUGE, 1.5, True]),
        (VerificationPolicy, "valid_seconds", [0, -1.0, math.nan, math.inf, HUGE, True]),
    ],
)
def test_speculation_and_policies_are_bounded(kind, field, values):
    for value in values:
        with pytest.raises(RequestError, match=f"{field}=.*: expected") as refused:
            kind(**{field: value})
        assert refused.value.param.endswith(field)


@pytest.mark.parametrize("wrong", [HUGE, ENORMOUS, -1, MAX_TOKEN_ID + 1, True, 1.0, "1", None], ids=type)
def test_token_ids_that_no_vocabulary_has_are_refused(wrong):
    with pytest.raises(RequestError, match=r"prompt has token id .*: expected integers in"):
        Request(request_id="r", prompt_token_ids=(1, wrong))
    with pytest.raises(RequestError, match="output_token_ids has token id"):
        replace(Request(request_id="r", prompt_token_ids=(1,)), output_token_ids=(wrong,))


def test_the_id_of_a_request_is_bounded():
    with pytest.raises(RequestError, match=f"request_id has .* characters: expected at most {MAX_REQUEST_ID_LENGTH}"):
        Request(request_id="r" * (MAX_REQUEST_ID_LENGTH + 1), prompt_token_ids=(1,))
    with pytest.raises(RequestError, match="request_id=7: expected a string"):
        Request(request_id=7, prompt_token_ids=(1,))  # type: ignore[arg-type]
