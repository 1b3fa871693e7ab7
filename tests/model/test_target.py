"""The target against transformers' DeepseekV4ForCausalLM: the same float32 logits, however text is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import Serving, random_tokens
from small_targets import BASE, CSA, HASH, HCA, LEARNED, SLIDING, TargetPair, build_pair

from dspark_ray.cache.shape import CacheShape
from dspark_ray.config import ConfigError, ModelConfig
from dspark_ray.model.deepseek_v4 import DeepSeekV4

TOLERANCE = 1e-4  # logits have a deviation near 1; the two sum in different orders
LENGTH = 150

NETWORKS: dict[str, dict[str, Any]] = {
    "mixed layers, narrow index": {},
    "two streams, every entry chosen": {"hc_mult": 2, "index_topk": 512, "compress_rates": {CSA: 4, HCA: 8}},
    "tiny window, no YaRN": {
        "sliding_window": 4,
        "layer_types": [HCA, HCA, CSA, HCA, CSA],
        "rope_parameters": None,
        "index_n_heads": 32,
        "index_topk": 3,
    },
    "only sliding layers": {"layer_types": [SLIDING] * 2, "mlp_layer_types": [LEARNED] * 2},
    "many experts, one group": {
        "n_routed_experts": 20,  # beyond what the dense mixture computes
        "num_experts_per_tok": 3,
        "o_groups": 1,
        "routed_scaling_factor": 2.5,
        "layer_types": [CSA, HCA],
        "mlp_layer_types": [HASH, LEARNED],
    },
}


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS.keys())
def pair(request: pytest.FixtureRequest) -> TargetPair:
    return build_pair(**request.param)


@pytest.fixture(scope="module")
def text(pair: TargetPair) -> list[int]:
    return random_tokens(LENGTH, pair.vocab_size, seed=2)


@pytest.mark.parametrize(
    "chunks",
    [[LENGTH], [1, 13, 64, 3, 30, 39], [7] * 21 + [3], [1] * LENGTH],
    ids=["whole", "odd chunks", "chunks of seven", "token by token"],
)
def test_prefill_in_any_chunks_gives_the_logits_of_transformers(
    pair: TargetPair, text: list[int], chunks: list[int]
) -> None:
    logits = Serving(pair.ours, gamma=0).prefill(0, text, chunks)
    torch.testing.assert_close(logits, pair.expected(text), atol=TOLERANCE, rtol=0)


def test_every_weight_of_the_target_matters() -> None:
    """A weight without effect would not be tested by the comparisons above."""
    pair = build_pair()
    text = random_tokens(80, pair.vocab_size, seed=2)
    before = Serving(pair.ours).prefill(0, text, [80])
    for name, weight in pair.ours.named_parameters():
        kept = weight.clone()
        # The router's bias only orders experts, so it takes a large change to see it.
        weight.add_(torch.randn_like(weight) * (10 if name.endswith("gate.bias") else 1))
        assert (Serving(pair.ours).prefill(0, text, [80]) - before).abs().max() > 1e-3, name
        weight.copy_(kept)


def test_selection_of_entries_changes_the_logits() -> None:
    narrow, wide = build_pair(index_topk=6), build_pair(index_topk=512)
    text = random_tokens(60, narrow.vocab_size, seed=2)
    difference = Serving(narrow.ours).prefill(0, text, [60]) - Serving(wide.ours).prefill(0, text, [60])
    first_row_with_seven_entries = 27
    assert difference[:first_row_with_seven_entries].abs().max() < TOLERANCE
    assert difference[first_row_with_seven_entries:].abs().max() > 0.05


def test_a_reused_slot_and_its_pages_keep_nothing_of_the_sequence_before() -> None:
    pair = build_pair()
    first, second = (random_tokens(count, pair.vocab_size, seed=count) for count in (140, 90))
    serving = Serving(pair.ours, gamma=3)
    serving.prefill(0, first, [140])
    logits = serving.prefill(0, second, [50, 40])
    torch.testing.assert_close(logits, pair.expected(second), atol=TOLERANCE, rtol=0)


def test_bfloat16_stays_near_float32() -> None:
    # Hash routing and a wide index leave nothing discrete that rounding could flip.
    pair = build_pair(index_topk=512, mlp_layer_types=[HASH] * 5)
    text = random_tokens(90, pair.vocab_size, seed=2)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DeepSeekV4(pair.ours.config)
    finally:
        torch.set_default_dtype(default)
    model.load_state_dict(pair.ours.state_dict())
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.hc_head_fn.dtype == torch.float32
    logits = Serving(model, gamma=3, dtype=torch.bfloat16).prefill(0, text, [50, 4, 36])
    expected = pair.expected(text)
    assert (logits - expected).abs().max() < 0.25
    assert (logits - expected).square().mean().sqrt() < 0.04


def test_hash_layers_after_learned_ones_are_refused() -> None:
    raw = build_pair().theirs.config.to_dict() | {"mlp_layer_types": [HASH, LEARNED, LEARNED, HASH, LEARNED]}
    with pytest.raises(ConfigError, match="mlp_layer_types"):
        ModelConfig.from_dict(raw)


def test_both_spellings_of_the_config_give_the_same_shape() -> None:
    saved = ModelConfig.from_dict(build_pair(compress_rates={CSA: 4, HCA: 128}).theirs.config.to_dict())
    dropped = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters")
    official = {key: value for key, value in BASE.items() if key not in dropped} | {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 128, 4, 128],
        "num_hash_layers": 2,
        "routed_scaling_factor": 1.5,
        "rope_scaling": BASE["rope_parameters"],
    }
    assert ModelConfig.from_dict(official) == saved


def test_cache_lengths_follow_the_longest_verify_block() -> None:
    config = build_pair().ours.config
    shape = CacheShape.of(config, gamma=5, page_size=16, num_slots=3, max_rows=100)
    assert (shape.window_ring, shape.raw_rings) == (12 + 5, {4: 8 + 5, 16: 16 + 5})
    assert shape.pool_rows(shape.window_ring) == 3 * 17 + 100
