"""The step loop: draft, plan, verify, accept, commit. One round of DSpark is one call of `Engine.step`.

drafter --DraftProposal--> schedule --VerifyPlan--> target --samples--> verification --Acceptance--> commit
   ^                                                                                                   |
   +-- context features the drafter lacks, next anchors <----- whether to draft next <-----------------+
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dspark_ray.config import ModelConfig, ResolvedConfig
from dspark_ray.drafters.draft_sampling import DraftSampling
from dspark_ray.drafters.protocol import ContextUpdate, Drafter, DraftRequest
from dspark_ray.engine.feature_window import Committed, FeatureWindow, Missing
from dspark_ray.engine.round import Drafted, Outcome, Work, batch_of, computed_of, mean_length, slots_of, thresholds_of
from dspark_ray.engine.scheduler import PrefillChunk, Scheduler, StepPlan
from dspark_ray.engine.sequence import Sequence
from dspark_ray.engine.target import ForwardCommand, ForwardResult, Target
from dspark_ray.engine.timing import StepTiming, Stopwatch
from dspark_ray.model.rows import Segment
from dspark_ray.sampling.sampler import NO_TOKEN, Samples
from dspark_ray.sampling.sampling_rows import RowContext, build_sampling_rows
from dspark_ray.speculative.acceptance import Acceptance, DraftSource, VerifiedBlock, build_verification
from dspark_ray.speculative.planner import Batch, DraftedRows, Planner, StepOutcome
from dspark_ray.types import (
    BypassReason,
    FinishReason,
    Request,
    RequestError,
    SequenceOutput,
    StepOutput,
    StepRecord,
    VerificationPolicy,
)

logger = logging.getLogger(__name__)


class NonfiniteLogitsError(ArithmeticError):
    """The target's logits of one sequence hold a NaN or an infinity, or leave no token possible."""


