"""Logits to tokens, on ranks that hold a shard of the vocabulary each.

A token is argmax(processed logits + Gumbel noise), which is a draw from their softmax. The noise depends on
(seed, position, token id) alone, so every rank computes its own part of it, and a drafter computes the same noise.

Letters: n rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import dspark_kernels as ops
from dspark_kernels.philox import STREAM_SAMPLE
from dspark_ray.model.parallel import ParallelGroup, split_range
from dspark_ray.sampling.sampling_rows import SamplingRows, SamplingTensors
from dspark_ray.types import TokenLogprobs

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not finite or leave no token possible."""


def edit_logits(local_logits: Tensor, rows: SamplingRows, first_token: int) -> Tensor:
    """[n, Vlocal] with penalties, bias and forbidden tokens applied, before temperature."""
    edits = rows.edits
    if edits is None:
        return local_logits
    return ops.edit_logits(local_logits, edits.rows, edits.token_ids, edits.factors, edits.offsets, first_token)


def filter_threshold(logits: Tensor, sampling: SamplingTensors) -> Tensor | None:
    """[n] lowest logit, after temperature, that the filters keep in each row of `logits`; None without filters."""
    filters = sampling.filters(logits.shape[1])
    return None if filters is None else ops.filter_threshold(logits, sampling.temperatures, *filters)


def filtered_logits(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """[n, V] after temperature, -inf where a filter removes a token: their softmax is the sampled distribution."""
    scaled, threshold = ops.apply_temperature(logits, sampling.temperatures), filter_threshold(logits, sampling)
    return scaled if threshold is None else scaled.masked_fill(scaled < threshold.unsqueeze(1), -torch.inf)


def draw(logits: Tensor, sampling: SamplingTensors, stream: int, first_token: int = 0) -> tuple[Tensor, Tensor]:
    """(values, token ids) [n]: the best of this shard's logits after temperature, filters and noise.

    The value is -inf where the shard has no possible token, and NaN where one of its logits is NaN or +inf.
    """
    values, ids, _ = ops.gumbel_argmax(
        logits,
        sampling.temperatures,
        sampling.seeds,
        sampling.positions,
        stream,
        first_token,
        filter_threshold(logits, sampling),
    )
    return values, ids


def choose_offers(values: Tensor, ids: Tensor) -> Tensor:
    """[n] token ids of the best values [size, n]; NO_TOKEN where a shard's value is NaN, or every shard's is -inf."""
    best = values.argmax(0, keepdim=True)  # argmax takes NaN for the largest value
    is_finite = values.gather(0, best)[0].isfinite()
    return torch.where(is_finite, ids.gather(0, best)[0].long(), NO_TOKEN)


@dataclass(frozen=True)
class Samples:
    """The target's own token at each of n rows, with the reports and distributions that rows asked for."""

    token_ids: list[int]
    """NO_TOKEN where a row has no distribution to sample from."""
    logprobs: list[TokenLogprobs | None]
    """Log-probabilities of token_ids under the unprocessed logits."""
    distributions: list[Tensor | None]
    """[V] processed and filtered logits of the rows that want them: softmax gives the probabilities."""
    log_softmax: list[Tensor | None]
    """[V] log-softmax of the unprocessed logits, for rows that report log-probabilities."""

    def of(self, rows: slice) -> Samples:
        """The samples of one request's rows."""
        return Samples(self.token_ids[rows], self.logprobs[rows], self.distributions[rows], self.log_softmax[rows])

    def logprobs_of(self, row: int, token_id: int) -> TokenLogprobs | None:
        """The report for `token_id` committed at `row`; in rejection verification it may differ from token_ids[row]."""
        own, log_softmax = self.logprobs[row], self.log_softmax[row]
        if own is None or log_softmax is None or token_id == own.token_id:
            return own
        return TokenLogprobs(token_id, float(log_softmax[token_id]), own.top)


class Sampler:
    """Samples from logits whose vocabulary is split over the ranks of a group."""

    def __init__(self, group: ParallelGroup, first_token: int, vocab_size: int) -> None:
        self._group, self._first_token, self._vocab_size = group, first_token, vocab_size

    def sample(self, local_logits: Tensor, rows: SamplingRows) -> Samples | None:
        """[n, Vlocal] -> samples on rank 0, None elsewhere. Every rank calls it with the same rows."""
        rows, num_rows = rows.to(local_logits.device), rows.num_rows
        samples = Samples([0] * num_rows, [None] * num_rows, [None] * num_rows, [None] * num_rows)
        sharded = sorted(set(range(num_rows)).difference(rows.full_vocab_rows))
        if sharded:
            self._sample_sharded(_take(local_logits, sharded), rows.select(sharded), sharded, samples)
        full = rows.full_vocab_rows
        if full:
            self._sample_full_vocab(_take(local_logits, full), rows.select(full), full, samples)
        return samples if self._group.rank == 0 else None

    def _sample_sharded(
        self, local_logits: Tensor, rows: SamplingRows, places: Sequence[int], samples: Samples
    ) -> None:
        """Each rank offers its best token; the best offer is the draw."""
        logits = edit_logits(local_logits, rows, self._first_token)
        values, ids = draw(logits, rows, STREAM_SAMPLE, self._first_token)
        # One collective for both: float64 holds every float32 and every token id exactly.
        offers = self._group.gather_to_first(torch.stack((values.double(), ids.double())))
        if offers is None:
            return
        tokens = choose_offers(*torch.stack(offers, dim=1))  # [size, n] values and ids
        for place, token_id in zip(places, tokens.tolist(), strict=True):
            samples.token_ids[place] = token_id

    def _sample_full_vocab(
        self, local_logits: Tensor, rows: SamplingRows, places: Sequence[int], samples: Samples
    ) -> None:
        """Gather full rows on rank 0, which samples and reports alone."""
        logits = self._gather_vocabulary(local_logits.float())
        if logits is None:
            return
        edited = edit_logits(logits, rows, 0)
        values, ids = draw(edited, rows, STREAM_SAMPLE)
        token_ids = choose_offers(values.unsqueeze(0), ids.unsqueeze(0)).tolist()
        filtered = filtered_logits(edited, rows) if any(rows.wants_distribution) else edited
        reports = any(num_top is not None for num_top in rows.logprobs)
        log_softmax = logits.log_softmax(-1) if reports else None
        for row, place in enumerate(places):
            samples.token_ids[place] = token_ids[row]
            if rows.wants_distribution[row]:
                samples.distributions[place] = filtered[row]
            num_top = rows.logprobs[row]
            if num_top is not None and log_softmax is not None and token_ids[row] != NO_TOKEN:
                samples.log_softmax[place] = log_softmax[row]
                samples.logprobs[place] = _report(log_softmax[row], token_ids[row], num_top)

    def _gather_vocabulary(self, local: Tensor) -> Tensor | None:
        """[w, Vlocal] -> [w, V] on rank 0; shards differ by one in size and travel padded."""
        size = self._group.size
        ranges = [split_range(self._vocab_size, size, rank) for rank in range(size)]
        shares = [stop - start for start, stop in ranges]
        padded = torch.nn.functional.pad(local, (0, max(shares) - local.shape[1]))
        parts = self._group.gather_to_first(padded)
        if parts is None:
            return None
        return torch.cat([part[:, :share] for part, share in zip(parts, shares, strict=True)], dim=1)


def _take(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[list(rows)]


def _report(log_softmax: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    top = log_softmax.topk(min(num_top, len(log_softmax)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(log_softmax[token_id]), pairs)
