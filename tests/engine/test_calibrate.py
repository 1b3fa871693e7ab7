"""The command that fits temperatures: what it records, what it writes, and what it says about bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small_model import build_small_engine

import deployments
from deployments.console.cli import main
from dspark_ray.config import ConfigError
from dspark_ray.evaluation import calibrate
from dspark_ray.evaluation.calibrate import Rounds, collect, prompts_from_file, report, split_prompts, table
from dspark_ray.speculative.calibration import Temperatures
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import SamplingParams

TINY = Path(deployments.__file__).parent / "tiny"
GAMMA = 5


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    """Four prompts, one of them a conversation."""
    prompts = [{"prompt": f"def function_{number}(" + "argument, " * number} for number in range(3)]
    conversation = {"messages": [{"role": "user", "content": "What is 3 + 4?"}]}
    path = tmp_path / "traffic.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*prompts, conversation]) + "\n\n")
    return path


def calibrate_on(traffic: Path, output: Path, *options: str) -> int:
    """Run the command on a few tokens."""
    few = ["--prompts", str(traffic), "--max-tokens", "12", "--temperature", "1"]
    return main(["calibrate", "--model", str(TINY), "--output", str(output), *few, *options])


# Recording.


def test_every_round_is_recorded_with_all_its_drafts_verified():
    engine = build_small_engine(schedule="fixed", bypass=False)
    rounds = collect(engine, [(1, 2, 3), (4, 5, 6, 7)], [SamplingParams(max_tokens=30, ignore_eos=True)])
    assert engine.planner.listener is None
    assert rounds.confidences.shape == (len(rounds.admitted), GAMMA)
    assert ((rounds.confidences > 0) & (rounds.confidences < 1)).all()
    assert (rounds.accepted <= rounds.admitted).all()
    # Only at the end of a text is there no use for all of them.
    assert np.sum(rounds.admitted < GAMMA) <= 2 * GAMMA
    # Each prompt's first token comes from its prompt, the others from rounds.
    assert 0 <= 2 * 29 - np.sum(rounds.accepted + 1) <= 2


def test_another_sampling_runs_every_prompt_again_with_other_seeds():
    engine = build_small_engine(schedule="fixed", bypass=False)
    heard = []
    once = collect(engine, [(1, 2, 3)], [SamplingParams(temperature=1, max_tokens=20, ignore_eos=True)])
    twice = collect(
        engine,
        [(1, 2, 3)],
        [SamplingParams(temperature=1, max_tokens=20, ignore_eos=True)] * 2,
        lambda done, total: heard.append((done, total)),
    )
    assert len(twice.admitted) > len(once.admitted)
    assert heard[-1] == (2, 2)


def test_a_report_knows_each_position_by_the_rounds_that_verified_it():
    rounds = Rounds(np.full((4, 2), 0.5), np.array([2, 2, 2, 1]), np.array([2, 1, 0, 0]))
    first, second = report(Temperatures((1.0, 2.0)), rounds)
    assert (first.count, second.count) == (4, 3)
    assert first.ece_before == pytest.approx(0)  # half of four stood
    assert second.ece_after == pytest.approx(1 / 3 - 1 / 4)  # one of three, and 0.5 at any temperature
    assert second.area_under_curve == pytest.approx(0.5)
    assert "mean" in table([first, second]).splitlines()[-1]


# Prompts.


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_no_prompt_is_both_fitted_on_and_reported_on(share):
    groups = [[(number,) for number in range(10)] * 2, [(100 + number,) for number in range(3)]]
    split = split_prompts(groups, share, seed=3)
    assert not set(split.fitted_on) & set(split.reported_on)
    assert set(split.fitted_on) | set(split.reported_on) == {prompt for group in groups for prompt in group}
    for part in (split.fitted_on, split.reported_on):
        assert {prompt[0] >= 100 for prompt in part} == {False, True}, "each kind is in both parts"
    assert split == split_prompts(groups, share, seed=3)


def test_a_file_of_prompts_gives_texts_and_conversations(traffic):
    tokenizer = Tokenizer.from_directory(TINY)
    prompts = prompts_from_file(traffic, tokenizer)
    assert len(prompts) == 4
    assert {prompt[0] for prompt in prompts} == {tokenizer.bos_token_id}
    assert tokenizer.decode(prompts[0]) == "def function_0("
    assert "3 + 4" in tokenizer.decode(prompts[3])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[]", 'line 2: []: expected {"prompt": text} or {"messages"'),
        ("{}", "line 2: {}: expected"),
        ('{"prompt": "a", "messages": []}', "line 2: "),
        ('{"prompt": 3}', "line 2: prompt=3: expected"),
        ('{"messages": "hello"}', 'line 2: messages="hello": expected'),
        ('{"messages": ["hello"]}', 'line 2: messages=["hello"]: expected'),
        ('{"messages": [{"role": "nobody", "content": "x"}]}', "line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "traffic.jsonl"
    path.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(ConfigError) as caught:
        prompts_from_file(path, Tokenizer.from_directory(TINY))
    assert str(caught.value).startswith(f"{path} ")
    assert message in str(caught.value)


# The command.


def test_the_command_writes_temperatures_that_the_engine_can_load(traffic, tmp_path, capsys, monkeypatch):
    ran: list[set[tuple[int, ...]]] = []

    def remembering(engine, prompts, *rest):
        ran.append(set(prompts))
        return collect(engine, prompts, *rest)

    monkeypatch.setattr(calibrate, "collect", remembering)
    output = tmp_path / "sts.json"
    assert calibrate_on(traffic, output) == 0
    fitted_on, reported_on = ran
    assert len(fitted_on) == len(reported_on) == 2
    assert not fitted_on & reported_on
    content = json.loads(output.read_text())
    assert set(content) == {"temperatures", "dataset", "num_samples", "ece_before", "ece_after"}
    assert len(content["temperatures"]) == len(content["ece_before"]) == len(content["ece_after"]) == GAMMA
    assert content["num_samples"] > 0
    assert content["dataset"] == "traffic.jsonl; temperature 1; coupled verification; seed 0"
    assert Temperatures.load(output).for_gamma(GAMMA).num_samples == content["num_samples"]
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "3", "4", "5"]
    assert lines[6].split()[0] == "mean"
    assert str(output) in lines[7]
    assert "calibrate: report: 2 of 2 texts" in captured.err


def test_the_command_draws_a_picture(traffic, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "reliability.png"
    assert calibrate_on(traffic, tmp_path / "sts.json", "--picture", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_temperatures_are_still_written(traffic, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = tmp_path / "reliability.png"
    assert calibrate_on(traffic, tmp_path / "sts.json", "--picture", str(picture)) == 0
    assert (tmp_path / "sts.json").exists()
    assert not picture.exists()
    assert "pip install 'dspark-ray[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--count", "1"], "count=1: expected at least 2"),
        (["--count", "600"], "count=600: only"),
        (["--held-out-share", "1"], "held_out_share=1.0: expected a number between 0 and 1"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--output", "no/such/folder/sts.json"], "no/such/folder/sts.json: cannot be written"),
        (["--picture", "no/such/folder/picture.png"], "no/such/folder/picture.png: cannot be written"),
        (["--prompts", "no/such/file.jsonl"], "no/such/file.jsonl: No such file"),
        (["--max-tokens", "1"], "max_tokens=1: no draft was verified"),
    ],
)
def test_bad_input_is_one_line_that_names_it(options, message, tmp_path, capsys):
    usual = ["--model", str(TINY), "--count", "2", "--output", str(tmp_path / "sts.json")]
    assert main(["calibrate", *usual, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "sts.json").exists()


def test_one_prompt_alone_cannot_be_split(tmp_path, capsys):
    path = tmp_path / "traffic.jsonl"
    path.write_text('{"prompt": "the same"}\n' * 3)
    assert calibrate_on(path, tmp_path / "sts.json") == 2
    assert f"{path}: 1 different prompts: expected at least 2" in capsys.readouterr().err


def test_prompts_that_are_too_long_are_left_out_and_counted(traffic, tmp_path, capsys):
    with traffic.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 3000}) + "\n")
    assert calibrate_on(traffic, tmp_path / "sts.json") == 0
    assert "left out 1 prompts of 2048 tokens or more" in capsys.readouterr().err
