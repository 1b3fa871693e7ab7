"""Floors of operations: bytes over memory bandwidth, or arithmetic over the rate of its unit, whichever is longer.

Bytes are those of every input and output, once each: weights are cold in a step, and activations are counted as cold
too. Arithmetic is the least that any algorithm needs; a multiply-add counts as two operations.

Letters as in `dspark_kernels.reference`: R requests, G gamma, N = R (1 + G) rows, d hidden size, m streams, H heads,
D head_dim, Dr rotary channels of it, V vocabulary, r rank of the Markov head, E experts, k of them per row, I width of
an expert; of the indexer Hi heads and Di channels; W window, Ke entries that a row sees, S raw rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Unit = Literal["bf16", "fp8", "fp32", "int32", "special"]
"""Matrix units by their operands, and scalar units; `special` computes exponentials and logarithms of float32."""

BF16, FP32, INT64, PACKED_KEY_SCALES = 2, 4, 8, 8
"""Bytes."""
CSA_RATIO, HCA_RATIO = 4, 128
Q_IDS = 64
"""Tokens that the draft of rejection verification could have been, per row."""
EDITS_PER_ROW = 16
L2_BYTES = 60e6
"""Of an H200, as PyTorch reports it."""


@dataclass(frozen=True)
class Card:
    """Ceilings of a GPU."""

    name: str
    bytes_per_second: float
    """Measured: a large copy within the device, bytes read plus bytes written."""
    rates: Mapping[Unit, float]
    """Operations per second. bf16 is measured (a product of 8192 x 8192 matrices of random numbers), the others are
    the data sheet's, or, where it has none, lanes per processor x 132 processors x 1.98 GHz."""


_DATA_SHEET: dict[Unit, float] = {
    "fp8": 1979e12,
    "fp32": 67e12,
    "int32": 64 * 132 * 1.98e9,
    "special": 16 * 132 * 1.98e9,
}
H200 = Card("NVIDIA H200", 4.3e12, {"bf16": 790e12, **_DATA_SHEET})
H100 = Card("NVIDIA H100 80GB HBM3", 3.0e12, {"bf16": 790e12, **_DATA_SHEET})


def card_called(name: str | None) -> Card:
    """By the name that the driver gives it; the H200 where it is not known."""
    return H100 if name == H100.name else H200


