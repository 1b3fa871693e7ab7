"""What the step loop asks about speculation: who is drafted, how much is verified, and was that right.

Cost table, calibration, schedule and selection meet here, so that the loop has one line for each question.
Everything is an array over slots or over the requests of a round. Letters: R drafted requests, G gamma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dspark_ray.config import ResolvedConfig
from dspark_ray.speculative.calibration import OnlineCalibration, Temperatures
from dspark_ray.speculative.cost import CostModel, lower_hull
from dspark_ray.speculative.cost_table import CostTable
from dspark_ray.speculative.depth import DraftDepth
from dspark_ray.speculative.draft_gate import DraftGate
from dspark_ray.speculative.prefix_schedule import (
    PLACES,
    FixedSchedule,
    RoundView,
    VerifyPlan,
    build_schedule,
    cut_at_threshold,
    survival,
)
from dspark_ray.types import BypassReason, StepRecord, VerificationPolicy

RoundListener = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""(confidences [R, G] as drafted, admitted [R], accepted [R]) of the rounds of one step."""


@dataclass(frozen=True)
class Batch:
    """A step, besides its drafts."""

    num_decoding: int
    num_prefill_rows: int
    certain_tokens: int
    """Requests that sample: each brings a token however little is verified."""
    context: float
    """Mean tokens before a row."""

    @property
    def base_rows(self) -> int:
        """Rows of the forward that are no drafts: an anchor per decoding request, and prompt chunks."""
        return self.num_decoding + self.num_prefill_rows


