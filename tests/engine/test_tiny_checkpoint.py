"""The trained checkpoint that is packaged: what it promises, on text it has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import deployments
from deployments.console.cli import main
from dspark_ray.checkpoint.inspect import describe
from dspark_ray.config import EngineConfig, ModelConfig
from dspark_ray.evaluation.accepted_length import held_out_token_ids, measure
from dspark_ray.evaluation.calibrate import collect, report
from dspark_ray.ranks.gang import STS_FILE, build_engine
from dspark_ray.speculative.calibration import Temperatures
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import SamplingParams

TINY = Path(deployments.__file__).parent / "tiny"


@pytest.fixture(scope="module", autouse=True)
def one_profile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The command line profiles once for all tests, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_it_has_every_kind_of_layer_and_a_whole_drafter():
    config = ModelConfig.from_file(TINY)
    assert {config.attention_kind(layer) for layer in range(config.num_hidden_layers)} == {"sliding", "csa", "hca"}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    description = describe(TINY)
    assert description.problems == ()
    assert description.drafter is not None
    assert description.drafter.confidence_head
    assert description.drafter.stages in (2, 3)


def test_it_fits_into_24_megabytes():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 24e6


@pytest.mark.parametrize(("temperature", "least"), [(0.0, 2.0), (1.0, 1.6)])
def test_several_drafted_tokens_stand_on_held_out_prompts(temperature, least):
    # A small sample: the figures to quote are the evaluation's, over many prompts.
    engine = build_engine(TINY, EngineConfig(max_num_seqs=16, schedule="fixed"))
    prompts = [p for per_kind in held_out_token_ids(Tokenizer.from_directory(TINY), 3).values() for p in per_kind]
    length = measure(engine, prompts, SamplingParams(temperature=temperature, max_tokens=48))
    assert length.num_rounds > 100
    assert length.mean > least


def test_its_temperatures_make_confidences_mean_something():
    temperatures = Temperatures.load(TINY / STS_FILE)
    assert len(temperatures.temperatures) == ModelConfig.from_file(TINY).gamma
    engine = build_engine(TINY, EngineConfig(max_num_seqs=16, schedule="fixed", bypass=False, calibrate_online=False))
    held_out = held_out_token_ids(Tokenizer.from_directory(TINY), 8)
    prompts = [tuple(prompt) for per_kind in held_out.values() for prompt in per_kind]
    rounds = collect(engine, prompts, [SamplingParams(temperature=t, max_tokens=48) for t in (0.0, 1.0)])
    errors = [found.ece_after for found in report(temperatures, rounds)]
    # A thousand rounds are off by 3 % by chance alone. Confidences that mean nothing would be off by 20 % and more.
    assert sum(errors) / len(errors) < 0.08


@pytest.mark.parametrize("options", [[], ["--temperature", "0.9", "--seed", "4", "--top-p", "0.95"]])
def test_the_command_line_says_the_same_with_and_without_speculation(options, capsys):
    texts = []
    for speculation in ([], ["--no-speculation"]):
        prompt = "def area(width, height):\n"
        arguments = ["generate", prompt, "--model", str(TINY), "--max-tokens", "60"]
        assert main([*arguments, *options, *speculation]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert "tokens/s; accepted length" in captured.err
    assert texts[0] == texts[1] != "\n"


def test_the_command_line_stops_at_a_stop_string(capsys):
    options = ["--stop", "\n", "--max-tokens", "40"]
    main(["generate", "1 + 1 = 2\n2 + 2 = ", "--model", str(TINY), *options])
    assert capsys.readouterr().out.count("\n") == 1


def test_the_command_line_explains_its_steps(capsys):
    main(["generate", "1 + 1 = 2\n", "--model", str(TINY), "--max-tokens", "30", "--explain"])
    captured = capsys.readouterr()
    assert "expected to be accepted" not in captured.out
    table = captured.err[captured.err.index("step  decoding  drafted") :].splitlines()
    steps = table[1 : table.index("")]
    assert len(steps) > 3
    assert [int(line.split()[0]) for line in steps] == list(range(len(steps)))
    assert "expected to be accepted" in table[-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "no/such/folder"], "no/such/folder"),
        (["generate", "x", "--model", str(TINY), "--gamma", "9"], "gamma=9: expected 0..5"),
        (["generate", "x", "--model", str(TINY), "--temperature", "-1"], "temperature=-1.0"),
        (["inspect", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_on_the_command_line_is_one_line_that_names_it(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
