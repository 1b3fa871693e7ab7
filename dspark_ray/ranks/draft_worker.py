"""Runs the draft module, with the context windows of all sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark_ray.config import ResolvedConfig
from dspark_ray.drafters.draft_sampling import DraftChooser
from dspark_ray.drafters.dspark import BlockOutput, DSparkModule
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.drafters.protocol import (
    ContextUpdate,
    DraftProposal,
    DraftRequest,
    TruncatedDistributions,
)
from dspark_ray.runner.decode import DraftGraphs
from dspark_ray.runner.graphs import Capture


class DraftWorker:
    """Answers draft requests. Its state is W context keys per stage and sequence, which the verifier can send again."""

    def __init__(self, module: DSparkModule, config: ResolvedConfig, capture: Capture | None = None) -> None:
        """With `capture`, drafts are recorded as graphs here and replayed later."""
        self.module, self.config = module, config
        self._pools = DraftPools(module, config.max_num_seqs)
        self._graphs: DraftGraphs | None = None
        if capture is not None and config.verification == "coupled" and module.is_vanilla:
            self._graphs = DraftGraphs(module, self._pools, config.max_num_seqs, capture)
            with torch.inference_mode():
                self._graphs.record_all()

    @torch.inference_mode()
    def draft(self, request: DraftRequest) -> DraftProposal:
        """Store the context, then draft every block."""
        self.store(request.context)
        if not len(request.slots):
            return _empty_proposal(request.num_positions)
        anchors, starts, slots = (
            torch.from_numpy(x).to(self._pools.device) for x in (request.anchors, request.starts, request.slots)
        )
        if self.config.verification != "coupled" or not self.module.is_vanilla:
            block = self.module.cached_block(anchors, starts, self._pools.tensors, self._pools.index(slots, starts))
            return self._draft_by_rows(request, block, anchors, starts)
        tokens, logits = self._draft_coupled(request, anchors, starts, slots)
        return DraftProposal(tokens.cpu().numpy(), torch.sigmoid(logits).cpu().numpy())

    def _draft_coupled(
        self, request: DraftRequest, anchors: Tensor, starts: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tokens, confidence logits), both [R, G], with G = num_positions, or gamma where a graph is replayed."""
        sampling, wanted = request.sampling.to(self._pools.device), request.num_positions
        filters = sampling.filters(self.module.config.vocab_size)
        if self._graphs is not None and filters is None:
            # Graphs draft whole blocks; fewer positions would save nothing.
            return self._graphs.run(anchors, starts, slots, sampling.seeds, sampling.temperatures)
        block = self.module.cached_block(anchors, starts, self._pools.tensors, self._pools.index(slots, starts))
        return self.module.sample(block, anchors, starts, sampling.temperatures, sampling.seeds, wanted, filters)

    def _draft_by_rows(
        self, request: DraftRequest, block: BlockOutput, anchors: Tensor, starts: Tensor
    ) -> DraftProposal:
        """Draft with full rows of logits at every position, for other Markov heads and for rejection verification."""
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
        device, dtype = self._pools.device, self._pools.tensors[0].dtype
        positions, slots = (torch.from_numpy(x).to(device) for x in (update.positions, update.slots))
        projected = update.projected.to(device, dtype)
        self.module.store_context(
            projected, positions, self._pools.tensors, self._pools.context_slot_mapping(slots, positions)
        )


class InlineDrafter:
    """A drafter in the process of rank 0; it drafts in collect()."""

    def __init__(self, worker: DraftWorker) -> None:
        self._worker = worker
        self._request: DraftRequest | None = None

    def submit(self, request: DraftRequest) -> None:
        self._request = request

    def collect(self) -> DraftProposal:
        request, self._request = self._request, None
        assert request is not None, "submit() comes before collect()"
        return self._worker.draft(request)

    def start(self) -> None:
        """Nothing to do: there is no other process."""

    def keep_alive(self) -> None:
        """Nothing to do: there is no other process."""

    def close(self) -> None:
        """Nothing to do: there is no other process."""


def _empty_proposal(gamma: int) -> DraftProposal:
    return DraftProposal(np.empty((0, gamma), dtype=np.int64), np.empty((0, gamma), dtype=np.float32))
