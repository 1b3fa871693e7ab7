"""Drives a target as a serving engine does: several sequences in one cache, addressed by slot and page."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.model.deepseek_v4 import DeepSeekV4, TargetOutput
from dspark_ray.model.rows import Segment, build_rows


class Serving:
    """A target and a cache full of NaN, with slots and pages assigned to sequences in shuffled order."""

    def __init__(
        self,
        model: DeepSeekV4,
        *,
        num_sequences: int = 1,
        gamma: int = 0,
        max_length: int = 512,
        page_size: int = 16,
        shape: CacheShape | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.shape = shape or CacheShape.of(model.config, gamma, page_size, num_sequences, num_sequences * max_length)
        num_pages = num_sequences * -(-max_length // page_size)
        self.cache = CacheTensors(model.config, self.shape, num_pages, dtype)
        poison(self.cache)
        generator = torch.Generator().manual_seed(num_sequences)
        self.slots = torch.randperm(num_sequences, generator=generator).tolist()
        self.pages = torch.randperm(num_pages, generator=generator).view(num_sequences, -1).tolist()

    @torch.no_grad()
    def output(self, pieces: dict[int, tuple[int, list[int]]]) -> TargetOutput:
        """One forward; `pieces` maps a sequence to its first position and token ids."""
        segments = [
            Segment(slot=self.slots[sequence], start=start, token_ids=token_ids, pages=self.pages[sequence])
            for sequence, (start, token_ids) in pieces.items()
        ]
        return self.model(build_rows(segments, self.shape), self.cache)

    def logits(self, pieces: dict[int, tuple[int, list[int]]]) -> dict[int, Tensor]:
        """One forward; logits [n, V] by sequence."""
        logits = self.model.logits(self.output(pieces).hidden)
        lengths = [len(token_ids) for _, token_ids in pieces.values()]
        return dict(zip(pieces, logits.split(lengths), strict=True))

    def prefill(self, sequence: int, token_ids: list[int], chunks: Iterable[int]) -> Tensor:
        """Feed one sequence from position 0 in chunks of the given lengths; logits [T, V]."""
        parts, start = [], 0
        for length in chunks:
            parts.append(self.logits({sequence: (start, token_ids[start : start + length])})[sequence])
            start += length
        assert start == len(token_ids), f"chunks cover {start} of {len(token_ids)} tokens"
        return torch.cat(parts)


def poison(cache: CacheTensors) -> None:
    """Fill the cache with NaN, so that reading an unwritten row is noticed."""
    for layer in cache.layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor):
                tensor.fill_(float("nan"))


def random_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """`count` uniform token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()
