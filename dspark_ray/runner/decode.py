"""Decode steps as graphs: the target's by number of rows, the drafter's by number of requests."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import dspark_kernels as ops
from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.config import CSA_RATIO
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.model.deepseek_v4 import DeepSeekV4, TargetOutput
from dspark_ray.model.rows import NOT_STAGED, Layout, Rows, Segment, compress_index, window_index
from dspark_ray.runner.graphs import Capture, GraphSet, Outputs, graph_sizes, padded_size


@dataclass(frozen=True)
class _VerifyBlocks:
    """The verify blocks of up to R requests in one tensor, so that one copy moves a step to the device.

    length | anchor | start | slot | G drafts | P pages
    """

    table: Tensor
    """[R, 4 + G + P] int64; length -1 marks an unused row."""
    gamma: int

    def fill(self, segments: SequenceOf[Segment]) -> None:
        """Write the segments, blocks of 1 .. 1+G tokens, to the first rows of the table."""
        host = np.zeros(self.table.shape, dtype=np.int64)
        host[:, 0] = -1
        for row, segment in zip(host, segments, strict=False):
            tokens, first_page = segment.token_ids, 4 + self.gamma
            row[:4] = len(tokens) - 1, tokens[0], segment.start, segment.slot
            row[4 : 3 + len(tokens)] = tokens[1:]
            row[first_page : first_page + len(segment.pages)] = segment.pages
        self.table.copy_(torch.from_numpy(host))

    def layout(self, num_rows: int) -> Layout:
        """Flattened to `num_rows` rows; padding rows write to staging and attend to themselves only."""
        length, anchor, start, slot = self.table[:, :4].unbind(1)
        drafts, pages = self.table[:, 4 : 4 + self.gamma], self.table[:, 4 + self.gamma :]
        token_ids, positions, owners, _ = ops.pack_rows(length, anchor, drafts, start, num_rows)
        padding, owners = owners < 0, owners.clamp_min(0)
        staged_from = torch.where(padding, 0, NOT_STAGED)
        return Layout(token_ids, positions, slot[owners], owners, pages, staged_from, padding)


def fixed_rows(layout: Layout, shape: CacheShape, max_length: int) -> Rows:
    """`build_rows` with shapes that depend on the number of rows alone, for sequences of up to `max_length` tokens.

    Every row is checked for an entry that it may close, and every entry that a sequence could have is listed.
    """
    closing = torch.arange(len(layout.positions), device=layout.positions.device)
    compressed = {
        ratio: compress_index(layout, shape, ratio, closing, max_length // ratio, None) for ratio in shape.raw_rings
    }
    window = window_index(layout, shape, None)
    return Rows(layout.token_ids, layout.positions, window, compressed, layout.padding)


class TargetGraphs:
    """The target's forward over verify blocks, recorded by number of rows and by length of the longest sequence.

    There are two lengths: as long as a CSA layer shows every entry to every row, its indexer need not run.
    """

    def __init__(
        self, model: DeepSeekV4, cache: CacheTensors, max_num_seqs: int, max_length: int, capture: Capture
    ) -> None:
        """`max_length` is the number of tokens of the longest sequence."""
        shape, device = cache.shape, model.norm.weight.device
        self.sizes = graph_sizes(min(max_num_seqs * shape.block_length, shape.max_rows))
        self._model, self._cache = model, cache
        self._lengths = tuple(sorted({min(model.config.index_topk * CSA_RATIO, max_length), max_length}))
        num_pages = -(-max_length // shape.page_size)
        table = torch.zeros(max_num_seqs, 3 + shape.block_length + num_pages, dtype=torch.int64, device=device)
        self._blocks = _VerifyBlocks(table, shape.block_length - 1)
        self._blocks.fill(())
        self._graphs: GraphSet[tuple[int, int]] = GraphSet(self._forward, capture)

    def record_all(self) -> None:
        """Record every size, largest first, so that the smaller ones reuse its memory."""
        for size in reversed(self.sizes):
            for length in self._lengths:
                self._graphs.record((size, length))

    def fits(self, segments: SequenceOf[Segment]) -> bool:
        """Whether a step of these segments can be replayed."""
        block = self._cache.shape.block_length
        lengths = [len(segment.token_ids) for segment in segments]
        return max(lengths) <= block and len(lengths) <= len(self._blocks.table) and sum(lengths) <= self.sizes[-1]

    def run(self, segments: SequenceOf[Segment]) -> TargetOutput:
        """The model's forward over `build_rows(segments)`.

        The returned context features are a copy; the hidden states are valid until the next run.
        """
        num_rows = sum(len(segment.token_ids) for segment in segments)
        longest = max(segment.start + len(segment.token_ids) for segment in segments)
        self._blocks.fill(segments)
        hidden, *features = self._graphs.run((padded_size(self.sizes, num_rows), padded_size(self._lengths, longest)))
        return TargetOutput(hidden[:num_rows], features[0][:num_rows].clone() if features else None)

    def _forward(self, key: tuple[int, int]) -> Outputs:
        num_rows, max_length = key
        rows = fixed_rows(self._blocks.layout(num_rows), self._cache.shape, max_length)
        output = self._model(rows, self._cache)
        return (output.hidden,) if output.context_features is None else (output.hidden, output.context_features)


class DraftGraphs:
    """Coupled drafts without filters, recorded by number of requests: stages, heads and the left-to-right loop."""

    def __init__(self, module: DSparkModule, pools: DraftPools, max_num_seqs: int, capture: Capture) -> None:
        self._module, self._pools = module, pools
        self.sizes = graph_sizes(max_num_seqs)
        device = pools.device
        self._integers = torch.zeros(4, max_num_seqs, dtype=torch.int64, device=device)
        """[4, R] anchors, starts, slots, seeds; padding requests start at 0, where there is no context."""
        self._temperatures = torch.zeros(max_num_seqs, dtype=torch.float64, device=device)
        self._graphs: GraphSet[int] = GraphSet(self._draft, capture)

    def record_all(self) -> None:
        """Record every size, largest first, so that the smaller ones reuse its memory."""
        for size in reversed(self.sizes):
            self._graphs.record(size)

    def run(
        self, anchors: Tensor, starts: Tensor, slots: Tensor, seeds: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tokens [R, G], confidence logits [R, G]) of full blocks, valid until the next run; all arguments [R]."""
        num_requests = len(anchors)
        self._integers[:, num_requests:] = 0
        self._integers[:, :num_requests] = torch.stack((anchors, starts, slots, seeds)).to(self._integers.device)
        self._temperatures[:num_requests] = temperatures.to(self._temperatures.device)
        tokens, logits = self._graphs.run(padded_size(self.sizes, num_requests))
        return tokens[:num_requests], logits[:num_requests]

    def _draft(self, num_requests: int) -> Outputs:
        anchors, starts, slots, seeds = self._integers[:, :num_requests].unbind(0)
        block = self._module.cached_block(anchors, starts, self._pools.tensors, self._pools.index(slots, starts))
        temperatures = self._temperatures[:num_requests]
        return self._module.sample(block, anchors, starts, temperatures, seeds, self._module.gamma)
