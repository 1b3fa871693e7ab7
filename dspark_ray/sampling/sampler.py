"""Logits to tokens, on the verifier shard by shard and on the drafter block by block.

A token is argmax(processed logits + Gumbel noise), which is a draw from their softmax. The noise depends on
(seed, position, token id) alone, so every rank makes its own part of it and a drafter makes the very same.

Letters: n rows of logits, R requests, G gamma, K kept draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_kernels import gumbel_noise
from dspark_kernels.philox import STREAM_DRAFT, STREAM_SAMPLE
from dspark_ray.config import VerificationMode
from dspark_ray.model.parallel import ParallelGroup, split_range
from dspark_ray.sampling.rows import Draws, SamplingRows, pack_draws
from dspark_ray.types import SamplingParams, TokenLogprobs


def process_logits(local_logits: Tensor, rows: SamplingRows, first_token: int) -> Tensor:
    """[n, Vlocal] float32: penalties, bias and forbidden tokens, then temperature where it is not 0."""
    logits = local_logits.float()
    if rows.edits is not None:
        logits = _apply_edits(logits, rows, first_token)
    return _temper(logits, rows)


def _apply_edits(logits: Tensor, rows: SamplingRows, first_token: int) -> Tensor:
    assert rows.edits is not None
    local = (rows.edits.token_ids >= first_token) & (rows.edits.token_ids < first_token + logits.shape[1])
    edits = rows.edits.select(local)
    where = (edits.rows, edits.token_ids - first_token)
    old = logits[where]
    new = torch.where(old > 0, old / edits.factors, old * edits.factors) + edits.offsets
    return logits.index_put(where, new)


def _temper(logits: Tensor, draws: Draws) -> Tensor:
    if not draws.any_sampled:
        return logits
    divisors = torch.where(draws.temperatures > 0, draws.temperatures, 1.0)
    return logits / divisors.float().unsqueeze(1)


def filter_logits(processed: Tensor, draws: Draws) -> Tensor:
    """[n, V] with -inf where top_k, then top_p, then min_p remove a token; never the best one.

    A filter is a lowest logit: tokens that tie with a kept one stay, and neither the order in which a device
    sorts equal logits nor the other rows matter.
    """
    if not draws.any_filtered:
        return processed
    width = min(draws.widest_top_k, processed.shape[1])
    best = processed.topk(width).values  # [n, width], best first
    last = draws.top_k.clamp(max=width).unsqueeze(1) - 1
    lowest = torch.maximum(best.gather(1, last), _lowest_of_top_p(best, last, draws.top_p.unsqueeze(1)))
    lowest = torch.maximum(lowest, best[:, :1] + draws.min_p.log().float().unsqueeze(1))
    return processed.masked_fill(processed < lowest, -torch.inf)


def _lowest_of_top_p(best: Tensor, last: Tensor, top_p: Tensor) -> Tensor:
    """[n, 1] the lowest logit among the fewest of the first last+1 tokens whose probability reaches top_p."""
    outside = torch.arange(best.shape[1], device=best.device) > last
    probabilities = best.masked_fill(outside, -torch.inf).double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    # Rounding must not cut the tail of rows without top_p.
    return torch.where(top_p < 1, best.gather(1, count - 1), -torch.inf)


def _add_noise(logits: Tensor, draws: Draws, noise: Tensor) -> Tensor:
    """Rows with temperature 0 stay as they are."""
    return logits + noise * (draws.temperatures > 0).unsqueeze(1)


def noisy_argmax(processed: Tensor, rows: Draws, first_token: int, stream: int) -> tuple[Tensor, Tensor]:
    """(values, token ids) [n]: this shard's best processed logit plus noise; of equal ones the lowest id."""
    if rows.any_sampled:
        noise = gumbel_noise(rows.seeds, rows.positions, stream, first_token, processed.shape[1])
        processed = _add_noise(processed, rows, noise)
    ids = processed.argmax(-1, keepdim=True)
    return processed.gather(1, ids).squeeze(1), ids.squeeze(1) + first_token


@dataclass(frozen=True)
class Samples:
    """The target's own token at each of n rows, and what else rows asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    """Of token_ids, under the unprocessed logits."""
    distributions: list[Tensor | None]
    """[V] processed and filtered logits of the rows that want them: softmax gives the probabilities."""
    log_softmax: list[Tensor | None]
    """[V] unprocessed log-probabilities of the rows that report any."""

    def of(self, rows: slice) -> Samples:
        """The samples of one request's rows."""
        return Samples(self.token_ids[rows], self.logprobs[rows], self.distributions[rows], self.log_softmax[rows])

    def logprobs_of(self, row: int, token_id: int) -> TokenLogprobs | None:
        """What to report when `token_id`, in rejection not always token_ids[row], is committed at `row`."""
        own, log_softmax = self.logprobs[row], self.log_softmax[row]
        if own is None or log_softmax is None or token_id == own.token_id:
            return own
        return TokenLogprobs(token_id, float(log_softmax[token_id]), own.top)