@dataclass(frozen=True)
class DraftedRows:
    """The requests of a proposal that still decode, in the proposal's order."""

    slots: np.ndarray
    """[R]"""
    confidences: np.ndarray
    """[R, G] as drafted; G is less than gamma where fewer positions were drafted"""
    limits: np.ndarray
    """[R] most drafts each can use"""
    thresholds: np.ndarray | None
    """[R] lowest survival each request wants verified; None where nobody asks for any"""


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to; all times are seconds."""

    num_tokens_accepted: np.ndarray
    """[R] drafts that stood, also those behind the end of a text"""
    num_committed: np.ndarray
    """[R] drafts that stood and belong to the text"""
    num_drafted: int
    """Requests that were drafted, also those that have left since."""
    bypass: BypassReason | None
    """Why nobody was, where somebody could have been."""
    draft_seconds: float
    target_seconds: float
    """Everything but the draft."""
    schedule_seconds: float
    ended_at: float
    """Unix time."""
    num_nonfinite_drafts: int = 0
    num_nonfinite_logits: int = 0
    """As in StepRecord"""


@dataclass(frozen=True)
class _Round:
    """A planned round, until its outcome is known."""

    rows: DraftedRows
    depth: int
    """Positions that were drafted"""
    lengths: np.ndarray
    expected: np.ndarray
    """[R] drafts"""
    usable: np.ndarray
    """[R, G] survival of what could be verified, 0 elsewhere"""


class Planner:
    """Owns everything that learns. Without a cost table nothing is known about seconds: all drafts are verified."""

    def __init__(
        self,
        config: ResolvedConfig,
        cost_table: CostTable | None = None,
        temperatures: Temperatures | None = None,
    ) -> None:
        self.config, self.gamma = config, config.gamma
        self.policy = self._own_policy = VerificationPolicy(confidence_threshold=config.confidence_threshold)
        self.listener: RoundListener | None = None
        self.calibration = OnlineCalibration(
            temperatures or Temperatures.identity(self.gamma), self.gamma, refit=config.calibrate_online
        )
        self.cost = self._cost_model(cost_table)
        self.follows_costs = self.cost is not None and config.schedule != "fixed"
        """Whether costs decide; otherwise everything that can be drafted is drafted and verified."""
        self._schedule = build_schedule(config.schedule) if self.follows_costs else FixedSchedule()
        self._gate = DraftGate(self.gamma)
        self._depth = DraftDepth(self.gamma)
        self._past = None
        if config.schedule == "lagged":
            self._past = _Past(config.max_num_seqs, self.gamma, config.schedule_lag)
        self._policy_ends_at = math.inf
        self._promise = _Promise()
        self._round: _Round | None = None
        self._step_seconds = 0.0
        self._num_steps = 0

    def _cost_model(self, cost_table: CostTable | None) -> CostModel | None:
        if cost_table is None:
            return None
        return CostModel(cost_table, self.config.max_num_batched_tokens, self.config.max_num_seqs)

    # Policies come and go.

    def apply(self, policy: VerificationPolicy, now: float) -> None:
        """Follow `policy` until it expires; `now` is the caller's clock, in seconds.

        The engine's own threshold is a floor: a policy raises it or leaves it.
        """
        lowest = self._own_policy.confidence_threshold
        self.policy = replace(policy, confidence_threshold=max(policy.confidence_threshold, lowest))
        self._policy_ends_at = now + policy.valid_seconds if policy.valid_seconds is not None else math.inf

    def expire_policy(self, now: float) -> None:
        """Return to the engine's own policy when the other one has had its time."""
        if now >= self._policy_ends_at:
            self.policy, self._policy_ends_at = self._own_policy, math.inf

    # Before the draft.

    def admit(self, slot: int) -> None:
        """A sequence gets `slot`: forget the one that had it before."""
        if self._past is not None:
            self._past.admit(slot)

    def bypass_reason(self, num_requests: int, batch: Batch) -> BypassReason | None:
        """Why the step `batch` is not drafted; None drafts for all `num_requests` that can use a draft."""
        if not self.policy.allow_drafts:
            return "policy"
        if num_requests == 0:
            return "no_room"
        if self.cost is None or not self.follows_costs:
            return None
        decision = self._gate.decide(
            num_requests,
            batch.certain_tokens,
            batch.base_rows,
            self.cost.target_seconds(batch.context),
            self.cost.draft_seconds(),
            self._step_seconds,
        )
        self._promise.make(decision.tokens_per_second)
        return None if decision.drafts or not self.config.bypass else "predicted_loss"

    def depth(self) -> int:
        """Positions of a block to draft for those that were selected."""
        return self._depth.choose() if self.follows_costs else self.gamma

    # Between draft and target.

    def plan(self, rows: DraftedRows, batch: Batch) -> VerifyPlan:
        """How many drafts of each request to verify: the schedule's lengths, then the thresholds."""
        limits, thresholds, depth = *self._allowed(rows), rows.confidences.shape[1]
        rows = replace(rows, confidences=_whole_blocks(rows.confidences, self.gamma))
        current = survival(self.calibration.calibrate(rows.confidences))
        view = RoundView(
            survival=current,
            lagged_survival=self._past.push(rows.slots, current) if self._past is not None else None,
            limits=limits,
            certain_tokens=batch.certain_tokens,
            base_rows=batch.base_rows,
            target_seconds=self._seconds_for_the_schedule(batch, len(rows.slots)),
            draft_seconds=self._draft_seconds(len(rows.slots)),
            tokens_per_second=self._promise.rate,
        )
        plan = self._schedule.plan(view)
        if thresholds is not None:
            plan = cut_at_threshold(plan, current, thresholds)
        lengths = np.array(plan.lengths, dtype=np.int64)
        expected = np.where(PLACES[: self.gamma] < lengths[:, None], current, 0.0).sum(-1)
        self._round = _Round(rows, depth, lengths, expected, _usable(view.allowed, thresholds))
        return plan

    def _allowed(self, rows: DraftedRows) -> tuple[np.ndarray, np.ndarray | None]:
        """Limits and thresholds [R] of requests and policy together."""
        most = self.policy.max_draft_tokens
        limits = rows.limits if most is None else np.minimum(rows.limits, most)
        lowest = self.policy.confidence_threshold
        if lowest == 0:
            return limits, rows.thresholds
        return limits, np.maximum(lowest, 0.0 if rows.thresholds is None else rows.thresholds) * np.ones(len(limits))

    def _target_seconds(self, batch: Batch) -> np.ndarray:
        """[rows + 1]; without a cost table every size costs the same, so that nothing is ever cut."""
        if self.cost is None:
            return np.ones(self.config.max_num_batched_tokens + 1)
        return self.cost.target_seconds(batch.context)

    def _seconds_for_the_schedule(self, batch: Batch, num_requests: int) -> np.ndarray:
        """[rows + 1] seconds of the sizes that the step can have.

        Algorithm 1 stops at the first stair of a curve, however good what lies behind it. It walks along the lower
        hull of the curve instead, which has no stairs, and is known before anything is drafted.
        """
        seconds = self._target_seconds(batch)
        if self.config.schedule != "causal" or self.cost is None:
            return seconds
        last = min(batch.base_rows + num_requests * self.gamma, len(seconds) - 1)
        return lower_hull(seconds, batch.base_rows, last)

    def _draft_seconds(self, num_requests: int) -> float:
        return 0.0 if self.cost is None else float(self.cost.draft_seconds()[num_requests])

    def drop_round(self) -> None:
        """Forget the planned round: none of its sequences runs."""
        self._round = None

    # After the target.

    def learn(self, batch: Batch, outcome: StepOutcome) -> StepRecord:
        """Compare the step with what was expected of it."""
        planned, self._round = self._round, None
        budget = int(planned.lengths.sum()) if planned else 0
        record = StepRecord(
            step=self._num_steps,
            ended_at=outcome.ended_at,
            num_decoding=batch.num_decoding,
            num_prefill_rows=batch.num_prefill_rows,
            bypass=outcome.bypass if batch.num_decoding else None,
            gamma=planned.depth if planned else self.gamma,
            lengths=tuple(planned.lengths.tolist()) if planned else (),
            accepted=tuple(outcome.num_committed.tolist()),
            expected=float(planned.expected.sum()) if planned else 0.0,
            predicted_draft_seconds=self._draft_seconds(outcome.num_drafted),
            measured_draft_seconds=outcome.draft_seconds,
            predicted_target_seconds=float(self._target_seconds(batch)[batch.base_rows + budget]) if self.cost else 0.0,
            measured_target_seconds=outcome.target_seconds,
            schedule_seconds=outcome.schedule_seconds,
            confidence_threshold=self.policy.confidence_threshold,
            policy_version=self.policy.version,
            cost_drift=self.cost.drift if self.cost else 1.0,
            num_nonfinite_drafts=outcome.num_nonfinite_drafts,
            num_nonfinite_logits=outcome.num_nonfinite_logits,
            calibration_error=tuple(None if math.isnan(error) else error for error in self.calibration.ece()),
        )
        if planned is not None:
            self._learn_round(planned, outcome.num_tokens_accepted)
        if self.cost is not None and not batch.num_prefill_rows:
            # Rows of a prompt cost otherwise than verified ones, and nobody chooses their number.
            rows = batch.base_rows + budget
            target, draft = outcome.target_seconds, outcome.draft_seconds
            self.cost.observe(rows, batch.context, target, outcome.num_drafted, draft)
        self._step_seconds = outcome.target_seconds + outcome.draft_seconds
        self._promise.compare(batch.certain_tokens + record.num_accepted, self._step_seconds)
        self._num_steps += 1
        return record

    def _learn_round(self, planned: _Round, accepted: np.ndarray) -> None:
        self.calibration.observe(planned.rows.confidences, planned.lengths, accepted)
        if self.follows_costs:
            self._depth.observe(planned.lengths, planned.depth)
            self._gate.observe(planned.usable, float(planned.expected.sum()), float(accepted.sum()))
        if self.listener is not None:
            self.listener(planned.rows.confidences, planned.lengths, accepted)


