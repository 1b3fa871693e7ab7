"""`dspark-ray` in a shell: one line for bad input, no output for a closed pipe and for Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.console.cli import main
from dspark_ray.ranks.device import check_device

ROOT = Path(__file__).parents[2]
TINY = ROOT / "deployments" / "tiny"
WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "deployments.console.cli"]


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, cwd=ROOT, text=True, **pipes)


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line on stderr with which the command ends."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# --- the shell ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["top", "explain"])
def test_commands_that_talk_to_a_server_import_no_heavy_package(command: str) -> None:
    program = (
        "import sys; from deployments.console.cli import main\n"
        f"main([{command!r}, '--url', 'http://127.0.0.1:9'])\n"
        "print([name for name in ('torch', 'numpy', 'tokenizers', 'ray', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    assert "Connection refused" in done.stderr


def test_a_configuration_is_read_without_torch() -> None:
    program = (
        f"import sys; from dspark_ray.config import ModelConfig; ModelConfig.from_file({str(TINY)!r})\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    "arguments", [["generate", "1 + 1 = 2\n", "--no-speculation"], ["inspect", "deployments/tiny"]]
)
def test_a_reader_that_has_gone_ends_the_program_in_silence(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(*arguments, stdout=write)
    os.close(write)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGPIPE
    assert "Error" not in error
    assert "Traceback" not in error


def test_ctrl_c_ends_the_program_in_silence() -> None:
    process = start("generate", "1 + 1 = 2\n2 + 2 = ", "--max-tokens", "1900", "--no-cost-cache", "--no-speculation")
    assert process.stdout is not None
    assert process.stdout.read(1)  # It generates.
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "KeyboardInterrupt" not in error


def test_a_terminal_without_unicode_is_no_reason_to_end() -> None:
    ascii_only = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    arguments = [*COMMAND, "generate", "caf\u00e9 \u2192 ", "--max-tokens", "1", "--no-speculation", "--stop", "\u2192"]
    done = subprocess.run(arguments, env=ascii_only, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*COMMAND, "inspect", "caf\u00e9"], env=ascii_only, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "1000000000", "two"])
@pytest.mark.parametrize("command", [["generate", "x"], ["calibrate"]])
def test_a_number_of_threads_has_a_range(capsys: pytest.CaptureFixture[str], command: list[str], value: str) -> None:
    assert f"--threads: '{value}': expected a whole number from 1 to 1024" in said(
        capsys, [*command, "--threads", value]
    )


@pytest.mark.parametrize("option", ["--temperature", "--top-p", "--confidence-threshold"])
@pytest.mark.parametrize("value", ["nan", "inf", "x"])
def test_a_number_is_finite(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert f"{option}: '{value}': expected a finite number" in said(capsys, ["generate", "x", option, value])


@pytest.mark.parametrize("value", ["inf", "nan", "0", "1e9"])
def test_an_interval_has_a_range(capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert f"--interval: '{value}': expected a positive number of seconds" in said(capsys, ["top", "--interval", value])


def test_an_unknown_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --tempo" in said(capsys, ["generate", "x", "--tempo", "3"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", [["generate", "x"], ["calibrate", "--count", "2"]])
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], command: list[str], device: str, tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "sts.json")] if command[0] == "calibrate" else []
    error = said(capsys, [*command, "--model", str(TINY), "--device", device, *output])
    assert f"device='{device}': torch {torch.__version__} finds no GPU here" in error


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", ""])
def test_a_device_that_torch_or_this_package_does_not_know_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=r"expected cpu, cuda or cuda:N"):
        check_device(device)


def test_a_device_beyond_the_last_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(ValueError, match=r"device='cuda:2': expected cuda:0 to cuda:1"):
        check_device("cuda:2")


# --- broken checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, which tests damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(change(raw)))


def with_key(key: str, value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda raw: {**raw, key: value}


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors header without moving the tensors."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


BOTH = pytest.mark.parametrize("command", [["inspect"], ["generate", "x", "--no-cost-cache", "--model"]])


@BOTH
@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        (None, "weight_map=null: expected file names by the names of tensors"),
        ([1], "weight_map=[1]: expected file names"),
        ({"norm.weight": None}, "weight_map.norm.weight=null: expected the name of a file beside it"),
        ({"norm.weight": 3}, "weight_map.norm.weight=3: expected the name of a file"),
        ({"norm.weight": "../other/a.safetensors"}, "expected the name of a file beside it"),
    ],
)
def test_an_index_names_a_file_for_every_tensor(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], command: list[str], weight_map: object, expected: str
) -> None:
    edit_json(checkpoint / INDEX, with_key("weight_map", weight_map))
    error = said(capsys, [*command, str(checkpoint)])
    assert f"{checkpoint / INDEX}: " in error
    assert expected in error


@BOTH
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[1, 2]", "expected an object with the keys of DeepSeek-V4, found [1, 2]"),
        (b"null", "found null"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_configuration_is_an_object(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], command: list[str], content: bytes, expected: str
) -> None:
    (checkpoint / "config.json").write_bytes(content)
    error = said(capsys, [*command, str(checkpoint)])
    assert f"{checkpoint / 'config.json'}: " in error
    assert expected in error


@BOTH
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_hidden_layers", "8", 'num_hidden_layers="8": expected a whole number, 1 or more'),
        ("num_hidden_layers", 8.0, "num_hidden_layers=8.0: expected a whole number"),
        ("num_hidden_layers", None, "num_hidden_layers=null"),
        ("num_hidden_layers", 2**40, f"num_hidden_layers={2**40}"),
        ("o_groups", 0, "o_groups=0: expected a whole number, 1 or more"),
        ("o_groups", 3, "o_groups=3: expected a divisor of num_attention_heads=4"),
        ("hidden_size", True, "hidden_size=true"),
        ("vocab_size", -1, "vocab_size=-1"),
        ("compress_ratios", 4, "compress_ratios=4: expected a list of whole numbers"),
        ("compress_ratios", [0, "4"], 'compress_ratios=[0, "4"]'),
        ("rms_norm_eps", "1e-6", 'rms_norm_eps="1e-6": expected a finite number above 0'),
        ("rope_scaling", [], "rope_scaling=[]: expected an object, or null"),
        ("rope_scaling", {"factor": "4"}, 'rope_scaling.factor="4": expected a finite number above 0'),
        ("rope_scaling", {"factor": 4}, "original_max_position_embeddings' is missing"),
        ("qk_rope_head_dim", 128, "qk_rope_head_dim=128: expected an even number, at most head_dim=64"),
        ("eos_token_id", "1", 'eos_token_id="1": expected a token id, or a list of them'),
        ("eos_token_id", [], "eos_token_id=[]"),
        ("eos_token_id", [1, 4096], "eos_token_id=[1, 4096]: expected ids below vocab_size"),
        ("dspark_target_layer_ids", [], "dspark_target_layer_ids=[]: expected a list of layers, at least one"),
        ("dspark_block_size", 0, "dspark_block_size=0"),
        ("dspark_noise_token_id", 5000, "dspark_noise_token_id=5000: expected an id below vocab_size"),
        ("dspark_markov_head_type", "other", "expected one of vanilla, gated, rnn"),
        ("model_type", ["deepseek_v4"], "expected 'deepseek_v4'"),
    ],
)
def test_a_value_of_the_configuration_is_named(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    key: str,
    value: object,
    expected: str,
) -> None:
    edit_json(checkpoint / "config.json", with_key(key, value))
    error = said(capsys, [*command, str(checkpoint)])
    assert str(checkpoint / "config.json") in error
    assert expected in error


@BOTH
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data_offsets", [0, 8], "expected a start at"),
        ("data_offsets", [8, 0], "data_offsets=[8, 0]: expected [start, stop] in bytes"),
        ("data_offsets", None, "data_offsets=null"),
        ("shape", ["3"], 'shape=["3"]: expected a list of whole numbers'),
        ("shape", [3], "which BF16 of shape [3] takes"),
        ("dtype", 7, "dtype=7: expected a name such as BF16"),
    ],
)
def test_an_entry_of_a_header_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], command: list[str], key: str, value: object, expected: str
) -> None:
    def change(header: dict[str, Any]) -> None:
        header["norm.weight"][key] = value
        if value == [0, 8]:  # A shape that fits, so that only the place is wrong: over another tensor.
            header["norm.weight"]["shape"] = [4]

    edit_header(checkpoint / WEIGHTS, change)
    error = said(capsys, [*command, str(checkpoint)])
    assert f"{checkpoint / WEIGHTS}: " in error
    assert expected in error


@BOTH
def test_a_header_is_an_object(checkpoint: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"null")
    assert "expected a safetensors header, found null" in said(capsys, [*command, str(checkpoint)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.2.attn.wkv.weight"][3, 5] = value

    edit_weights(checkpoint / WEIGHTS, change)
    expected = f"{WEIGHTS}: layers.2.attn.wkv.weight: expected finite numbers, found {value} at [3, 5]"
    assert main(["inspect", str(checkpoint)]) == 2
    assert expected in capsys.readouterr().out
    assert main(["inspect", "--headers-only", str(checkpoint)]) == 0
    assert "no weights were read" in capsys.readouterr().out
    assert expected in said(capsys, ["generate", "x", "--no-cost-cache", "--model", str(checkpoint)])


def test_a_missing_tensor_is_an_exit_code_too(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / INDEX).unlink()
    edit_weights(checkpoint / WEIGHTS, lambda tensors: tensors.pop("norm.weight"))
    assert main(["inspect", str(checkpoint)]) == 2
    assert "norm.weight: expected shape [256], found no such tensor" in capsys.readouterr().out


def test_each_of_several_end_tokens_ends_the_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "1 + 1 = 2\n2 + 2 = ",
        "--no-speculation",
        "--max-tokens",
        "24",
        "--model",
        str(checkpoint),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    newline = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]["Ċ"]
    assert "\n" in text
    edit_json(checkpoint / "config.json", with_key("eos_token_id", [1, newline]))
    assert main(arguments) == 0
    assert capsys.readouterr().out == text.partition("\n")[0] + "\n"
