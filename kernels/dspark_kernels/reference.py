"""The operations of a DSpark round in plain torch; the kernel of the same name must reproduce each.

Functions allocate their results, except the three that write the cache (`store_window`, `store_raw`, `compress`).
They compute in float32 where the official program does; activations keep the dtype they came in.

Letters: N rows, R requests, G gamma, H heads, D head_dim, Dr rotary channels of it, d hidden size, m streams,
V vocabulary, r rank of the Markov head, E experts, I expert width, K keys per row, P rows of a pool (a cache tensor).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import (
    ACTIVATION_GROUP,
    KEY_GROUP,
    dequantise_fp4,
    dequantise_fp8,
    pack_keys,
    round_fp8,
    unpack_keys,
)
from .philox import STREAM_ACCEPT, STREAM_RECOVER, STREAM_SAMPLE, gumbel_noise, uniform_noise

# Up to both, computing every expert for every row costs less than launching a product per chosen expert.
_DENSE_MAX_EXPERTS, _DENSE_MAX_ROWS = 16, 64


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, times `weight` where there is one; computed in float32."""
    weight = None if weight is None else weight.float()
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate adjacent pairs of the last `2 * cos.shape[-1]` channels of x [N, ..., D] by angles cos/sin [N, Dr/2].

    Interleaved pairs, rotary part last, float32 arithmetic. See docs/model.md, Attention.
    """
    rotary_dims = 2 * cos.shape[-1]
    # A pair is a complex number, and its rotation one product.
    turn = torch.complex(cos, -sin if inverse else sin)
    turn = turn.view(len(turn), *(1,) * (x.dim() - 2), turn.shape[-1])
    plain, rotary = x.split((x.shape[-1] - rotary_dims, rotary_dims), dim=-1)
    pairs = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`rms_norm`, then `rope`: x [N, D] or [N, H, D] over its last dimension."""
    return rope(rms_norm(x, weight, eps), cos, sin)


def _mhc_project(streams: Tensor, fn: Tensor, rms_eps: float) -> tuple[Tensor, Tensor]:
    flat = streams.float().flatten(-2)  # [N, m*d], stream-major
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    return flat, F.linear(flat, fn) * inverse_rms


