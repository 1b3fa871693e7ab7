"""Train a checkpoint from nothing: first the target, then the drafter on the frozen target.

    python -m dspark_ray.training.train target  --data DIR --run DIR --minutes 60
    python -m dspark_ray.training.train drafter --data DIR --run DIR --minutes 40
    (python -m dspark_ray.training.regenerate, then drafter again with more minutes: text in the target's own words)
    python -m dspark_ray.training.train export  --data DIR --run DIR --output DIR

Progress goes to the terminal and to `<run>/<phase>.jsonl`; the state is saved every minute, and the same command
goes on where it stopped. The learning rate follows the share of the time budget that is used up.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspark_ray.checkpoint.writer import save_checkpoint
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import DSparkModule, along
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.layers import Gate
from dspark_ray.training.forward import draft_forward, target_forward
from dspark_ray.training.initial import initialise
from dspark_ray.training.loss import draft_loss

_SAVE_SECONDS = 60.0
_BIAS_STEP = 1e-3
"""How far a step moves the router bias of an expert that saw too much or too little."""


@dataclass(frozen=True)
class TrainingConfig:
    """One phase of training."""

    minutes: float = 60.0
    """Time budget; the learning rate follows the share of it that is used up."""
    steps: int | None = None
    """A budget of steps instead, for runs that must not depend on the machine's speed."""
    batch: int = 4
    length: int = 512
    anchors: int = 128
    """Draft blocks per sequence (drafter phase)."""
    learning_rate: float = 2e-3
    final_share: float = 0.03
    """The learning rate at the end, relative to its peak."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


def learning_rate_share(config: TrainingConfig, step: int, progress: float) -> float:
    """Warm up by steps, then fall along a cosine with progress in [0, 1]."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return warm * (config.final_share + (1 - config.final_share) * cosine)


def batches(tokens: np.ndarray, config: TrainingConfig, step: int) -> Iterator[Tensor]:
    """Endless [batch, length] crops; batch `step` is the same however often training was interrupted."""
    while True:
        generator = np.random.default_rng((config.seed, step))
        starts = generator.integers(0, len(tokens) - config.length, config.batch)
        yield torch.from_numpy(np.stack([tokens[s : s + config.length] for s in starts]).astype(np.int64))
        step += 1


def optimizer_for(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-9, fused=True)


