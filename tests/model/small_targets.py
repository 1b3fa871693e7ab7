"""Small random targets, built twice with the same weights: by transformers and by this package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dspark_ray.config import ModelConfig
from dspark_ray.model.deepseek_v4 import DeepSeekV4

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
HASH, LEARNED = "hash_moe", "moe"
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "swiglu_limit": 1.0,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 6,
    "layer_types": [SLIDING, CSA, HCA, CSA, HCA],
    "mlp_layer_types": [HASH, HASH, LEARNED, LEARNED, LEARNED],
    "compress_rates": {CSA: 4, HCA: 16},
    "rope_parameters": YARN,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class TargetPair:
    """The same network as transformers runs it and as this package does."""

    theirs: DeepseekV4ForCausalLM
    ours: DeepSeekV4

    @property
    def vocab_size(self) -> int:
        return self.ours.config.vocab_size

    @torch.no_grad()
    def expected(self, token_ids: list[int] | Tensor) -> Tensor:
        """transformers' logits [T, V] of one sequence, computed whole and without a cache."""
        batch = torch.as_tensor(token_ids).unsqueeze(0)
        return self.theirs(batch, use_cache=False).logits[0]


# Chosen so that on every text compared no two entries or experts compete within 2e-5 for the last place:
# which of two near equals wins depends on the order of sums, and moves logits by far more than rounding.
DECISIVE_SEED = 6


def build_pair(seed: int = DECISIVE_SEED, **overrides: Any) -> TargetPair:
    """Build both from `BASE` with `overrides`, weights drawn so that logits have a deviation near 1."""
    keys = {**BASE, **overrides}
    keys["num_hidden_layers"] = len(keys["layer_types"])
    config = DeepseekV4Config(**keys, attn_implementation="eager", experts_implementation="eager")
    theirs = DeepseekV4ForCausalLM(config).eval()
    randomise(theirs, seed)
    ours = DeepSeekV4(ModelConfig.from_dict(config.to_dict()))
    copy_weights(ours, theirs.state_dict())
    return TargetPair(theirs, ours.requires_grad_(False))


@torch.no_grad()
def randomise(model: DeepseekV4ForCausalLM, seed: int) -> None:
    """Give every weight, sink, bias and table values whose loss or misplacement changes results."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("tid2eid"):
            draws = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
            tensor.copy_(draws.argsort(dim=1)[:, : config.num_experts_per_tok])
        elif "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("scale"):
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.dim() == 1 or name.endswith("position_bias"):
            tensor.copy_(0.5 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)


# Official names, as this package uses them, to those of transformers: most specific first.
_RENAMES = (
    (r"\.indexer\.compressor\.", ".indexer."),
    (r"\.attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
    (r"\.attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
    (r"\.attn\.indexer\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.", ".self_attn."),
    (r"\.(compressor|indexer)\.wkv", r".\1.kv_proj"),
    (r"\.(compressor|indexer)\.wgate", r".\1.gate_proj"),
    (r"\.(compressor|indexer)\.ape", r".\1.position_bias"),
    (r"\.(compressor|indexer)\.norm", r".\1.kv_norm"),
    (r"\.wq_a", ".q_a_proj"),
    (r"\.wq_b", ".q_b_proj"),
    (r"\.wkv", ".kv_proj"),
    (r"\.wo_a", ".o_a_proj"),
    (r"\.wo_b", ".o_b_proj"),
    (r"\.q_norm", ".q_a_norm"),
    (r"\.attn_sink", ".sinks"),
    (r"\.attn_norm", ".input_layernorm"),
    (r"\.ffn_norm", ".post_attention_layernorm"),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.ffn\.gate\.bias", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.", ".mlp."),
    (r"\.shared_experts\.w1", ".shared_experts.gate_proj"),
    (r"\.shared_experts\.w2", ".shared_experts.down_proj"),
    (r"\.shared_experts\.w3", ".shared_experts.up_proj"),
    (r"\.experts\.w13", ".experts.gate_up_proj"),
    (r"\.experts\.w2", ".experts.down_proj"),
    (r"^hc_head_", "hc_head.hc_"),
    (r"^embed\.", "embed_tokens."),
)


def transformers_name(name: str) -> str:
    """The name under which transformers keeps our parameter or buffer `name`."""
    if name == "head.weight":
        return "lm_head.weight"
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return f"model.{name}"


def copy_weights(ours: DeepSeekV4, theirs: dict[str, Tensor]) -> None:
    """Fill `ours`; both sides must name and shape exactly the same weights."""
    names = {name: transformers_name(name) for name in ours.state_dict()}
    assert set(names.values()) == set(theirs), set(names.values()) ^ set(theirs)
    ours.load_state_dict({name: theirs[other] for name, other in names.items()})
