"""Packed FP8 keys: the rounded values of the official program, in half the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dspark_kernels import formats
from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.config import KEY_GROUP, CacheDType, ConfigError, EngineConfig, KeyDType, ModelConfig
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.rows import Segment, build_rows
from dspark_ray.training.initial import initialise

RAW = {
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 144,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 16, 4],
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 64},
}
CONFIG = replace(ModelConfig.from_dict(RAW), kv_fake_quant=True)


def hidden_states(packed: bool) -> tuple[list[torch.Tensor], CacheTensors]:
    """A prompt of 50 tokens and blocks of 4 behind it, in bfloat16."""
    model = DeepSeekV4(CONFIG)
    initialise(model, seed=0)
    model = model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "hc_" in name or name.endswith(("attn_sink", "ape", "gate.bias")):
            parameter.data = parameter.data.float()
    shape = CacheShape.of(CONFIG, gamma=3, page_size=16, num_slots=1, max_rows=64)
    cache = CacheTensors(CONFIG, shape, 8, torch.bfloat16, packed=packed)
    outputs, start = [], 0
    with torch.inference_mode():
        for count in (50, 4, 4, 4, 4):
            tokens = [(7 * (start + n)) % CONFIG.vocab_size for n in range(count)]
            rows = build_rows([Segment(0, start, tokens, list(range(8)))], shape)
            outputs.append(model(rows, cache).hidden)
            start += count - 1 if count == 4 else count  # the last draft of each block falls
    return outputs, cache


def test_a_packed_cache_holds_the_values_of_a_rounded_plain_one() -> None:
    packed, small = hidden_states(packed=True)
    plain, large = hidden_states(packed=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed, plain, strict=True))
    assert small.layers[0].window.nbytes == large.layers[0].window.nbytes * (128 + 2 * 16 + 8) // (2 * 144)


def test_keys_that_do_not_fill_groups_of_64_are_refused() -> None:
    config = replace(CONFIG, head_dim=96)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8': keys have 80 channels .* multiple of 64"):
        EngineConfig(kv_cache_dtype="fp8").for_model(config)


QUANTISED = ModelConfig.from_dict(RAW | {"quantization_config": {"quant_method": "fp8"}})


def test_a_checkpoint_with_quantised_weights_has_rounded_keys() -> None:
    assert QUANTISED.kv_fake_quant
    assert not ModelConfig.from_dict(RAW).kv_fake_quant
    odd = RAW | {"quantization_config": {"quant_method": "fp8"}, "head_dim": 48 + RAW["qk_rope_head_dim"]}
    assert not ModelConfig.from_dict(odd).kv_fake_quant, "48 channels are no whole number of groups"


@pytest.mark.parametrize(
    ("model", "device", "asked", "stored"),
    [
        (QUANTISED, "cuda", "auto", "fp8"),
        (QUANTISED, "cuda:1", "auto", "fp8"),
        (QUANTISED, "cpu", "auto", "float32"),
        (QUANTISED, "cpu", "fp8", "fp8"),
        (ModelConfig.from_dict(RAW), "cuda", "auto", "float32"),
        (ModelConfig.from_dict(RAW), "cuda", "fp8", "fp8"),
    ],
)
def test_auto_stores_keys_in_fp8_on_a_gpu_where_they_were_trained_so(
    model: ModelConfig, device: str, asked: CacheDType, stored: KeyDType
) -> None:
    config = EngineConfig(device=device, kv_cache_dtype=asked, max_model_len=256).for_model(model)
    assert config.kv_cache_dtype == stored


def test_configurations_and_kernels_have_the_same_groups() -> None:
    assert KEY_GROUP == formats.KEY_GROUP
