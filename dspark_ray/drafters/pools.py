"""The drafter's KV cache: context keys of every stage, by slot and position."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.model.rows import PoolIndex


class DraftPools:
    """Per stage a ring of W rows per sequence, then one row for every position of the blocks being drafted.

    Rings hold committed tokens only; keys of block positions are read only in the round that writes them.
    """

    def __init__(self, module: DSparkModule, num_slots: int) -> None:
        weight = module.stages[0].main_norm.weight
        self.window, self.gamma, self.num_slots, self.device = (
            module.config.sliding_window,
            module.gamma,
            num_slots,
            weight.device,
        )
        num_rows = num_slots * (self.window + self.gamma)
        self.tensors = [
            torch.zeros(num_rows, module.config.head_dim, dtype=weight.dtype, device=weight.device)
            for _ in module.stages
        ]

    def context_slot_mapping(self, slots: Tensor, positions: Tensor) -> Tensor:
        """[n] pool rows of committed tokens at positions [n] of sequences in slots [n]."""
        return slots * self.window + positions % self.window

    def index(self, slots: Tensor, starts: Tensor) -> PoolIndex:
        """Slot mapping of R blocks, and the keys each request sees: W positions before its anchor, then its block.

        slots, starts [R]; `starts` are the anchors' positions.
        """
        num_requests = len(slots)
        wanted = starts.unsqueeze(1) + torch.arange(-self.window, 0, device=slots.device)
        context = torch.where(wanted >= 0, self.context_slot_mapping(slots.unsqueeze(1), wanted), -1)
        own = self.num_slots * self.window + torch.arange(num_requests * self.gamma, device=slots.device)
        return PoolIndex(own, torch.cat((context, own.view(num_requests, self.gamma)), dim=1), None)
