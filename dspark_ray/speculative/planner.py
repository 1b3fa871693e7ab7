"""The decisions about speculation: whether to draft, how deep, and how many drafts to verify; and their evaluation.

The planner joins cost model, calibration, schedule and draft gate, so that the step loop has one call per decision.
Data are arrays over slots or over the requests of a round. Letters: R drafted requests, G gamma.
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
    """The composition of a step without its drafts."""

    num_decoding: int
    num_prefill_rows: int
    certain_tokens: int
    """Requests that sample: each brings one token whether or not drafts are verified."""
    context: float
    """Mean number of tokens before a row."""

    @property
    def base_rows(self) -> int:
        """Rows of the forward that are not drafts: an anchor per decoding request, and prompt chunks."""
        return self.num_decoding + self.num_prefill_rows


@dataclass(frozen=True)
class DraftedRows:
    """The requests of a proposal that still decode, in the proposal's order."""

    slots: np.ndarray
    """[R]"""
    confidences: np.ndarray
    """[R, G] as drafted; G is less than gamma where fewer positions were drafted"""
    limits: np.ndarray
    """[R] draft limits: most drafts that each request can use"""
    thresholds: np.ndarray | None
    """[R] confidence thresholds of the requests; None where all are 0"""


@dataclass(frozen=True)
class StepOutcome:
    """The measured result of a step; all times are seconds."""

    num_tokens_accepted: np.ndarray
    """[R] accepted drafts, including those behind the end of a text"""
    num_committed: np.ndarray
    """[R] accepted drafts that became part of the text"""
    num_drafted: int
    """Requests that were drafted, including those that have ended since."""
    bypass: BypassReason | None
    """Why no request was drafted, where some could have been."""
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
    """A planned round whose outcome is not known yet."""

    rows: DraftedRows
    depth: int
    """Positions that were drafted"""
    lengths: np.ndarray
    """[R] verified drafts"""
    expected: np.ndarray
    """[R] drafts expected to be accepted"""
    verifiable: np.ndarray
    """[R, G] survival within limits and thresholds, 0 elsewhere"""


class Planner:
    """Owns everything that learns from steps. Without a cost table it drafts always and verifies all drafts."""

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
        """Whether costs decide; otherwise every request is drafted and every draft verified."""
        self._schedule = build_schedule(config.schedule) if self.follows_costs else FixedSchedule()
        self._gate = DraftGate(self.gamma)
        self._depth = DraftDepth(self.gamma)
        self._history = None
        if config.schedule == "lagged":
            self._history = _SurvivalHistory(config.max_num_seqs, self.gamma, config.schedule_lag)
        self._policy_ends_at = math.inf
        self._throughput = ThroughputTarget()
        self._round: _Round | None = None
        self._step_seconds = 0.0
        self._num_steps = 0

    def _cost_model(self, cost_table: CostTable | None) -> CostModel | None:
        if cost_table is None:
            return None
        return CostModel(cost_table, self.config.max_num_batched_tokens, self.config.max_num_seqs)

    # The policy.

    def apply(self, policy: VerificationPolicy, now: float) -> None:
        """Follow `policy` until it expires; `now` is the caller's clock, in seconds.

        The engine's own threshold is a floor that a policy can only raise.
        """
        lowest = self._own_policy.confidence_threshold
        self.policy = replace(policy, confidence_threshold=max(policy.confidence_threshold, lowest))
        self._policy_ends_at = now + policy.valid_seconds if policy.valid_seconds is not None else math.inf

    def expire_policy(self, now: float) -> None:
        """Return to the engine's own policy when the other one has expired."""
        if now >= self._policy_ends_at:
            self.policy, self._policy_ends_at = self._own_policy, math.inf

    # Before the draft.

    def admit(self, slot: int) -> None:
        """A new sequence gets `slot`: forget the previous one."""
        if self._history is not None:
            self._history.admit(slot)

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
        self._throughput.set(decision.tokens_per_second)
        return None if decision.drafts or not self.config.bypass else "predicted_loss"

    def depth(self) -> int:
        """Positions of a block to draft in the next step, 1..gamma."""
        return self._depth.choose() if self.follows_costs else self.gamma

    # Between draft and target.

    def plan(self, rows: DraftedRows, batch: Batch) -> VerifyPlan:
        """How many drafts of each request to verify: the schedule's lengths, then the thresholds."""
        limits, thresholds, depth = *self._allowed(rows), rows.confidences.shape[1]
        rows = replace(rows, confidences=_pad_to_gamma(rows.confidences, self.gamma))
        current = survival(self.calibration.calibrate(rows.confidences))
        view = RoundView(
            survival=current,
            lagged_survival=self._history.push(rows.slots, current) if self._history is not None else None,
            limits=limits,
            certain_tokens=batch.certain_tokens,
            base_rows=batch.base_rows,
            target_seconds=self._schedule_seconds(batch, len(rows.slots)),
            draft_seconds=self._draft_seconds(len(rows.slots)),
            tokens_per_second=self._throughput.rate,
        )
        plan = self._schedule.plan(view)
        if thresholds is not None:
            plan = cut_at_threshold(plan, current, thresholds)
        lengths = np.array(plan.lengths, dtype=np.int64)
        expected = np.where(PLACES[: self.gamma] < lengths[:, None], current, 0.0).sum(-1)
        self._round = _Round(rows, depth, lengths, expected, _verifiable(view.allowed, thresholds))
        return plan

    def _allowed(self, rows: DraftedRows) -> tuple[np.ndarray, np.ndarray | None]:
        """Draft limits and thresholds [R] of requests and policy combined."""
        most = self.policy.max_draft_tokens
        limits = rows.limits if most is None else np.minimum(rows.limits, most)
        lowest = self.policy.confidence_threshold
        if lowest == 0:
            return limits, rows.thresholds
        return limits, np.maximum(lowest, 0.0 if rows.thresholds is None else rows.thresholds) * np.ones(len(limits))

    def _target_seconds(self, batch: Batch) -> np.ndarray:
        """[rows + 1] seconds by rows; without a cost table every size costs the same, so that no draft is cut."""
        if self.cost is None:
            return np.ones(self.config.max_num_batched_tokens + 1)
        return self.cost.target_seconds(batch.context)

    def _schedule_seconds(self, batch: Batch, num_requests: int) -> np.ndarray:
        """[rows + 1] seconds by rows, as the schedule sees them.

        Algorithm 1 would stop at the first step of a padded cost curve even where larger sizes pay. It gets the lower
        convex hull of the curve, which has no steps and does not depend on the drafts.
        """
        seconds = self._target_seconds(batch)
        if self.config.schedule != "causal" or self.cost is None:
            return seconds
        last = min(batch.base_rows + num_requests * self.gamma, len(seconds) - 1)
        return lower_hull(seconds, batch.base_rows, last)

    def _draft_seconds(self, num_requests: int) -> float:
        return 0.0 if self.cost is None else float(self.cost.draft_seconds()[num_requests])

    def drop_round(self) -> None:
        """Forget the planned round, because none of its sequences runs."""
        self._round = None

    # After the target.

    def learn(self, batch: Batch, outcome: StepOutcome) -> StepRecord:
        """Learn from the finished step; the record compares it with the expectations."""
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
            # Prompt rows have other costs than verified rows, and the schedule does not choose their number.
            rows = batch.base_rows + budget
            target, draft = outcome.target_seconds, outcome.draft_seconds
            self.cost.observe(rows, batch.context, target, outcome.num_drafted, draft)
        self._step_seconds = outcome.target_seconds + outcome.draft_seconds
        self._throughput.observe(batch.certain_tokens + record.num_accepted, self._step_seconds)
        self._num_steps += 1
        return record

    def _learn_round(self, planned: _Round, accepted: np.ndarray) -> None:
        self.calibration.observe(planned.rows.confidences, planned.lengths, accepted)
        if self.follows_costs:
            self._depth.observe(planned.lengths, planned.depth)
            self._gate.observe(planned.verifiable, float(planned.expected.sum()), float(accepted.sum()))
        if self.listener is not None:
            self.listener(planned.rows.confidences, planned.lengths, accepted)


