"""Refit the confidence head of a checkpoint on the outcomes of its drafts.

    python -m dspark_ray.training.confidence --model deployments/tiny

Training the drafter fits the head to the overlap of drafter and target distributions. Coupled verification accepts a
draft less often, so the head is fitted again to outcomes. Drafts and their acceptance do not change.

Prompts come from the corpus's train split. Recorded rounds are kept in parts, and the same command resumes where it
stopped. Letters: N rounds, G gamma, K inputs of the head, M drafts with a known outcome.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from dspark_ray.checkpoint.layout import local_name
from dspark_ray.checkpoint.reader import Checkpoint, CheckpointError, StoredTensor
from dspark_ray.config import ConfigError, EngineConfig
from dspark_ray.drafters.heads import ConfidenceHead
from dspark_ray.engine.offline import TokenIds, serve
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import build_engine
from dspark_ray.speculative.calibration import Temperatures, survival_errors
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.training.corpus import KINDS, training_prompts
from dspark_ray.types import SamplingParams

RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Strengths of the ridge, tried from strong to weak without --l2."""

_HEAD = "confidence_head.proj.weight"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PROMPTS_PER_PART = 16
"""Prompts of each kind in a part; half of them are continued greedily, half sampled."""
_MAX_TOKENS = 96
_HELD_BACK = 5
"""Every fifth part is held back from the fit. Parts have no prompt in common."""


# Recording.


@dataclass(frozen=True)
class HeadRounds:
    """Inputs of the head in each round, and the outcomes of the drafts."""

    inputs: np.ndarray
    """[N, G, K] float32: hidden state and Markov embedding of the previous token."""
    verified: np.ndarray
    """[N]"""
    accepted: np.ndarray
    """[N]"""

    @staticmethod
    def joined(parts: list[HeadRounds]) -> HeadRounds:
        """All rounds of all parts, at least one."""
        return HeadRounds(
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.verified for part in parts]),
            np.concatenate([part.accepted for part in parts]),
        )

    def outcomes(self) -> tuple[Tensor, Tensor]:
        """Inputs [M, K] and outcomes [M], float64, of verified drafts whose predecessors were all accepted."""
        positions = np.arange(self.inputs.shape[1])
        reached = (positions < self.verified[:, None]) & (positions <= self.accepted[:, None])  # [N, G]
        stood = positions < self.accepted[:, None]
        return torch.from_numpy(self.inputs[reached]).double(), torch.from_numpy(stood[reached]).double()


class HeadRecorder:
    """Records inputs of a confidence head, and the outcomes of the same drafts as the planner reports them."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._inputs: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._rounds: list[HeadRounds] = []

    def record_head(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook; the head runs once per block, or once per position of a block."""
        if not isinstance(module, ConfidenceHead):
            return
        joined = torch.cat([part.float() for part in inputs], dim=-1)
        if joined.dim() == 3:  # [R, G, K]
            self._inputs, self._logits = list(joined.unbind(1)), list(output.unbind(1))
            return
        if len(self._inputs) == self._gamma:
            self._inputs, self._logits = [], []
        self._inputs.append(joined)
        self._logits.append(output)

    def __call__(self, confidences: np.ndarray, verified: np.ndarray, accepted: np.ndarray) -> None:
        """A listener of a planner. Skips rounds in which a request ended between drafting and verification."""
        drafted = torch.sigmoid(torch.stack(self._logits, 1)).cpu().numpy()
        if len(drafted) != len(confidences):
            return
        assert np.array_equal(drafted, confidences), "the planner reports another block than the head's latest"
        inputs = torch.stack(self._inputs, 1).cpu().numpy()
        self._rounds.append(HeadRounds(inputs, verified.copy(), accepted.copy()))

    def rounds(self) -> HeadRounds:
        """All rounds recorded so far."""
        return HeadRounds.joined(self._rounds)


@contextmanager
def recording(engine: Engine) -> Iterator[HeadRecorder]:
    """Record every round of `engine`, whose drafter must be in this process."""
    recorder = HeadRecorder(engine.gamma)
    handle = register_module_forward_hook(recorder.record_head)
    engine.planner.listener = recorder
    try:
        yield recorder
    finally:
        engine.planner.listener = None
        handle.remove()


def record_part(engine: Engine, prompts: list[TokenIds], seed: int) -> HeadRounds:
    """The rounds of `prompts`, every second one greedy and the others at temperature 1."""
    with recording(engine) as recorder:
        for temperature in (0, 1):
            sampling = SamplingParams(temperature=temperature, max_tokens=_MAX_TOKENS, seed=seed)
            serve(engine, prompts[temperature::2], [sampling])
    return recorder.rounds()


