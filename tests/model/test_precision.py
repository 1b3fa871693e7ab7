"""Values that stay in float32: compressor rows, and the terms of a sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_ray.config import CSA_RATIO, ModelConfig
from dspark_ray.model.layers import Compressor, MoE
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.training.initial import initialise

BF16 = torch.bfloat16
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v4",
        "vocab_size": 64,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
        "compress_ratios": [4, 0],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "num_hash_layers": 0,
        "routed_scaling_factor": 1.5,
    }
)
HIDDEN = torch.randn(40, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)).to(BF16)


def test_compressors_store_rows_in_float32() -> None:
    """A gate of size 8 that is rounded to bfloat16 is off by 2^-6, and with it a weight of the pooling."""
    compressor = Compressor(CONFIG, CSA_RATIO, CONFIG.head_dim)
    initialise(compressor, seed=0)
    compressor = compressor.to(BF16)
    compressor.ape.data = compressor.ape.data.float()
    width = compressor.wkv.weight.shape[0]
    pool, slots = torch.zeros(len(HIDDEN), 2 * width), torch.arange(len(HIDDEN))
    compressor.store_raw(HIDDEN, slots, pool, slots)
    kv, gate = (HIDDEN.double() @ weight.weight.double().t() for weight in (compressor.wkv, compressor.wgate))
    expected = torch.cat((kv, gate + compressor.ape[slots % CSA_RATIO]), dim=1)
    torch.testing.assert_close(pool.double(), expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class _OneOf(ParallelGroup):
    """A rank of several whose part of each sum is kept instead of added to others'."""

    parts: list[Tensor] = field(default_factory=list)

    def sum(self, x: Tensor) -> Tensor:
        self.parts.append(x)
        return x


def test_ranks_add_up_their_experts_before_they_round() -> None:
    group = _OneOf(3, 8)
    moe = MoE(CONFIG, 0, group)
    initialise(moe, seed=0)
    out = moe.to(BF16)(HIDDEN, torch.zeros(len(HIDDEN), dtype=torch.int64))
    (part,) = group.parts
    assert part.dtype == torch.float32
    assert not torch.equal(part, part.to(BF16).float())
    assert torch.equal(out, part.to(BF16))
