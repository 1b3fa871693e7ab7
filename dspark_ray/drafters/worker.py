"""The drafter at work: the module and the context windows of all sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark_ray.config import EngineConfig
from dspark_ray.drafters.dspark import BlockOutput, DSparkModule
from dspark_ray.drafters.protocol import (
    ContextUpdate,
    DraftProposal,
    DraftRequest,
    TruncatedDistributions,
)
from dspark_ray.model.rows import PoolIndex
from dspark_ray.sampling.sampler import DraftChooser, DraftSampling


class DraftWorker:
    """Answers draft requests. Its whole state is W context keys per stage and sequence: it can be rebuilt.

    The pool of a stage is a ring of W rows per sequence, then one place for every row of the blocks being drafted.
    """

    def __init__(self, module: DSparkModule, config: EngineConfig) -> None:
        self.module, self.config = module, config
        model, window = module.config, module.config.sliding_window
        self.window = window
        weight = module.stages[0].main_norm.weight
        num_rows = config.max_num_seqs * (window + module.gamma)
        self._pools = [
            torch.zeros(num_rows, model.head_dim, dtype=weight.dtype, device=weight.device) for _ in module.stages
        ]

    @torch.inference_mode()
    def draft(self, request: DraftRequest) -> DraftProposal:
        """Store the context, then draft every block."""
        self.store(request.context)
        if not len(request.slots):
            return _nothing(request.num_positions)
        device = self._pools[0].device
        anchors, starts, slots = (
            torch.from_numpy(x).to(device) for x in (request.anchors, request.starts, request.slots)
        )
        block = self.module.cached_block(anchors, starts, self._pools, self._index(slots, starts))
        if self._is_coupled_alone(request.sampling):
            sampling = request.sampling.to(device)
            tokens, logits = self.module.sample(
                block, anchors, starts, sampling.temperatures, sampling.seeds, request.num_positions
            )
            return DraftProposal(tokens.cpu().numpy(), torch.sigmoid(logits).cpu().numpy())
        return self._draft_by_rows(request, block, anchors, starts)

    def _is_coupled_alone(self, sampling: DraftSampling) -> bool:
        """Whether temperature and noise are all there is between logits and tokens."""
        return self.config.verification == "coupled" and self.module.is_vanilla and not sampling.any_filtered

    def _draft_by_rows(
        self, request: DraftRequest, block: BlockOutput, anchors: Tensor, starts: Tensor
    ) -> DraftProposal:
        """With whole rows of logits at every position: filters, other Markov heads, rejection verification."""
        choose = DraftChooser(
            request.sampling,
            starts,
            request.num_positions,
            self.module.config.vocab_size,
            self.config.verification,
            self.config.rejection_top_k,
        )
        draft = self.module.run_heads(block, anchors, choose, request.num_positions)
        distributions = None
        if self.config.verification == "rejection":
            distributions = TruncatedDistributions(choose.ids.cpu().numpy(), choose.probabilities.cpu().numpy())
        confidences = torch.sigmoid(draft.confidence_logits)
        return DraftProposal(draft.tokens.cpu().numpy(), confidences.cpu().numpy(), distributions)

    @torch.inference_mode()
    def store(self, update: ContextUpdate) -> None:
        """Write the context keys of committed tokens into the rings, by position."""
        if not len(update.slots):
            return
        pool = self._pools[0]
        positions = torch.from_numpy(update.positions).to(pool.device)
        slots = torch.from_numpy(update.slots).to(pool.device) * self.window + positions % self.window
        self.module.store_context(update.main_x.to(pool.dtype).to(pool.device), positions, self._pools, slots)

    def _index(self, slots: Tensor, starts: Tensor) -> PoolIndex:
        """Where block rows go, and the keys each request sees: the W positions before its anchor, then its block."""
        num_requests, gamma = len(slots), self.module.gamma
        wanted = starts.unsqueeze(1) + torch.arange(-self.window, 0, device=slots.device)
        context = torch.where(wanted >= 0, slots.unsqueeze(1) * self.window + wanted % self.window, -1)
        own = self.config.max_num_seqs * self.window + torch.arange(num_requests * gamma, device=slots.device)
        return PoolIndex(own, torch.cat((context, own.view(num_requests, gamma)), dim=1), None)


class InlineDrafter:
    """The drafter inside the process of rank 0: drafts when the proposal is asked for."""

    def __init__(self, worker: DraftWorker) -> None:
        self._worker = worker
        self._request: DraftRequest | None = None

    def submit(self, request: DraftRequest) -> None:
        self._request = request

    def collect(self) -> DraftProposal:
        request, self._request = self._request, None
        assert request is not None, "submit() comes before collect()"
        return self._worker.draft(request)

    def keep_alive(self) -> None:
        """Nobody is waiting."""

    def close(self) -> None:
        """Nothing to end: it lives and dies with rank 0."""


def _nothing(gamma: int) -> DraftProposal:
    return DraftProposal(np.empty((0, gamma), dtype=np.int64), np.empty((0, gamma), dtype=np.float32))
