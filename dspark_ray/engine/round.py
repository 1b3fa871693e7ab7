"""The parts of one round: what was drafted, what each sequence runs, and what was accepted."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dspark_ray.drafters.protocol import DraftProposal
from dspark_ray.engine.scheduler import StepPlan
from dspark_ray.engine.sequence import Sequence
from dspark_ray.model.rows import Segment
from dspark_ray.sampling.sampling_rows import RowContext
from dspark_ray.speculative.planner import Batch
from dspark_ray.speculative.prefix_schedule import PLACES


@dataclass(frozen=True)
class Work:
    """The work of one sequence in a step: committed tokens and drafts to run, and rows to sample."""

    sequence: Sequence
    segment: Segment
    """The committed tokens that run, then the drafts."""
    drafts: tuple[int, ...] = ()
    rows: tuple[RowContext, ...] = ()
    """Sampled rows: that of the last committed token, then that of each draft; empty where nothing is sampled."""
    is_round: bool = False
    """Whether the sequence decodes; otherwise it prefills."""
    proposal_row: int | None = None
    num_drafted: int = 0

    @property
    def samples(self) -> bool:
        return len(self.rows) > 0

    @property
    def num_rows(self) -> int:
        return len(self.segment.token_ids)

    @property
    def num_committed(self) -> int:
        """Committed tokens that run."""
        return self.num_rows - len(self.drafts)


@dataclass(frozen=True)
class Drafted:
    """A proposal, its sequences, and how many drafts of each are verified."""

    proposal: DraftProposal
    sequences: list[Sequence]
    """One per row of the proposal."""
    usable: np.ndarray
    """[R] positions before the first that is not usable, by row of the proposal"""
    lengths: dict[Sequence, int] = field(default_factory=dict)
    """Drafts to verify of each sequence that still decodes, in the order of their rows."""

    @staticmethod
    def of(proposal: DraftProposal, sequences: list[Sequence], vocab_size: int) -> Drafted:
        """Confidences count as 0 from the first position of a request that is not usable."""
        usable = proposal.num_usable(vocab_size)
        is_usable = PLACES[: proposal.tokens.shape[1]] < usable[:, None]
        confidences = np.where(is_usable, proposal.confidences, 0.0).astype(proposal.confidences.dtype)
        return Drafted(DraftProposal(proposal.tokens, confidences, proposal.distributions), sequences, usable)

    @property
    def depth(self) -> int:
        """Drafted positions per sequence."""
        return self.proposal.tokens.shape[1]

    @property
    def num_unusable(self) -> int:
        """Requests with a position that is not usable."""
        return int(np.count_nonzero(self.usable < self.depth))

    @cached_property
    def row_of(self) -> dict[Sequence, int]:
        return {sequence: row for row, sequence in enumerate(self.sequences)}

    def tokens_of(self, sequence: Sequence) -> tuple[int, ...]:
        """The drafts of `sequence` that are verified."""
        return tuple(self.proposal.tokens[self.row_of[sequence], : self.lengths[sequence]].tolist())


@dataclass(frozen=True)
class Outcome:
    """Accepted drafts of a sequence, and how many of them became part of its text."""

    num_accepted: int = 0
    num_committed: int = 0


def batch_of(plan: StepPlan) -> Batch:
    """The composition of the step `plan`."""
    finishing = sum(chunk.num_tokens == chunk.sequence.num_missing for chunk in plan.prefill)
    return Batch(
        num_decoding=len(plan.decoding),
        num_prefill_rows=sum(chunk.num_tokens for chunk in plan.prefill),
        certain_tokens=len(plan.decoding) + finishing,
        context=mean_length(plan.decoding),
    )


def mean_length(sequences: SequenceOf[Sequence]) -> float:
    """Mean number of tokens per sequence, 0 without sequences."""
    return sum(sequence.length for sequence in sequences) / max(1, len(sequences))


def thresholds_of(sequences: SequenceOf[Sequence]) -> np.ndarray | None:
    """[R] confidence thresholds; None where all are 0."""
    thresholds = [sequence.request.speculative.confidence_threshold for sequence in sequences]
    return np.array(thresholds) if any(thresholds) else None


def slots_of(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """[R] slots of sequences that hold one."""
    return np.array([sequence.slot for sequence in sequences], dtype=np.int64)


def computed_of(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """[R] positions in the target's cache."""
    return np.array([sequence.num_computed for sequence in sequences], dtype=np.int64)
