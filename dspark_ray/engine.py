"""The step loop: draft, plan, verify, accept, commit. One round of DSpark is one call of `Engine.step`.

drafter --DraftProposal--> schedule --VerifyPlan--> target --samples--> verification --Acceptance--> commit
   ^                                                                                                   |
   +--------- main_x that the drafter misses, next anchors <-- select who is drafted next <------------+
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dspark_ray.config import EngineConfig, ModelConfig
from dspark_ray.drafters.protocol import ContextUpdate, Drafter, DraftProposal, DraftRequest
from dspark_ray.drafters.window import Committed, FeatureWindow, Missing
from dspark_ray.model.executor import ForwardCommand, ForwardResult, Target
from dspark_ray.model.rows import Segment
from dspark_ray.sampling.rows import RowContext, build_sampling_rows
from dspark_ray.sampling.sampler import DraftSampling, Samples
from dspark_ray.scheduler import Scheduler, StepPlan
from dspark_ray.sequence import Sequence
from dspark_ray.speculative.acceptance import Acceptance, DraftSource, VerifiedBlock, build_verification
from dspark_ray.speculative.planner import Batch, DraftedRows, Planner, StepOutcome
from dspark_ray.timing import StepTiming, Stopwatch
from dspark_ray.types import (
    BypassReason,
    FinishReason,
    Request,
    RequestError,
    SequenceOutput,
    StepOutput,
    StepRecord,
    TokenLogprobs,
    VerificationPolicy,
)


@dataclass(frozen=True)
class _Work:
    """What one sequence does in a step: run committed tokens and drafts, and perhaps sample behind them."""

    sequence: Sequence
    num_committed: int
    drafts: tuple[int, ...]
    samples: bool
    is_round: bool = False
    """Whether the sequence decodes, rather than being computed up to its last token."""
    proposal_row: int | None = None
    num_drafted: int = 0

    @property
    def token_ids(self) -> list[int]:
        start = self.sequence.num_computed
        return [*self.sequence.tokens[start : start + self.num_committed], *self.drafts]

    @property
    def num_rows(self) -> int:
        return self.num_committed + len(self.drafts)


@dataclass(frozen=True)
class _Drafted:
    """A proposal, the sequences it is for, and how much of it is verified."""

    proposal: DraftProposal
    sequences: list[Sequence]
    """One per row of the proposal."""
    lengths: dict[Sequence, int] = field(default_factory=dict)
    """Of those that still decode, in the order of their rows."""

    @property
    def depth(self) -> int:
        """Positions drafted of each."""
        return self.proposal.tokens.shape[1]

    @cached_property
    def row_of(self) -> dict[Sequence, int]:
        return {sequence: row for row, sequence in enumerate(self.sequences)}

    def tokens_of(self, sequence: Sequence) -> tuple[int, ...]:
        """The drafts of `sequence` that are verified."""
        return tuple(self.proposal.tokens[self.row_of[sequence], : self.lengths[sequence]].tolist())


@dataclass(frozen=True)
class _Judged:
    """Drafts of a sequence that stood, and those of them that belong to its text."""

    num_accepted: int
    num_committed: int


class Engine:
    """Serves requests with one target and, where there is one, a drafter."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        target: Target,
        drafter: Drafter | None,
        planner: Planner | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`config` must have been through EngineConfig.for_model; None plans without knowing any costs."""
        assert config.gamma is not None, "EngineConfig.for_model comes first"
        self.config, self.model_config, self.gamma = config, model_config, config.gamma
        self.scheduler = Scheduler(config)
        self.last_step_timing = StepTiming()
        self._target, self._clock = target, clock
        self._drafter = drafter if config.speculation and self.gamma > 0 else None
        self.planner = planner or Planner(config)
        self._verification = build_verification(config.verification)
        self._features = FeatureWindow(config.max_num_seqs, model_config.sliding_window)
        self._num_known = np.zeros(config.max_num_seqs, dtype=np.int64)
        """Positions whose main_x the drafter has, by slot."""
        self._drafting: list[Sequence] | None = None
        """Sequences of the request that is open at the drafter."""
        self._bypass: BypassReason | None = None
        """Why none is open, where one could be."""
        self._watch = Stopwatch(clock)
        self._learning_seconds = 0.0
        """Of the step before; a step's own is not over when its record is made."""
        self._aborted: list[SequenceOutput] = []

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        """Accept a request. Raises RequestError for what can never be served, QueueFullError for now."""
        self._check(request)
        self.scheduler.add(Sequence(request))

    def abort(self, request_id: str) -> None:
        """End a request; the next step reports it. Unknown ids have ended already."""
        sequence = self.scheduler.remove(request_id)
        if sequence is not None:
            self._aborted.append(_final_output(sequence, "abort"))

    def apply_policy(self, policy: VerificationPolicy) -> None:
        """Let `policy` bound what is verified, from the next step on and until it expires."""
        self.planner.apply(policy, self._clock())

    @property
    def can_draft(self) -> bool:
        """Whether there is a drafter, and drafts to make with it."""
        return self._drafter is not None

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Rows to which the target's decode steps are filled up; empty where none are."""
        return self._target.graph_sizes

    def has_unfinished(self) -> bool:
        """Whether another step has something to do or to report."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._aborted)

    def close(self) -> None:
        """End followers and drafter; the engine must not be used afterwards."""
        if self._drafter is not None:
            self._drafter.close()
        self._target.close()

    def keep_alive(self) -> None:
        """Call every few seconds while idle, so that waiting ranks do not take silence for death."""
        self._target.keep_alive()
        if self._drafter is not None:
            self._drafter.keep_alive()

    # The round.

    def step(self) -> StepOutput:
        """Run one round for everybody that can run."""
        watch = self._watch = Stopwatch(self._clock)
        self.planner.expire_policy(watch.started)
        plan = self.scheduler.plan()
        with watch.times("draft"):
            drafted = self._collect_drafts()
        if plan.is_empty:
            return self._output([])
        batch = _batch(plan)
        drafted = self._plan_lengths(plan, drafted, batch)
        works = self._works(plan, drafted)
        command = self._command(works)
        with watch.times("target"):
            result = self._target.run(command)
        outputs, judged = self._commit(works, drafted, result)
        bypass = self._bypass
        chosen = self._select()
        with watch.times("draft"):
            self._submit_drafts(chosen)
        decided = watch.timing()
        with watch.times("schedule"):
            record = self._learn(batch, drafted, judged, bypass, decided)
        self.last_step_timing = watch.timing()
        self._learning_seconds = self.last_step_timing.schedule - decided.schedule
        return self._output(outputs, record)

    def _collect_drafts(self) -> _Drafted | None:
        """The proposal asked for at the end of the step before."""
        if self._drafting is None or self._drafter is None:
            return None
        drafting, self._drafting = self._drafting, None
        return _Drafted(self._drafter.collect(), drafting)

    def _plan_lengths(self, plan: StepPlan, drafted: _Drafted | None, batch: Batch) -> _Drafted | None:
        """How many drafts of each sequence to verify; those that left since they were drafted have no length."""
        if drafted is None:
            return None
        decoding = set(plan.decoding)
        live = [sequence for sequence in drafted.sequences if sequence in decoding]
        if not live:
            return drafted
        rows = DraftedRows(
            slots=_slots(live),
            confidences=drafted.proposal.confidences[[drafted.row_of[sequence] for sequence in live]],
            limits=np.array([min(drafted.depth, self._max_length(sequence)) for sequence in live]),
            thresholds=_thresholds(live),
        )
        with self._watch.times("schedule"):
            verify_plan = self.planner.plan(rows, batch)
        return replace(drafted, lengths=dict(zip(live, verify_plan.lengths, strict=True)))

    def _works(self, plan: StepPlan, drafted: _Drafted | None) -> list[_Work]:
        works = []
        for sequence in plan.decoding:
            if drafted is not None and sequence in drafted.lengths:
                row, drafts = drafted.row_of[sequence], drafted.tokens_of(sequence)
                works.append(
                    _Work(sequence, 1, drafts, True, is_round=True, proposal_row=row, num_drafted=drafted.depth)
                )
            else:
                works.append(_Work(sequence, 1, (), samples=True, is_round=True))
        for chunk in plan.prefill:
            ends = chunk.num_tokens == chunk.sequence.num_missing
            works.append(_Work(chunk.sequence, chunk.num_tokens, (), samples=ends))
        return works

    def _command(self, works: list[_Work]) -> ForwardCommand:
        segments: list[Segment] = []
        contexts: list[RowContext] = []
        sampled_rows: list[int] = []
        first_row = 0
        for work in works:
            sequence = work.sequence
            assert sequence.slot is not None
            segments.append(Segment(sequence.slot, sequence.num_computed, work.token_ids, list(sequence.pages)))
            if work.samples:
                sampled_rows.extend(range(first_row + work.num_committed - 1, first_row + work.num_rows))
                contexts.extend(self._row_contexts(work))
            first_row += work.num_rows
        return ForwardCommand(
            segments=tuple(segments),
            sampled_rows=np.array(sampled_rows, dtype=np.int64),
            sampling=build_sampling_rows(contexts, self.model_config.vocab_size),
            wants_features=any(self._speculates(work.sequence) for work in works),
        )

    def _row_contexts(self, work: _Work) -> list[RowContext]:
        """One per sampled row: the last committed token's, then one behind each draft."""
        sequence, params = work.sequence, work.sequence.request.sampling
        outputs: list[int] = sequence.output_token_ids if params.has_penalties else []
        contexts = []
        for num_drafts in range(len(work.drafts) + 1):
            too_early = sequence.num_outputs + num_drafts < params.min_tokens
            contexts.append(
                RowContext(
                    params=params,
                    position=sequence.length + num_drafts,
                    prompt_token_ids=sequence.request.prompt_token_ids,
                    output_token_ids=[*outputs, *work.drafts[:num_drafts]] if params.has_penalties else (),
                    forbidden_token_ids=tuple(self._stop_ids(sequence)) if too_early else (),
                    wants_distribution=self._verification.wants_distribution
                    and params.temperature > 0
                    and len(work.drafts) > 0,
                )
            )
        return contexts

    def _commit(
        self, works: list[_Work], drafted: _Drafted | None, result: ForwardResult
    ) -> tuple[list[SequenceOutput], dict[Sequence, _Judged]]:
        """Accept, append, finish, and keep the features of what was committed; also what was said of each block."""
        accepted = self._accept(works, drafted, result.samples)
        outputs, judged, committed, first_row = [], {}, [], 0
        for work in works:
            num_kept = work.num_committed
            if work.samples:
                acceptance, logprobs = next(accepted)
                num_kept += acceptance.num_accepted
                work.sequence.num_computed += num_kept
                outputs.append(self._append(work, acceptance, logprobs))
                judged[work.sequence] = _Judged(acceptance.num_accepted, len(outputs[-1].token_ids) - 1)
            else:
                work.sequence.num_computed += num_kept
            if work.sequence.slot is not None and self._speculates(work.sequence):
                committed.append((work.sequence.slot, work.sequence.num_computed, num_kept, first_row))
            first_row += work.num_rows
        if committed and result.features is not None:
            self._keep_features(Committed(*np.array(committed).T), result.features)
        return outputs, judged

    def _learn(
        self,
        batch: Batch,
        drafted: _Drafted | None,
        judged: dict[Sequence, _Judged],
        bypass: BypassReason | None,
        timing: StepTiming,
    ) -> StepRecord:
        """Tell the planner what became of the step."""
        live = list(drafted.lengths) if drafted else []
        return self.planner.learn(
            batch,
            StepOutcome(
                num_tokens_accepted=np.array([judged[sequence].num_accepted for sequence in live], dtype=np.int64),
                num_committed=np.array([judged[sequence].num_committed for sequence in live], dtype=np.int64),
                num_drafted=len(drafted.sequences) if drafted else 0,
                bypass=bypass,
                draft_seconds=timing.draft,
                target_seconds=timing.total - timing.draft,
                schedule_seconds=timing.schedule + self._learning_seconds,
                ended_at=time.time(),
            ),
        )

    def _append(self, work: _Work, acceptance: Acceptance, logprobs: tuple[TokenLogprobs, ...]) -> SequenceOutput:
        """Commit the accepted drafts and the next anchor, up to where the request ends."""
        sequence = work.sequence
        new_tokens = [*work.drafts[: acceptance.num_accepted], acceptance.next_anchor]
        committed: list[int] = []
        for token in new_tokens:
            committed.append(token)
            sequence.tokens.append(token)
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason is not None:
                break
        if not work.is_round and sequence.slot is not None:
            self.planner.admit(sequence.slot)
        if work.is_round:
            # Drafts behind the end of the text are not counted: accepted + 1 is what the round committed.
            sequence.stats.record(work.num_drafted, len(work.drafts), len(committed) - 1)
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence.request.request_id)
            return _final_output(sequence, sequence.finish_reason, committed, logprobs, self._stop_ids(sequence))
        return SequenceOutput(
            request_id=sequence.request.request_id,
            token_ids=tuple(committed),
            logprobs=logprobs[: len(committed)],
            stats=sequence.stats.freeze(),
        )

    def _accept(
        self, works: list[_Work], drafted: _Drafted | None, samples: Samples
    ) -> Iterator[tuple[Acceptance, tuple[TokenLogprobs, ...]]]:
        """For every work that samples: its drafts judged, and what to report of each committed token."""
        sampling = [work for work in works if work.samples]
        blocks = [VerifiedBlock(work.drafts, self._draft_source(work, drafted)) for work in sampling]
        first_row = 0
        for block, acceptance in zip(blocks, self._verification.verify(blocks, samples), strict=True):
            tokens = (*block.draft_tokens[: acceptance.num_accepted], acceptance.next_anchor)
            reports = (samples.logprobs_of(first_row + row, token) for row, token in enumerate(tokens))
            yield acceptance, tuple(report for report in reports if report is not None)
            first_row += block.num_rows

    def _draft_source(self, work: _Work, drafted: _Drafted | None) -> DraftSource | None:
        """What the drafts were drawn from, where the verification asks for it."""
        if drafted is None or work.proposal_row is None or drafted.proposal.distributions is None:
            return None
        distributions = drafted.proposal.distributions
        return DraftSource(
            ids=torch.from_numpy(distributions.ids[work.proposal_row]),
            probabilities=torch.from_numpy(distributions.probabilities[work.proposal_row]),
            seed=work.sequence.request.sampling.seed,
            first_position=work.sequence.length,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.request.sampling
        if sequence.num_outputs >= params.min_tokens and sequence.anchor in self._stop_ids(sequence):
            return "stop"
        if sequence.num_outputs >= params.max_tokens or sequence.length >= self.config.max_model_len:
            return "length"
        return None

    def _stop_ids(self, sequence: Sequence) -> frozenset[int]:
        params = sequence.request.sampling
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        return frozenset((*eos, *params.stop_token_ids))

    # The drafter's side.

    def _speculates(self, sequence: Sequence) -> bool:
        speculative = sequence.request.speculative
        return self._drafter is not None and speculative.enabled and speculative.max_draft_tokens != 0

    def _max_length(self, sequence: Sequence) -> int:
        """Most drafts that can still be of use: the target's own token always takes the last place."""
        params, asked = sequence.request.sampling, sequence.request.speculative.max_draft_tokens
        remaining = min(params.max_tokens - sequence.num_outputs, self.config.max_model_len - sequence.length)
        return max(0, min(self.gamma, self.gamma if asked is None else asked, remaining - 1))

    def _keep_features(self, committed: Committed, features: Tensor) -> None:
        """Remember what the drafter may want to know; it is told when it drafts for the sequence next."""
        # Of whoever has a slot since this step, the drafter knows nothing.
        self._num_known[committed.slots[committed.stops == committed.counts]] = 0
        self._features.store(committed, features)

    def known_context(self) -> ContextUpdate:
        """All that a new drafter needs to know of the running sequences."""
        running = [s for s in self.scheduler.running if self._speculates(s)]
        return self._context(_slots(running), np.zeros(len(running), dtype=np.int64), _computed(running))

    def _context(self, slots: np.ndarray, num_known: np.ndarray, num_computed: np.ndarray) -> ContextUpdate:
        missing: Missing = self._features.since(slots, num_known, num_computed)
        return ContextUpdate(missing.slots, missing.positions, self._target.project(missing.features))

    def _select(self) -> list[Sequence]:
        """Those of the decoding sequences for which a draft pays in the next step."""
        self._bypass = None
        decoding = [s for s in self.scheduler.running if s.is_decoding]
        speculating = [s for s in decoding if self._speculates(s)]
        if not speculating:
            return []
        candidates = [s for s in speculating if self._max_length(s) > 0]
        batch = Batch(len(decoding), 0, len(decoding), _mean_length(decoding))
        with self._watch.times("schedule"):
            chosen, self._bypass = self.planner.select(_slots(candidates), batch)
        return [sequence for sequence, is_chosen in zip(candidates, chosen.tolist(), strict=True) if is_chosen]

    def _submit_drafts(self, sequences: list[Sequence]) -> None:
        """Ask for the next blocks of `sequences`, so that the drafter works while outputs leave."""
        if self._drafter is None:
            return
        if not sequences:
            self._drafter.keep_alive()  # nobody is drafted, which may go on for long
            return
        slots, num_computed = _slots(sequences), _computed(sequences)
        context = self._context(slots, self._num_known[slots], num_computed)
        self._num_known[slots] = num_computed
        self._drafter.submit(self._draft_request(context, sequences))
        self._drafting = sequences

    def _draft_request(self, context: ContextUpdate, sequences: list[Sequence]) -> DraftRequest:
        return DraftRequest(
            context=context,
            slots=np.array([s.slot for s in sequences], dtype=np.int64),
            anchors=np.array([s.anchor for s in sequences], dtype=np.int64),
            starts=np.array([s.length - 1 for s in sequences], dtype=np.int64),
            sampling=DraftSampling.of([s.request.sampling for s in sequences]),
            num_positions=self.planner.depth(),
        )

    # Edges.

    def _check(self, request: Request) -> None:
        limit, vocab_size = self.config.max_model_len, self.model_config.vocab_size
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if num_tokens >= limit:
            raise RequestError("prompt", f"the prompt has {num_tokens} tokens: expected fewer than {limit}")
        if request.request_id in self.scheduler:
            raise RequestError("request_id", f"request_id={request.request_id!r} is already running")
        named = {
            "prompt": request.prompt_token_ids,
            "logit_bias": request.sampling.logit_bias,
            "stop_token_ids": request.sampling.stop_token_ids,
        }
        for param, token_ids in named.items():
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(param, f"{param} has token id {token_id}: expected 0..{vocab_size - 1}")
        if len(request.output_token_ids) >= request.sampling.max_tokens:
            raise RequestError("max_tokens", "the tokens to continue from already reach max_tokens")

    def _output(self, sequences: list[SequenceOutput], record: StepRecord | None = None) -> StepOutput:
        aborted, self._aborted = self._aborted, []
        return StepOutput(
            sequences=(*sequences, *aborted),
            record=record,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            cache_usage=self.scheduler.pool.usage,
            num_preemptions=self.scheduler.num_preemptions,
        )


def _batch(plan: StepPlan) -> Batch:
    finishing = sum(chunk.num_tokens == chunk.sequence.num_missing for chunk in plan.prefill)
    return Batch(
        num_decoding=len(plan.decoding),
        num_prefill_rows=sum(chunk.num_tokens for chunk in plan.prefill),
        certain_tokens=len(plan.decoding) + finishing,
        context=_mean_length(plan.decoding),
    )


def _mean_length(sequences: SequenceOf[Sequence]) -> float:
    return sum(sequence.length for sequence in sequences) / max(1, len(sequences))


def _thresholds(sequences: SequenceOf[Sequence]) -> np.ndarray | None:
    """[R], None where nobody asks for any."""
    thresholds = [sequence.request.speculative.confidence_threshold for sequence in sequences]
    return np.array(thresholds) if any(thresholds) else None


def _slots(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """[R] of sequences that hold one."""
    return np.array([sequence.slot for sequence in sequences], dtype=np.int64)


def _computed(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """[R]"""
    return np.array([sequence.num_computed for sequence in sequences], dtype=np.int64)


def _final_output(
    sequence: Sequence,
    reason: FinishReason,
    token_ids: list[int] | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
    stop_ids: frozenset[int] = frozenset(),
) -> SequenceOutput:
    token_ids = token_ids or []
    stopped_by_id = reason == "stop" and token_ids and token_ids[-1] in stop_ids
    return SequenceOutput(
        request_id=sequence.request.request_id,
        token_ids=tuple(token_ids),
        logprobs=logprobs[: len(token_ids)],
        finish_reason=reason,
        stop_token_id=token_ids[-1] if stopped_by_id else None,
        stats=sequence.stats.freeze(),
    )