@dataclass(frozen=True)
class Floor:
    """What an operation has to move and to compute."""

    bytes: float
    operations: Mapping[Unit, float]

    def times(self, card: Card = H200) -> dict[str, float]:
        """Seconds that each takes by itself."""
        return {"memory": self.bytes / card.bytes_per_second} | {
            unit: count / card.rates[unit] for unit, count in self.operations.items()
        }

    def seconds(self, card: Card = H200) -> float:
        """The larger of them: they can happen at the same time."""
        return max(self.times(card).values())

    def bound(self, card: Card = H200) -> str:
        """Which of them it is."""
        times = self.times(card)
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Compressor:
    """Of one kind of compressed layer."""

    width: int
    """D, of an entry"""
    channels: int
    """C, of a raw row: width times the series"""
    ratio: int
    window_rows: int
    """S, raw rows that an entry pools"""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and of a step; the defaults are DeepSeek-V4-Flash's with DSpark, at 8192 tokens of context."""

    hidden: int = 4096
    streams: int = 4
    sinkhorn_iters: int = 20
    heads: int = 64
    head_dim: int = 512
    rotary_dims: int = 64
    vocabulary: int = 129280
    markov_rank: int = 256
    experts: int = 256
    experts_per_row: int = 6
    expert_width: int = 2048
    q_lora: int = 1024
    o_lora: int = 1024
    o_groups: int = 8
    window: int = 128
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 512
    taps: int = 3
    """Target layers whose features the drafter reads."""
    gamma: int = 5
    context: int = 8192

    def rows(self, requests: int) -> int:
        """N: an anchor and its drafts for each request."""
        return requests * (1 + self.gamma)

    @property
    def key_bytes(self) -> int:
        """Of a packed key: FP8 outside the rotary part, that in bfloat16, scales."""
        return self.head_dim - self.rotary_dims + BF16 * self.rotary_dims + PACKED_KEY_SCALES

    def linear(self, variant: str) -> tuple[int, int]:
        """(inputs, outputs) of a layer whose weight is stored in FP8."""
        return {
            "wq_a": (self.hidden, self.q_lora),
            "wq_b": (self.q_lora, self.heads * self.head_dim),
            "wkv": (self.hidden, self.head_dim),
            "wo_b": (self.o_groups * self.o_lora, self.hidden),
            "index wq_b": (self.q_lora, self.index_heads * self.index_dim),
            "shared w1, w3": (self.hidden, self.expert_width),
            "shared w2": (self.expert_width, self.hidden),
            "main_proj": (self.taps * self.hidden, self.hidden),
        }[variant]

    def compressor(self, variant: str) -> Compressor:
        """Where windows overlap, a raw row has two series and an entry pools two windows."""
        return {
            "CSA": Compressor(self.head_dim, 2 * self.head_dim, CSA_RATIO, 2 * CSA_RATIO),
            "HCA": Compressor(self.head_dim, self.head_dim, HCA_RATIO, HCA_RATIO),
            "indexer": Compressor(self.index_dim, 2 * self.index_dim, CSA_RATIO, 2 * CSA_RATIO),
        }[variant]

    def closing(self, requests: int, variant: str) -> int:
        """Of so many rows, how many close a window: one in `ratio`, but one at least."""
        return max(1, round(self.rows(requests) / self.compressor(variant).ratio))

    def entries(self, variant: str) -> int:
        """Compressed entries that a row attends to."""
        kind = variant.partition(" ")[0]
        return {
            "sliding": 0,
            "drafter": 0,
            "CSA": min(self.index_topk, self.context // CSA_RATIO),
            "HCA": self.context // HCA_RATIO,
        }[kind]


FLASH = Shapes()
TINY = Shapes(
    hidden=128,
    sinkhorn_iters=4,
    heads=4,
    head_dim=80,
    rotary_dims=16,
    vocabulary=300,
    markov_rank=32,
    experts=8,
    experts_per_row=2,
    expert_width=128,
    q_lora=128,
    o_lora=64,
    o_groups=2,
    window=16,
    index_heads=4,
    index_dim=32,
    index_topk=16,
    taps=2,
    context=256,
)
"""For running the benchmark's own code where nothing is measured."""

_PHILOX = 10 * (2 + 2) / 4
"""int32 operations per token: ten rounds of two wide multiplications and two three-way xors give four numbers. The
keys of a row are made once. Exact noise would also take two float64 logarithms, but only of tokens that can win."""


def _angles(shapes: Shapes, rows: int) -> int:
    """Bytes of cos and sin."""
    return rows * shapes.rotary_dims * FP32


def accept_coupled(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows = shapes.rows(requests)
    return Floor(INT64 * (2 * rows + requests + 1 + 2 * requests), {"int32": 2 * rows})


def accept_rejection(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, logits = shapes.rows(requests), shapes.rows(requests) * shapes.vocabulary
    q_bytes = rows * Q_IDS * (INT64 + FP32)
    small = INT64 * (2 * rows + requests + requests + 1 + 2 * requests)
    operations: dict[Unit, float] = {"special": logits, "int32": _PHILOX * requests * shapes.vocabulary}
    return Floor(FP32 * logits + q_bytes + small, operations)


def admit_prefixes(shapes: Shapes, requests: int, variant: str) -> Floor:
    candidates = requests * shapes.gamma
    return Floor(FP32 * candidates + INT64 * (3 * requests + 1), {"int32": candidates})


def compress(shapes: Shapes, requests: int, variant: str) -> Floor:
    kind, rows, closing = shapes.compressor(variant), shapes.rows(requests), shapes.closing(requests, variant)
    entry = BF16 * kind.width if variant == "indexer" else shapes.key_bytes
    window = kind.window_rows * (2 * kind.width * FP32 + INT64)
    gates = closing * kind.window_rows * kind.width
    moved = closing * (window + entry) + _angles(shapes, closing) + INT64 * rows + BF16 * kind.width
    return Floor(moved, {"special": gates, "fp32": 4 * gates})


def edit_logits(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows = shapes.rows(requests)
    edits = EDITS_PER_ROW * rows * (2 * INT64 + 2 * FP32)
    return Floor(2 * FP32 * rows * shapes.vocabulary + edits, {"fp32": 3 * EDITS_PER_ROW * rows})


def gumbel_argmax(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, logits = shapes.rows(requests), shapes.rows(requests) * shapes.vocabulary
    small = rows * (3 * INT64 + 2 * FP32 + INT64)
    return Floor(FP32 * logits + small, {"int32": _PHILOX * logits, "special": logits})


def indexer_topk(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, entries = shapes.rows(requests), shapes.context // CSA_RATIO
    query = rows * shapes.index_heads * (shapes.index_dim + 1) * BF16
    keys = requests * entries * shapes.index_dim * BF16
    index = INT64 * rows * (entries + min(shapes.index_topk, entries))
    scores = rows * shapes.index_heads * entries
    return Floor(query + keys + index, {"bf16": 2 * scores * shapes.index_dim, "fp32": 3 * scores})


def linear_float32(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, d, vocabulary = shapes.rows(requests), shapes.hidden, shapes.vocabulary
    return Floor(BF16 * d * (rows + vocabulary) + FP32 * rows * vocabulary, {"bf16": 2 * rows * d * vocabulary})


def linear_fp8(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, (inputs, outputs) = shapes.rows(requests), shapes.linear(variant)
    scales = -(-inputs // 128) * -(-outputs // 128)
    moved = BF16 * rows * (inputs + outputs) + inputs * outputs + scales
    return Floor(moved, {"fp8": 2 * rows * inputs * outputs})


def filter_threshold(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows = shapes.rows(requests)
    return Floor(rows * (FP32 * shapes.vocabulary + 4 * INT64 + FP32), {"int32": rows * shapes.vocabulary})


def markov_sample(shapes: Shapes, requests: int, variant: str) -> Floor:
    logits, matrix = requests * shapes.gamma * shapes.vocabulary, BF16 * shapes.vocabulary * shapes.markov_rank
    # Every position waits for the token before it, so w2 passes once for each; L2 can keep some of it.
    passes = matrix + (shapes.gamma - 1) * max(0.0, matrix - L2_BYTES)
    embeddings = BF16 * requests * shapes.gamma * shapes.markov_rank
    filters = 3 if variant == "filtered" else 0
    small = requests * ((4 + filters) * INT64 + shapes.gamma * (INT64 + FP32))
    operations: dict[Unit, float] = {
        "bf16": 2 * logits * shapes.markov_rank,
        "int32": _PHILOX * logits,
        "special": logits,
    }
    return Floor(FP32 * logits + passes + embeddings + small, operations)


def _mhc_projection(shapes: Shapes, requests: int, mixes: int, scales: int) -> Floor:
    """Streams in, collapsed rows out, the mixes' weights. The weights are float32 numbers: three bfloat16 each."""
    rows, width = shapes.rows(requests), shapes.streams * shapes.hidden
    weights = FP32 * (mixes * width + mixes + scales)
    return Floor(
        BF16 * rows * (width + shapes.hidden) + weights,
        {"bf16": 3 * 2 * rows * mixes * width, "fp32": 4 * rows * width},
    )


def mhc_head(shapes: Shapes, requests: int, variant: str) -> Floor:
    return _mhc_projection(shapes, requests, shapes.streams, 1)


def mhc_read(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, m, d = shapes.rows(requests), shapes.streams, shapes.hidden
    base = _mhc_projection(shapes, requests, (2 + m) * m, 3)
    steps = rows * 2 * shapes.sinkhorn_iters * 2 * m * m
    operations: dict[Unit, float] = {**base.operations, "fp32": base.operations["fp32"] + 4 * rows * d + steps}
    return Floor(base.bytes + BF16 * d + FP32 * rows * (m + m * m), operations)


def mhc_write(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, m, d = shapes.rows(requests), shapes.streams, shapes.hidden
    return Floor(rows * (BF16 * d * (1 + 2 * m) + FP32 * (m + m * m)), {"fp32": 2 * rows * m * (m + 1) * d})


def distinct_experts(shapes: Shapes, rows: int) -> float:
    """Expected number of distinct choices, where every row makes its own uniformly."""
    return shapes.experts * (1 - (1 - shapes.experts_per_row / shapes.experts) ** rows)


def moe(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, weights = shapes.rows(requests), 3 * shapes.hidden * shapes.expert_width
    per_expert = {"FP4": weights / 2 + weights / 32, "FP8": weights + weights / 128**2, "bf16": BF16 * weights}[variant]
    routing = rows * shapes.experts_per_row * (FP32 + INT64)
    activations = rows * shapes.hidden * (BF16 + FP32)
    unit: Unit = "bf16" if variant == "bf16" else "fp8"
    return Floor(
        distinct_experts(shapes, rows) * per_expert + routing + activations,
        {unit: 2 * rows * shapes.experts_per_row * weights},
    )


def norm_rope(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, heads = shapes.rows(requests), shapes.rows(requests) * shapes.heads
    operations = heads * (3 * shapes.head_dim + 3 * shapes.rotary_dims)
    return Floor(2 * BF16 * heads * shapes.head_dim + _angles(shapes, rows), {"fp32": operations})


def pack_rows(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows = shapes.rows(requests)
    return Floor(INT64 * (requests * (3 + shapes.gamma) + 3 * rows + requests + 1), {"int32": 2 * rows})


def rms_norm(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, width = shapes.rows(requests), {"hidden": shapes.hidden, "q_latent": shapes.q_lora}[variant]
    return Floor(BF16 * width * (2 * rows + 1), {"fp32": 4 * rows * width})


def rope(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, heads = shapes.rows(requests), shapes.rows(requests) * shapes.index_heads
    moved = 2 * BF16 * heads * shapes.index_dim + _angles(shapes, rows)
    return Floor(moved, {"fp32": 3 * heads * shapes.rotary_dims})


def route(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, d, experts = shapes.rows(requests), shapes.hidden, shapes.experts
    chosen = rows * shapes.experts_per_row * (FP32 + INT64)
    return Floor(BF16 * d * (rows + experts) + FP32 * experts + chosen, {"bf16": 2 * rows * d * experts})


def sparse_attention(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, heads, dim = shapes.rows(requests), shapes.heads, shapes.head_dim
    entries = shapes.entries(variant)
    key = shapes.key_bytes if variant.endswith("packed") else BF16 * dim
    if variant == "drafter":
        # A block's gamma queries see the same keys and count as heads; nothing is rotated back.
        keys, products = shapes.window + shapes.gamma, requests * shapes.gamma * heads
        index, angles, distinct = requests * keys, 0, requests * keys
        sinks = shapes.gamma * heads
    else:
        keys, products = shapes.window + entries, rows * heads
        index, angles, sinks = rows * keys, _angles(shapes, rows), heads
        # Rows of a request see each other's windows, and choose alike.
        distinct = requests * (shapes.window + shapes.gamma + entries)
    moved = 2 * BF16 * products * dim + distinct * key + INT64 * index + angles + FP32 * sinks
    return Floor(moved, {"bf16": 2 * 2 * products * keys * dim, "special": products * keys})


def store_raw(shapes: Shapes, requests: int, variant: str) -> Floor:
    kind, rows = shapes.compressor(variant), shapes.rows(requests)
    per_row = 2 * kind.channels * (BF16 + FP32) + 2 * INT64
    # Of the position bias only the rows that some position needs.
    bias = FP32 * min(rows, kind.ratio) * kind.channels
    return Floor(rows * per_row + bias, {"fp32": rows * kind.channels})


def store_window(shapes: Shapes, requests: int, variant: str) -> Floor:
    rows, dim = shapes.rows(requests), shapes.head_dim
    key = shapes.key_bytes if variant == "packed" else BF16 * dim
    moved = rows * (BF16 * dim + key + INT64) + _angles(shapes, rows) + BF16 * dim
    return Floor(moved, {"fp32": rows * (7 * dim + 3 * shapes.rotary_dims)})


def swiglu(shapes: Shapes, requests: int, variant: str) -> Floor:
    values = shapes.rows(requests) * shapes.expert_width
    return Floor(3 * FP32 * values, {"fp32": 6 * values, "special": values})


@dataclass(frozen=True)
class Operation:
    """One operation, and the variants in which it is looked at."""

    floor: Callable[[Shapes, int, str], Floor]
    bytes_formula: str
    operations_formula: str
    launches: str
    """Of kernels, per call."""
    variants: tuple[str, ...] = ("",)


_COMPRESSORS = ("CSA", "HCA", "indexer")

OPERATIONS: dict[str, Operation] = {
    "accept_coupled": Operation(accept_coupled, "8 (2N + 3R + 1)", "int32: 2N", "1"),
    "accept_rejection": Operation(
        accept_rejection, "4NV + 64 (8 + 4) N + 8 (2N + 4R + 1)", "special: NV; int32: 10 RV", "4"
    ),
    "admit_prefixes": Operation(admit_prefixes, "4RG + 8 (3R + 1)", "int32: RG", "1"),
    "compress": Operation(
        compress,
        "c (S (8D + 8) + entry + 4Dr) + 8N + 2D; c = N / ratio windows close",
        "special: cSD; fp32: 4 cSD",
        "1",
        _COMPRESSORS,
    ),
    "edit_logits": Operation(edit_logits, "8NV + 16 × 24N", "fp32: 16 × 3N", "2"),
    "filter_threshold": Operation(filter_threshold, "4NV + 36N", "int32: NV", "1"),
    "gumbel_argmax": Operation(gumbel_argmax, "4NV + 40N", "int32: 10 NV; special: NV", "2"),
    "indexer_topk": Operation(
        indexer_topk,
        "2N Hi (Di + 1) + 2R Ke Di + 8N (Ke + 512); Ke = context / 4",
        "bf16: 2N Hi Ke Di; fp32: 3N Hi Ke",
        "2, one more beyond 8192 entries",
    ),
    "linear_float32": Operation(linear_float32, "2d (N + V) + 4NV", "bf16: 2NdV", "cuBLAS", ("logits",)),
    "linear_fp8": Operation(
        linear_fp8,
        "2N (in + out) + in out (1 + 1/128²)",
        "fp8: 2N in out",
        "1, beyond 16 rows 2",
        ("wq_a", "wq_b", "wkv", "wo_b", "index wq_b", "shared w1, w3", "shared w2", "main_proj"),
    ),
    "markov_sample": Operation(
        markov_sample,
        "4RGV + 2Vr + (G - 1) (2Vr - L2) + 2RGr + 32R + 12RG",
        "bf16: 2RGVr; int32: 10 RGV; special: RGV",
        "G + 1, filtered 9G",
        ("", "filtered"),
    ),
    "mhc_head": Operation(mhc_head, "2N (m + 1) d + 4m (md + 1) + 4", "bf16: 3 × 2N m md; fp32: 4N md", "1"),
    "mhc_read": Operation(
        mhc_read,
        "2N (m + 1) d + 4 (2 + m) m (md + 1) + 12 + 2d + 4N (m + m²)",
        "bf16: 3 × 2N (2 + m) m md; fp32: 4N md + 4Nd + 4N m² iterations",
        "1",
    ),
    "mhc_write": Operation(mhc_write, "2N (1 + 2m) d + 4N (m + m²)", "fp32: 2N m (m + 1) d", "1"),
    "moe": Operation(
        moe,
        "E (1 - (1 - k/E)ᴺ) 3dI w + 12Nk + 6Nd; w = 1/2 + 1/32, 1 + 1/128², 2",
        "fp8 (bf16 weights: bf16): 6Nk dI",
        "5, bf16 4",
        ("FP4", "FP8", "bf16"),
    ),
    "norm_rope": Operation(norm_rope, "4N H D + 4N Dr", "fp32: 3N H (D + Dr)", "1"),
    "pack_rows": Operation(pack_rows, "8 (R (3 + G) + 3N + R + 1)", "int32: 2N", "1"),
    "rms_norm": Operation(rms_norm, "2d (2N + 1)", "fp32: 4Nd", "1", ("hidden", "q_latent")),
    "rope": Operation(rope, "4N Hi Di + 4N Dr", "fp32: 3N Hi Dr", "1"),
    "route": Operation(route, "2d (N + E) + 4E + 12Nk", "bf16: 2NdE", "2"),
    "sparse_attention": Operation(
        sparse_attention,
        "4N H D + R (W + G + Ke) key + 8N (W + Ke) + 4N Dr + 4H",
        "bf16: 4N H (W + Ke) D; special: N H (W + Ke)",
        "1, or 2 where rows are few",
        ("sliding", "CSA", "CSA packed", "HCA", "HCA packed", "drafter"),
    ),
    "store_raw": Operation(store_raw, "2N C (2 + 4) + 16N + 4C min(N, ratio)", "fp32: NC", "1", _COMPRESSORS),
    "store_window": Operation(
        store_window, "N (2D + key + 8) + 4N Dr + 2D", "fp32: N (7D + 3Dr)", "1", ("bf16", "packed")
    ),
    "swiglu": Operation(swiglu, "12N I", "fp32: 6N I; special: N I", "1"),
}


@dataclass(frozen=True)
class Case:
    """One variant of an operation."""

    op: str
    variant: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".strip()

    def floor(self, requests: int, shapes: Shapes = FLASH) -> Floor:
        """At so many requests."""
        return OPERATIONS[self.op].floor(shapes, requests, self.variant)


CASES = tuple(Case(op, variant) for op, operation in OPERATIONS.items() for variant in operation.variants)
REQUESTS = (1, 8, 32, 128, 256)


def microseconds(seconds: float) -> str:
    """Two or three digits."""
    value = 1e6 * seconds
    if value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def table() -> str:
    """Formulas and floors in Markdown."""
    lines = ["| operation | bytes | operations | launches |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {op.bytes_formula} | {op.operations_formula} | {op.launches} |" for name, op in OPERATIONS.items()
    ]
    counts = " | ".join(str(requests) for requests in REQUESTS)
    lines += ["", f"| microseconds at least, by requests | {counts} | bound by |", f"|---|{'--:|' * len(REQUESTS)}---|"]
    for case in CASES:
        floors = [case.floor(requests) for requests in REQUESTS]
        times = " | ".join(microseconds(floor.seconds()) for floor in floors)
        bounds = dict.fromkeys(floor.bound() for floor in floors)
        lines.append(f"| {case.name} | {times} | {', then '.join(bounds)} |")
    return "\n".join(lines)