def mhc_read(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse residual streams [N, m, d] to a sublayer input, and compute the two mixes for `mhc_write`.

    fn [(2+m)m, m*d], base [(2+m)m], scale [3], all float32; norm [d] is the weight of the sublayer's own RMS norm.
    Returns (u [N, d] normed, in the streams' dtype, post [N, m] float32, comb [N, m, m] float32, doubly stochastic:
    one row softmax, `iters` column steps, `iters - 1` row steps). See docs/model.md, Hyper-connections.
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
    collapsed = torch.bmm(pre.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)
    return rms_norm(collapsed, norm, rms_eps), post, comb


def mhc_write(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_k = post_k * out + sum_j comb[j, k] X_j: write a sublayer's output [N, d] into the streams [N, m, d]."""
    kept = torch.bmm(comb.transpose(1, 2), streams.float())
    return torch.addcmul(kept, post.unsqueeze(-1), out.float().unsqueeze(1)).to(streams.dtype)


def mhc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    """Collapse streams [N, m, d] to [N, d] before a final norm (no mixes, no Sinkhorn)."""
    _, z = _mhc_project(streams, fn, rms_eps)
    weights = torch.sigmoid(z * scale + base) + eps
    return torch.bmm(weights.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)


def fake_quant_fp8(x: Tensor, num_channels: int, group_size: int = KEY_GROUP) -> Tensor:
    """Round the first `num_channels` of x's last dimension to E4M3 with a power-of-two scale per `group_size`.

    This is the key rounding of the official program. See docs/model.md, Quantisation.
    """
    head, tail = x.split((num_channels, x.shape[-1] - num_channels), dim=-1)
    values, scale = round_fp8(head, group_size)
    return torch.cat(((values.float() * scale).flatten(-2).to(x.dtype), tail), dim=-1)


def store_window(
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    quantise: bool = False,
) -> None:
    """Norm and rotate keys of N tokens, round them to FP8 with `quantise`, write them to rows slot_mapping [N].

    kv [N, D] as projected; pool [P, D], or uint8 [P, packed_key_bytes], which always holds rounded values.
    See docs/model.md, Attention and KV cache.
    """
    _store_keys(norm_rope(kv, weight, eps, cos, sin), pool, slot_mapping, 2 * cos.shape[-1], quantise)


def _store_keys(keys: Tensor, pool: Tensor, slot_mapping: Tensor, rotary_dims: int, quantise: bool) -> None:
    if pool.dtype == torch.uint8:
        pool[slot_mapping] = pack_keys(keys, rotary_dims)
    else:
        keys = fake_quant_fp8(keys, keys.shape[-1] - rotary_dims) if quantise else keys
        pool[slot_mapping] = keys.to(pool.dtype)


def store_raw(kv: Tensor, gate: Tensor, ape: Tensor, positions: Tensor, pool: Tensor, slot_mapping: Tensor) -> None:
    """Write compressor rows of N tokens: pool[slot_mapping] = [kv | gate + ape[position mod ratio]] in float32.

    kv, gate [N, C]; ape [ratio, C] float32; pool [P, 2C] float32; positions, slot_mapping [N].
    See docs/model.md, Compression.
    """
    pool[slot_mapping] = torch.cat((kv.float(), gate.float() + ape[positions % len(ape)]), dim=-1)


def softmax_pool(kv: Tensor, gate: Tensor, valid: Tensor | None = None) -> Tensor:
    """Pool raw rows kv, gate [E, S, D] into [E, D] by a softmax over the S rows, channel by channel.

    `valid` [E, S] marks the rows that exist; the others may hold anything, NaN included.
    See docs/model.md, Compression.
    """
    if valid is not None:
        gate = torch.where(valid.unsqueeze(-1), gate, float("-inf"))
        kv = torch.where(valid.unsqueeze(-1), kv, 0.0)
    return (torch.softmax(gate, dim=1) * kv).sum(1)


def overlapping(rows: Tensor) -> Tensor:
    """[E, 2r, D] of rows [E, 2r, 2D]: series A (first D channels) of the first r rows, series B of the others."""
    first, second = rows.chunk(2, dim=1)
    width = rows.shape[-1] // 2
    return torch.cat((first[..., :width], second[..., width:]), dim=1)


def compress(
    pool: Tensor,
    index: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    entries: Tensor,
    store_entries: Tensor,
    quantise: bool = False,
) -> None:
    """Write entries of E closing windows: pool their raw rows, norm, rotate, round to FP8 with `quantise`.

    pool [P, 2C] float32 as `store_raw` writes it; index [E, S] its rows of each window, -1 before position 0;
    C is D, or 2D where windows overlap (S = 2r: series A of the first r rows, series B of the others).
    weight [D] of the norm; cos, sin [E, Dr/2] of each window's first token. entries [Q, D] or uint8 packed;
    store_entries [E] its rows to write, -1 for a window that does not close.
    See docs/model.md, Compression.
    """
    closes = store_entries >= 0
    if not closes.all():
        index, cos, sin, store_entries = (rows[closes] for rows in (index, cos, sin, store_entries))
    kv, gate = pool[index.clamp_min(0)].chunk(2, dim=-1)
    if kv.shape[-1] == 2 * len(weight):
        kv, gate = overlapping(kv), overlapping(gate)
    dtype = weight.dtype if entries.dtype == torch.uint8 else entries.dtype
    pooled = softmax_pool(kv, gate, index >= 0).to(dtype)
    keys = norm_rope(pooled, weight, eps, cos, sin)
    _store_keys(keys, entries, store_entries, 2 * cos.shape[-1], quantise)


def indexer_topk(query: Tensor, head_weights: Tensor, keys: Tensor, entry_index: Tensor, topk: int) -> Tensor:
    """Choose the `topk` visible entries of every row with the highest scores.

    query [N, Hi, Di], head_weights [N, Hi], keys [P, Di], entry_index [N, K] into keys, -1 behind the visible ones.
    score = sum over h of head_weights[h] * relu(query[h] . key). Ties go to the earlier entry.
    Returns [N, min(topk, K)] of entry_index's values in their order, -1 behind them where a row sees fewer.
    See docs/model.md, Indexer.
    """
    gathered = keys[entry_index.clamp_min(0)].to(query.dtype)  # [N, K, Di]
    scores = torch.einsum("nhd,nkd->nhk", query, gathered).float().relu()
    scores = torch.einsum("nh,nhk->nk", head_weights.float(), scores)
    scores = scores.masked_fill(entry_index < 0, float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return entry_index.gather(1, order.sort(dim=-1).values)


def sparse_attention(
    query: Tensor,
    window_keys: Tensor,
    window_index: Tensor,
    entry_keys: Tensor | None,
    entry_index: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attention of query [N, H, D] over keys chosen by index, each key being its own value.

    window_index [N, Kw] points into window_keys [P, D], entry_index [N, Ke] into entry_keys [Q, D]; -1 is no key, and
    in entry_index stands behind all keys. Keys may be packed (uint8). `sink` [H] is one more logit that only enters
    the denominator. With cos, sin [N, Dr/2] the results' last Dr channels are rotated back by those angles.
    Returns [N, H, D]. See docs/model.md, Attention.
    """
    head_dim, rotary_dims = query.shape[-1], 0 if cos is None else 2 * cos.shape[-1]
    keys, index = _chosen(window_keys, window_index, head_dim, rotary_dims).to(query.dtype), window_index
    if entry_keys is not None and entry_index is not None and entry_index.shape[1]:
        entries = _chosen(entry_keys, entry_index, head_dim, rotary_dims).to(query.dtype)
        keys, index = torch.cat((keys, entries), dim=1), torch.cat((index, entry_index), dim=1)
    missing = index < 0  # [N, K]
    keys = keys.masked_fill(missing.unsqueeze(2), 0.0)  # an unwritten row may hold NaN
    logits = torch.bmm(query, keys.transpose(1, 2)).float() * softmax_scale
    logits = logits.masked_fill(missing.unsqueeze(1), float("-inf"))
    logits = torch.cat((logits, sink.float().view(1, -1, 1).expand(len(query), -1, 1)), dim=-1)
    probabilities = torch.softmax(logits, dim=-1)[..., :-1]
    values = torch.bmm(probabilities.to(query.dtype), keys)
    if cos is None or sin is None:
        return values
    return rope(values, cos, sin, inverse=True)


def _chosen(keys: Tensor, index: Tensor, head_dim: int, rotary_dims: int) -> Tensor:
    """[N, K, D] of keys [P, D], or packed keys, at index [N, K]; arbitrary where the index is -1."""
    rows = keys.index_select(0, index.clamp_min(0).flatten())
    if keys.dtype == torch.uint8:
        rows = unpack_keys(rows, head_dim, rotary_dims)
    return rows.view(*index.shape, head_dim)


def route(
    hidden: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    hash_experts: Tensor | None,
    top_k: int,
    scale: float,
    norm: bool,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts: `hash_experts` [N, top_k] where given, else those with the highest score + bias.

    Rows marked by `padding` [N] (bool) get expert -1, which is none, and arbitrary weights.

    Returns (weights [N, top_k] float32, experts [N, top_k]). Chosen experts are distinct and in range for any scores;
    NaN counts as a highest score, and makes weights NaN. See docs/model.md, Experts.
    """
    scores = F.softplus(F.linear(hidden.float(), gate.float())).sqrt()
    if hash_experts is not None:
        experts = hash_experts
    else:
        experts = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if norm:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, experts if padding is None else experts.masked_fill(padding.unsqueeze(1), -1)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [N, in] times an FP8 weight [out, in] with one scale per tile; x is first rounded to FP8 per 128 channels.

    Returns [N, out] in x's dtype. See docs/model.md, Quantisation.
    """
    rounded = _rounded_activations(x)
    return F.linear(rounded.float(), dequantise_fp8(weight, scale)).to(x.dtype)


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [out, in], both as stored, summed and returned in float32."""
    return F.linear(x.float(), weight.float())


def _rounded_activations(x: Tensor) -> Tensor:
    values, scale = round_fp8(x, ACTIVATION_GROUP)
    return (values.float() * scale).flatten(-2).to(x.dtype)


def moe(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    num_experts: int,
    first_expert: int = 0,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
) -> Tensor:
    """Routed experts of rows hidden [N, d]: sum over k of weights[:, k] * expert(experts[:, k]).

    w13 [E, 2I, d] holds the gate rows first, w2 [E, d, I]: this rank's experts, numbers first_expert ..
    first_expert + E - 1 of the layer's `num_experts`. Experts of other ranks add nothing, nor does expert -1, which
    padding rows have. Returns [N, d] in float32.

    Quantised weights come with scales: FP8 (E4M3, [E, ceil(2I/128), ceil(d/128)]) or FP4 (int8 [E, 2I, d/2] with
    scales [E, 2I, d/32]). Then the inputs of both products are rounded to FP8 per 128 channels, as the official
    program does; I must be a multiple of 128, so that no scale tile holds both gate and up rows.
    """
    check_expert_range(num_experts, first_expert, len(w13))
    if w13_scale is not None and w2_scale is not None:
        return _moe_quantised(hidden, weights, experts, (w13, w13_scale), (w2, w2_scale), limit, first_expert)
    if w13.shape[0] <= _DENSE_MAX_EXPERTS and hidden.shape[0] <= _DENSE_MAX_ROWS:
        return _moe_dense(hidden, weights, experts, w13, w2, limit, first_expert)
    return _moe_grouped(hidden, weights, experts, w13, w2, limit, first_expert)


def check_expert_range(num_experts: int, first_expert: int, num_local_experts: int) -> None:
    """Raise ValueError unless a rank's experts are a part of the layer's."""
    last = first_expert + num_local_experts - 1
    if first_expert < 0 or last >= num_experts:
        raise ValueError(f"experts {first_expert} .. {last} of {num_experts}: expected some of 0 .. {num_experts - 1}")


def _moe_quantised(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    w13: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    limit: float,
    first_expert: int,
) -> Tensor:
    """One expert at a time, dequantised only if a row chose it."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    rounded = _rounded_activations(hidden).float()
    for expert in range(len(w13[0])):
        rows, places = (experts == first_expert + expert).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate, up = F.linear(rounded[rows], _dequantised(*w13, expert)).chunk(2, dim=-1)
        inner = (swiglu(gate, up, limit) * weights[rows, places].unsqueeze(-1)).to(hidden.dtype)
        inner = _rounded_activations(inner).float()
        out = out.index_add(0, rows, F.linear(inner, _dequantised(*w2, expert)))
    return out


def _dequantised(weight: Tensor, scale: Tensor, expert: int) -> Tensor:
    dequantise = dequantise_fp8 if weight.dtype == torch.float8_e4m3fn else dequantise_fp4
    return dequantise(weight[expert], scale[expert])


def _moe_dense(
    hidden: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor, limit: float, first_expert: int
) -> Tensor:
    """Every local expert on every row: fewest launches where rows or experts are few."""
    num_experts = w13.shape[0]
    local = experts - first_expert
    mine = (local >= 0) & (local < num_experts)
    mix = weights.new_zeros(hidden.shape[0], num_experts)
    mix = mix.scatter_add(1, local.clamp(0, num_experts - 1), weights.where(mine, 0.0))  # [N, E]
    rows = hidden.unsqueeze(0).expand(num_experts, -1, -1)
    gate, up = torch.bmm(rows, w13.transpose(1, 2)).float().chunk(2, dim=-1)
    inner = swiglu(gate, up, limit) * mix.t().unsqueeze(-1)
    return torch.bmm(inner.to(hidden.dtype), w2.transpose(1, 2)).float().sum(0)


def _moe_grouped(
    hidden: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor, limit: float, first_expert: int
) -> Tensor:
    """Rows sorted by expert, one product per chosen expert."""
    num_experts, top_k = w13.shape[0], experts.shape[1]
    local = experts.flatten() - first_expert
    # The number after the last local expert stands for experts of other ranks.
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    order = local.argsort(stable=True)
    counts = torch.bincount(local, minlength=num_experts).tolist()
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    start = 0
    for expert in range(num_experts):
        chosen = order[start : start + counts[expert]]
        start += len(chosen)
        if len(chosen) == 0:
            continue
        rows = chosen // top_k
        gate, up = F.linear(hidden[rows], w13[expert]).float().chunk(2, dim=-1)
        inner = swiglu(gate, up, limit) * weights.flatten()[chosen].unsqueeze(-1)
        out = out.index_add(0, rows, F.linear(inner.to(hidden.dtype), w2[expert]).float())
    return out


def edit_logits(
    logits: Tensor, rows: Tensor, token_ids: Tensor, factors: Tensor, offsets: Tensor, first_id: int = 0
) -> Tensor:
    """logits [n, V] with some of them changed: x -> (x / factor if x > 0 else x * factor) + offset.

    rows, token_ids, factors, offsets [m], each pair (row, token) at most once; the columns stand for token ids
    first_id .. first_id + V - 1, and pairs of other token ids are ignored: they belong to other ranks. Returns
    float32 [n, V].
    """
    local = (token_ids >= first_id) & (token_ids < first_id + logits.shape[1])
    where = (rows[local], token_ids[local] - first_id)
    old, factors = logits.float()[where], factors[local]
    new = torch.where(old > 0, old / factors, old * factors) + offsets[local]
    return logits.float().index_put(where, new)


def apply_temperature(logits: Tensor, temperatures: Tensor) -> Tensor:
    """float32 logits [n, V] / temperatures [n]; rows with temperature 0 stay as they are."""
    divisors = torch.where(temperatures > 0, temperatures, 1.0)
    return logits.float() / divisors.float().unsqueeze(1)


def filter_threshold(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, widest_top_k: int
) -> Tensor:
    """[n] lowest logit, after temperature, that top_k, then top_p, then min_p keep in each row of logits [n, V].

    top_k [n] int64, limited to `widest_top_k`; top_p, min_p [n] float64. The best token always stays. A
    filter is a threshold: tokens that tie with a kept one stay, and how a device sorts equal logits does not matter.
    NaN for rows that hold NaN or +inf.
    """
    width = min(widest_top_k, logits.shape[1])
    best = apply_temperature(logits, temperatures).topk(width).values  # [n, width], best first
    last = top_k.clamp(max=width).unsqueeze(1) - 1
    lowest = torch.maximum(best.gather(1, last), _lowest_of_top_p(best, last, top_p.unsqueeze(1)))
    lowest = torch.maximum(lowest, best[:, :1] + min_p.log().float().unsqueeze(1))
    return torch.where(best[:, :1] < torch.inf, lowest, torch.nan).squeeze(1)  # NaN sorts before inf


def _lowest_of_top_p(best: Tensor, last: Tensor, top_p: Tensor) -> Tensor:
    """[n, 1] lowest logit of the smallest set of the first last+1 tokens whose probability reaches top_p."""
    outside = torch.arange(best.shape[1], device=best.device) > last
    probabilities = best.masked_fill(outside, -torch.inf).double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    # In rows without top_p rounding must not cut the tail.
    return torch.where(top_p < 1, best.gather(1, count - 1), -torch.inf)


def gumbel_argmax(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    first_id: int = 0,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One draw per row from a shard of the vocabulary: (values [n], token ids [n] int64, log-sum-exp [n]).

    x = logits [n, V] / temperature, or the logits at temperature 0. The value is the largest x + noise(seed, position,
    token id), without noise at temperature 0, among tokens with x >= threshold [n]; of equal ones the lowest id wins.
    The log-sum-exp is that of all x. Columns stand for token ids from first_id on. Values are float32.

    A row without a possible token has id -1. If some x is NaN or +inf there is no softmax: the value is NaN, which
    `argmax` over shards takes for the largest, and the log-sum-exp is not finite. If no kept token has x above -inf
    the value is -inf, and another shard may have a larger one.
    """
    scaled = apply_temperature(logits, temperatures)
    kept = scaled if threshold is None else scaled.masked_fill(scaled < threshold.unsqueeze(1), -torch.inf)
    sampled = temperatures > 0
    if sampled.any():
        noise = gumbel_noise(seeds, positions, stream, first_id, logits.shape[1])
        kept = kept + noise * sampled.unsqueeze(1)
    values, ids = kept.max(-1)
    log_sums = scaled.logsumexp(-1)
    values = torch.where(log_sums < torch.inf, values, torch.nan)
    return values, torch.where(values > -torch.inf, ids + first_id, -1), log_sums


def markov_sample(
    base_logits: Tensor,
    anchors: Tensor,
    w1: Tensor,
    w2: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    filters: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draft left to right: token k = argmax(x_k + noise), x_k = (base_logits[:, k] + W2 . W1[token k-1]) / temperature.

    base_logits [R, G, V]; anchors [R] are the previous tokens; w1, w2 [V, r]; temperatures, seeds [R]; positions [R]
    of the first drafted token; the target has the same noise at the same positions. `filters` are the last four
    arguments of `filter_threshold`; no token below the threshold is drafted. Returns (tokens [R, G] int64,
    log-sum-exp of x_k [R, G] float32). See docs/dspark.md, Markov head.

    Drafts are always token ids 0 .. V - 1, because they are indices in verification: where logits hold NaN or +inf the
    draft is an arbitrary token and its log-sum-exp is not finite.
    """
    num_requests, num_positions, vocab_size = base_logits.shape
    noise = None
    if (temperatures > 0).any():
        # For all positions at once, because Philox in torch is many small calls.
        addresses = positions.unsqueeze(1) + torch.arange(num_positions, device=positions.device)
        noise = gumbel_noise(seeds.repeat_interleave(num_positions), addresses.flatten(), stream, 0, vocab_size)
        noise = noise.view(num_requests, num_positions, vocab_size) * (temperatures > 0).view(-1, 1, 1)
    previous, tokens, rows = anchors, [], []
    for k in range(num_positions):
        bias = F.linear(w1[previous].float(), w2.float())
        unscaled = base_logits[:, k].float() + bias
        logits = kept = apply_temperature(unscaled, temperatures)
        if filters is not None:
            threshold = filter_threshold(unscaled, temperatures, *filters)
            kept = logits.masked_fill(logits < threshold.unsqueeze(1), -torch.inf)
        previous = (kept if noise is None else kept + noise[:, k]).argmax(-1)
        tokens.append(previous)
        rows.append(logits)
    return torch.stack(tokens, 1), torch.stack(rows, 1).logsumexp(-1)


def admit_prefixes(confidences: Tensor, limits: Tensor, thresholds: Tensor, budget: Tensor) -> Tensor:
    """Number of drafts to verify per request: lengths [R] int64.

    survival = running product of confidences [R, G] in float64. The best `budget` (int64, no dimensions) of the
    survivals at positions below limits [R] are admitted; of equal ones the earlier request, then the earlier position,
    is admitted first. Then positions with survival below thresholds [R] are dropped.
    Source: DSpark paper, sections 3.2.2 and 5.2; docs/dspark.md, Schedules.
    """
    num_requests, gamma = confidences.shape
    survival = confidences.double().cumprod(-1)
    places = torch.arange(gamma, device=confidences.device)
    allowed = torch.where(places < limits.unsqueeze(1), survival, -1.0)
    order = allowed.flatten().sort(descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    admitted = (rank.view(num_requests, gamma) < budget) & (allowed >= 0)
    return torch.minimum(admitted.sum(-1), (survival >= thresholds.unsqueeze(1)).sum(-1))


def pack_rows(
    lengths: Tensor, anchors: Tensor, drafts: Tensor, starts: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flatten [anchor, first `length` drafts] of R requests into `num_rows` rows, the last of which may be padding.

    lengths, anchors, starts (position of the anchor) [R]; drafts [R, G]; R + sum(lengths) <= num_rows.
    Returns int64 (token_ids, positions, owners [num_rows], first_rows [R + 1]). Padding rows have token 0, position 0
    and owner -1; request r has rows first_rows[r] .. first_rows[r + 1] - 1.
    """
    first_rows = F.pad((lengths + 1).cumsum(0), (1, 0))
    rows = torch.arange(num_rows, device=lengths.device)
    owners = torch.searchsorted(first_rows, rows, right=True) - 1
    used = owners < len(lengths)
    owner = owners.clamp(max=len(lengths) - 1)
    offset = rows - first_rows[owner]
    blocks = torch.cat((anchors.unsqueeze(1), drafts), dim=1)
    token_ids = blocks[owner, offset.clamp(max=drafts.shape[1])]
    return (
        torch.where(used, token_ids, 0),
        torch.where(used, starts[owner] + offset, 0),
        torch.where(used, owners, -1),
        first_rows,
    )


def accept_coupled(row_tokens: Tensor, target_tokens: Tensor, first_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Number of accepted drafts, and the token that follows them: (num_accepted [R], next_anchors [R]), both int64.

    Request r has rows first_rows[r] .. first_rows[r + 1] - 1 of row_tokens [N] (the anchor, then its drafts) and of
    target_tokens [N] (the target's token after each). A draft is accepted if it is the target's token of the row before
    and all drafts before it are accepted. A request without rows accepts 0 and has next anchor -1.
    """
    if len(row_tokens) == 0:
        return _without_rows(first_rows)
    num_accepted, last_rows = _leading(row_tokens[1:] == target_tokens[:-1], first_rows)
    return num_accepted, _unless_empty(target_tokens[last_rows], first_rows)


def _leading(matches: Tensor, first_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(number of accepted drafts of each request, the row that predicts its next token), both [R].

    matches [N - 1] tells for every row but the first whether its draft passes its own test.
    """
    num_rows, num_requests, device = len(matches) + 1, len(first_rows) - 1, matches.device
    rows = torch.arange(1, num_rows, device=device)
    owners = torch.searchsorted(first_rows, rows, right=True) - 1
    owner = owners.clamp(0, num_requests - 1)
    rejected = (owners == owner) & ~matches & (rows > first_rows[owner])
    # The rows between the anchor and the first rejected row, or the end, are accepted.
    ends = first_rows[1:].clone().scatter_reduce(0, owner[rejected], rows[rejected], "amin")
    num_accepted = (ends - first_rows[:-1] - 1).clamp_min(0)
    return num_accepted, (first_rows[:-1] + num_accepted).clamp(max=num_rows - 1)


def _without_rows(first_rows: Tensor) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros_like(first_rows[1:])
    return nothing, nothing - 1


def _unless_empty(tokens: Tensor, first_rows: Tensor) -> Tensor:
    """tokens [R], -1 for requests without rows."""
    return torch.where(first_rows[1:] > first_rows[:-1], tokens, -1)


def accept_rejection(
    row_tokens: Tensor,
    logits: Tensor,
    q_ids: Tensor,
    q_probabilities: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling over ragged rows: (num_accepted [R], next_anchors [R]), both int64.

    Rows as in `accept_coupled`; logits [N, V] are the target's in each row, processed and filtered; positions [N] are
    of the tokens that the rows predict; seeds [R]. q_probabilities [N, K] over q_ids are the distribution that the
    draft in the NEXT row was drawn from; those of a request's last row are not read. A draft is accepted where
    u * q(draft) < p(draft). The next token is drawn from max(p - q, 0) after a rejection, else from p. The test, the
    recovery and the token after the last draft have a noise stream each, so that none share a number. A request
    without rows accepts 0 and has next anchor -1.

    A row that holds NaN or +inf, or nothing above -inf, has no softmax: no draft after it is accepted, and a request
    whose next token it predicts has next anchor -1. Where a q of a row is NaN the draft is rejected, and the next token
    is drawn from p.
    """
    if len(row_tokens) == 0:
        return _without_rows(first_rows)
    p = logits.double().softmax(-1)
    owners = torch.searchsorted(first_rows, torch.arange(len(p), device=p.device), right=True) - 1
    row_seeds = seeds[owners.clamp(0, len(seeds) - 1)]
    before = (tensor[:-1] for tensor in (p, q_ids, q_probabilities, row_seeds, positions))
    num_accepted, last_rows = _leading(_passes(row_tokens[1:], *before), first_rows)
    p_next, position = p[last_rows], positions[last_rows]
    residual = _residual(p_next, q_ids[last_rows], q_probabilities[last_rows])
    recovered = _draw(residual, seeds, position, STREAM_RECOVER)
    following = _draw(p_next, seeds, position, STREAM_SAMPLE)
    tokens = torch.where(last_rows + 1 == first_rows[1:], following, recovered)
    tokens = torch.where(p_next.isnan().any(-1), -1, tokens)
    return num_accepted, _unless_empty(tokens, first_rows)


def _passes(
    drafts: Tensor, p: Tensor, q_ids: Tensor, q_probabilities: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """[n] whether a uniform is below p(draft) / q(draft), for drafts [n] and the rows before them."""
    draft = drafts.unsqueeze(1)
    q_draft = (q_probabilities.double() * (q_ids == draft)).sum(-1)
    return uniform_noise(seeds, positions, STREAM_ACCEPT) * q_draft < p.gather(1, draft).squeeze(1)


def _residual(p: Tensor, q_ids: Tensor, q_probabilities: Tensor) -> Tensor:
    """[N, V] max(p - q, 0), unnormalised."""
    residual = p.scatter_add(-1, q_ids, -q_probabilities.double()).clamp(min=0)
    # Where p equals q up to rounding nothing is left, and rejections are rare: p is right there.
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)


def _draw(weights: Tensor, seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """[N] token ids from unnormalised weights [N, V]."""
    return (weights.log() + gumbel_noise(seeds, positions, stream, 0, weights.shape[-1])).argmax(-1)
