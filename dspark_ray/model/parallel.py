"""Tensor parallelism: how units are split over ranks, and sums over ranks (docs/model.md, Tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def split_range(total: int, size: int, rank: int) -> tuple[int, int]:
    """[start, stop) of `total` units for `rank` of `size`; the first ranks take the remainder."""
    share, rest = divmod(total, size)
    start = rank * share + min(rank, rest)
    return start, start + share + (rank < rest)


@dataclass(frozen=True)
class ParallelGroup:
    """The ranks that together hold one target. `handle` is None for a single rank."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    def range(self, total: int) -> tuple[int, int]:
        """This rank's [start, stop) of `total` units."""
        return split_range(total, self.size, self.rank)

    def share(self, total: int) -> int:
        """This rank's number of `total` units."""
        start, stop = self.range(total)
        return stop - start

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in float32 as in the official program; may overwrite x."""
        if self.size == 1:
            return x
        total = x.float().contiguous()
        dist.all_reduce(total, group=self.handle)
        return total.to(x.dtype)

    def gather_to_first(self, x: Tensor) -> list[Tensor] | None:
        """The tensors of all ranks (equal shapes) on rank 0; None on other ranks."""
        if self.size == 1:
            return [x]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0, group=self.handle)
        return parts
