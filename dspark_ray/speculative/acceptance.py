"""Which drafts are accepted, and the target's token behind them: two verifications with one interface.

Letters: k verified drafts per block, K ids of a truncated draft distribution, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

import dspark_kernels as ops
from dspark_ray.config import VerificationMode
from dspark_ray.sampling.sampler import NO_TOKEN, Samples


@dataclass(frozen=True)
class Acceptance:
    """A round commits the first `num_accepted` drafts, then `next_anchor`."""

    num_accepted: int
    next_anchor: int
    """NO_TOKEN where the target's logits are not finite; the text must end there."""


@dataclass(frozen=True)
class DraftSource:
    """The distributions that the drafts of one request were drawn from, and the address of the verification noise."""

    ids: Tensor
    """[G, K], G at least the number of verified drafts"""
    probabilities: Tensor
    """[G, K], each row sums to 1"""
    seed: int
    first_position: int
    """Absolute index of the first drafted token."""


@dataclass(frozen=True)
class VerifiedBlock:
    """The verified drafts of one request; the target has a sample behind the anchor and one behind each draft."""

    draft_tokens: Sequence[int]
    source: DraftSource | None = None

    @property
    def num_rows(self) -> int:
        return len(self.draft_tokens) + 1


class Verification(Protocol):
    """Decides which drafts of a step's blocks are accepted, by the target's samples; `samples` are in block order."""

    wants_distribution: bool
    """Whether samples of rows with drafts must include the whole distribution."""

    def verify(self, blocks: Sequence[VerifiedBlock], samples: Samples) -> list[Acceptance]: ...


class CoupledVerification:
    """A draft is accepted if it equals the target's own token: the text does not depend on the drafts."""

    wants_distribution = False

    def verify(self, blocks: Sequence[VerifiedBlock], samples: Samples) -> list[Acceptance]:
        return [
            accept_coupled(block.draft_tokens, samples.token_ids[start : start + block.num_rows])
            for block, start in zip(blocks, _first_rows(blocks), strict=False)
        ]


class RejectionVerification:
    """Speculative sampling: accepts more drafts; the text depends on them, but its distribution does not."""

    wants_distribution = True

    def verify(self, blocks: Sequence[VerifiedBlock], samples: Samples) -> list[Acceptance]:
        """Rows without a distribution are greedy or have no drafts: the target's own token decides."""
        accepted = CoupledVerification().verify(blocks, samples)
        sampled, rows = [], []
        for number, (block, start) in enumerate(zip(blocks, _first_rows(blocks), strict=False)):
            if NO_TOKEN in samples.token_ids[start : start + block.num_rows]:
                # Acceptance and recovery would be computed from NaN.
                accepted[number] = Acceptance(0, NO_TOKEN)
                continue
            distributions = [row for row in samples.distributions[start : start + block.num_rows] if row is not None]
            if distributions:
                assert len(distributions) == block.num_rows, "one distribution per draft and one behind the last"
                sampled.append(number)
                rows += distributions
        if sampled:
            acceptances = accept_rejection([blocks[number] for number in sampled], torch.stack(rows))
            for number, acceptance in zip(sampled, acceptances, strict=True):
                accepted[number] = acceptance
        return accepted


def _first_rows(blocks: Sequence[VerifiedBlock]) -> list[int]:
    """[blocks + 1]"""
    return list(accumulate((block.num_rows for block in blocks), initial=0))


def build_verification(mode: VerificationMode) -> Verification:
    """The verification that `EngineConfig.verification` names."""
    return CoupledVerification() if mode == "coupled" else RejectionVerification()


def accept_coupled(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> Acceptance:
    """Keep drafts as long as they equal the target's tokens, of which there is one more.

    The host's counterpart of `dspark_kernels.accept_coupled`, for tokens that are already on the host.
    """
    num_accepted = 0
    while num_accepted < len(draft_tokens) and draft_tokens[num_accepted] == target_tokens[num_accepted]:
        num_accepted += 1
    return Acceptance(num_accepted, target_tokens[num_accepted])


def accept_rejection(blocks: Sequence[VerifiedBlock], target_logits: Tensor) -> list[Acceptance]:
    """Rejection sampling of blocks, each with its source, given their rows of processed and filtered logits [N, V]."""
    device = target_logits.device
    first_rows = _first_rows(blocks)
    q_ids, q_probabilities = [], []
    row_tokens: list[int] = []
    positions: list[int] = []
    seeds: list[int] = []
    for block in blocks:
        source, count = block.source, len(block.draft_tokens)
        assert source is not None, "sampled drafts come with their distributions"
        # q of the last row is never read, because nothing was drafted behind it.
        rows = [*range(count), max(count - 1, 0)]
        q_ids.append(source.ids[rows])
        q_probabilities.append(source.probabilities[rows])
        row_tokens += [0, *block.draft_tokens]
        positions += range(source.first_position, source.first_position + count + 1)
        seeds.append(source.seed)
    num_accepted, next_anchors = ops.accept_rejection(
        torch.tensor(row_tokens, device=device),
        target_logits,
        torch.cat(q_ids).to(device),
        torch.cat(q_probabilities).to(device),
        torch.tensor(seeds, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(first_rows, device=device),
    )
    return [Acceptance(*pair) for pair in zip(num_accepted.tolist(), next_anchors.tolist(), strict=True)]
