"""Refit the confidence head of a checkpoint on what became of its drafts.

    python -m dspark_ray.training.confidence --model deployments/tiny

Training the drafter teaches the head how much drafter and target agree. Under coupled verification a draft stands
less often than that, so the head is fitted once more, on outcomes. Drafts and what stands of them stay as they were.

Prompts come from the corpus's train split. Recorded rounds are kept in parts, and the same command goes on where it
stopped. Letters: N rounds, G gamma, K inputs of the head, M judged drafts.
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
"""Tried from strong to weak where no --l2 is given."""

_HEAD = "confidence_head.proj.weight"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PROMPTS_PER_PART = 16
"""Of each kind; half of them are continued greedily, half sampled."""
_MAX_TOKENS = 96
_HELD_BACK = 5
"""Every fifth part is not fitted on. Parts have no prompt in common."""


# Recording.


@dataclass(frozen=True)
class HeadRounds:
    """What the head saw in each round, and what became of the drafts."""

    inputs: np.ndarray
    """[N, G, K] float32: hidden state and Markov embedding of the token before."""
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

    def judged(self) -> tuple[Tensor, Tensor]:
        """Inputs [M, K] and outcomes [M], both float64, of drafts that were verified and before which all stood."""
        positions = np.arange(self.inputs.shape[1])
        reached = (positions < self.verified[:, None]) & (positions <= self.accepted[:, None])  # [N, G]
        stood = positions < self.accepted[:, None]
        return torch.from_numpy(self.inputs[reached]).double(), torch.from_numpy(stood[reached]).double()


class HeadRecorder:
    """Hears the inputs of a confidence head, then from a planner what became of the drafts they belong to."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._inputs: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._rounds: list[HeadRounds] = []

    def hear_head(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook; the head runs once per block, or once per position of it."""
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
        """A listener of a planner. Rounds count only where nobody left between drafting and verifying."""
        drafted = torch.sigmoid(torch.stack(self._logits, 1)).cpu().numpy()
        if len(drafted) != len(confidences):
            return
        assert np.array_equal(drafted, confidences), "the planner spoke of another block than the head's latest"
        inputs = torch.stack(self._inputs, 1).cpu().numpy()
        self._rounds.append(HeadRounds(inputs, verified.copy(), accepted.copy()))

    def rounds(self) -> HeadRounds:
        """All that was heard so far."""
        return HeadRounds.joined(self._rounds)


@contextmanager
def recording(engine: Engine) -> Iterator[HeadRecorder]:
    """Record every round of `engine`, whose drafter must be in this process."""
    recorder = HeadRecorder(engine.gamma)
    handle = register_module_forward_hook(recorder.hear_head)
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
    """Parts with `num_rounds` in all, enough of them to hold one back.

    Those that `folder` has are read, the others recorded and kept there.
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
    """Written beside its place, then moved, so that an interruption leaves no half part."""
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
        # Far from the minimum a whole step may overshoot.
        while (found := objective(weights - step)) > value and step.abs().max() > 1e-12:
            step = step / 2
        if value - found <= 1e-9 * value:
            break
        weights, value = weights - step, found
    return weights


def log_loss(inputs: Tensor, stood: Tensor, weights: Tensor) -> float:
    """Mean over judged drafts, in nats."""
    return F.binary_cross_entropy_with_logits(inputs @ weights, stood).item()


def choose_weights(
    fitted_on: HeadRounds, held_back: HeadRounds, current: Tensor, ridges: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """The fit with the smallest loss on rounds it has not seen, after rounding to `dtype`.

    The ridge pulls towards the current weights or towards zero.
    """
    seen, unseen = fitted_on.judged(), held_back.judged()
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
    """Mean over positions of the calibration error of survival."""
    gamma = rounds.inputs.shape[1]
    confidences = torch.sigmoid(torch.from_numpy(rounds.inputs).double() @ weights).numpy()
    return float(np.mean(survival_errors(confidences, rounds.verified, rounds.accepted, np.ones(gamma))))


# The tensor in its file.


@dataclass(frozen=True)
class StoredHead:
    """Where a checkpoint has the weights of its confidence head: bytes start .. stop of a file."""

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
        """Put weights [K] into the file, no other byte of which changes."""
        stored = weights.to(self.dtype)
        assert torch.equal(stored.double(), weights), "weights are rounded before they are judged"
        values = stored.view(torch.uint8).numpy().tobytes()
        assert len(values) == self.stop - self.start
        content = self.file.read_bytes()
        partial = self.file.with_suffix(".partial")
        partial.write_bytes(content[: self.start] + values + content[self.stop :])
        partial.replace(self.file)

    def fingerprint(self) -> str:
        """Of all weights but the head's."""
        digest = hashlib.sha256()
        for file in sorted(self.file.parent.glob("*.safetensors")):
            content = file.read_bytes()
            digest.update(content[: self.start] + content[self.stop :] if file == self.file else content)
        return digest.hexdigest()[:16]


def _span(tensor: StoredTensor) -> tuple[int, int]:
    """A safetensors file is the length of its header, the header in JSON, and the data that offsets refer to."""
    with tensor.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[tensor.stored_name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


# The command.


def refit(parts: list[HeadRounds], current: Tensor, ridges: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """New weights, as they will be stored; prints what they are worth on parts that were not fitted on."""
    fitted_on = HeadRounds.joined([part for number, part in enumerate(parts) if (number + 1) % _HELD_BACK])
    held_back = HeadRounds.joined(parts[_HELD_BACK - 1 :: _HELD_BACK])
    weights = choose_weights(fitted_on, held_back, current, ridges, dtype)
    judged = held_back.judged()
    for name, which in (("before", current), ("after", weights)):
        print(
            f"confidence: {name}: loss {log_loss(*judged, which):.5f}, "
            f"ECE of survival {calibration_error(held_back, which):.2%} on held-back prompts"
        )
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("deployments/tiny"))
    parser.add_argument("--output", type=Path, help="where the refitted checkpoint goes (default: the model's folder)")
    parser.add_argument("--rounds", type=int, default=40_000, help="rounds to record (default: %(default)s)")
    parser.add_argument("--l2", type=float, help="strength of the ridge (default: what held-back prompts prefer)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--data", type=Path, default=Path(".build/confidence"), help="where recorded rounds are kept")
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
