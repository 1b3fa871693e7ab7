"""Refitting the confidence head: what is recorded, which outcomes count, what is fitted and what is written."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_model import SMALL, build_small_engine, save_small_checkpoint

from dspark_ray.checkpoint.reader import CheckpointError
from dspark_ray.config import ConfigError, EngineConfig
from dspark_ray.drafters.heads import ConfidenceHead
from dspark_ray.evaluation.calibrate import collect
from dspark_ray.ranks.gang import STS_FILE, build_engine
from dspark_ray.speculative.calibration import Temperatures
from dspark_ray.training import confidence
from dspark_ray.training.confidence import HeadRounds, StoredHead, choose_weights, fit_weights, record, recording
from dspark_ray.training.corpus import KINDS, documents_of_kind, held_out_prompts, training_prompts
from dspark_ray.types import SamplingParams

GAMMA, DRAFTER_INPUTS = 5, SMALL.hidden_size + 8
HEAD = "mtp.1.confidence_head.proj.weight"


def outcomes(weights: torch.Tensor, num_rounds: int, seed: int) -> HeadRounds:
    """Rounds in which each position stands with the probability that `weights` give it, all of them verified."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_rounds, GAMMA, len(weights), generator=generator)
    stands = torch.rand(num_rounds, GAMMA, generator=generator) < torch.sigmoid(inputs.double() @ weights)
    accepted = stands.long().cumprod(1).sum(1).numpy()
    return HeadRounds(inputs.numpy(), np.full(num_rounds, GAMMA), accepted)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """Enough for every outcome to be seen, and a fifth of what the command records."""
    monkeypatch.setattr(confidence, "_MAX_TOKENS", 20)


# Recording.


def test_recorded_inputs_give_the_confidences_that_were_planned_with():
    engine = build_small_engine(schedule="fixed", bypass=False)
    prompts = [(1, 2, 3), (4, 5, 6, 7), (8, 9)]
    samplings = [SamplingParams(temperature=1, max_tokens=20, ignore_eos=True)]
    planned = collect(engine, prompts, samplings)
    with recording(engine) as recorder:
        confidence.serve(engine, prompts, samplings)
    rounds = recorder.rounds()
    head = engine._drafter._worker.module.stages[-1].confidence_head
    inputs = torch.from_numpy(rounds.inputs)
    assert inputs.shape == (len(planned.accepted), GAMMA, DRAFTER_INPUTS)
    hidden, embedding = inputs.split((SMALL.hidden_size, 8), dim=-1)
    np.testing.assert_allclose(torch.sigmoid(head(hidden, embedding)).numpy(), planned.confidences, rtol=1e-5)
    np.testing.assert_array_equal(rounds.verified, planned.admitted)
    np.testing.assert_array_equal(rounds.accepted, planned.accepted)


def test_nothing_listens_once_recording_is_over():
    engine = build_small_engine(schedule="fixed", bypass=False)
    with recording(engine) as recorder:
        pass
    assert engine.planner.listener is None
    ConfidenceHead(4, 2)(torch.zeros(1, 4), torch.zeros(1, 2))
    assert not recorder._inputs


def test_parts_that_are_there_are_not_recorded_again(tmp_path):
    engine = build_small_engine(schedule="fixed", bypass=False)
    prompts = [[(number, 2, 3), (number, 5)] for number in range(1, 8)]
    first = record(engine, iter(prompts), tmp_path, num_rounds=1)
    enough = sum(len(part.verified) for part in first) + 1
    refused = [[]] * 5 + prompts[5:]  # without prompts, nothing could be recorded
    again = record(engine, iter(refused), tmp_path, num_rounds=enough)
    assert len(again) == len(first) + 1 == 6
    np.testing.assert_array_equal(again[0].inputs, first[0].inputs)
    assert not list(tmp_path.glob("*partial*"))


def test_more_rounds_than_the_corpus_has_prompts_for_are_refused(tmp_path):
    engine = build_small_engine(schedule="fixed", bypass=False)
    with pytest.raises(ConfigError, match="rounds=1000000: the corpus has prompts for"):
        record(engine, iter([[(1, 2), (3, 4)]] * 5), tmp_path, num_rounds=1_000_000)


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_prompt_is_a_held_out_one(kind):
    prompts = list(itertools.islice(training_prompts(kind), 40))
    assert len(set(prompts)) == 40
    assert not set(prompts) & set(held_out_prompts(kind, 40))
    texts = [document.text for document in documents_of_kind(kind, "train")]
    assert all(any(prompt in text for text in texts) for prompt in prompts[:5])


# Which outcomes count.


@pytest.mark.parametrize(
    ("verified", "accepted", "judged"),
    [
        (5, 5, [1, 1, 1, 1, 1]),
        (5, 2, [1, 1, 0]),
        (5, 0, [0]),
        (2, 2, [1, 1]),  # what would have come of the third draft is not known
        (2, 1, [1, 0]),
        (0, 0, []),
    ],
)
def test_a_draft_counts_if_it_was_verified_and_all_before_it_stood(verified, accepted, judged):
    inputs = np.arange(GAMMA, dtype=np.float32).reshape(1, GAMMA, 1)
    found, stood = HeadRounds(inputs, np.array([verified]), np.array([accepted])).outcomes()
    assert stood.tolist() == judged
    assert found.flatten().tolist() == list(range(len(judged)))


