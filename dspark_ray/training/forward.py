"""Full-sequence forwards for training: parameters and formulas of serving, without a cache.

Serving gathers keys by index, row by row. Here complete sequences of equal length are given, so the window is a band of
dense chunks and compressed entries are one matrix. A test compares the two.

Letters as in dspark_ray.config, with B sequences of T tokens each, N = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import dspark_kernels as ops
from dspark_ray.drafters.dspark import BlockOutput, DSparkModule
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.layers import Attention, Compressor, DecoderLayer
from dspark_ray.model.rope import Angles


@dataclass(frozen=True)
class TrainingOutput:
    """[N, d] input of the LM head, and context features [N, T*d] if the model has a drafter."""

    hidden: Tensor
    context_features: Tensor | None


def target_forward(model: DeepSeekV4, token_ids: Tensor) -> TrainingOutput:
    """Run the target on token_ids [B, T]; raises ValueError unless T is a multiple of the window and of every ratio.

    Every visible CSA entry is attended to: sequences longer than index_topk * 4 need the serving forward.
    """
    config = model.config
    num_sequences, length = token_ids.shape
    for unit in (config.sliding_window, *(ratio for ratio in config.compress_ratios if ratio)):
        if length % unit:
            raise ValueError(f"sequence length {length}: expected a multiple of {unit}")
    flat = token_ids.flatten()
    positions = torch.arange(length).repeat(num_sequences)
    angles = {compressed: model.rope.angles(positions, compressed=compressed) for compressed in (False, True)}
    streams, taps = model.embed_streams(flat), []
    tapped = config.dspark.target_layer_ids if config.dspark else ()
    for number, decoder_layer in enumerate(model.layers):
        assert isinstance(decoder_layer, DecoderLayer)
        attention = decoder_layer.attn
        entry_angles = None
        if attention.ratio:
            entry_angles = model.rope.angles(torch.arange(0, length, attention.ratio), compressed=True)

        def attend(
            hidden: Tensor, attention: Attention = attention, entry_angles: Angles | None = entry_angles
        ) -> Tensor:
            return _attend(attention, hidden, positions, num_sequences, angles[attention.ratio > 0], entry_angles)

        streams = decoder_layer(streams, flat, attend)
        if number in tapped:
            taps.append(streams.mean(dim=1))
    return TrainingOutput(model.final_hidden(streams), torch.cat(taps, dim=-1) if taps else None)


def _attend(
    attention: Attention,
    hidden: Tensor,
    positions: Tensor,
    num_sequences: int,
    angles: Angles,
    entry_angles: Angles | None,
) -> Tensor:
    """Dense attention over [previous W positions ++ own W positions ++ compressed entries]."""
    window, length = attention.config.sliding_window, len(hidden) // num_sequences
    chunks = (num_sequences, length // window, window)  # B, J, W
    query = attention.query(attention.q_latent(hidden), angles).unflatten(0, chunks)  # [B, J, W, H, D]
    own = attention.keys(hidden, angles).unflatten(0, chunks)
    before = torch.nn.functional.pad(own, (0, 0, 0, 0, 1, 0))[:, :-1]
    keys = torch.cat((before, own), dim=2)  # [B, J, 2W, D]
    visible = _band(length, window)
    scale = attention.config.head_dim**-0.5
    logits = torch.einsum("bjqhd,bjkd->bjhqk", query, keys) * scale
    logits = [logits.masked_fill(~visible.unsqueeze(1), float("-inf"))]
    if attention.ratio:
        assert entry_angles is not None
        entries = _entries(attention, attention.compressor, hidden, positions, num_sequences, entry_angles)
        seen = torch.arange(entries.shape[1]) < ((torch.arange(length) + 1) // attention.ratio).unsqueeze(1)
        entry_logits = torch.einsum("bjqhd,bkd->bjhqk", query, entries) * scale
        mask = ~seen.unflatten(0, chunks[1:]).unsqueeze(1)  # [J, 1, W, K]
        logits.append(entry_logits.masked_fill(mask, float("-inf")))
    sink = attention.attn_sink.view(1, 1, -1, 1, 1).expand(*logits[0].shape[:-1], 1)
    joined = torch.cat((*logits, sink), dim=-1)
    probabilities = torch.softmax(joined, dim=-1)
    values = torch.einsum("bjhqk,bjkd->bjqhd", probabilities[..., : 2 * window], keys)
    if attention.ratio:
        values = values + torch.einsum("bjhqk,bkd->bjqhd", probabilities[..., 2 * window : -1], entries)
    return attention.output(ops.rope(values.flatten(0, 2), angles.cos, angles.sin, inverse=True))


def _band(length: int, window: int) -> Tensor:
    """[J, W, 2W]: query q of chunk j sees the last W positions up to itself."""
    query = torch.arange(length).unflatten(0, (-1, window)).unsqueeze(2)  # [J, W, 1]
    start = torch.arange(0, length, window).view(-1, 1, 1)
    key = start - window + torch.arange(2 * window)  # [J, 1, 2W]
    return (key >= 0) & (key <= query) & (key > query - window)


def _entries(
    attention: Attention,
    compressor: Compressor,
    hidden: Tensor,
    positions: Tensor,
    num_sequences: int,
    angles: Angles,
) -> Tensor:
    """All entries [B, T/r, D]; in an overlapping compressor entry 0 has no previous window."""
    ratio = compressor.ratio
    kv, gate = compressor.raw(hidden)
    raw = torch.cat((kv, gate + compressor.ape[positions % ratio]), dim=-1)
    raw = raw.unflatten(0, (num_sequences, -1, ratio))  # [B, K, r, C]
    valid = None
    if compressor.num_series == 2:
        before = torch.nn.functional.pad(raw, (0, 0, 0, 0, 1, 0))[:, :-1]
        raw = torch.cat((before, raw), dim=2)
        valid = torch.ones(raw.shape[:3], dtype=torch.bool)
        valid[:, 0, :ratio] = False
        valid = valid.flatten(0, 1)
    repeated = Angles(angles.cos.repeat(num_sequences, 1), angles.sin.repeat(num_sequences, 1))
    kv, gate = raw.flatten(0, 1).chunk(2, dim=-1)
    pooled = compressor.pooled(kv, gate, valid, repeated, hidden.dtype)
    return attention.stored(pooled).unflatten(0, (num_sequences, -1))


def draft_forward(
    drafter: DSparkModule, features: Tensor, token_ids: Tensor, sequences: Tensor, starts: Tensor
) -> BlockOutput:
    """Draft blocks at A sampled anchors: anchor i is the token of sequence sequences[i] at position starts[i].

    features [N, T*d] are context features of token_ids [B, T]; an anchor at n has context n-W .. n-1.
    """
    num_sequences, length = token_ids.shape
    window = drafter.config.sliding_window
    positions = torch.arange(length).repeat(num_sequences)
    wanted = starts.unsqueeze(1) + torch.arange(-window, 0)  # [A, W]
    visible = wanted >= 0
    rows = sequences.unsqueeze(1) * length + wanted.clamp_min(0)
    keys = drafter.context_keys(drafter.project(features), positions)
    context = [stage_keys[rows] for stage_keys in keys]
    return drafter.block(token_ids[sequences, starts], starts, context, visible)