def _whole_blocks(confidences: np.ndarray, gamma: int) -> np.ndarray:
    """[R, gamma] with 0 where no position was drafted."""
    if confidences.shape[1] == gamma:
        return confidences
    blocks = np.zeros((len(confidences), gamma), dtype=confidences.dtype)
    blocks[:, : confidences.shape[1]] = confidences
    return blocks


def _usable(allowed: np.ndarray, thresholds: np.ndarray | None) -> np.ndarray:
    """[R, G] survival of what could be verified, 0 elsewhere."""
    if thresholds is None:
        return np.maximum(allowed, 0.0)
    return np.where(allowed >= thresholds[:, None], np.maximum(allowed, 0.0), 0.0)


class _Promise:
    """The rate that forecasts promise, corrected by what of late came of promises.

    Prompts take time too, and forecasts of the best are too good on average: what a row is worth is the rate that is
    really achieved.
    """

    _MEMORY = 0.98
    _PRIOR_SECONDS = 0.2
    """Of steps that kept their promise, before anything is known."""

    def __init__(self) -> None:
        self._made: float | None = None
        self._tokens = self._promised = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per second to count on; None before the first promise."""
        if self._made is None:
            return None
        prior = self._made * self._PRIOR_SECONDS
        return self._made * (self._tokens + prior) / (self._promised + prior)

    def make(self, tokens_per_second: float) -> None:
        """What the next steps are to achieve."""
        self._made = tokens_per_second

    def compare(self, tokens: int, seconds: float) -> None:
        """What a step achieved."""
        if self._made is not None:
            self._tokens = self._MEMORY * self._tokens + tokens
            self._promised = self._MEMORY * self._promised + self._made * seconds


class _Past:
    """Survivals of the latest rounds of every slot."""

    def __init__(self, num_slots: int, gamma: int, lag: int) -> None:
        self._lag = lag
        self._ring = np.ones((lag + 1, num_slots, gamma))
        self._num_rounds = np.zeros(num_slots, dtype=np.int64)

    def admit(self, slot: int) -> None:
        """A new request has no past: it counts as certain."""
        self._ring[:, slot] = 1.0

    def push(self, slots: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Remember survival [R, G] of a round; what it was `lag` rounds before."""
        length = self._lag + 1
        self._ring[self._num_rounds[slots] % length, slots] = current
        self._num_rounds[slots] += 1
        return self._ring[self._num_rounds[slots] % length, slots]
