"""Arguments for measuring every operation: random values at a model's shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.floors import CSA_RATIO, EDITS_PER_ROW, HCA_RATIO, Q_IDS, Case, Shapes
from dspark_kernels.formats import FP4_SCALE_TILE, FP8_SCALE_TILE, pack_keys
from dspark_kernels.philox import STREAM_SAMPLE

Args = tuple[Any, ...]

EPS = 1e-6
TEMPERATURE = 0.8
TOP_K = 50


class Inputs:
    """Arguments of operations, one method each: random with fixed seeds."""

    def __init__(self, shapes: Shapes, requests: int, device: torch.device) -> None:
        self.shapes, self.requests, self.device = shapes, requests, device
        self.rows = shapes.rows(requests)
        self._generator = torch.Generator(device).manual_seed(0)

    def of(self, case: Case) -> Args:
        """Arguments of `case.op`."""
        args: Args = getattr(self, case.op)(case.variant)
        return args

    def accept_coupled(self, variant: str) -> Args:
        # Two tokens: half of the drafts stand.
        return self._integers(0, 2, self.rows), self._integers(0, 2, self.rows), self._first_rows()

    def accept_rejection(self, variant: str) -> Args:
        logits = self._normal(self.rows, self.shapes.vocabulary, dtype=torch.float32, scale=3.0)
        q = logits.topk(Q_IDS, dim=-1)
        # q as large as p: every draft stands, and every row is needed.
        q_probabilities = (q.values - logits.logsumexp(-1, keepdim=True)).exp()
        drafts = q.indices.gather(1, self._integers(0, Q_IDS, self.rows, 1)).squeeze(1).roll(1)
        positions = self._integers(0, 2**20, self.rows)
        return drafts, logits, q.indices, q_probabilities, self._seeds(), positions, self._first_rows()

    def admit_prefixes(self, variant: str) -> Args:
        requests, gamma = self.requests, self.shapes.gamma
        limits = torch.full((requests,), gamma, device=self.device)
        thresholds = torch.zeros(requests, dtype=torch.float64, device=self.device)
        budget = torch.tensor(2 * requests * gamma // 3, device=self.device)
        return self._uniform(requests, gamma), limits, thresholds, budget

    def compress(self, variant: str) -> Args:
        shapes, kind = self.shapes, self.shapes.compressor(variant)
        closing = shapes.closing(self.requests, variant)
        rows = torch.arange(self.rows, device=self.device)
        closes = torch.arange(closing, device=self.device) * self.rows // closing
        where = torch.full_like(rows, -1)
        where[closes] = torch.arange(closing, device=self.device)
        # A second window of a request begins where the first one's second half does: it shares rows, but no series.
        ring = kind.window_rows + kind.ratio
        block = 1 + shapes.gamma
        first = rows // block * ring + rows % block // kind.ratio * kind.ratio
        index = first.unsqueeze(1) + torch.arange(kind.window_rows, device=self.device)
        pool = self._normal(self.requests * ring, 2 * kind.channels, dtype=torch.float32)
        packed = variant != "indexer"
        entries = self._empty_keys(self.rows, kind.width, packed)
        index = torch.where((where >= 0).unsqueeze(1), index, -1)
        return pool, index, self._norm(kind.width), EPS, *self._angles(self.rows), entries, where, packed

    def edit_logits(self, variant: str) -> Args:
        logits = self._normal(self.rows, self.shapes.vocabulary, dtype=torch.float32)
        rows = torch.arange(self.rows, device=self.device).repeat_interleave(EDITS_PER_ROW)
        edits = torch.arange(len(rows), device=self.device)
        # A stride that shares no factor with the vocabulary: no pair occurs twice.
        token_ids = edits * 7919 % self.shapes.vocabulary
        return logits, rows, token_ids, 1 + self._uniform(len(rows)), self._normal(len(rows), dtype=torch.float32)

    def gumbel_argmax(self, variant: str) -> Args:
        logits = self._normal(self.rows, self.shapes.vocabulary, dtype=torch.float32, scale=3.0)
        seeds, positions = self._integers(0, 2**62, self.rows), self._integers(0, 2**20, self.rows)
        return logits, self._temperatures(self.rows), seeds, positions, STREAM_SAMPLE

    def indexer_topk(self, variant: str) -> Args:
        shapes, entries = self.shapes, self.shapes.context // CSA_RATIO
        query = self._normal(self.rows, shapes.index_heads, shapes.index_dim)
        weights = self._normal(self.rows, shapes.index_heads, scale=shapes.index_dim**-0.5)
        keys = self._normal(self.requests * entries, shapes.index_dim)
        index = self._owners().unsqueeze(1) * entries + torch.arange(entries, device=self.device)
        return query, weights, keys, index, shapes.index_topk

    def linear_float32(self, variant: str) -> Args:
        d = self.shapes.hidden
        return self._normal(self.rows, d), self._normal(self.shapes.vocabulary, d, scale=d**-0.5)

    def linear_fp8(self, variant: str) -> Args:
        inputs, outputs = self.shapes.linear(variant)
        return (
            self._normal(self.rows, inputs),
            self._fp8(outputs, inputs),
            self._scales(FP8_SCALE_TILE, outputs, inputs),
        )

    def filter_threshold(self, variant: str) -> Args:
        logits = self._normal(self.rows, self.shapes.vocabulary, dtype=torch.float32, scale=3.0)
        return logits, self._temperatures(self.rows), *self._filters(self.rows)

    def markov_sample(self, variant: str) -> Args:
        shapes, requests = self.shapes, self.requests
        logits = self._normal(requests, shapes.gamma, shapes.vocabulary, dtype=torch.float32, scale=3.0)
        anchors = self._integers(0, shapes.vocabulary, requests)
        w1 = self._normal(shapes.vocabulary, shapes.markov_rank)
        w2 = self._normal(shapes.vocabulary, shapes.markov_rank, scale=shapes.markov_rank**-0.5)
        address = self._seeds(), self._integers(0, 2**20, requests), STREAM_SAMPLE
        filters = (self._filters(requests),) if variant == "filtered" else ()
        return logits, anchors, w1, w2, self._temperatures(requests), *address, *filters

    def mhc_head(self, variant: str) -> Args:
        m = self.shapes.streams
        return self._streams(), *self._hyper_connection(m, 1), EPS, EPS

    def mhc_read(self, variant: str) -> Args:
        m, d = self.shapes.streams, self.shapes.hidden
        weights = self._hyper_connection((2 + m) * m, 3)
        return self._streams(), *weights, self._norm(d), self.shapes.sinkhorn_iters, EPS, EPS

    def mhc_write(self, variant: str) -> Args:
        m, d = self.shapes.streams, self.shapes.hidden
        return self._normal(self.rows, d), self._streams(), self._uniform(self.rows, m), self._uniform(self.rows, m, m)

    def moe(self, variant: str) -> Args:
        shapes = self.shapes
        hidden = self._normal(self.rows, shapes.hidden)
        weights = self._uniform(self.rows, shapes.experts_per_row)
        experts = self._uniform(self.rows, shapes.experts).topk(shapes.experts_per_row, dim=-1).indices
        w13 = (shapes.experts, 2 * shapes.expert_width, shapes.hidden)
        w2 = (shapes.experts, shapes.hidden, shapes.expert_width)
        if variant == "bf16":
            stored = [self._normal(*shape, scale=shape[-1] ** -0.5) for shape in (w13, w2)]
            return hidden, weights, experts, *stored, 10.0, shapes.experts
        if variant == "FP8":
            stored = [self._fp8(*shape) for shape in (w13, w2)]
        else:
            stored = [self._bytes(0, 256, *shape[:-1], shape[-1] // 2).view(torch.int8) for shape in (w13, w2)]
        block = FP8_SCALE_TILE if variant == "FP8" else FP4_SCALE_TILE
        scales = (self._scales(block, *w13), self._scales(block, *w2))
        return hidden, weights, experts, *stored, 10.0, shapes.experts, 0, *scales

    def norm_rope(self, variant: str) -> Args:
        query = self._normal(self.rows, self.shapes.heads, self.shapes.head_dim)
        return query, None, EPS, *self._angles(self.rows)

    def pack_rows(self, variant: str) -> Args:
        requests, gamma = self.requests, self.shapes.gamma
        lengths, drafts = torch.full((requests,), gamma, device=self.device), self._integers(0, 2**17, requests, gamma)
        return lengths, self._integers(0, 2**17, requests), drafts, self._integers(0, 2**20, requests), self.rows

    def rms_norm(self, variant: str) -> Args:
        width = self.shapes.hidden if variant == "hidden" else self.shapes.q_lora
        return self._normal(self.rows, width), self._norm(width), EPS

    def rope(self, variant: str) -> Args:
        query = self._normal(self.rows, self.shapes.index_heads, self.shapes.index_dim)
        return query, *self._angles(self.rows)

    def route(self, variant: str) -> Args:
        d, experts = self.shapes.hidden, self.shapes.experts
        gate, bias = self._normal(experts, d, scale=d**-0.5), self._normal(experts, dtype=torch.float32, scale=0.1)
        return self._normal(self.rows, d), gate, bias, None, self.shapes.experts_per_row, 1.5, True

    def sparse_attention(self, variant: str) -> Args:
        shapes, packed = self.shapes, variant.endswith("packed")
        # Room for the block's own rows behind the window before it.
        ring = shapes.window + shapes.gamma
        window_keys = self._keys(self.requests * ring, packed)
        scale = shapes.head_dim**-0.5
        # Queries are small enough for what rounding the logits costs the reference to stay within the bound.
        if variant == "drafter":
            query = self._normal(self.requests, shapes.gamma * shapes.heads, shapes.head_dim, scale=0.5)
            index = torch.arange(self.requests * ring, device=self.device).view(self.requests, ring)
            return query, window_keys, index, None, None, self._sinks(shapes.gamma * shapes.heads), scale
        query = self._normal(self.rows, shapes.heads, shapes.head_dim, scale=0.5)
        owners = self._owners().unsqueeze(1)
        first = owners * ring + self._places().unsqueeze(1)
        window_index = first + torch.arange(shapes.window, device=self.device)
        entry_keys, entry_index = None, None
        if shapes.entries(variant):
            ratio = CSA_RATIO if variant.startswith("CSA") else HCA_RATIO
            stored = shapes.context // ratio
            entry_keys = self._keys(self.requests * stored, packed)
            chosen = self._uniform(self.requests, stored).topk(shapes.entries(variant), dim=-1).indices.sort().values
            entry_index = owners * stored + chosen[self._owners()]
        sinks, angles = self._sinks(shapes.heads), self._angles(self.rows)
        return query, window_keys, window_index, entry_keys, entry_index, sinks, scale, *angles

    def store_raw(self, variant: str) -> Args:
        kind = self.shapes.compressor(variant)
        kv, gate = self._normal(self.rows, kind.channels), self._normal(self.rows, kind.channels)
        bias = self._normal(kind.ratio, kind.channels, dtype=torch.float32)
        ring = kind.window_rows + self.shapes.gamma
        pool = torch.zeros(self.requests * ring, 2 * kind.channels, device=self.device)
        positions = torch.arange(self.rows, device=self.device) + self.shapes.context
        return kv, gate, bias, positions, pool, self._owners() * ring + self._places()

    def store_window(self, variant: str) -> Args:
        shapes, ring = self.shapes, self.shapes.window + self.shapes.gamma
        pool = self._empty_keys(self.requests * ring, shapes.head_dim, variant == "packed")
        kv, slots = self._normal(self.rows, shapes.head_dim), self._owners() * ring + self._places()
        return kv, self._norm(shapes.head_dim), EPS, *self._angles(self.rows), pool, slots, True

    def swiglu(self, variant: str) -> Args:
        shape = (self.rows, self.shapes.expert_width)
        return self._normal(*shape, dtype=torch.float32), self._normal(*shape, dtype=torch.float32), 10.0

    # What they are made of.

    def _normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device).normal_(0.0, scale, generator=self._generator)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self.device)

    def _bytes(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.uint8, device=self.device).random_(low, high, generator=self._generator)

    def _fp8(self, *shape: int) -> Tensor:
        """E4M3 numbers of both signs, up to 4."""
        code = self._bytes(0, 2 * 0x49, *shape)
        # 0 .. 0x48 stay, the others become 0x80 .. 0xC8. In place: experts' weights take gigabytes.
        code.add_((code >= 0x49).to(torch.uint8).mul_(0x80 - 0x49))
        return code.view(torch.float8_e4m3fn)

    def _scales(self, block: tuple[int, int], *shape: int) -> Tensor:
        """2^-10 .. 2^-6, one for every block of a weight of `shape`."""
        *stack, rows, columns = shape
        return self._bytes(117, 122, *stack, -(-rows // block[0]), -(-columns // block[1])).view(torch.float8_e8m0fnu)

    def _norm(self, width: int) -> Tensor:
        return 1 + self._normal(width, scale=0.1)

    def _angles(self, rows: int) -> tuple[Tensor, Tensor]:
        turns = 100 * self._normal(rows, self.shapes.rotary_dims // 2, dtype=torch.float32)
        return turns.cos(), turns.sin()

    def _keys(self, count: int, packed: bool) -> Tensor:
        keys = self._normal(count, self.shapes.head_dim)
        return pack_keys(keys, self.shapes.rotary_dims) if packed else keys

    def _empty_keys(self, count: int, width: int, packed: bool) -> Tensor:
        if packed:
            return torch.zeros(count, self.shapes.key_bytes, dtype=torch.uint8, device=self.device)
        return torch.zeros(count, width, dtype=torch.bfloat16, device=self.device)

    def _sinks(self, heads: int) -> Tensor:
        return self._normal(heads, dtype=torch.float32)

    def _streams(self) -> Tensor:
        return self._normal(self.rows, self.shapes.streams, self.shapes.hidden)

    def _hyper_connection(self, mixes: int, scales: int) -> tuple[Tensor, Tensor, Tensor]:
        width = self.shapes.streams * self.shapes.hidden
        fn = self._normal(mixes, width, dtype=torch.float32, scale=width**-0.5)
        return fn, self._normal(mixes, dtype=torch.float32), self._normal(scales, dtype=torch.float32)

    def _temperatures(self, count: int) -> Tensor:
        return torch.full((count,), TEMPERATURE, dtype=torch.float64, device=self.device)

    def _filters(self, count: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """top_k, top_p, min_p, and the widest top_k."""
        top_k = torch.full((count,), TOP_K, device=self.device)
        top_p = torch.full((count,), 0.95, dtype=torch.float64, device=self.device)
        return top_k, top_p, torch.zeros_like(top_p), TOP_K

    def _seeds(self) -> Tensor:
        return self._integers(0, 2**62, self.requests)

    def _first_rows(self) -> Tensor:
        return torch.arange(self.requests + 1, device=self.device) * (1 + self.shapes.gamma)

    def _owners(self) -> Tensor:
        """[N] the request of every row"""
        return torch.arange(self.rows, device=self.device) // (1 + self.shapes.gamma)

    def _places(self) -> Tensor:
        """[N] 0 .. G, the place of every row in its request's block"""
        return torch.arange(self.rows, device=self.device) % (1 + self.shapes.gamma)
