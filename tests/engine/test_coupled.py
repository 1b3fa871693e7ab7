"""Coupled verification: the text depends on the request and its seed alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_model import build_small_engine, request, run, run_outputs

from dspark_ray.types import VerificationLimits

SAMPLED = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 5},
    "hot": {"temperature": 1.7, "seed": -3},
    "top-k and top-p": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 11},
    "min-p": {"temperature": 1.1, "min_p": 0.02, "seed": 12},
    "penalties": {
        "temperature": 0.8,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "seed": 13,
    },
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 0.9},
    "bias": {"temperature": 1.0, "logit_bias": {3: 2.0, 9: -100.0}, "seed": 14},
}


def mixed(prompt: tuple[int, ...], speculate: bool):
    """One request of every kind, on prompts of different lengths."""
    return [
        request(prompt[: 5 + 2 * number], name, speculate, **sampling)
        for number, (name, sampling) in enumerate(SAMPLED.items())
    ]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[int]]:
    """What each request says alone, without speculation."""
    from small_model import SMALL

    prompt = tuple((7 * n + 3) % SMALL.vocab_size for n in range(23))
    return {r.request_id: run(build_small_engine(), r)[r.request_id] for r in mixed(prompt, speculate=False)}


@pytest.fixture
def fixed_prompt() -> tuple[int, ...]:
    from small_model import SMALL

    return tuple((7 * n + 3) % SMALL.vocab_size for n in range(23))


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("name", SAMPLED)
def test_text_with_speculation_equals_text_without(name, gamma, texts, fixed_prompt):
    alone = next(r for r in mixed(fixed_prompt, speculate=True) if r.request_id == name)
    assert run(build_small_engine(gamma=gamma), alone)[name] == texts[name]


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_batch_mates_do_not_change_the_text(gamma, texts, fixed_prompt):
    assert run(build_small_engine(gamma=gamma), *mixed(fixed_prompt, speculate=True)) == texts


def test_speculating_and_not_speculating_requests_share_a_batch(texts, fixed_prompt):
    requests = [
        replace(r, speculative=VerificationLimits(bypass=number % 2 == 1))
        for number, r in enumerate(mixed(fixed_prompt, speculate=True))
    ]
    assert run(build_small_engine(), *requests) == texts


def test_preemption_does_not_change_the_text(texts, fixed_prompt):
    engine = build_small_engine(num_pages=8)  # one sequence of full length at a time, or a few short ones
    assert run(engine, *mixed(fixed_prompt, speculate=True)) == texts
    assert engine.scheduler.num_preemptions > 0


def test_small_prefill_chunks_do_not_change_the_text(texts, fixed_prompt):
    engine = build_small_engine(max_num_seqs=3, max_num_batched_tokens=18)
    assert run(engine, *mixed(fixed_prompt, speculate=True)) == texts


def test_continuing_from_given_tokens_does_not_change_the_text(texts, fixed_prompt):
    requests = [replace(r, output_token_ids=tuple(texts[r.request_id][:17])) for r in mixed(fixed_prompt, True)]
    continued = run(build_small_engine(), *requests)
    assert continued == {name: tokens[17:] for name, tokens in texts.items()}


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_a_confidence_threshold_does_not_change_the_text(threshold, texts, fixed_prompt):
    requests = [
        replace(r, speculative=VerificationLimits(confidence_threshold=threshold, max_draft_tokens=4))
        for r in mixed(fixed_prompt, speculate=True)
    ]
    assert run(build_small_engine(), *requests) == texts


def test_drafts_are_accepted_and_rejected(fixed_prompt):
    outputs = run_outputs(build_small_engine(), *mixed(fixed_prompt, speculate=True))
    stats = [o.stats for parts in outputs.values() for o in parts if o.stats and o.finish_reason]
    accepted, admitted = sum(s.num_accepted for s in stats), sum(s.num_admitted for s in stats)
    assert 0.1 * admitted < accepted < 0.9 * admitted
