"""The operations of a DSpark round in plain torch: what every kernel of the same name must reproduce.

Every function is differentiable where that makes sense, allocates its result, and computes in float32 where the
official program does; activations keep the dtype they came in.

Letters: N rows, H heads, D head_dim, d hidden size, m streams, E experts, I expert width, K keys per row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FP8_MAX = 448.0
_FP8_AMAX_FLOOR = 1e-4
# Below both, computing every expert for every row costs less than the launches that choosing would take.
_DENSE_MAX_EXPERTS, _DENSE_MAX_ROWS = 16, 64


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, times `weight` where there is one; computed in float32."""
    weight = None if weight is None else weight.float()
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate adjacent pairs of the last `2 * cos.shape[-1]` channels of x [N, ..., D] by angles cos/sin [N, Dr/2].

    Source: DeepSeek-V4 specification 1.2 (interleaved pairs, rotary part last, float32 arithmetic).
    """
    rotary_dims = 2 * cos.shape[-1]
    # A pair is a complex number, and turning it is one product.
    turn = torch.complex(cos, -sin if inverse else sin)
    turn = turn.view(len(turn), *(1,) * (x.dim() - 2), turn.shape[-1])
    plain, rotary = x.split((x.shape[-1] - rotary_dims, rotary_dims), dim=-1)
    pairs = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)


def _mhc_project(streams: Tensor, fn: Tensor, rms_eps: float) -> tuple[Tensor, Tensor]:
    flat = streams.float().flatten(-2)  # [N, m*d], stream-major
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    return flat, F.linear(flat, fn) * inverse_rms


def mhc_read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse residual streams [N, m, d] to a sublayer input and the two mixes that `mhc_write` needs.

    Returns (u [N, d] in the streams' dtype, post [N, m] float32, comb [N, m, m] float32, doubly stochastic).
    Source: DeepSeek-V4 specification 2.1 (one row softmax, `iters` column steps, `iters - 1` row steps).
    """
    m = streams.shape[-2]
    _, z = _mhc_project(streams, fn, rms_eps)  # [N, (2+m)*m]
    pre = torch.sigmoid(z[:, :m] * scale[0] + base[:m]) + eps
    post = 2 * torch.sigmoid(z[:, m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = (z[:, 2 * m :] * scale[2] + base[2 * m :]).unflatten(-1, (m, m))
    comb = torch.softmax(comb, dim=-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    collapsed = torch.bmm(pre.unsqueeze(1), streams.float()).squeeze(1)
    return collapsed.to(streams.dtype), post, comb


def mhc_write(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_k = post_k * out + sum_j comb[j, k] X_j: put a sublayer's output [N, d] back into the streams [N, m, d]."""
    kept = torch.bmm(comb.transpose(1, 2), streams.float())
    return torch.addcmul(kept, post.unsqueeze(-1), out.float().unsqueeze(1)).to(streams.dtype)


def mhc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    """Collapse streams [N, m, d] to [N, d] in front of a final norm (no mixes, no Sinkhorn)."""
    _, z = _mhc_project(streams, fn, rms_eps)
    weights = torch.sigmoid(z * scale + base) + eps
    return torch.bmm(weights.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)


def fake_quant_fp8(x: Tensor, num_channels: int, group_size: int = 64) -> Tensor:
    """Round the first `num_channels` of x's last dimension to E4M3 with a power-of-two scale per `group_size`.

    Source: KV rounding of the official program (DSpark module specification, section 4).
    """
    head, tail = x.split((num_channels, x.shape[-1] - num_channels), dim=-1)
    groups = head.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(_FP8_AMAX_FLOOR)
    scale = torch.exp2(torch.ceil(torch.log2(amax / _FP8_MAX)))
    rounded = (groups / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return torch.cat((rounded.flatten(-2).to(x.dtype), tail), dim=-1)


def compress(kv: Tensor, gate: Tensor, valid: Tensor | None = None) -> Tensor:
    """Pool raw rows kv, gate [E, S, D] into entries [E, D] by a softmax over the S slots, channel by channel.

    `valid` [E, S] marks the slots that exist; the others may hold anything, NaN included.
    Source: DeepSeek-V4 specification 2.3.
    """
    if valid is not None:
        gate = torch.where(valid.unsqueeze(-1), gate, float("-inf"))
        kv = torch.where(valid.unsqueeze(-1), kv, 0.0)
    return (torch.softmax(gate, dim=1) * kv).sum(1)


def indexer_topk(query: Tensor, head_weights: Tensor, keys: Tensor, entry_index: Tensor, topk: int) -> Tensor:
    """Choose the `topk` best-scoring visible entries of every row.

    query [N, Hi, Di], head_weights [N, Hi], keys [P, Di], entry_index [N, K] into keys with -1 for invisible.
    Returns [N, min(topk, K)] of entry_index's values, -1 where a row sees fewer. Ties go to the lower entry.
    """
    gathered = keys[entry_index.clamp_min(0)].to(query.dtype)  # [N, K, Di]
    scores = torch.einsum("nhd,nkd->nhk", query, gathered).relu()
    scores = torch.einsum("nh,nhk->nk", head_weights.to(scores.dtype), scores).float()
    scores = scores.masked_fill(entry_index < 0, float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return entry_index.gather(1, order)


def sparse_attention(
    query: Tensor,
    window_keys: Tensor,
    window_index: Tensor,
    entry_keys: Tensor | None,
    entry_index: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
) -> Tensor:
    """Attention of query [N, H, D] over keys chosen by index, each key being its own value.

    window_index [N, Kw] points into window_keys [P, D], entry_index [N, Ke] into entry_keys; -1 is no key.
    `sink` [H] is one more logit that only enters the denominator. Returns [N, H, D].
    Source: DeepSeek-V4 specification 2.2.
    """
    keys, index = _chosen(window_keys, window_index), window_index
    if entry_keys is not None and entry_index is not None and entry_index.shape[1]:
        keys = torch.cat((keys, _chosen(entry_keys, entry_index).to(keys.dtype)), dim=1)
        index = torch.cat((index, entry_index), dim=1)
    missing = index < 0  # [N, K]
    keys = keys.masked_fill(missing.unsqueeze(2), 0.0)  # a slot nobody wrote may hold NaN
    logits = torch.bmm(query, keys.transpose(1, 2)).float() * softmax_scale
    logits = logits.masked_fill(missing.unsqueeze(1), float("-inf"))
    logits = torch.cat((logits, sink.float().view(1, -1, 1).expand(len(query), -1, 1)), dim=-1)
    probabilities = torch.softmax(logits, dim=-1)[..., :-1]
    return torch.bmm(probabilities.to(query.dtype), keys)


def _chosen(keys: Tensor, index: Tensor) -> Tensor:
    """keys [P, D] at index [N, K]: [N, K, D], anything where the index is -1."""
    return keys.index_select(0, index.clamp_min(0).flatten()).view(*index.shape, -1)


def route(
    hidden: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    hash_experts: Tensor | None,
    top_k: int,
    scale: float,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    """Choose experts: by `hash_experts` [N, top_k] where given, else the best of score + bias.

    Returns (weights [N, top_k] float32, experts [N, top_k]). Source: DeepSeek-V4 specification 2.6.
    """
    scores = F.softplus(F.linear(hidden.float(), gate.float())).sqrt()
    if hash_experts is not None:
        experts = hash_experts
    else:
        experts = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if norm:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, experts


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def moe(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    first_expert: int = 0,
) -> Tensor:
    """Routed experts of rows hidden [N, d]: sum over k of weights[:, k] * expert(experts[:, k]).

    w13 [E, 2I, d] holds the gate rows first, w2 [E, d, I]; E experts numbered from `first_expert`, the
    others belong to other ranks and add nothing. Returns [N, d] in float32.
    """
    if w13.shape[0] <= _DENSE_MAX_EXPERTS and hidden.shape[0] <= _DENSE_MAX_ROWS:
        return _moe_dense(hidden, weights, experts, w13, w2, limit, first_expert)
    return _moe_grouped(hidden, weights, experts, w13, w2, limit, first_expert)


def _moe_dense(
    hidden: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor, limit: float, first_expert: int
) -> Tensor:
    """Every local expert on every row: fewest launches where rows or experts are few."""
    num_experts = w13.shape[0]
    local = experts - first_expert
    mine = (local >= 0) & (local < num_experts)
    mix = weights.new_zeros(hidden.shape[0], num_experts)
    mix = mix.scatter_add(1, local.clamp(0, num_experts - 1), weights * mine)  # [N, E]
    rows = hidden.unsqueeze(0).expand(num_experts, -1, -1)
    gate, up = torch.bmm(rows, w13.transpose(1, 2)).float().chunk(2, dim=-1)
    inner = swiglu(gate, up, limit) * mix.t().unsqueeze(-1)
    return torch.bmm(inner.to(hidden.dtype), w2.transpose(1, 2)).float().sum(0)


def _moe_grouped(
    hidden: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor, limit: float, first_expert: int
) -> Tensor:
    """Rows sorted by expert, one product per expert that anybody chose."""
    top_k = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=first_expert + w13.shape[0]).tolist()
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    start = sum(counts[:first_expert])
    for expert in range(w13.shape[0]):
        chosen = order[start : start + counts[first_expert + expert]]
        start += len(chosen)
        if len(chosen) == 0:
            continue
        rows = chosen // top_k
        gate, up = F.linear(hidden[rows], w13[expert]).float().chunk(2, dim=-1)
        inner = swiglu(gate, up, limit) * weights.flatten()[chosen].unsqueeze(-1)
        out = out.index_add(0, rows, F.linear(inner.to(hidden.dtype), w2[expert]).float())
    return out
