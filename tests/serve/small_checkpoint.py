"""A checkpoint of a few megabytes: a random DeepSeek-V4 with its drafter, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_tokenizer import NOISE, NUM_TOKENS, save_byte_tokenizer

from dspark_ray.checkpoint.writer import save_checkpoint
from dspark_ray.config import EngineConfig, ModelConfig
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.ranks.gang import build_engine
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.training.initial import initialise
from dspark_ray.types import Request, SamplingParams

RAW = {
    "model_type": "deepseek_v4",
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 16,
    "compress_ratios": [0, 4, 16, 0, 0],
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "hc_mult": 2,
    "max_position_embeddings": 8192,
    "dspark_block_size": 5,
    "dspark_noise_token_id": NOISE,
    "dspark_target_layer_ids": [1, 2],
    "dspark_markov_rank": 8,
}

ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 8192, "page_size": 32}


COST_TABLE = "cost_table.json"
"""Beside the checkpoint: profiling takes longer than most tests."""


def save_small_checkpoint(directory: Path) -> Path:
    config = ModelConfig.from_dict(RAW)
    model, drafter = DeepSeekV4(config), DSparkModule(config)
    initialise(model, seed=0)
    initialise(drafter, seed=1)
    with torch.no_grad():
        model.head.weight *= 0.7  # flat enough that shared noise often makes drafter and target agree
    save_checkpoint(directory, model, drafter, RAW)
    save_byte_tokenizer(directory)
    CostTable.of(Curve((1, 64), (0.01, 0.0101)), Curve((1, 8), (0.0001, 0.0002))).save(directory / COST_TABLE)
    return directory


def tokens_in_process(checkpoint: Path, prompt: list[int], **sampling: object) -> list[int]:
    """The text that one process generates for a prompt without Ray and without speculation."""
    engine = build_engine(checkpoint, EngineConfig(**ENGINE, speculation=False))  # type: ignore[arg-type]
    engine.add_request(
        Request(
            request_id="r",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        )
    )
    tokens: list[int] = []
    while engine.has_unfinished():
        tokens += [token for output in engine.step().sequences for token in output.token_ids]
    return tokens