class Sampler:
    """Samples from logits whose vocabulary is spread over the ranks of a group."""

    def __init__(self, group: ParallelGroup, first_token: int, vocab_size: int) -> None:
        self._group, self._first_token, self._vocab_size = group, first_token, vocab_size

    def sample(self, local_logits: Tensor, rows: SamplingRows) -> Samples | None:
        """[n, Vlocal] -> samples on rank 0, None elsewhere. Every rank calls it with the same rows."""
        rows, num_rows = rows.to(local_logits.device), rows.num_rows
        samples = Samples([0] * num_rows, [None] * num_rows, [None] * num_rows, [None] * num_rows)
        sharded = sorted(set(range(num_rows)).difference(rows.whole))
        if sharded:
            self._sample_sharded(_take(local_logits, sharded), rows.select(sharded), sharded, samples)
        if rows.whole:
            self._sample_whole(_take(local_logits, rows.whole), rows.select(rows.whole), rows.whole, samples)
        return samples if self._group.rank == 0 else None

    def _sample_sharded(
        self, local_logits: Tensor, rows: SamplingRows, places: Sequence[int], samples: Samples
    ) -> None:
        """Each rank offers its best token; the best offer is the draw."""
        processed = process_logits(local_logits, rows, self._first_token)
        values, ids = noisy_argmax(processed, rows, self._first_token, STREAM_SAMPLE)
        # One collective for both: float64 holds every float32 and every token id exactly.
        offers = self._group.gather_to_first(torch.stack((values.double(), ids.double())))
        if offers is None:
            return
        values, ids = torch.stack(offers, dim=1)  # [size, n] each
        winner = values.argmax(0, keepdim=True)
        for place, token_id in zip(places, ids.gather(0, winner)[0].long().tolist(), strict=True):
            samples.token_ids[place] = token_id

    def _sample_whole(self, local_logits: Tensor, rows: SamplingRows, places: Sequence[int], samples: Samples) -> None:
        """Rank 0 sees whole rows and does everything alone."""
        logits = self._gather_vocabulary(local_logits.float())
        if logits is None:
            return
        filtered = filter_logits(process_logits(logits, rows, 0), rows)
        token_ids = noisy_argmax(filtered, rows, 0, STREAM_SAMPLE)[1].tolist()
        reports = any(num_top is not None for num_top in rows.logprobs)
        log_softmax = logits.log_softmax(-1) if reports else None
        for row, place in enumerate(places):
            samples.token_ids[place] = token_ids[row]
            if rows.wants_distribution[row]:
                samples.distributions[place] = filtered[row]
            num_top = rows.logprobs[row]
            if num_top is not None and log_softmax is not None:
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


@dataclass(frozen=True)
class DraftSampling(Draws):
    """How the requests of a round want their drafts drawn; positions are the drafter's to fill in."""

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> DraftSampling:
        """One row per request."""
        return DraftSampling(**pack_draws(params, [0] * len(params)))


class DraftChooser:
    """Picks the drafted tokens of R blocks: call with k = 0, 1, ... and that position's logits [R, V]."""

    ids: Tensor
    """[R, G, K] in rejection mode: the tokens that each draft could have been ..."""
    probabilities: Tensor
    """[R, G, K] float32 ... and how likely each was."""

    def __init__(
        self,
        sampling: DraftSampling,
        starts: Tensor,
        gamma: int,
        vocab_size: int,
        mode: VerificationMode,
        top_k: int = 64,
    ) -> None:
        """starts [R] are the anchors' positions: the token chosen at k sits at starts + 1 + k."""
        self._sampling = sampling.to(starts.device)
        self._num_kept = min(top_k, vocab_size)
        self._choose = self._coupled if mode == "coupled" else self._truncated
        self._noise = _block_noise(self._sampling, starts, gamma, vocab_size, mode)
        if mode == "rejection":
            self.ids = starts.new_zeros(len(starts), gamma, self._num_kept)
            self.probabilities = self.ids.float()

    def __call__(self, k: int, logits: Tensor) -> Tensor:
        """Token ids [R]."""
        return self._choose(k, filter_logits(_temper(logits.float(), self._sampling), self._sampling))

    def _coupled(self, k: int, filtered: Tensor) -> Tensor:
        """With the noise that the target will use at the same position."""
        return self._perturb(filtered, k).argmax(-1)

    def _truncated(self, k: int, filtered: Tensor) -> Tensor:
        """From the best K tokens, whose distribution, not the full row, is what the draft comes from."""
        best = filtered.topk(self._num_kept)
        choice = self._perturb(filtered, k).gather(1, best.indices).argmax(-1, keepdim=True)
        certain = torch.zeros_like(best.values).scatter(1, choice, 1.0)
        sampled = self._sampling.temperatures.unsqueeze(1) > 0
        self.ids[:, k] = best.indices
        self.probabilities[:, k] = torch.where(sampled, best.values.softmax(-1), certain)
        return best.indices.gather(1, choice).squeeze(1)

    def _perturb(self, logits: Tensor, k: int) -> Tensor:
        return logits if self._noise is None else _add_noise(logits, self._sampling, self._noise[:, k])


def _block_noise(
    sampling: DraftSampling, starts: Tensor, gamma: int, vocab_size: int, mode: VerificationMode
) -> Tensor | None:
    """[R, G, V] at once: Philox in torch is many small calls. None where nobody samples."""
    if not sampling.any_sampled:
        return None
    seeds = sampling.seeds.unsqueeze(1).expand(-1, gamma)
    addresses = _noise_positions(starts, gamma, mode)
    stream = STREAM_SAMPLE if mode == "coupled" else STREAM_DRAFT
    return gumbel_noise(seeds.flatten(), addresses.flatten(), stream, 0, vocab_size).unflatten(0, (-1, gamma))


def _noise_positions(starts: Tensor, gamma: int, mode: VerificationMode) -> Tensor:
    """[R, G] where the noise of a block is found."""
    offsets = torch.arange(gamma, device=starts.device)
    positions = starts.unsqueeze(1) + 1 + offsets
    if mode == "coupled":
        return positions
    # A position is drafted anew after a rejection before it. Confidences of the old draft may have set the
    # new budget, so its noise is not independent of what gets verified: each block has its own.
    return positions + (offsets << 32)