class LoadBalancer:
    """Moves router biases against the load (auxiliary-loss-free balancing)."""

    def __init__(self, model: nn.Module) -> None:
        gates = [m for m in model.modules() if isinstance(m, Gate)]
        self._biases = {number: gate.bias for number, gate in enumerate(gates) if gate.bias is not None}
        self._loads: dict[int, Tensor] = {}
        for number, bias in self._biases.items():
            bias.requires_grad_(False)
            gates[number].register_forward_hook(self._record(number))

    def _record(self, number: int) -> Callable[..., None]:
        def hook(gate: Gate, _inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
            self._loads[number] = torch.bincount(output[1].flatten(), minlength=gate.config.n_routed_experts)

        return hook

    def step(self) -> None:
        """Apply the loads of the last forward."""
        for number, load in self._loads.items():
            error = load.float().mean() - load.float()
            self._biases[number].data.add_(error.sign(), alpha=_BIAS_STEP)


class Phase:
    """State, log and clock of one phase; survives interruption."""

    def __init__(self, name: str, run: Path, model: nn.Module, config: TrainingConfig) -> None:
        self.name, self.model, self.config = name, model, config
        self.state_file, self.log_file = run / f"{name}.pt", run / f"{name}.jsonl"
        self.optimizer = optimizer_for(model, config)
        self.step, self.elapsed = 0, 0.0
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed = state["step"], state["elapsed"]

    def save(self) -> None:
        """Write the state beside the old one, then swap, so that a kill loses at most a minute."""
        partial = self.state_file.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, partial)
        partial.replace(self.state_file)

    def run(self, loss_of: Callable[[Tensor], tuple[Tensor, dict[str, float]]], tokens: np.ndarray) -> None:
        """Train until the time budget is used up. `loss_of(batch)` gives the loss and what to log."""
        config, saved = self.config, time.monotonic()
        balancer = LoadBalancer(self.model)
        for batch in batches(tokens, config, self.step):
            progress = self._progress()
            if progress >= 1:
                break
            started = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_share(config, self.step, progress)
            loss, figures = loss_of(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), config.clip)
            self.optimizer.step()
            balancer.step()
            self.step += 1
            self.elapsed += time.monotonic() - started
            if self.step % 20 == 0:
                self._log({"loss": loss.item(), "norm": norm.item(), **figures})
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _progress(self) -> float:
        """Share of the budget that is used up."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.elapsed / (60 * self.config.minutes)

    def _log(self, figures: dict[str, float]) -> None:
        line = {"step": self.step, "minutes": round(self.elapsed / 60, 2)}
        line |= {name: round(value, 4) for name, value in figures.items()}
        with self.log_file.open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(self.name, *(f"{name} {value}" for name, value in line.items()), flush=True)


def train_target(model: DeepSeekV4, data: Path, run: Path, config: TrainingConfig) -> None:
    """Next-token cross-entropy on crops of the training stream."""

    def loss_of(batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        logits = model.logits(target_forward(model, batch).hidden).float().unflatten(0, batch.shape)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), {}

    Phase("target", run, model, config).run(loss_of, np.load(data / "train.npy", mmap_mode="r"))


def drafter_tokens(data: Path) -> np.ndarray:
    """The training stream, half of it in the target's own words where `training.regenerate` has made some."""
    tokens = np.load(data / "train.npy", mmap_mode="r")
    regenerated = data / "regenerated.npy"
    if not regenerated.exists():
        return tokens
    own = np.load(regenerated)
    return np.concatenate((tokens, np.tile(own, max(1, len(tokens) // len(own)))))


def train_drafter(drafter: DSparkModule, model: DeepSeekV4, data: Path, run: Path, config: TrainingConfig) -> None:
    """DSpark's loss at random anchors, features and distributions coming from the frozen target."""
    generator = torch.Generator().manual_seed(config.seed)

    def loss_of(batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        gamma, length = drafter.gamma, batch.shape[1]
        with torch.no_grad():
            target = target_forward(model, batch)
        assert target.context_features is not None, "a target with a drafter gives features"
        sequences = torch.arange(len(batch)).repeat_interleave(config.anchors)
        starts = torch.randint(1, length - gamma, (len(sequences),), generator=generator)
        rows = starts.unsqueeze(1) + torch.arange(gamma)  # position n+k predicts token n+1+k
        labels = batch[sequences.unsqueeze(1), rows + 1]
        with torch.no_grad():
            hidden = target.hidden.unflatten(0, batch.shape)[sequences.unsqueeze(1), rows]
            target_logits = model.logits(hidden)
        block = draft_forward(drafter, target.context_features, batch, sequences, starts)
        draft = drafter.run_heads(block, batch[sequences, starts], along(labels))
        loss = draft_loss(draft.logits, target_logits, draft.confidence_logits, labels, torch.ones_like(labels))
        survival = loss.accept_rate.cumprod(-1).sum(-1).mean()
        return loss.total, {"accept_1": loss.accept_rate[:, 0].mean().item(), "length": 1 + survival.item()}

    Phase("drafter", run, drafter, config).run(loss_of, drafter_tokens(data))


def round_to_bfloat16(model: nn.Module) -> None:
    """Round the weights that the checkpoint keeps in bfloat16, so that the drafter learns the target that is served."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and parameter.dim() >= 2:
            parameter.data = parameter.data.bfloat16().float()


def load_frozen_target(config: ModelConfig, run: Path) -> DeepSeekV4:
    """The target of a finished first phase, rounded as it will be stored."""
    model = DeepSeekV4(config)
    model.load_state_dict(torch.load(run / "target.pt", weights_only=True)["model"])
    round_to_bfloat16(model)
    return model.requires_grad_(False)


def export(config: ModelConfig, data: Path, run: Path, output: Path) -> None:
    """Write the finished run as a checkpoint in the official layout, with its tokenizer."""
    model = load_frozen_target(config, run)
    drafter = DSparkModule(config)
    drafter.load_state_dict(torch.load(run / "drafter.pt", weights_only=True)["model"])
    save_checkpoint(output, model, drafter, config.raw)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("target", "drafter", "export"))
    parser.add_argument("--config", type=Path, default=Path("deployments/tiny/config.json"))
    parser.add_argument("--data", type=Path, default=Path(".build/tiny"))
    parser.add_argument("--run", type=Path, default=Path(".build/tiny/run"))
    parser.add_argument("--output", type=Path, default=Path("deployments/tiny"), help="where export writes")
    parser.add_argument("--minutes", type=float, default=TrainingConfig.minutes, help="time budget of a phase")
    parser.add_argument("--batch", type=int, default=TrainingConfig.batch)
    parser.add_argument("--learning-rate", type=float, default=TrainingConfig.learning_rate)
    arguments = parser.parse_args()
    model_config = ModelConfig.from_file(arguments.config)
    config = TrainingConfig(minutes=arguments.minutes, batch=arguments.batch, learning_rate=arguments.learning_rate)
    arguments.run.mkdir(parents=True, exist_ok=True)
    if arguments.phase == "export":
        export(model_config, arguments.data, arguments.run, arguments.output)
    elif arguments.phase == "target":
        model = DeepSeekV4(model_config)
        initialise(model, config.seed, residual_scale=(2 * model_config.num_hidden_layers) ** -0.5)
        train_target(model, arguments.data, arguments.run, config)
    else:
        model = load_frozen_target(model_config, arguments.run)
        drafter = DSparkModule(model_config)
        initialise(drafter, config.seed + 1)
        drafter.share(model.embed.weight, model.head.weight)
        train_drafter(drafter, model, arguments.data, arguments.run, replace(config, seed=config.seed + 1))


if __name__ == "__main__":
    main()
