"""Layers shared by the DeepSeek-V4 target and the DSpark stages. Parameters are named as in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspark_kernels as ops
from dspark_ray.config import CSA_RATIO, ModelConfig
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.model.rope import Angles


def empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter, filled by the loader or by `training.initial`."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype))


class Weight(nn.Module):
    """A weight [out, in] (or [width]) without bias, called `X.weight` in the checkpoint.

    A weight kept in its quantised form has a `scale` too (`checkpoint/stored.py`).
    """

    scale: nn.Parameter | None

    def __init__(self, *shape: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = empty(*shape, dtype=dtype)
        self.register_parameter("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.scale is None else ops.linear_fp8(x, self.weight, self.scale)

    def in_float32(self, x: Tensor) -> Tensor:
        """As `forward`, but float32 [N, out]; rounded to x's dtype only where the weight is quantised."""
        return ops.linear_float32(x, self.weight) if self.scale is None else self(x).float()


def hyper_connection(config: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """fn [(2+m)m, m*d], base [(2+m)m], scale [3] of the hyper-connection around one sublayer, all float32.

    Not a module, because the checkpoint has them on the layer, as hc_attn_fn and so on.
    """
    m, mixes = config.hc_mult, (2 + config.hc_mult) * config.hc_mult
    return (
        empty(mixes, m * config.hidden_size, dtype=torch.float32),
        empty(mixes, dtype=torch.float32),
        empty(3, dtype=torch.float32),
    )


class Compressor(nn.Module):
    """Raw rows of a compressed layer and their pooling into entries (docs/model.md, Compression)."""

    def __init__(self, config: ModelConfig, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio, self.width, self.eps = ratio, width, config.rms_norm_eps
        self.num_series = 2 if ratio == CSA_RATIO else 1
        self.wkv = Weight(self.num_series * width, config.hidden_size)
        self.wgate = Weight(self.num_series * width, config.hidden_size)
        self.ape = empty(ratio, self.num_series * width, dtype=torch.float32)
        self.norm = Weight(width)

    def raw(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(kv, gate) [N, num_series * width] float32 of each row, the gate without its position bias.

        Not rounded to the rows' dtype: rounding would change the gate by a percent, for as long as its entry is kept.
        """
        return self.wkv.in_float32(hidden), self.wgate.in_float32(hidden)

    def store_raw(self, hidden: Tensor, positions: Tensor, pool: Tensor, slot_mapping: Tensor) -> None:
        """Write raw rows of `hidden` into rows slot_mapping [N] of `pool`."""
        ops.store_raw(*self.raw(hidden), self.ape, positions, pool, slot_mapping)

    def store_entries(
        self, pool: Tensor, keys: Tensor, angles: Angles, entries: Tensor, where: Tensor, quantise: bool
    ) -> None:
        """Pool raw rows keys [E, S] of `pool` into rows where [E] of `entries`, at the angles of their first tokens."""
        ops.compress(pool, keys, self.norm.weight, self.eps, angles.cos, angles.sin, entries, where, quantise)

    def pooled(self, kv: Tensor, gate: Tensor, valid: Tensor | None, angles: Angles, dtype: torch.dtype) -> Tensor:
        """Entries [E, width] of raw rows kv, gate [E, S, ...] with position bias, without a cache (training)."""
        if self.num_series == 2:
            kv, gate = ops.overlapping(kv), ops.overlapping(gate)
        pooled = ops.softmax_pool(kv, gate, valid).to(dtype)
        return ops.norm_rope(pooled, self.norm.weight, self.eps, angles.cos, angles.sin)


class Indexer(nn.Module):
    """Chooses the CSA entries that a row attends to (docs/model.md, Indexer); replicated on every rank."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.topk = (
            config.index_n_heads,
            config.index_head_dim,
            config.index_topk,
        )
        self.wq_b = Weight(self.num_heads * self.head_dim, config.q_lora_rank)
        self.weights_proj = Weight(self.num_heads, config.hidden_size)
        self.compressor = Compressor(config, CSA_RATIO, self.head_dim)

    def query(self, hidden: Tensor, q_latent: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """(rotated queries [N, Hi, Di], head weights [N, Hi])."""
        query = self.wq_b(q_latent).unflatten(-1, (self.num_heads, self.head_dim))
        scale = self.num_heads**-0.5 * self.head_dim**-0.5
        return ops.rope(query, angles.cos, angles.sin), self.weights_proj(hidden) * scale


class Attention(nn.Module):
    """Attention with shared K=V, a latent query, sinks and a grouped output (docs/model.md, Attention)."""

    def __init__(self, config: ModelConfig, layer: int, group: ParallelGroup) -> None:
        super().__init__()
        self.config, self.group = config, group
        d, head_dim = config.hidden_size, config.head_dim
        self.num_heads = group.share(config.num_attention_heads)
        self.num_groups = group.share(config.o_groups)
        self.ratio = config.compress_ratio(layer)
        self.attn_sink = empty(self.num_heads, dtype=torch.float32)
        self.wq_a = Weight(config.q_lora_rank, d)
        self.q_norm = Weight(config.q_lora_rank)
        self.wq_b = Weight(self.num_heads * head_dim, config.q_lora_rank)
        self.wkv = Weight(head_dim, d)
        self.kv_norm = Weight(head_dim)
        group_width = config.num_attention_heads * head_dim // config.o_groups
        self.wo_a = Weight(self.num_groups * config.o_lora_rank, group_width)
        self.wo_b = Weight(d, self.num_groups * config.o_lora_rank)
        if self.ratio:
            self.compressor = Compressor(config, self.ratio, head_dim)
        if self.ratio == CSA_RATIO:
            self.indexer = Indexer(config)

    def q_latent(self, hidden: Tensor) -> Tensor:
        """[N, q_lora_rank] latent of the query, also the input of the indexer."""
        return ops.rms_norm(self.wq_a(hidden), self.q_norm.weight, self.config.rms_norm_eps)

    def query(self, q_latent: Tensor, angles: Angles) -> Tensor:
        """[N, H, D] rotated queries, each head normed without a weight."""
        heads = self.wq_b(q_latent).unflatten(-1, (self.num_heads, self.config.head_dim))
        return ops.norm_rope(heads, None, self.config.rms_norm_eps, angles.cos, angles.sin)

    def store_keys(self, hidden: Tensor, angles: Angles, pool: Tensor, slot_mapping: Tensor) -> None:
        """Write the keys of `hidden` into rows slot_mapping [N] of `pool`."""
        ops.store_window(
            self.wkv(hidden),
            self.kv_norm.weight,
            self.config.rms_norm_eps,
            angles.cos,
            angles.sin,
            pool,
            slot_mapping,
            self.config.kv_fake_quant,
        )

    def keys(self, hidden: Tensor, angles: Angles) -> Tensor:
        """[N, D], one vector per token that is both key and value of every head, as `store_keys` would write it."""
        kv = self.wkv(hidden)
        return self.stored(ops.norm_rope(kv, self.kv_norm.weight, self.config.rms_norm_eps, angles.cos, angles.sin))

    def stored(self, keys: Tensor) -> Tensor:
        """Keys as the cache stores them: rounded to FP8 outside the rotary part where the model was trained so."""
        if not self.config.kv_fake_quant:
            return keys
        return ops.fake_quant_fp8(keys, self.config.head_dim - self.config.qk_rope_head_dim)

    def output(self, values: Tensor) -> Tensor:
        """[N, H, D], already rotated back, -> [N, d]: project per group, sum over ranks."""
        grouped = values.flatten(1).unflatten(-1, (self.num_groups, -1)).transpose(0, 1)
        weights = self.wo_a.weight.unflatten(0, (self.num_groups, -1))
        latent = torch.bmm(grouped, weights.transpose(1, 2)).transpose(0, 1).flatten(1)
        return self.group.sum(self.wo_b(latent))


class Gate(nn.Module):
    """Router: by token id in the first layers, by score and bias in the others (docs/model.md, Experts)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.weight = empty(config.n_routed_experts, config.hidden_size)
        self.bias: nn.Parameter | None = None
        self.tid2eid: Tensor | None = None
        if layer < config.num_hash_layers:
            table = torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
            del self.tid2eid  # replaced by a buffer
            self.register_buffer("tid2eid", table)
        else:
            self.bias = empty(config.n_routed_experts, dtype=torch.float32)

    def forward(self, hidden: Tensor, token_ids: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        config = self.config
        chosen = None if self.tid2eid is None else self.tid2eid[token_ids]
        return ops.route(
            hidden,
            self.weight,
            self.bias,
            chosen,
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            config.norm_topk_prob,
            padding,
        )


class SharedExpert(nn.Module):
    """The expert of every token, its width split over ranks."""

    def __init__(self, config: ModelConfig, group: ParallelGroup) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        width = group.share(config.moe_intermediate_size * config.n_shared_experts)
        self.w1 = Weight(width, config.hidden_size)
        self.w2 = Weight(config.hidden_size, width)
        self.w3 = Weight(width, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = ops.swiglu(self.w1(hidden).float(), self.w3(hidden).float(), self.limit)
        return self.w2(inner.to(hidden.dtype))


class Experts(nn.Module):
    """This rank's routed experts, stacked so that one product can serve several.

    Experts kept in their quantised form have scales too (`checkpoint/stored.py`).
    """

    w13_scale: nn.Parameter | None
    w2_scale: nn.Parameter | None

    def __init__(self, config: ModelConfig, group: ParallelGroup) -> None:
        super().__init__()
        first, stop = group.range(config.n_routed_experts)
        self.first = first
        self.w13 = empty(stop - first, 2 * config.moe_intermediate_size, config.hidden_size)
        self.w2 = empty(stop - first, config.hidden_size, config.moe_intermediate_size)
        self.register_parameter("w13_scale", None)
        self.register_parameter("w2_scale", None)


class MoE(nn.Module):
    """Routed experts plus the shared one; one sum over ranks."""

    def __init__(self, config: ModelConfig, layer: int, group: ParallelGroup) -> None:
        super().__init__()
        self.group, self.limit = group, config.swiglu_limit
        self.gate = Gate(config, layer)
        self.experts = Experts(config, group)
        self.shared_experts = SharedExpert(config, group)

    def forward(self, hidden: Tensor, token_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """[N, d] -> [N, d]; no experts are read for rows marked by `padding` [N]."""
        weights, chosen = self.gate(hidden, token_ids, padding)
        experts = self.experts
        routed = ops.moe(
            hidden,
            weights,
            chosen,
            experts.w13,
            experts.w2,
            self.limit,
            len(self.gate.weight),
            experts.first,
            experts.w13_scale,
            experts.w2_scale,
        )
        # Ranks add up float32, and the sum is rounded once.
        return self.group.sum(routed + self.shared_experts(hidden)).to(hidden.dtype)


class DecoderLayer(nn.Module):
    """Attention and MoE, each between a hyper-connection read and write: a target layer or a draft stage."""

    def __init__(self, config: ModelConfig, layer: int, group: ParallelGroup) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = Weight(config.hidden_size)
        self.ffn_norm = Weight(config.hidden_size)
        self.attn = Attention(config, layer, group)
        self.ffn = MoE(config, layer, group)
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = hyper_connection(config)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = hyper_connection(config)

    def forward(
        self,
        streams: Tensor,
        token_ids: Tensor,
        attend: Callable[[Tensor], Tensor],
        padding: Tensor | None = None,
    ) -> Tensor:
        """streams [N, m, d] -> [N, m, d]; `attend` is the attention sublayer on normed rows [N, d].

        `padding` [N] (bool) marks rows whose results are unused.
        """
        config = self.config

        def read(fn: Tensor, base: Tensor, scale: Tensor, norm: Weight) -> tuple[Tensor, Tensor, Tensor]:
            iters, eps, rms_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
            return ops.mhc_read(streams, fn, base, scale, norm.weight, iters, eps, rms_eps)

        hidden, post, comb = read(self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.attn_norm)
        streams = ops.mhc_write(attend(hidden), streams, post, comb)

        hidden, post, comb = read(self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.ffn_norm)
        return ops.mhc_write(self.ffn(hidden, token_ids, padding), streams, post, comb)
