"""Training reduces the loss, and resumes from its saved state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_ray.config import ModelConfig
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.training.initial import initialise
from dspark_ray.training.train import TrainingConfig, batches, learning_rate_share, train_target

SMALL = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v4",
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 1,
        "o_lora_rank": 16,
        "sliding_window": 16,
        "compress_ratios": [0, 4],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.0,
    }
)
CONFIG = TrainingConfig(steps=60, batch=4, length=32, warmup_steps=5, learning_rate=1e-2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "train.npy", np.tile(np.arange(32, dtype=np.uint16), 200))
    return tmp_path


def fresh_model() -> DeepSeekV4:
    model = DeepSeekV4(SMALL)
    initialise(model, seed=0)
    return model


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "target.jsonl").read_text().splitlines()]


def test_a_repeating_sequence_is_learnt_and_an_interrupted_run_goes_on(data):
    train_target(fresh_model(), data, data, CONFIG)
    first = torch.load(data / "target.pt", weights_only=True)
    assert log_of(data)[-1]["loss"] < 0.5 * np.log(32)
    longer = replace(CONFIG, steps=120)
    train_target(fresh_model(), data, data, longer)
    second = torch.load(data / "target.pt", weights_only=True)
    assert (first["step"], second["step"]) == (60, 120)
    assert [line["step"] for line in log_of(data)] == [20, 40, 60, 80, 100, 120]
    assert log_of(data)[-1]["loss"] < 0.2 * np.log(32)


def test_batches_depend_on_the_step_alone(data):
    tokens = np.load(data / "train.npy")
    from_the_start = batches(tokens, CONFIG, 0)
    skipped = [next(from_the_start) for _ in range(4)][3]
    assert torch.equal(skipped, next(batches(tokens, CONFIG, 3)))


def test_the_learning_rate_warms_up_and_falls_to_its_final_share():
    shares = [learning_rate_share(CONFIG, step, step / 100) for step in range(101)]
    assert shares[0] == pytest.approx(1 / CONFIG.warmup_steps)
    assert max(shares) == max(shares[3:6])
    assert shares[-1] == pytest.approx(CONFIG.final_share)
