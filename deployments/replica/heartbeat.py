"""A replica's side of load control: sends its engine's load to the load controller, and applies the policy it gets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from autoscale.controller import Decision
from autoscale.policies import number_of
from autoscale.signals import LoadSample, Place
from deployments.replica.channel import Observer
from dspark_ray.types import StepOutput, StepRecord, VerificationPolicy

logger = logging.getLogger("ray.serve")

_TIMEOUT_PERIODS = 3.0
"""Timeout for an answer, in heartbeat periods."""


class LoadWindow(Observer):
    """Sums over the steps between two heartbeats. Times are in seconds of the caller's clock."""

    def __init__(self, replica: str, max_running: int) -> None:
        self._replica, self._max_running = replica, max_running
        self.places: tuple[Place, ...] = ()
        """Places of the gang's actors, once they are known."""
        self._last = StepOutput()
        self._record: StepRecord | None = None
        self.start(0.0)

    def start(self, now: float) -> None:
        """Begin a new interval at `now`."""
        self._started_at = now
        self._num_steps = self._running = self._waiting = 0
        self._rows = self._decoded = self._budget = self._accepted = self._tokens = 0
        self._busy = 0.0

    def on_step(self, step: StepOutput) -> None:
        self._last = step
        self._running += step.num_running
        self._waiting += step.num_waiting
        self._num_steps += 1
        self._tokens += sum(len(sequence.token_ids) for sequence in step.sequences)
        if step.record is not None:
            self._add_record(step.record)

    def _add_record(self, record: StepRecord) -> None:
        self._record = record
        self._rows += record.num_decoding + record.budget + record.num_prefill_rows
        self._decoded += record.num_decoding
        self._budget += record.budget
        self._accepted += record.num_accepted
        self._busy += record.measured_draft_seconds + record.measured_target_seconds

    def take(self, now: float) -> LoadSample:
        """The sample of this interval, after which the next one begins. Without steps the engine counts as idle."""
        steps, decoded, seconds = max(1, self._num_steps), max(1, self._decoded), now - self._started_at
        record = self._record
        sample = LoadSample(
            replica=self._replica,
            places=self.places,
            seconds=seconds,
            num_steps=self._num_steps,
            num_running=self._running / steps,
            num_waiting=self._waiting / steps,
            max_running=self._max_running,
            cache_usage=self._last.cache_usage,
            rows_per_step=self._rows / steps,
            budget_per_request=self._budget / decoded,
            accepted_length=(self._decoded + self._accepted) / decoded,
            tokens_per_second=self._tokens / seconds if seconds > 0 else 0.0,
            busy_share=min(1.0, self._busy / seconds) if seconds > 0 else 0.0,
            # An average over recent steps, which says nothing about an interval without steps.
            slowness=record.cost_drift if record is not None and self._num_steps else 1.0,
            threshold=record.confidence_threshold if record is not None else 0.0,
            policy_version=record.policy_version if record is not None else 0,
        )
        self.start(now)
        return sample

    def stats(self) -> dict[str, float]:
        """The engine's current load, for Serve's autoscaling policy."""
        last = self._last
        return {
            "running": float(last.num_running),
            "waiting": float(last.num_waiting),
            "max_running": float(self._max_running),
            "cache_usage": last.cache_usage,
        }


def policy_of(decision: Decision) -> VerificationPolicy:
    """The load controller's decision as a policy for the engine."""
    return VerificationPolicy(
        confidence_threshold=decision.bounds.confidence_threshold,
        max_draft_tokens=decision.bounds.max_draft_tokens,
        bypass=decision.bounds.bypass,
        version=decision.version,
        valid_seconds=decision.valid_seconds,
    )


class HeartbeatLoop:
    """Sends heartbeats for the replica's lifetime. Failures of the load controller never affect the engine.

    Where the controller does not answer, a warning is logged and its last policy expires in the engine.
    """

    def __init__(
        self,
        window: LoadWindow,
        ask: Callable[[LoadSample], Awaitable[Decision]],
        apply: Callable[[VerificationPolicy], None],
        period: float,
        clock: Callable[[], float] = time.monotonic,
        rule_preset: str | None = None,
    ) -> None:
        """`period` is in seconds, until the controller sets another one.

        `rule_preset` is the preset of the autoscaling policy, None where it follows the controller's.
        """
        self._window, self._ask, self._apply, self._clock = window, ask, apply, clock
        self._period = period
        self._is_answered = True
        self._rule_preset = rule_preset
        self._compared: set[str | None] = set()
        self._decision: Decision | None = None
        self._valid_until = 0.0

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        self._window.start(self._clock())
        while True:
            await asyncio.sleep(self._period)
            await self.beat()

    async def beat(self) -> None:
        """Send one heartbeat. Failures of the controller are logged and not raised."""
        sample = self._window.take(self._clock())
        try:
            decision = await asyncio.wait_for(self._ask(sample), _TIMEOUT_PERIODS * self._period)
            self._apply(policy_of(decision))
        except Exception as error:  # Whatever fails, the engine follows its own schedule.
            self._on_silence(error)
            return
        self._decision, self._period = decision, decision.heartbeat_seconds
        self._compare_presets(decision.preset)
        self._valid_until = self._clock() + decision.valid_seconds
        if not self._is_answered:
            self._is_answered = True
            logger.info("the load controller answers again")

    def _compare_presets(self, preset: str | None) -> None:
        """Warn once per preset of the controller that differs from the autoscaling policy's."""
        if self._rule_preset in (None, preset) or preset in self._compared:
            return
        self._compared.add(preset)
        logger.warning(
            "the autoscaling policy adds replicas by preset %r and the load controller decides by %r: expected the"
            " same, or no preset in policy_kwargs, which then follow the controller's",
            self._rule_preset,
            preset,
        )

    def stats(self) -> dict[str, float]:
        """The policy in force, for Serve's autoscaling policy; empty without one."""
        decision = self._decision
        if decision is None or self._clock() >= self._valid_until:
            return {}
        stats = {"threshold": decision.bounds.confidence_threshold, "saturation": decision.saturation.value}
        if decision.preset is not None:
            stats["preset"] = number_of(decision.preset)
        # A fixed threshold says nothing about when replicas should be added.
        return stats if decision.range_used is None else {**stats, "range_used": decision.range_used}

    def _on_silence(self, error: Exception) -> None:
        if self._is_answered:
            self._is_answered = False
            logger.warning("no usable answer from the load controller (%s); its policy expires", _words(error))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
