"""Logits to tokens, on the verifier shard by shard and on the drafter block by block.

A token is argmax(processed logits + Gumbel noise), which is a draw from their softmax. The noise depends on
(seed, position, token id) alone, so every rank makes its own part of it and a drafter makes the very same.

Letters: n rows of logits, R requests, G gamma, K kept draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import dspark_kernels as ops
from dspark_kernels import gumbel_noise
from dspark_kernels.philox import STREAM_DRAFT, STREAM_SAMPLE
from dspark_ray.config import VerificationMode
from dspark_ray.model.parallel import ParallelGroup, split_range
from dspark_ray.sampling.sampling_rows import Draws, SamplingRows, pack_draws
from dspark_ray.types import SamplingParams, TokenLogprobs

NO_TOKEN = -1
"""In place of a token id: the row's logits are not finite, or leave no token possible."""


def edit_logits(local_logits: Tensor, rows: SamplingRows, first_token: int) -> Tensor:
    """[n, Vlocal] with penalties, bias and forbidden tokens applied; not yet tempered."""
    edits = rows.edits
    if edits is None:
        return local_logits
    return ops.edit_logits(local_logits, edits.rows, edits.token_ids, edits.factors, edits.offsets, first_token)


def temper(logits: Tensor, draws: Draws) -> Tensor:
    """float32 logits [n, V] / temperature, where it is not 0."""
    if not draws.any_sampled:
        return logits.float()
    divisors = torch.where(draws.temperatures > 0, draws.temperatures, 1.0)
    return logits.float() / divisors.float().unsqueeze(1)


def lowest_kept(logits: Tensor, draws: Draws) -> Tensor | None:
    """[n] lowest tempered logit that the filters leave in rows of untempered logits; None without filters."""
    filters = draws.filters(logits.shape[1])
    return None if filters is None else ops.lowest_kept_logit(logits, draws.temperatures, *filters)


def filtered_logits(logits: Tensor, draws: Draws) -> Tensor:
    """[n, V] tempered, and -inf where a filter removes a token: softmax gives the distribution that is drawn from."""
    tempered, lowest = temper(logits, draws), lowest_kept(logits, draws)
    return tempered if lowest is None else tempered.masked_fill(tempered < lowest.unsqueeze(1), -torch.inf)


def draw(logits: Tensor, draws: Draws, stream: int, first_token: int = 0) -> tuple[Tensor, Tensor]:
    """(values, token ids) [n]: the best of this shard's tempered and filtered logits plus noise.

    The value is -inf where the shard has no possible token, and NaN where one of its logits is NaN or +inf.
    """
    values, ids, _ = ops.gumbel_argmax(
        logits, draws.temperatures, draws.seeds, draws.positions, stream, first_token, lowest_kept(logits, draws)
    )
    return values, ids


def choose_offers(values: Tensor, ids: Tensor) -> Tensor:
    """[n] token ids of the best values [size, n]; NO_TOKEN where a shard's value is NaN, or every shard's is -inf."""
    best = values.argmax(0, keepdim=True)  # of the NaN where there is one
    is_finite = values.gather(0, best)[0].isfinite()
    return torch.where(is_finite, ids.gather(0, best)[0].long(), NO_TOKEN)


@dataclass(frozen=True)
class Samples:
    """The target's own token at each of n rows, and what else rows asked for."""

    token_ids: list[int]
    """NO_TOKEN where a row cannot be drawn from."""
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
        logits = edit_logits(local_logits, rows, self._first_token)
        values, ids = draw(logits, rows, STREAM_SAMPLE, self._first_token)
        # One collective for both: float64 holds every float32 and every token id exactly.
        offers = self._group.gather_to_first(torch.stack((values.double(), ids.double())))
        if offers is None:
            return
        tokens = choose_offers(*torch.stack(offers, dim=1))  # [size, n] values and ids
        for place, token_id in zip(places, tokens.tolist(), strict=True):
            samples.token_ids[place] = token_id

    def _sample_whole(self, local_logits: Tensor, rows: SamplingRows, places: Sequence[int], samples: Samples) -> None:
        """Rank 0 sees whole rows and does everything alone."""
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


@dataclass(frozen=True)
class DraftSampling(Draws):
    """How the requests of a round want their drafts drawn; positions are the drafter's to fill in."""

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> DraftSampling:
        """One row per request."""
        return DraftSampling(**pack_draws(params, [0] * len(params)))

    def at(self, positions: Tensor) -> DraftSampling:
        """The same draws at positions [R]."""
        return replace(self, integers=torch.stack((self.seeds, positions, self.top_k)))


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
        self._noise_positions = _noise_positions(starts, gamma, mode)
        if mode == "rejection":
            self.ids = starts.new_zeros(len(starts), gamma, self._num_kept)
            self.probabilities = self.ids.float()

    def __call__(self, k: int, logits: Tensor) -> Tensor:
        """Token ids [R]."""
        return self._choose(k, logits)

    def _coupled(self, k: int, logits: Tensor) -> Tensor:
        """With the noise that the target will use at the same position; some token where nothing can be drawn."""
        return draw(logits, self._draws_at(k), STREAM_SAMPLE)[1].clamp_min(0)

    def _truncated(self, k: int, logits: Tensor) -> Tensor:
        """From the best K tokens, whose distribution, not the full row, is what the draft comes from."""
        draws = self._draws_at(k)
        best = filtered_logits(logits, draws).topk(self._num_kept)
        noisy = best.values + self._noise_of(best.indices, draws, logits.shape[1])
        choice = noisy.argmax(-1, keepdim=True)
        certain = torch.zeros_like(best.values).scatter(1, choice, 1.0)
        self.ids[:, k] = best.indices
        self.probabilities[:, k] = torch.where(draws.is_sampled, best.values.softmax(-1), certain)
        return best.indices.gather(1, choice).squeeze(1)

    def _draws_at(self, k: int) -> DraftSampling:
        """The requests' draws at position k of their blocks."""
        return self._sampling.at(self._noise_positions[:, k])

    def _noise_of(self, token_ids: Tensor, draws: DraftSampling, vocab_size: int) -> Tensor:
        """Noise [R, K] of token_ids, 0 where nothing is sampled."""
        if not draws.any_sampled:
            return torch.zeros_like(token_ids, dtype=torch.float32)
        noise = gumbel_noise(draws.seeds, draws.positions, STREAM_DRAFT, 0, vocab_size)
        return noise.gather(1, token_ids) * draws.is_sampled


def _noise_positions(starts: Tensor, gamma: int, mode: VerificationMode) -> Tensor:
    """[R, G] where the noise of a block is found."""
    offsets = torch.arange(gamma, device=starts.device)
    positions = starts.unsqueeze(1) + 1 + offsets
    if mode == "coupled":
        return positions
    # A position is drafted anew after a rejection before it. Confidences of the old draft may have set the
    # new budget, so its noise is not independent of what gets verified: each block has its own.
    return positions + (offsets << 32)