# Fitting.


def test_the_fit_finds_the_weights_that_the_outcomes_came_from():
    true = torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)
    rounds = outcomes(true, 20_000, seed=0)
    fitted = fit_weights(*rounds.outcomes(), torch.zeros(4, dtype=torch.float64), 1.0, torch.zeros_like(true))
    torch.testing.assert_close(fitted, true, atol=0.06, rtol=0)


def test_an_endless_ridge_keeps_the_weights_where_it_pulls_to():
    rounds = outcomes(torch.ones(4, dtype=torch.float64), 100, seed=0)
    centre = torch.tensor([0.5, -0.5, 2.0, 0.0], dtype=torch.float64)
    fitted = fit_weights(*rounds.outcomes(), torch.zeros_like(centre), 1e9, centre)
    torch.testing.assert_close(fitted, centre, atol=1e-4, rtol=0)


def test_the_fit_converges_from_weights_that_are_far_off():
    rounds = outcomes(torch.ones(4, dtype=torch.float64), 500, seed=0)
    zero = torch.zeros(4, dtype=torch.float64)
    near, far = (fit_weights(*rounds.outcomes(), start, 1.0, zero) for start in (zero, zero + 40))
    torch.testing.assert_close(near, far, atol=1e-3, rtol=0)


def test_chosen_weights_are_such_as_can_be_stored():
    true = torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)
    seen, unseen = (outcomes(true, 2000, seed) for seed in (0, 1))
    chosen = choose_weights(seen, unseen, -true, (1.0, 100.0), torch.bfloat16)
    assert torch.equal(chosen, chosen.bfloat16().double())
    torch.testing.assert_close(chosen, true, atol=0.2, rtol=0)


def test_weights_that_cannot_be_bettered_stay():
    true = torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)
    few, unseen = outcomes(true, 3, seed=0), outcomes(true, 4000, seed=1)
    assert torch.equal(choose_weights(few, unseen, true, (0.1,), torch.bfloat16), true)


# Writing.


def test_writing_changes_the_head_and_nothing_else(tmp_path):
    directory = save_small_checkpoint(tmp_path / "model")
    head = StoredHead.find(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    tensors, mark = load_file(head.file), head.fingerprint()
    torch.testing.assert_close(head.read(), tensors[HEAD].flatten().double(), atol=0, rtol=0)
    weights = torch.linspace(-1, 1, DRAFTER_INPUTS).bfloat16().double()
    head.write(weights)
    after = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [head.file.name]
    assert len(before[head.file.name]) == len(after[head.file.name])
    written = load_file(head.file)
    assert torch.equal(written[HEAD].flatten().double(), weights)
    assert [name for name in tensors if not torch.equal(tensors[name], written[name])] == [HEAD]
    assert head.fingerprint() == mark == StoredHead.find(directory).fingerprint()


def test_a_checkpoint_without_a_confidence_head_is_refused(tmp_path):
    directory = save_small_checkpoint(tmp_path)
    # A name of the same length keeps the header as long as it says it is.
    for file in (StoredHead.find(directory).file, directory / "model.safetensors.index.json"):
        file.write_bytes(file.read_bytes().replace(b"confidence_head", b"confidence_hand"))
    with pytest.raises(CheckpointError, match=r"expected a tensor mtp\.N\.confidence_head"):
        StoredHead.find(directory)


def test_the_command_writes_a_checkpoint_that_differs_in_its_head(tmp_path, monkeypatch, capsys):
    model, output = save_small_checkpoint(tmp_path / "model"), tmp_path / "refitted"
    prompts = [[(part, number, 7) for number in range(2, 10)] for part in range(1, 6)]
    monkeypatch.setattr(confidence, "_prompts_by_part", lambda tokenizer, seed: iter(prompts))
    monkeypatch.setattr(confidence.Tokenizer, "from_directory", lambda directory: None)
    arguments = ["--model", model, "--output", output, "--data", tmp_path / "data", "--rounds", "50"]
    monkeypatch.setattr(sys, "argv", ["confidence", *map(str, arguments)])
    confidence.main()
    printed = capsys.readouterr().out
    assert "before: loss" in printed
    assert "after: loss" in printed
    old, new = (load_file(StoredHead.find(directory).file) for directory in (model, output))
    assert [name for name in old if not torch.equal(old[name], new[name])] == [HEAD]
    assert Path(output / "config.json").read_bytes() == Path(model / "config.json").read_bytes()


# Temperatures beside the checkpoint.


def test_too_few_temperatures_name_their_file(tmp_path):
    directory = save_small_checkpoint(tmp_path)
    Temperatures((1.0, 2.0)).save(directory / STS_FILE)
    with pytest.raises(ConfigError) as caught:
        build_engine(directory, EngineConfig(max_model_len=64, schedule="fixed"))
    assert str(caught.value).startswith(f"{directory / STS_FILE}: 2 temperatures: expected at least gamma=5")


def test_temperatures_that_are_given_stand_in_for_a_broken_file(tmp_path):
    directory = save_small_checkpoint(tmp_path)
    (directory / STS_FILE).write_text("{")
    config = EngineConfig(max_model_len=64, schedule="fixed")
    engine = build_engine(directory, config, temperatures=Temperatures((2.0,) * GAMMA))
    assert engine.planner.calibration.temperatures.tolist() == [2.0] * GAMMA