def _pad_to_gamma(confidences: np.ndarray, gamma: int) -> np.ndarray:
    """[R, gamma] confidences, 0 where no position was drafted."""
    if confidences.shape[1] == gamma:
        return confidences
    padded = np.zeros((len(confidences), gamma), dtype=confidences.dtype)
    padded[:, : confidences.shape[1]] = confidences
    return padded


def _verifiable(allowed: np.ndarray, thresholds: np.ndarray | None) -> np.ndarray:
    """[R, G] survival within limits and thresholds, 0 elsewhere."""
    if thresholds is None:
        return np.maximum(allowed, 0.0)
    return np.where(allowed >= thresholds[:, None], np.maximum(allowed, 0.0), 0.0)


class ThroughputTarget:
    """The forecast tokens per second, scaled by the recent ratio of achieved to forecast tokens.

    Achieved throughput is lower: prompts take time too, and the better of two forecasts is too high on average. The
    price of a row is the rate that the engine really achieves.
    """

    _DECAY = 0.98
    """Per step, of the sums from which the ratio is computed."""
    _PRIOR_SECONDS = 0.2
    """Of steps that achieved the forecast, which the sums start with."""

    def __init__(self) -> None:
        self._forecast: float | None = None
        self._achieved_tokens = self._forecast_tokens = 0.0

    @property
    def rate(self) -> float | None:
        """Expected tokens per second; None before the first forecast."""
        if self._forecast is None:
            return None
        prior = self._forecast * self._PRIOR_SECONDS
        return self._forecast * (self._achieved_tokens + prior) / (self._forecast_tokens + prior)

    def set(self, tokens_per_second: float) -> None:
        """The forecast for the next steps."""
        self._forecast = tokens_per_second

    def observe(self, tokens: int, seconds: float) -> None:
        """The measured result of a step."""
        if self._forecast is not None:
            self._achieved_tokens = self._DECAY * self._achieved_tokens + tokens
            self._forecast_tokens = self._DECAY * self._forecast_tokens + self._forecast * seconds


class _SurvivalHistory:
    """Survival of the latest rounds of every slot."""

    def __init__(self, num_slots: int, gamma: int, lag: int) -> None:
        self._lag = lag
        self._ring = np.ones((lag + 1, num_slots, gamma))
        self._num_rounds = np.zeros(num_slots, dtype=np.int64)

    def admit(self, slot: int) -> None:
        """A new request has no earlier rounds: its survival counts as 1."""
        self._ring[:, slot] = 1.0

    def push(self, slots: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Store the survival [R, G] of a round and return that of `lag` rounds before."""
        length = self._lag + 1
        self._ring[self._num_rounds[slots] % length, slots] = current
        self._num_rounds[slots] += 1
        return self._ring[self._num_rounds[slots] % length, slots]
