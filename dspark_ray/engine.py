"""The step loop: draft, plan, verify, accept, commit. One round of DSpark is one call of `Engine.step`.

drafter --DraftProposal--> schedule --VerifyPlan--> target --samples--> verification --Acceptance--> commit
   ^                                                                                                   |
   +------------------------ main_x of the accepted rows, next anchors --------------------------------+
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dspark_ray.config import EngineConfig, ModelConfig
from dspark_ray.drafters.protocol import ContextUpdate, Drafter, DraftProposal, DraftRequest
from dspark_ray.drafters.window import FeatureWindow
from dspark_ray.model.executor import ForwardCommand, ForwardResult, Target
from dspark_ray.model.rows import Segment
from dspark_ray.sampling.rows import RowContext, build_sampling_rows
from dspark_ray.sampling.sampler import DraftSampling, Samples
from dspark_ray.scheduler import Scheduler, StepPlan
from dspark_ray.sequence import Sequence
from dspark_ray.speculative.acceptance import Acceptance, DraftSource, build_verification
from dspark_ray.speculative.plan import FixedSchedule, PrefixSchedule, VerifyPlan, cut_at_threshold
from dspark_ray.types import FinishReason, Request, RequestError, SequenceOutput, StepOutput, TokenLogprobs


@dataclass(frozen=True)
class StepTiming:
    """Seconds of one step; what is neither draft nor target is the loop itself."""

    total: float = 0.0
    draft: float = 0.0
    """Waiting for the proposal (with an inline drafter: drafting)."""
    target: float = 0.0

    @property
    def loop(self) -> float:
        return self.total - self.draft - self.target


@dataclass(frozen=True)
class _Work:
    """What one sequence does in a step: run committed tokens and drafts, and perhaps sample behind them."""

    sequence: Sequence
    num_committed: int
    drafts: tuple[int, ...]
    samples: bool
    proposal_row: int | None = None

    @property
    def token_ids(self) -> list[int]:
        start = self.sequence.num_computed
        return [*self.sequence.tokens[start : start + self.num_committed], *self.drafts]

    @property
    def num_rows(self) -> int:
        return self.num_committed + len(self.drafts)


@dataclass(frozen=True)
class _Drafted:
    """A proposal and the sequences it is for."""

    proposal: DraftProposal
    row_of: dict[str, int]


class Engine:
    """Serves requests with one target and, where there is one, a drafter."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        target: Target,
        drafter: Drafter | None,
        schedule: PrefixSchedule | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`config` must have been through EngineConfig.for_model."""
        assert config.gamma is not None, "EngineConfig.for_model comes first"
        self.config, self.model_config, self.gamma = config, model_config, config.gamma
        self.scheduler = Scheduler(config)
        self.last_step_timing = StepTiming()
        self._target, self._clock = target, clock
        self._drafter = drafter if config.speculation and self.gamma > 0 else None
        self._schedule = schedule or FixedSchedule()
        self._verification = build_verification(config.verification)
        self.features = FeatureWindow(config.max_num_seqs, model_config.sliding_window, model_config.hidden_size)
        self._drafting: list[Sequence] | None = None
        """Sequences of the request that is open at the drafter."""
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
        started = self._clock()
        plan = self.scheduler.plan()
        drafted = self._collect_drafts()
        proposed = self._clock()
        if plan.is_empty:
            return self._output([])
        verify_plan = self._plan_lengths(plan, drafted)
        works = self._works(plan, drafted, verify_plan)
        command = self._command(works)
        forward_started = self._clock()
        result = self._target.run(command)
        forward_ended = self._clock()
        outputs = self._commit(works, drafted, result)
        self.last_step_timing = StepTiming(self._clock() - started, proposed - started, forward_ended - forward_started)
        return self._output(outputs)

    def _collect_drafts(self) -> _Drafted | None:
        """The proposal asked for at the end of the step before."""
        if self._drafting is None or self._drafter is None:
            return None
        drafting, self._drafting = self._drafting, None
        proposal = self._drafter.collect()
        return _Drafted(proposal, {s.request.request_id: row for row, s in enumerate(drafting)})

    def _plan_lengths(self, plan: StepPlan, drafted: _Drafted | None) -> VerifyPlan | None:
        """How many drafts of each proposal row to verify; rows of sequences that left verify none."""
        if drafted is None:
            return None
        decoding = {sequence.request.request_id: sequence for sequence in plan.decoding}
        sequences = [decoding.get(request_id) for request_id in drafted.row_of]
        limits = [self._max_length(sequence) if sequence else 0 for sequence in sequences]
        thresholds = [s.request.speculative.confidence_threshold if s else 0.0 for s in sequences]
        return cut_at_threshold(self._schedule.plan(drafted.proposal, limits), drafted.proposal, thresholds)

    def _works(self, plan: StepPlan, drafted: _Drafted | None, verify_plan: VerifyPlan | None) -> list[_Work]:
        works = []
        for sequence in plan.decoding:
            row = drafted.row_of.get(sequence.request.request_id) if drafted else None
            drafts: tuple[int, ...] = ()
            if row is not None and drafted is not None and verify_plan is not None:
                drafts = tuple(drafted.proposal.tokens[row, : verify_plan.lengths[row]].tolist())
            works.append(_Work(sequence, 1, drafts, samples=True, proposal_row=row))
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

    def _commit(self, works: list[_Work], drafted: _Drafted | None, result: ForwardResult) -> list[SequenceOutput]:
        """Accept, append, finish, and tell the drafter."""
        outputs, updates, first_row, first_sample = [], [], 0, 0
        for work in works:
            num_kept = work.num_committed
            if work.samples:
                rows = slice(first_sample, first_sample + len(work.drafts) + 1)
                acceptance, logprobs = self._accept(work, drafted, result.samples.of(rows))
                first_sample = rows.stop
                num_kept += acceptance.num_accepted
                work.sequence.num_computed += num_kept
                outputs.append(self._append(work, acceptance, logprobs))
            else:
                work.sequence.num_computed += num_kept
            if result.main_x is not None and self._speculates(work.sequence):
                updates.append(self._context_update(work.sequence, num_kept, first_row, result))
            first_row += work.num_rows
        self._submit_drafts(updates)
        return outputs

    def _append(self, work: _Work, acceptance: Acceptance, logprobs: tuple[TokenLogprobs, ...]) -> SequenceOutput:
        """Commit the accepted drafts and the next anchor, up to where the request ends."""
        sequence = work.sequence
        is_round = work.num_committed == 1 and sequence.num_outputs > 0
        new_tokens = [*work.drafts[: acceptance.num_accepted], acceptance.next_anchor]
        committed: list[int] = []
        for token in new_tokens:
            committed.append(token)
            sequence.tokens.append(token)
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason is not None:
                break
        if is_round:
            drafted = self.gamma if work.proposal_row is not None else 0
            # Drafts behind the end of the text are not counted: accepted + 1 is what the round committed.
            sequence.stats.record(drafted, len(work.drafts), len(committed) - 1)
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
        self, work: _Work, drafted: _Drafted | None, samples: Samples
    ) -> tuple[Acceptance, tuple[TokenLogprobs, ...]]:
        """Judge the drafts by the samples of their rows; also what to report of each committed token."""
        acceptance = self._verification.verify(work.drafts, samples, self._draft_source(work, drafted))
        tokens = (*work.drafts[: acceptance.num_accepted], acceptance.next_anchor)
        reports = (samples.logprobs_of(row, token) for row, token in enumerate(tokens))
        return acceptance, tuple(report for report in reports if report is not None)

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
        eos = () if params.ignore_eos else (self.model_config.eos_token_id,)
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

    def _context_update(
        self, sequence: Sequence, num_kept: int, first_row: int, result: ForwardResult
    ) -> ContextUpdate | None:
        """main_x of the rows just committed, the last W of them; None when the sequence is gone."""
        if sequence.slot is None or result.main_x is None:
            return None
        num_rows = min(num_kept, self.features.window)
        stop = first_row + num_kept
        return ContextUpdate(
            slots=np.full(num_rows, sequence.slot),
            positions=np.arange(sequence.num_computed - num_rows, sequence.num_computed),
            main_x=result.main_x[stop - num_rows : stop],
        )

    def _submit_drafts(self, updates: list[ContextUpdate | None]) -> None:
        """Send committed context and ask for the next blocks, so that the drafter works while outputs leave."""
        if self._drafter is None:
            return
        sequences = [
            s for s in self.scheduler.running if s.is_decoding and self._speculates(s) and self._max_length(s) > 0
        ]
        known = [update for update in updates if update is not None]
        if not sequences and not known:
            self._drafter.keep_alive()  # nobody speculates, which may go on for long
            return
        context = ContextUpdate.join(known, self.model_config.hidden_size)
        self.features.store(context)
        self._drafter.submit(self._draft_request(context, sequences))
        self._drafting = sequences

    def _draft_request(self, context: ContextUpdate, sequences: list[Sequence]) -> DraftRequest:
        return DraftRequest(
            context=context,
            slots=np.array([s.slot for s in sequences], dtype=np.int64),
            anchors=np.array([s.anchor for s in sequences], dtype=np.int64),
            starts=np.array([s.length - 1 for s in sequences], dtype=np.int64),
            sampling=DraftSampling.of([s.request.sampling for s in sequences]),
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

    def _output(self, sequences: list[SequenceOutput]) -> StepOutput:
        aborted, self._aborted = self._aborted, []
        return StepOutput(
            sequences=(*sequences, *aborted),
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            cache_usage=self.scheduler.pool.usage,
            num_preemptions=self.scheduler.num_preemptions,
        )


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
