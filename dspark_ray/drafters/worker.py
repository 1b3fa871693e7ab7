"""The drafter at work: the module and the context windows of all sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark_ray.config import EngineConfig
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.drafters.protocol import (
    ContextUpdate,
    DraftProposal,
    DraftRequest,
    TruncatedDistributions,
)
from dspark_ray.sampling.sampler import DraftChooser


class DraftWorker:
    """Answers draft requests. Its whole state is W context keys per stage and sequence: it can be rebuilt."""

    def __init__(self, module: DSparkModule, config: EngineConfig) -> None:
        self.module, self.config = module, config
        model, window = module.config, module.config.sliding_window
        self.window = window
        weight = module.stages[0].main_norm.weight
        self._rings = [
            torch.zeros(config.max_num_seqs * window, model.head_dim, dtype=weight.dtype, device=weight.device)
            for _ in module.stages
        ]

    @torch.inference_mode()
    def draft(self, request: DraftRequest) -> DraftProposal:
        """Store the context, then draft every block."""
        self.store(request.context)
        if not len(request.slots):
            return _nothing(request.num_positions)
        device = self._rings[0].device
        anchors, starts = (torch.from_numpy(x).to(device) for x in (request.anchors, request.starts))
        context, visible = self._context(request)
        block = self.module.block(anchors, starts, context, visible)
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
        ring, device = self._rings[0], self._rings[0].device
        positions = torch.from_numpy(update.positions).to(device)
        slots = torch.from_numpy(update.slots).to(device) * self.window + positions % self.window
        keys = self.module.context_keys(update.main_x.to(ring.dtype).to(device), positions)
        for stage_ring, stage_keys in zip(self._rings, keys, strict=True):
            stage_ring[slots] = stage_keys

    def _context(self, request: DraftRequest) -> tuple[list[Tensor], Tensor]:
        """Per stage the keys [R, W, D] of the positions before each anchor, and which of them exist [R, W]."""
        wanted = request.starts[:, None] + np.arange(-self.window, 0)
        flat = torch.from_numpy(request.slots[:, None] * self.window + wanted % self.window)
        flat = flat.to(self._rings[0].device)
        return [ring[flat] for ring in self._rings], torch.from_numpy(wanted >= 0).to(flat.device)


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
