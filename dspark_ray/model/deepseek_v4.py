"""DeepSeek-V4, the target: one forward over the flattened rows of many sequences.

Twice per layer: hyper-connection read, norm, sublayer, hyper-connection write. docs/model.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dspark_kernels as ops
from dspark_ray.cache.tensors import CacheTensors, LayerCache
from dspark_ray.config import ModelConfig
from dspark_ray.model.layers import Attention, Compressor, DecoderLayer, Weight, empty
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.model.rope import Angles, Rope
from dspark_ray.model.rows import CompressIndex, PoolIndex, Rows


@dataclass(frozen=True)
class _LayerAngles:
    """Rotary angles for one kind of layer in a forward: of the rows, and of the entries that close."""

    rows: Angles
    entries: Angles | None


@dataclass(frozen=True)
class TargetOutput:
    """Results of a forward besides the cache that it writes."""

    hidden: Tensor
    """[N, d] after the final norm, the input of `DeepSeekV4.logits`."""
    context_features: Tensor | None
    """[N, T*d] means over the streams after the T tapped layers; None for a model without a drafter."""


class DeepSeekV4(nn.Module):
    """The target network, or one tensor-parallel rank of it."""

    def __init__(self, config: ModelConfig, group: ParallelGroup | None = None) -> None:
        super().__init__()
        self.config = config
        self.group = group = group or ParallelGroup()
        self.first_token, stop = group.range(config.vocab_size)
        self.embed = Weight(stop - self.first_token, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, group) for layer in range(config.num_hidden_layers))
        m, d = config.hc_mult, config.hidden_size
        self.hc_head_fn = empty(m, m * d, dtype=torch.float32)
        self.hc_head_base = empty(m, dtype=torch.float32)
        self.hc_head_scale = empty(1, dtype=torch.float32)
        self.norm = Weight(d)
        self.head = Weight(stop - self.first_token, d)
        self._rope: Rope | None = None

    @property
    def rope(self) -> Rope:
        """Frequency tables on the weights' device."""
        if self._rope is None:
            self._rope = Rope(self.config, self.norm.weight.device)
        return self._rope

    def forward(self, rows: Rows, cache: CacheTensors) -> TargetOutput:
        """Run all layers on `rows`, reading and writing `cache`."""
        angles = self._angles(rows)
        streams = self.embed_streams(rows.token_ids)
        taps: dict[int, Tensor] = {}
        tapped = self.config.dspark.target_layer_ids if self.config.dspark else ()
        for number, (decoder_layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            assert isinstance(decoder_layer, DecoderLayer)
            ratio = decoder_layer.attn.ratio
            layer = _CachedAttention(
                decoder_layer.attn, rows.window, rows.compressed.get(ratio), angles[ratio], layer_cache
            )
            streams = decoder_layer(streams, rows.token_ids, layer.forward_at(rows.positions), rows.padding)
            if number in tapped:
                taps[number] = streams.mean(dim=1)
        features = torch.cat([taps[number] for number in tapped], dim=-1) if taps else None
        return TargetOutput(self.final_hidden(streams), features)

    def embed_streams(self, token_ids: Tensor) -> Tensor:
        """[N] -> [N, m, d]; every stream starts as the embedding."""
        local = token_ids - self.first_token
        mine = (local >= 0) & (local < self.embed.weight.shape[0])
        rows = self.embed.weight[local.clamp(0, self.embed.weight.shape[0] - 1)]
        if self.group.size > 1:
            rows = self.group.sum(rows * mine.unsqueeze(1))
        return rows.unsqueeze(1).repeat(1, self.config.hc_mult, 1)

    def final_hidden(self, streams: Tensor) -> Tensor:
        """[N, m, d] -> [N, d]: head collapse and final norm."""
        config = self.config
        hidden = ops.mhc_head(
            streams,
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            config.hc_eps,
            config.rms_norm_eps,
        )
        return ops.rms_norm(hidden, self.norm.weight, config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] -> [n, V / size] float32: this rank's slice of the vocabulary."""
        return ops.linear_float32(hidden, self.head.weight)

    def _angles(self, rows: Rows) -> dict[int, _LayerAngles]:
        """Angles by compression ratio; 0 stands for sliding layers."""
        angles = {0: _LayerAngles(self.rope.angles(rows.positions, compressed=False), None)}
        if rows.compressed:
            compressed = self.rope.angles(rows.positions, compressed=True)
            for ratio, index in rows.compressed.items():
                entries = self.rope.angles(index.entry_positions, compressed=True)
                angles[ratio] = _LayerAngles(compressed, entries)
        return angles


class _CachedAttention:
    """The attention sublayer of one layer in one forward: its parameters, indices and cache."""

    def __init__(
        self,
        attention: Attention,
        window: PoolIndex,
        compressed: CompressIndex | None,
        angles: _LayerAngles,
        cache: LayerCache,
    ) -> None:
        self.attention, self.window, self.compressed = attention, window, compressed
        self.angles, self.cache = angles, cache

    def forward_at(self, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """The sublayer as a function of its normed input [N, d]."""

        def attend(hidden: Tensor) -> Tensor:
            attention, angles, window = self.attention, self.angles.rows, self.window
            q_latent = attention.q_latent(hidden)
            query = attention.query(q_latent, angles)
            attention.store_keys(hidden, angles, self.cache.window, window.slot_mapping)
            entry_keys, entry_index = self._entries(hidden, q_latent, positions)
            values = ops.sparse_attention(
                query,
                self.cache.window,
                window.keys,
                entry_keys,
                entry_index,
                attention.attn_sink,
                attention.config.head_dim**-0.5,
                angles.cos,
                angles.sin,
            )
            if window.moves is not None:
                window.moves.apply(self.cache.window)
            return attention.output(values)

        return attend

    def _entries(self, hidden: Tensor, q_latent: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Write the entries that close in this forward; (entries, index of those that every row sees)."""
        index, cache, attention = self.compressed, self.cache, self.attention
        if index is None:
            return None, None
        self._store(attention.compressor, cache.raw, cache.entries, hidden, positions)
        if cache.index_raw is None:
            return cache.entries, index.visible
        indexer = attention.indexer
        self._store(indexer.compressor, cache.index_raw, cache.index_entries, hidden, positions)
        if index.visible.shape[1] <= indexer.topk:  # every visible entry is chosen
            return cache.entries, index.visible
        assert cache.index_entries is not None
        query, weights = indexer.query(hidden, q_latent, self.angles.rows)
        chosen = ops.indexer_topk(query, weights, cache.index_entries, index.visible, indexer.topk)
        return cache.entries, chosen

    def _store(
        self,
        compressor: Compressor,
        raw: Tensor | None,
        entries: Tensor | None,
        hidden: Tensor,
        positions: Tensor,
    ) -> None:
        """Write raw rows, then pool windows that close and write their entries."""
        assert self.compressed is not None and raw is not None and entries is not None
        index, pool, angles = self.compressed, self.compressed.pool, self.angles.entries
        compressor.store_raw(hidden, positions, raw, pool.slot_mapping)
        if len(index.store_entries):
            assert angles is not None
            quantise = self.attention.config.kv_fake_quant and entries is self.cache.entries
            compressor.store_entries(raw, pool.keys, angles, entries, index.store_entries, quantise)
        if pool.moves is not None:
            pool.moves.apply(raw)
