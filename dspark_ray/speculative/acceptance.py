"""Which drafts stand, and what the target says behind them. Two verifications with one signature.

Letters: B blocks, k verified drafts per block, K ids of a truncated draft distribution, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark_kernels import gumbel_noise, uniform_noise
from dspark_kernels.philox import STREAM_ACCEPT, STREAM_RECOVER, STREAM_SAMPLE
from dspark_ray.config import VerificationMode
from dspark_ray.sampling.sampler import Samples


@dataclass(frozen=True)
class Acceptance:
    """A round commits the first `num_accepted` drafts, then `next_anchor`."""

    num_accepted: int
    next_anchor: int


@dataclass(frozen=True)
class DraftSource:
    """What the drafts of one request were really drawn from, and where the noise of judging them is found."""

    ids: Tensor
    """[G, K], G at least the number of verified drafts"""
    probabilities: Tensor
    """[G, K], each row sums to 1"""
    seed: int
    first_position: int
    """Absolute index of the first drafted token."""


class Verification(Protocol):
    """Judges the drafts of one request by the target's samples at its rows (one more than drafts)."""

    wants_distribution: bool
    """Whether rows with drafts must be sampled with their whole distribution."""

    def verify(self, draft_tokens: Sequence[int], samples: Samples, source: DraftSource | None) -> Acceptance: ...


class CoupledVerification:
    """A draft stands if it is the target's own token: the text never depends on drafts."""

    wants_distribution = False

    def verify(self, draft_tokens: Sequence[int], samples: Samples, source: DraftSource | None) -> Acceptance:
        return accept_coupled(draft_tokens, samples.token_ids)


class RejectionVerification:
    """Speculative sampling: more drafts stand; the text depends on them, its distribution does not."""

    wants_distribution = True

    def verify(self, draft_tokens: Sequence[int], samples: Samples, source: DraftSource | None) -> Acceptance:
        """Rows without a distribution are greedy or have no drafts: the target's own token decides."""
        rows = [row for row in samples.distributions if row is not None]
        if not rows:
            return accept_coupled(draft_tokens, samples.token_ids)
        assert source is not None, "sampled drafts come with what they were drawn from"
        assert len(rows) == len(draft_tokens) + 1, "one distribution per draft and one behind the last"
        positions = range(source.first_position, source.first_position + len(rows))
        return accept_rejection(
            draft_tokens, torch.stack(rows), source.ids, source.probabilities, source.seed, positions
        )


def build_verification(mode: VerificationMode) -> Verification:
    """The verification that `EngineConfig.verification` names."""
    return CoupledVerification() if mode == "coupled" else RejectionVerification()


def accept_coupled(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> Acceptance:
    """Keep drafts as long as they equal the target's tokens, of which there is one more."""
    num_accepted = 0
    while num_accepted < len(draft_tokens) and draft_tokens[num_accepted] == target_tokens[num_accepted]:
        num_accepted += 1
    return Acceptance(num_accepted, target_tokens[num_accepted])


def accept_rejection(
    draft_tokens: Sequence[int],
    target_logits: Tensor,
    q_ids: Tensor,
    q_probabilities: Tensor,
    seed: int,
    positions: Sequence[int],
) -> Acceptance:
    """`accept_rejection_blocks` for one: target_logits [k+1, V], q [k or more, K], k+1 positions."""
    device, k = target_logits.device, len(draft_tokens)
    num_accepted, next_anchors = accept_rejection_blocks(
        torch.tensor([draft_tokens], dtype=torch.int64, device=device),
        target_logits.unsqueeze(0),
        q_ids[None, :k].to(device),
        q_probabilities[None, :k].to(device),
        torch.tensor([seed], device=device),
        torch.tensor([positions], device=device),
    )
    return Acceptance(int(num_accepted), int(next_anchors))


def accept_rejection_blocks(
    draft_tokens: Tensor,
    target_logits: Tensor,
    q_ids: Tensor,
    q_probabilities: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """(num_accepted [B], next_anchor [B]) of blocks of equal length, by speculative sampling.

    draft_tokens [B, k], k > 0, were drawn from q_probabilities [B, k, K] over q_ids; target_logits
    [B, k+1, V] are processed and filtered; positions [B, k+1] are those of the predicted tokens. The test,
    the recovery and the token behind the last draft have a noise stream each, so that none share a number.
    """
    p = target_logits.double().softmax(-1)
    num_accepted = _stands(draft_tokens, p, q_ids, q_probabilities, seeds, positions).cumprod(-1).sum(-1)
    at = num_accepted.unsqueeze(1)
    p_next, position = _pick(p, at), positions.gather(1, at).squeeze(1)
    residual = _residual(p_next, *_next_q(q_ids, q_probabilities, at))
    recovered = _draw(residual, seeds, position, STREAM_RECOVER)
    following = _draw(p_next, seeds, position, STREAM_SAMPLE)
    return num_accepted, torch.where(num_accepted == draft_tokens.shape[1], following, recovered)


def _stands(
    draft_tokens: Tensor, p: Tensor, q_ids: Tensor, q_probabilities: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """[B, k] whether a uniform is below p(draft) / q(draft), each position for itself."""
    num_blocks, k = draft_tokens.shape
    draft = draft_tokens.unsqueeze(-1)
    p_draft = p[:, :k].gather(-1, draft).squeeze(-1)
    q_draft = (q_probabilities.double() * (q_ids == draft)).sum(-1)
    addresses = seeds.unsqueeze(1).expand(-1, k).flatten(), positions[:, :k].flatten()
    return uniform_noise(*addresses, STREAM_ACCEPT).view(num_blocks, k) * q_draft < p_draft


def _next_q(q_ids: Tensor, q_probabilities: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, K] of the first draft that fell; of the last one where none did, which nobody will use."""
    at = at.clamp(max=q_ids.shape[1] - 1)
    return _pick(q_ids, at), _pick(q_probabilities, at)


def _pick(values: Tensor, at: Tensor) -> Tensor:
    """values [B, k, X] at positions [B, 1]: [B, X]."""
    return values.gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[-1])).squeeze(1)


def _residual(p: Tensor, q_ids: Tensor, q_probabilities: Tensor) -> Tensor:
    """[B, V] max(p - q, 0), which need not sum to 1 to be drawn from."""
    residual = p.scatter_add(-1, q_ids, -q_probabilities.double()).clamp(min=0)
    # Where p equals q up to rounding nothing is left, and hardly anything is ever rejected: p is right there.
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)


def _draw(weights: Tensor, seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """[B] token ids from unnormalised weights [B, V]."""
    return (weights.log() + gumbel_noise(seeds, positions, stream, 0, weights.shape[-1])).argmax(-1)
