"""Shapes that kernels are compiled for: DeepSeek-V4-Flash on one GPU, Pro on each of 16, and numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (1, 6, 12, 24, 48, 96, 192, 1536)
"""One row, one request with five drafts, and up to 256 requests: each may have another tiling."""
FEWER_ROWS = (6, 24, 48, 192, 1536)
VOCABULARY, HEAD_DIM, ROTARY_PAIRS, STREAMS, TOP_K, GAMMA = 129280, 512, 32, 4, 6, 5


@dataclass(frozen=True)
class Model:
    """One rank's part of a model; sizes common to both models are constants above."""

    name: str
    hidden: int
    heads: int
    """Number on this rank."""
    q_lora: int
    index_topk: int
    experts: int
    """Number on all ranks."""
    local_experts: int
    expert_width: int
    markov_rank: int
    linears: tuple[tuple[int, int], ...]
    """(out, in) of this rank's FP8 weights."""
    rows: tuple[int, ...]
    """Numbers of rows to compile for."""


FLASH = Model(
    name="Flash",
    hidden=4096,
    heads=64,
    q_lora=1024,
    index_topk=512,
    experts=256,
    local_experts=256,
    expert_width=2048,
    markov_rank=256,
    linears=(
        (1024, 4096),
        (32768, 1024),
        (512, 4096),
        (8192, 4096),
        (4096, 8192),
        (2048, 4096),
        (4096, 2048),
        (4096, 12288),
    ),
    rows=ROWS,
)
PRO = Model(
    name="Pro",
    hidden=7168,
    heads=8,
    q_lora=1536,
    index_topk=1024,
    experts=384,
    local_experts=24,
    expert_width=3072,
    markov_rank=512,
    linears=((1536, 7168), (4096, 1536), (512, 7168), (8192, 1536), (7168, 1024), (7168, 21504)),
    rows=FEWER_ROWS,
)
MODELS = (FLASH, PRO)
