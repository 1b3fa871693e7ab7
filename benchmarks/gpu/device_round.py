"""A round that runs on the device alone: draft, admit, verify, accept, commit, for greedy and coupled requests.

The serving loop reads the tokens of every step on the host, because it streams them. This round does not, so that its
time is that of its operations and it can be one CUDA graph.

    anchors -> draft -> admit_prefixes -> pack_rows -> target -> gumbel_argmax -> accept_coupled -> next anchors

Letters as in dspark_ray.config; N rows of the target's forward, fixed: R + budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import dspark_kernels as ops
from dspark_kernels.philox import STREAM_SAMPLE
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.rows import NOT_STAGED, Layout
from dspark_ray.runner.decode import fixed_rows


@dataclass(frozen=True)
class Requests:
    """R decoding requests; the tensors keep their addresses, and a round advances `anchors` and `starts`."""

    anchors: Tensor
    """[R] the last known token of each, not yet in the cache"""
    starts: Tensor
    """[R] its position"""
    slots: Tensor
    """[R]"""
    pages: Tensor
    """[R, P]"""
    seeds: Tensor
    """[R]"""
    temperatures: Tensor
    """[R] float64"""


@dataclass(frozen=True)
class RoundResult:
    """Results of a round."""

    num_accepted: Tensor
    """[R]"""
    next_anchors: Tensor
    """[R]"""
    drafts: Tensor
    """[R, G]; the first num_accepted[r] of row r stand"""


class DeviceRound:
    """One engine's round: `budget` drafts are verified in each, and no sequence gets longer than `max_length`."""

    def __init__(
        self,
        target: DeepSeekV4,
        drafter: DSparkModule,
        cache: CacheTensors,
        pools: DraftPools,
        requests: Requests,
        budget: int,
        max_length: int,
    ) -> None:
        self.target, self.drafter, self.cache, self.pools = target, drafter, cache, pools
        self.requests, self.max_length = requests, max_length
        num_requests, device = len(requests.anchors), requests.anchors.device
        self.num_rows = num_requests + budget
        self._budget = torch.tensor(budget, device=device)
        self._limits = torch.full((num_requests,), drafter.gamma, device=device)
        self._thresholds = torch.zeros(num_requests, dtype=torch.float64, device=device)

    def run(self) -> RoundResult:
        """One round, without waiting for the device."""
        requests = self.requests
        drafts, confidences = self._draft()
        lengths = ops.admit_prefixes(confidences, self._limits, self._thresholds, self._budget)
        token_ids, positions, owners, first_rows = ops.pack_rows(
            lengths, requests.anchors, drafts, requests.starts, self.num_rows
        )
        tokens, features = self._verify(token_ids, positions, owners)
        num_accepted, next_anchors = ops.accept_coupled(token_ids, tokens, first_rows)
        self._store_context(features, positions, owners, num_accepted)
        requests.anchors.copy_(next_anchors)
        requests.starts.add_(num_accepted + 1)
        return RoundResult(num_accepted, next_anchors, drafts)

    def _draft(self) -> tuple[Tensor, Tensor]:
        """(tokens [R, G], confidences [R, G])"""
        requests, index = self.requests, self.pools.index(self.requests.slots, self.requests.starts)
        block = self.drafter.cached_block(requests.anchors, requests.starts, self.pools.tensors, index)
        tokens, logits = self.drafter.sample(
            block, requests.anchors, requests.starts, requests.temperatures, requests.seeds, self.drafter.gamma
        )
        return tokens, torch.sigmoid(logits)

    def _verify(self, token_ids: Tensor, positions: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """(the target's token behind each row [N], features [N, T*d])"""
        requests, is_padding, owner = self.requests, owners < 0, owners.clamp_min(0)
        staged_from = torch.where(is_padding, 0, NOT_STAGED)
        layout = Layout(token_ids, positions, requests.slots[owner], owner, requests.pages, staged_from)
        output = self.target(fixed_rows(layout, self.cache.shape, self.max_length), self.cache)
        assert output.context_features is not None
        _, tokens, _ = ops.gumbel_argmax(
            self.target.logits(output.hidden),
            requests.temperatures[owner],
            requests.seeds[owner],
            positions + 1,
            STREAM_SAMPLE,
        )
        return tokens, output.context_features

    def _store_context(self, features: Tensor, positions: Tensor, owners: Tensor, num_accepted: Tensor) -> None:
        """Context keys of anchors and accepted drafts; those of other rows go to the block rows, which are not read."""
        requests, pools, owner = self.requests, self.pools, owners.clamp_min(0)
        committed = (owners >= 0) & (positions <= requests.starts[owner] + num_accepted[owner])
        trash = pools.num_slots * pools.window + torch.arange(self.num_rows, device=owners.device) % (
            pools.num_slots * pools.gamma
        )
        slot_mapping = torch.where(committed, pools.context_slot_mapping(requests.slots[owner], positions), trash)
        self.drafter.store_context(self.drafter.project(features), positions, pools.tensors, slot_mapping)
