"""Sampling of drafted tokens: with the target's noise (coupled) or from recorded distributions (rejection).

Letters: R requests, G gamma, K kept draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_kernels import gumbel_noise
from dspark_kernels.philox import STREAM_DRAFT, STREAM_SAMPLE
from dspark_ray.config import VerificationMode
from dspark_ray.sampling.sampler import draw, filtered_logits
from dspark_ray.sampling.sampling_rows import SamplingTensors, pack_sampling
from dspark_ray.types import SamplingParams


@dataclass(frozen=True)
class DraftSampling(SamplingTensors):
    """Sampling tensors of the requests of a round; the drafter fills in the positions."""

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> DraftSampling:
        """One row per request."""
        return DraftSampling(**pack_sampling(params, [0] * len(params)))

    def at(self, positions: Tensor) -> DraftSampling:
        """The same parameters at positions [R]."""
        return replace(self, integers=torch.stack((self.seeds, positions, self.top_k)))


class DraftChooser:
    """Chooses the drafted tokens of R blocks: a `Choose` to be called with k = 0, 1, ... in order."""

    ids: Tensor
    """[R, G, K] in rejection mode: the candidates that each draft was drawn from."""
    probabilities: Tensor
    """[R, G, K] float32 probabilities of `ids`, each row sums to 1."""

    def __init__(
        self,
        sampling: DraftSampling,
        starts: Tensor,
        gamma: int,
        vocab_size: int,
        mode: VerificationMode,
        top_k: int = 64,
    ) -> None:
        """starts [R] are the anchors' positions: the token chosen at k is at position starts + 1 + k.

        `top_k` is the number of candidates in rejection mode.
        """
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
        """Draw with the target's noise at the same position; token 0 where the logits are not finite."""
        return draw(logits, self._sampling_at(k), STREAM_SAMPLE)[1].clamp_min(0)

    def _truncated(self, k: int, logits: Tensor) -> Tensor:
        """Draw from the renormalised distribution of the best K tokens, and record it."""
        sampling = self._sampling_at(k)
        best = filtered_logits(logits, sampling).topk(self._num_kept)
        noisy = best.values + self._noise_of(best.indices, sampling, logits.shape[1])
        choice = noisy.argmax(-1, keepdim=True)
        certain = torch.zeros_like(best.values).scatter(1, choice, 1.0)
        self.ids[:, k] = best.indices
        self.probabilities[:, k] = torch.where(sampling.is_sampled, best.values.softmax(-1), certain)
        return best.indices.gather(1, choice).squeeze(1)

    def _sampling_at(self, k: int) -> DraftSampling:
        """The requests' parameters at position k of their blocks."""
        return self._sampling.at(self._noise_positions[:, k])

    def _noise_of(self, token_ids: Tensor, sampling: DraftSampling, vocab_size: int) -> Tensor:
        """Noise [R, K] of token_ids, 0 in greedy rows."""
        if not sampling.any_sampled:
            return torch.zeros_like(token_ids, dtype=torch.float32)
        noise = gumbel_noise(sampling.seeds, sampling.positions, STREAM_DRAFT, 0, vocab_size)
        return noise.gather(1, token_ids) * sampling.is_sampled


def _noise_positions(starts: Tensor, gamma: int, mode: VerificationMode) -> Tensor:
    """[R, G] positions that address the noise of a block."""
    offsets = torch.arange(gamma, device=starts.device)
    positions = starts.unsqueeze(1) + 1 + offsets
    if mode == "coupled":
        return positions
    # After a rejection the positions behind it are drafted again. Confidences of the old draft may have set the new
    # budget, so the old noise is not independent of what is verified: each block needs noise of its own.
    return positions + (offsets << 32)