def record(engine: Engine, prompts: Iterator[list[TokenIds]], folder: Path, num_rounds: int) -> list[HeadRounds]:
    """Parts with `num_rounds` in total, enough of them to hold one back.

    Parts in `folder` are read; the others are recorded and saved there. Raises ConfigError if prompts run out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[HeadRounds] = []
    count = 0
    for number, part_prompts in enumerate(prompts):
        file = folder / f"part-{number:04d}.npz"
        if not file.exists():
            _save(record_part(engine, part_prompts, seed=number * len(part_prompts)), file)
        parts.append(_load(file))
        count += len(parts[-1].verified)
        print(f"confidence: {count} of {num_rounds} rounds", flush=True)
        if count >= num_rounds and len(parts) >= _HELD_BACK:
            return parts
    raise ConfigError(f"rounds={num_rounds}: the corpus has prompts for {count}")


def _save(rounds: HeadRounds, file: Path) -> None:
    """Write a partial file, then rename it, so that an interruption leaves no incomplete part."""
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, inputs=rounds.inputs, verified=rounds.verified, accepted=rounds.accepted)
    partial.replace(file)


def _load(file: Path) -> HeadRounds:
    with np.load(file) as arrays:
        return HeadRounds(arrays["inputs"], arrays["verified"], arrays["accepted"])


def _prompts_by_part(tokenizer: Tokenizer, seed: int) -> Iterator[list[TokenIds]]:
    """Prompts of every kind for each part, until a kind has no more."""
    sources = [training_prompts(kind, seed) for kind in KINDS]
    while True:
        chosen = [list(islice(source, _PROMPTS_PER_PART)) for source in sources]
        if any(len(prompts) < _PROMPTS_PER_PART for prompts in chosen):
            return
        yield [(tokenizer.bos_token_id, *tokenizer.encode(prompt)) for prompts in chosen for prompt in prompts]


# Fitting.


def fit_weights(inputs: Tensor, stood: Tensor, start: Tensor, ridge: float, centre: Tensor) -> Tensor:
    """Newton's method on  sum log loss + ridge/2 |w - centre|^2  for inputs [M, K], outcomes [M], weights [K]."""

    def objective(weights: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(inputs @ weights, stood, reduction="sum")
        return loss + 0.5 * ridge * (weights - centre).square().sum()

    weights, value = start, objective(start)
    for _ in range(50):
        predicted = torch.sigmoid(inputs @ weights)
        gradient = inputs.T @ (predicted - stood) + ridge * (weights - centre)
        curvature = inputs.T @ (inputs * (predicted * (1 - predicted)).unsqueeze(1))
        curvature += ridge * torch.eye(len(weights), dtype=weights.dtype)
        step = torch.linalg.solve(curvature, gradient)
        # Far from the minimum a full step may overshoot.
        while (found := objective(weights - step)) > value and step.abs().max() > 1e-12:
            step = step / 2
        if value - found <= 1e-9 * value:
            break
        weights, value = weights - step, found
    return weights


def log_loss(inputs: Tensor, stood: Tensor, weights: Tensor) -> float:
    """Mean over drafts, in nats."""
    return F.binary_cross_entropy_with_logits(inputs @ weights, stood).item()


def choose_weights(
    fitted_on: HeadRounds, held_back: HeadRounds, current: Tensor, ridges: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """The fit with the smallest loss on held-back rounds, after rounding to `dtype`.

    The ridge pulls towards the current weights or towards zero.
    """
    seen, unseen = fitted_on.outcomes(), held_back.outcomes()
    best, lowest = current, log_loss(*unseen, current)
    for name, centre in (("current", current), ("zero", torch.zeros_like(current))):
        weights = current
        for ridge in sorted(ridges, reverse=True):
            weights = fit_weights(*seen, weights, ridge, centre)
            rounded = weights.to(dtype).double()
            loss = log_loss(*unseen, rounded)
            print(f"confidence: l2 {ridge:g} towards {name}: loss {loss:.5f} on held-back prompts", flush=True)
            if loss < lowest:
                best, lowest = rounded, loss
    return best


def calibration_error(rounds: HeadRounds, weights: Tensor) -> float:
    """Calibration error of survival, averaged over positions."""
    gamma = rounds.inputs.shape[1]
    confidences = torch.sigmoid(torch.from_numpy(rounds.inputs).double() @ weights).numpy()
    return float(np.mean(survival_errors(confidences, rounds.verified, rounds.accepted, np.ones(gamma))))


# The tensor in its file.


@dataclass(frozen=True)
class StoredHead:
    """Location of a checkpoint's confidence head: bytes start .. stop - 1 of a file."""

    file: Path
    start: int
    stop: int
    dtype: torch.dtype

    @staticmethod
    def find(directory: Path) -> StoredHead:
        """Raises CheckpointError for a checkpoint without a confidence head, or with a quantised one."""
        tensors = Checkpoint.open(directory).tensors
        found = [tensor for name, tensor in tensors.items() if local_name(name) == _HEAD]
        if not found:
            raise CheckpointError(f"{directory}: expected a tensor mtp.N.{_HEAD}, found none")
        tensor = found[0]
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{tensor.file}: {tensor.stored_name}: expected {', '.join(_DTYPES)}, found {tensor.dtype}"
            )
        return StoredHead(tensor.file, *_span(tensor), _DTYPES[tensor.dtype])

    def read(self) -> Tensor:
        """The weights [K] in float64."""
        stored = self.file.read_bytes()[self.start : self.stop]
        return torch.frombuffer(bytearray(stored), dtype=self.dtype).double()

    def write(self, weights: Tensor) -> None:
        """Write weights [K] to the file and change no other byte."""
        stored = weights.to(self.dtype)
        assert torch.equal(stored.double(), weights), "weights must be rounded to the stored dtype first"
        values = stored.view(torch.uint8).numpy().tobytes()
        assert len(values) == self.stop - self.start
        content = self.file.read_bytes()
        partial = self.file.with_suffix(".partial")
        partial.write_bytes(content[: self.start] + values + content[self.stop :])
        partial.replace(self.file)

    def fingerprint(self) -> str:
        """Digest of all weights except the head's."""
        digest = hashlib.sha256()
        for file in sorted(self.file.parent.glob("*.safetensors")):
            content = file.read_bytes()
            digest.update(content[: self.start] + content[self.stop :] if file == self.file else content)
        return digest.hexdigest()[:16]


def _span(tensor: StoredTensor) -> tuple[int, int]:
    """Byte range of a tensor in its file: data offsets count from the end of the header."""
    with tensor.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[tensor.stored_name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


# The command.


def refit(parts: list[HeadRounds], current: Tensor, ridges: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """New weights, rounded as stored; prints losses before and after on held-back parts."""
    fitted_on = HeadRounds.joined([part for number, part in enumerate(parts) if (number + 1) % _HELD_BACK])
    held_back = HeadRounds.joined(parts[_HELD_BACK - 1 :: _HELD_BACK])
    weights = choose_weights(fitted_on, held_back, current, ridges, dtype)
    outcomes = held_back.outcomes()
    for name, which in (("before", current), ("after", weights)):
        print(
            f"confidence: {name}: loss {log_loss(*outcomes, which):.5f}, "
            f"ECE of survival {calibration_error(held_back, which):.2%} on held-back prompts"
        )
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("deployments/tiny"))
    parser.add_argument("--output", type=Path, help="folder for the refitted checkpoint (default: the model's folder)")
    parser.add_argument("--rounds", type=int, default=40_000, help="rounds to record (default: %(default)s)")
    parser.add_argument("--l2", type=float, help="strength of the ridge (default: chosen on held-back prompts)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of prompts")
    parser.add_argument("--data", type=Path, default=Path(".build/confidence"), help="folder of recorded rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = StoredHead.find(arguments.model)
    config = EngineConfig(
        max_num_seqs=32, max_model_len=1024, max_waiting=1000, schedule="fixed", bypass=False, calibrate_online=False
    )
    gamma = Checkpoint.open(arguments.model).config.gamma
    engine = build_engine(arguments.model, config, temperatures=Temperatures.identity(gamma))
    prompts = _prompts_by_part(Tokenizer.from_directory(arguments.model), arguments.seed)
    folder = arguments.data / f"{head.fingerprint()}-{arguments.seed}"
    parts = record(engine, prompts, folder, arguments.rounds)
    engine.close()
    ridges = RIDGES if arguments.l2 is None else (arguments.l2,)
    weights = refit(parts, head.read(), ridges, head.dtype)
    output = arguments.output or arguments.model
    if output.resolve() != arguments.model.resolve():
        shutil.copytree(arguments.model, output, dirs_exist_ok=True)
    StoredHead.find(output).write(weights)
    print(f"confidence: wrote {output}")


if __name__ == "__main__":
    main()
