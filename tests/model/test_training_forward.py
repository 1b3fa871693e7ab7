"""Training forwards over full sequences equal serving forwards with a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from serving import Serving, random_tokens
from small_targets import CSA, HCA, build_pair
from torch import Tensor

from dspark_ray.config import DSparkConfig, ModelConfig
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.model.deepseek_v4 import DeepSeekV4, TargetOutput
from dspark_ray.training.forward import draft_forward, target_forward
from dspark_ray.training.initial import initialise

LENGTH = 48


def assert_same(actual: Tensor | None, expected: Tensor | None, config: ModelConfig) -> None:
    """Equal up to the order of sums; not rounding keys at all would cost 2 % of the deviation or more."""
    assert actual is not None
    assert expected is not None
    difference = (actual - expected) / expected.std()
    if config.kv_fake_quant:  # where the order of sums may push a key over the edge between two FP8 values
        assert difference.square().mean().sqrt() < 5e-3
    else:
        assert difference.abs().max() < 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["float32 keys", "fp8 keys"])
def target(request: pytest.FixtureRequest) -> DeepSeekV4:
    """A target with taps; its head_dim leaves one group of 64 channels to round."""
    pair = build_pair(head_dim=72, compress_rates={CSA: 4, HCA: 8}, sliding_window=16, index_topk=LENGTH // 4)
    dspark = DSparkConfig(gamma=5, noise_token_id=96, target_layer_ids=(1, 2, 4), markov_rank=8, num_stages=2)
    model = DeepSeekV4(replace(pair.ours.config, dspark=dspark, kv_fake_quant=request.param))
    model.load_state_dict(pair.ours.state_dict())
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def batch() -> Tensor:
    """[2, T]"""
    return torch.tensor([random_tokens(LENGTH, 97, seed) for seed in (1, 2)])


@pytest.fixture(scope="module")
def served(target: DeepSeekV4, batch: Tensor) -> TargetOutput:
    pieces = {number: (0, token_ids) for number, token_ids in enumerate(batch.tolist())}
    return Serving(target, num_sequences=2).output(pieces)


def drafter_of(config: ModelConfig) -> DSparkModule:
    drafter = DSparkModule(config)
    initialise(drafter, seed=3)
    generator = torch.Generator().manual_seed(4)
    embed, head = torch.randn(2, config.vocab_size, config.hidden_size, generator=generator)
    drafter.share(embed, head * config.hidden_size**-0.5)
    return drafter.requires_grad_(False)


def test_the_training_target_equals_the_serving_target(target: DeepSeekV4, batch: Tensor, served: TargetOutput) -> None:
    trained = target_forward(target, batch)
    assert_same(trained.hidden, served.hidden, target.config)
    assert_same(trained.context_features, served.context_features, target.config)


def test_the_training_target_refuses_lengths_it_cannot_cut_into_windows(target: DeepSeekV4) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        target_forward(target, torch.zeros(1, 24, dtype=torch.int64))


def test_training_drafts_the_blocks_that_a_ring_of_context_gives(target: DeepSeekV4, batch: Tensor) -> None:
    config, window = target.config, target.config.sliding_window
    drafter = drafter_of(config)
    features = target_forward(target, batch).context_features
    assert features is not None
    sequences, starts = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 16, 3, 17, 41])
    trained = draft_forward(drafter, features, batch, sequences, starts)

    rings = [torch.full((len(starts), window, config.head_dim), float("nan")) for _ in drafter.stages]
    for request, (sequence, start) in enumerate(zip(sequences.tolist(), starts.tolist(), strict=True)):
        positions = torch.arange(max(start - window, 0), start)
        projected = drafter.project(features.unflatten(0, batch.shape)[sequence, positions])
        for ring, keys in zip(rings, drafter.context_keys(projected, positions), strict=True):
            ring[request, positions % window] = keys
    visible = torch.arange(window) < starts.unsqueeze(1)
    served = drafter.block(batch[sequences, starts], starts, rings, visible)

    assert_same(trained.hidden, served.hidden, target.config)
    assert_same(trained.base_logits, served.base_logits, target.config)