class Engine:
    """Serves requests with one target and, where there is one, a drafter."""

    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        target: Target,
        drafter: Drafter | None,
        planner: Planner | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The default planner knows no costs: it drafts always and verifies all drafts."""
        self.config, self.model_config, self.gamma = config, model_config, config.gamma
        self.scheduler = Scheduler(config)
        self.last_step_timing = StepTiming()
        self._target, self._clock = target, clock
        self._drafter = drafter if config.speculation and self.gamma > 0 else None
        self.planner = planner or Planner(config)
        self._verification = build_verification(config.verification)
        self._features = FeatureWindow(config.max_num_seqs, model_config.sliding_window)
        self._num_known = np.zeros(config.max_num_seqs, dtype=np.int64)
        """Number of positions whose context features the drafter has, by slot."""
        self._drafting: list[Sequence] | None = None
        """Sequences of the draft request that is open; None where none is."""
        self._bypass: BypassReason | None = None
        """Why no draft request is open, where one could be."""
        self._watch = Stopwatch(clock)
        self._learning_seconds = 0.0
        """Spent on learning in the step before; the record of a step is made before its own are known."""
        self._ended: list[SequenceOutput] = []
        """Last outputs of sequences that were aborted or ended by an error since the last step."""
        self._num_nonfinite_logits = 0
        """Sequences that the current step ended because their logits were not finite."""

    # Requests.

    def add_request(self, request: Request) -> None:
        """Accept a request. Raises RequestError if it can never be served, QueueFullError if it cannot be served now.

        Everything that depends on the request alone is computed here, so that an exception of any kind concerns this
        request and leaves the engine as it was.
        """
        self._check(request)
        sequence = self.sequence_of(request)
        build_sampling_rows(self._row_contexts(sequence, ()))
        self.scheduler.add(sequence)

    def sequence_of(self, request: Request) -> Sequence:
        """The sequence that `add_request` queues. Raises ValueError for token ids outside the vocabulary."""
        return Sequence(request, self.model_config.eos_token_ids, self.model_config.vocab_size)

    def abort(self, request_id: str) -> None:
        """End a request; the next step reports it. Unknown ids are ignored: they have ended already."""
        sequence = self.scheduler.remove(request_id)
        if sequence is not None:
            self._ended.append(_last_output(sequence, "abort"))

    def apply_policy(self, policy: VerificationPolicy) -> None:
        """Limit drafts and verification by `policy`, from the next step until it expires."""
        self.planner.apply(policy, self._clock())

    @property
    def can_draft(self) -> bool:
        """Whether there is a drafter and gamma is above 0."""
        return self._drafter is not None

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Row counts to which the target's decode steps are padded; empty without CUDA graphs."""
        return self._target.graph_sizes

    def has_unfinished(self) -> bool:
        """Whether another step has something to do or to report."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._ended)

    def start(self) -> None:
        """Call once, before the first request: from now on followers and drafter treat long silence as death."""
        self._target.start()
        if self._drafter is not None:
            self._drafter.start()

    def close(self) -> None:
        """End followers and drafter; the engine must not be used afterwards."""
        if self._drafter is not None:
            self._drafter.close()
        self._target.close()

    def keep_alive(self) -> None:
        """Call every few seconds while idle, so that waiting ranks do not treat the silence as death."""
        self._target.keep_alive()
        if self._drafter is not None:
            self._drafter.keep_alive()

    # The round.

    def step(self) -> StepOutput:
        """Run one step: a round of every decoding sequence, and prefill chunks.

        An exception that concerns one sequence ends that sequence, with finish reason "error"; any other is raised.
        """
        watch = self._watch = Stopwatch(self._clock)
        self.planner.expire_policy(watch.started)
        plan = self._plan()
        with watch.times("draft"):
            drafted = self._collect_drafts()
        batch = batch_of(plan)
        drafted = self._plan_lengths(plan, drafted, batch)
        works = self._works(plan, drafted)
        if not works:
            self.planner.drop_round()
            return self._output([])
        command = self._command(works)
        with watch.times("target"):
            result = self._target.run(command)
        outputs, outcomes = self._commit(works, drafted, result)
        bypass = self._bypass
        chosen = self._select()
        with watch.times("draft"):
            self._submit_drafts(chosen)
        decided = watch.timing()
        with watch.times("schedule"):
            record = self._learn(batch, drafted, outcomes, bypass, decided)
        self.last_step_timing = watch.timing()
        self._learning_seconds = self.last_step_timing.schedule - decided.schedule
        return self._output(outputs, record)

    def _plan(self) -> StepPlan:
        """The scheduler's plan; tell the planner which slots have new sequences."""
        plan = self.scheduler.plan()
        for chunk in plan.prefill:
            if chunk.sequence.num_computed == 0:
                self.planner.admit(chunk.slot)
        return plan

    def _collect_drafts(self) -> Drafted | None:
        """The proposal that was requested at the end of the step before."""
        if self._drafting is None or self._drafter is None:
            return None
        drafting, self._drafting = self._drafting, None
        return Drafted.of(self._drafter.collect(), drafting, self.model_config.vocab_size)

    def _plan_lengths(self, plan: StepPlan, drafted: Drafted | None, batch: Batch) -> Drafted | None:
        """How many drafts of each sequence to verify; sequences that ended since they were drafted have no length."""
        if drafted is None:
            return None
        decoding = set(plan.decoding)
        live = [sequence for sequence in drafted.sequences if sequence in decoding]
        if not live:
            return drafted
        at = [drafted.row_of[sequence] for sequence in live]
        rows = DraftedRows(
            slots=slots_of(live),
            confidences=drafted.proposal.confidences[at],
            limits=np.minimum(drafted.usable[at], [self._draft_limit(sequence) for sequence in live]),
            thresholds=thresholds_of(live),
        )
        with self._watch.times("schedule"):
            verify_plan = self.planner.plan(rows, batch)
        return replace(drafted, lengths=dict(zip(live, verify_plan.lengths, strict=True)))

    def _works(self, plan: StepPlan, drafted: Drafted | None) -> list[Work]:
        works: list[Work] = []
        for sequence in plan.decoding:
            with self._ends_on_error(sequence):
                works.append(self._round_of(sequence, drafted))
        for chunk in plan.prefill:
            with self._ends_on_error(chunk.sequence):
                works.append(self._prefill_of(chunk))
        return works

    @contextmanager
    def _ends_on_error(self, sequence: Sequence) -> Iterator[None]:
        """An exception inside ends `sequence` and nothing else."""
        try:
            yield
        except NonfiniteLogitsError as error:
            self._num_nonfinite_logits += 1
            logger.error("request %s ends: %s", sequence.request.request_id, error)
            self._fail(sequence, str(error))
        except Exception as error:
            logger.exception("request %s ends", sequence.request.request_id)
            self._fail(sequence, f"an internal error ended this request ({type(error).__name__})")

    def _fail(self, sequence: Sequence, error: str) -> None:
        self.scheduler.remove(sequence.request.request_id)
        self._ended.append(_last_output(sequence, "error", error))

    def _round_of(self, sequence: Sequence, drafted: Drafted | None) -> Work:
        if drafted is None or sequence not in drafted.lengths:
            return Work(sequence, _segment(sequence, 1), rows=self._row_contexts(sequence, ()), is_round=True)
        drafts = drafted.tokens_of(sequence)
        return Work(
            sequence,
            _segment(sequence, 1, drafts),
            drafts,
            self._row_contexts(sequence, drafts),
            is_round=True,
            proposal_row=drafted.row_of[sequence],
            num_drafted=drafted.depth,
        )

    def _prefill_of(self, chunk: PrefillChunk) -> Work:
        sequence = chunk.sequence
        is_last = chunk.num_tokens == sequence.num_missing
        rows = self._row_contexts(sequence, ()) if is_last else ()
        return Work(sequence, _segment(sequence, chunk.num_tokens), rows=rows)

    def _row_contexts(self, sequence: Sequence, drafts: tuple[int, ...]) -> tuple[RowContext, ...]:
        """One per sampled row: that of the last committed token, then that of each draft."""
        params = sequence.request.sampling
        outputs = (*sequence.output_token_ids, *drafts) if params.has_penalties else ()
        num_outputs = sequence.num_outputs
        return tuple(
            RowContext(
                sequence.sampling,
                position=sequence.length + num_drafts,
                output_token_ids=outputs[: num_outputs + num_drafts],
                before_min_tokens=num_outputs + num_drafts < params.min_tokens,
                wants_distribution=self._verification.wants_distribution and len(drafts) > 0,
            )
            for num_drafts in range(len(drafts) + 1)
        )

    def _command(self, works: list[Work]) -> ForwardCommand:
        sampled_rows: list[int] = []
        first_row = 0
        for work in works:
            end = first_row + work.num_rows
            sampled_rows.extend(range(end - len(work.rows), end))
            first_row = end
        return ForwardCommand(
            segments=tuple(work.segment for work in works),
            sampled_rows=np.array(sampled_rows, dtype=np.int64),
            sampling=build_sampling_rows([row for work in works for row in work.rows]),
            wants_context_features=any(self._speculates(work.sequence) for work in works),
        )

    def _commit(
        self, works: list[Work], drafted: Drafted | None, result: ForwardResult
    ) -> tuple[list[SequenceOutput], dict[Sequence, Outcome]]:
        """Accept drafts, append tokens, finish sequences, and keep the context features of committed tokens.

        Returns the outputs and the outcomes of all sequences that sampled.
        """
        sampling = [work for work in works if work.samples]
        blocks = [VerifiedBlock(work.drafts, self._draft_source(work, drafted)) for work in sampling]
        acceptances = iter(self._verification.verify(blocks, result.samples))
        outputs: list[SequenceOutput] = []
        outcomes: dict[Sequence, Outcome] = {}
        committed: list[tuple[int, int, int, int]] = []
        first_row = first_sample = 0
        for work in works:
            acceptance = next(acceptances) if work.samples else None
            num_kept = work.num_committed + (acceptance.num_accepted if acceptance else 0)
            sequence = work.sequence
            with self._ends_on_error(sequence):
                sequence.num_computed += num_kept
                if acceptance is not None:
                    samples = result.samples.of(slice(first_sample, first_sample + len(work.rows)))
                    outputs.append(self._append(work, acceptance, samples))
                    outcomes[sequence] = Outcome(acceptance.num_accepted, len(outputs[-1].token_ids) - 1)
            if sequence.slot is not None and self._speculates(sequence):
                committed.append((sequence.slot, sequence.num_computed, num_kept, first_row))
            first_row += work.num_rows
            first_sample += len(work.rows)
        if committed and result.context_features is not None:
            self._keep_features(Committed(*np.array(committed).T), result.context_features)
        return outputs, outcomes

    def _learn(
        self,
        batch: Batch,
        drafted: Drafted | None,
        outcomes: dict[Sequence, Outcome],
        bypass: BypassReason | None,
        timing: StepTiming,
    ) -> StepRecord:
        """Give the planner the result of the step."""
        # A sequence that ended by an error counts as having no accepted drafts.
        rounds = [outcomes.get(sequence, Outcome()) for sequence in drafted.lengths] if drafted else []
        num_nonfinite_logits, self._num_nonfinite_logits = self._num_nonfinite_logits, 0
        return self.planner.learn(
            batch,
            StepOutcome(
                num_tokens_accepted=np.array([outcome.num_accepted for outcome in rounds], dtype=np.int64),
                num_committed=np.array([outcome.num_committed for outcome in rounds], dtype=np.int64),
                num_drafted=len(drafted.sequences) if drafted else 0,
                bypass=bypass,
                draft_seconds=timing.draft,
                target_seconds=timing.total - timing.draft,
                schedule_seconds=timing.schedule + self._learning_seconds,
                ended_at=time.time(),
                num_nonfinite_drafts=drafted.num_unusable if drafted else 0,
                num_nonfinite_logits=num_nonfinite_logits,
            ),
        )

    def _append(self, work: Work, acceptance: Acceptance, samples: Samples) -> SequenceOutput:
        """Commit the accepted drafts and the next anchor, up to the end of the request.

        `samples` are of the work's rows. Raises NonfiniteLogitsError where there is no next anchor.
        """
        sequence = work.sequence
        if acceptance.next_anchor == NO_TOKEN:
            raise NonfiniteLogitsError(f"the model's logits behind token {sequence.length} are not finite")
        committed: list[int] = []
        for token in (*work.drafts[: acceptance.num_accepted], acceptance.next_anchor):
            committed.append(token)
            sequence.tokens.append(token)
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason is not None:
                break
        if work.is_round:
            # Drafts behind the end of the text are not counted: the round commits accepted + 1 tokens.
            sequence.stats.record(work.num_drafted, len(work.drafts), len(committed) - 1)
        reports = (samples.logprobs_of(row, token) for row, token in enumerate(committed))
        stopped_by_id = sequence.finish_reason == "stop" and committed[-1] in sequence.stop_ids
        output = SequenceOutput(
            request_id=sequence.request.request_id,
            token_ids=tuple(committed),
            logprobs=tuple(report for report in reports if report is not None),
            finish_reason=sequence.finish_reason,
            stop_token_id=committed[-1] if stopped_by_id else None,
            stats=sequence.stats.freeze(),
        )
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence.request.request_id)
        return output

    def _draft_source(self, work: Work, drafted: Drafted | None) -> DraftSource | None:
        """The distributions of the drafts, where the verification needs them."""
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
        if sequence.num_outputs >= params.min_tokens and sequence.anchor in sequence.stop_ids:
            return "stop"
        if sequence.num_outputs >= params.max_tokens or sequence.length >= self.config.max_model_len:
            return "length"
        return None

    # The drafter's side.

    def _speculates(self, sequence: Sequence) -> bool:
        return self._drafter is not None and sequence.request.speculative.allow_drafts

    def _draft_limit(self, sequence: Sequence) -> int:
        """Most drafts that can still become part of the text: its last token is always the target's own."""
        params, asked = sequence.request.sampling, sequence.request.speculative.max_draft_tokens
        remaining = min(params.max_tokens - sequence.num_outputs, self.config.max_model_len - sequence.length)
        return max(0, min(self.gamma, self.gamma if asked is None else asked, remaining - 1))

    def _keep_features(self, committed: Committed, features: Tensor) -> None:
        """Remember what the drafter may want to know; it is told when it drafts for the sequence next."""
        # The first chunk of a sequence: the drafter's context in this slot belongs to the previous sequence.
        self._num_known[committed.slots[committed.stops == committed.counts]] = 0
        self._features.store(committed, features)

    def _context(self, slots: np.ndarray, num_known: np.ndarray, num_computed: np.ndarray) -> ContextUpdate:
        missing: Missing = self._features.since(slots, num_known, num_computed)
        return ContextUpdate(missing.slots, missing.positions, self._target.project(missing.features))

    def _select(self) -> list[Sequence]:
        """The decoding sequences to draft in the next step: all that can use a draft, or none."""
        self._bypass = None
        decoding = [s for s in self.scheduler.running if s.is_decoding]
        speculating = [s for s in decoding if self._speculates(s)]
        if not speculating:
            return []
        candidates = [s for s in speculating if self._draft_limit(s) > 0]
        batch = Batch(len(decoding), 0, len(decoding), mean_length(decoding))
        with self._watch.times("schedule"):
            self._bypass = self.planner.bypass_reason(len(candidates), batch)
        return candidates if self._bypass is None else []

    def _submit_drafts(self, sequences: list[Sequence]) -> None:
        """Request the next drafts of `sequences`, so that the drafter works while outputs are sent."""
        if self._drafter is None:
            return
        if not sequences:
            self._drafter.keep_alive()  # a bypass may last longer than the drafter's timeout
            return
        slots, num_computed = slots_of(sequences), computed_of(sequences)
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
        sampling, vocab_size = request.sampling, self.model_config.vocab_size
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if num_tokens >= self.config.max_model_len:
            raise RequestError(
                "prompt", f"the prompt has {num_tokens} tokens: expected fewer than {self.config.max_model_len}"
            )
        if request.request_id in self.scheduler:
            raise RequestError("request_id", f"request_id={request.request_id!r} is already running")
        named: dict[str, Collection[int]] = {
            "prompt": request.prompt_token_ids,
            "output_token_ids": request.output_token_ids,
            "logit_bias": sampling.logit_bias,
            "stop_token_ids": sampling.stop_token_ids,
        }
        for param, token_ids in named.items():
            largest = max(token_ids, default=0)
            if largest >= vocab_size:
                raise RequestError(param, f"{param} has token id {largest}: expected 0..{vocab_size - 1}")
        if len(request.output_token_ids) >= sampling.max_tokens:
            raise RequestError("max_tokens", "the tokens to continue from already reach max_tokens")
        if sampling.min_tokens > 0 and len(set(sampling.stop_token_ids)) >= vocab_size - 1:
            raise RequestError("stop_token_ids", "stop_token_ids leave no token possible before min_tokens")

    def _output(self, sequences: list[SequenceOutput], record: StepRecord | None = None) -> StepOutput:
        ended, self._ended = self._ended, []
        return StepOutput(
            sequences=(*sequences, *ended),
            record=record,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            cache_usage=self.scheduler.pool.usage,
            num_preemptions=self.scheduler.num_preemptions,
        )


def _segment(sequence: Sequence, num_committed: int, drafts: tuple[int, ...] = ()) -> Segment:
    """The next `num_committed` uncomputed tokens of a sequence that holds a slot, then `drafts`."""
    assert sequence.slot is not None
    start = sequence.num_computed
    token_ids = [*sequence.tokens[start : start + num_committed], *drafts]
    return Segment(sequence.slot, start, token_ids, list(sequence.pages))


def _last_output(sequence: Sequence, reason: FinishReason, error: str | None = None) -> SequenceOutput:
    """Of a sequence that ends without a token."""
    return SequenceOutput(
        request_id=sequence.request.request_id, finish_reason=reason, stats=sequence.stats.freeze(), error=error
    )
