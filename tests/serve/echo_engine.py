"""A small real engine: it repeats the prompt, a few tokens per step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from dspark_ray.types import (
    QueueFullError,
    Request,
    RequestError,
    SequenceOutput,
    SpeculationStats,
    StepOutput,
    StepRecord,
    TokenLogprobs,
    VerificationPolicy,
)

TOKENS_PER_STEP = 3
STEP_SECONDS = 0.002


@dataclass
class EchoEngine:
    """Repeats the prompt over and over. While `step_gate` is cleared, no step is made."""

    vocab_size: int
    eos_token_id: int
    max_requests: int = 64
    seen: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    policies: list[VerificationPolicy] = field(default_factory=list)
    step_gate: threading.Event = field(default_factory=threading.Event)
    breaks: bool = False
    chokes_on: str = ""
    """The id of the request that raises when it is added; * for all."""
    most_suspects: int = 0
    """Ids of requests that ran at the same time."""
    hides_drawn: bool = False
    """Whether the drawn token is missing from the top logprobs."""
    num_steps: int = 0
    _running: dict[str, tuple[Request, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step_gate.set()

    def reset(self) -> None:
        """Restore the initial state, for the next test."""
        self.max_requests, self.breaks, self.chokes_on, self.hides_drawn = 64, False, "", False
        self.seen.clear()
        self.aborted.clear()
        self.policies.clear()
        self.step_gate.set()

    @property
    def running(self) -> list[Request]:
        return [request for request, _ in list(self._running.values())]

    def add_request(self, request: Request) -> None:
        if self.chokes_on in (request.request_id, "*"):
            raise RuntimeError("cannot add it")
        for token in request.prompt_token_ids:
            if not 0 <= token < self.vocab_size:
                raise RequestError("prompt", f"prompt has token id {token}: expected 0..{self.vocab_size - 1}")
        if len(self._running) >= self.max_requests:
            raise QueueFullError(f"{len(self._running)} requests are waiting")
        self.seen.append(request)
        self._running[request.request_id] = request, len(request.output_token_ids)
        self.most_suspects = max(self.most_suspects, sum(name.startswith("suspect") for name in self._running))

    def abort(self, request_id: str) -> None:
        if self._running.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def apply_policy(self, policy: VerificationPolicy) -> None:
        self.policies.append(policy)

    def has_unfinished(self) -> bool:
        return bool(self._running)

    def step(self) -> StepOutput:
        self.step_gate.wait(10)
        time.sleep(STEP_SECONDS)
        if self.breaks:
            raise RuntimeError("the engine broke on purpose")
        record = self._record()
        outputs = tuple(self._advance(*self._running[request_id]) for request_id in list(self._running))
        return StepOutput(sequences=outputs, record=record, num_running=len(self._running))

    def keep_alive(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _record(self) -> StepRecord:
        """Three of five drafts verified per request and two accepted, unless a policy forbids drafts."""
        policy = self.policies[-1] if self.policies else VerificationPolicy()
        num_drafted = 0 if policy.bypass else len(self._running)
        self.num_steps += 1
        return StepRecord(
            step=self.num_steps - 1,
            ended_at=time.time(),
            num_decoding=len(self._running),
            num_prefill_rows=0,
            bypass="policy" if policy.bypass else None,
            lengths=(TOKENS_PER_STEP,) * num_drafted,
            accepted=(TOKENS_PER_STEP - 1,) * num_drafted,
            expected=2.5 * num_drafted,
            gamma=5,
            confidence_threshold=policy.confidence_threshold,
            policy_version=policy.version,
            calibration_error=(0.25, None, None, None, None),
        )

    def _advance(self, request: Request, num_done: int) -> SequenceOutput:
        tokens = list(self._next_tokens(request, num_done))
        num_done += len(tokens)
        stopped = tokens[-1] == self.eos_token_id
        reason = "stop" if stopped else "length" if num_done >= request.sampling.max_tokens else None
        self._running[request.request_id] = request, num_done
        if reason is not None:
            del self._running[request.request_id]
        return SequenceOutput(
            request_id=request.request_id,
            token_ids=tuple(tokens),
            logprobs=tuple(self._logprobs(request, token) for token in tokens)
            if request.sampling.logprobs is not None
            else (),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_token_id=tokens[-1] if stopped else None,
            stats=SpeculationStats(4, 20, 16, 8, (0, 0, 4)),
        )

    def _next_tokens(self, request: Request, num_done: int) -> Iterable[int]:
        for position in range(num_done, min(num_done + TOKENS_PER_STEP, request.sampling.max_tokens)):
            token = request.prompt_token_ids[position % len(request.prompt_token_ids)]
            yield token
            if token == self.eos_token_id:
                return

    def _logprobs(self, request: Request, token: int) -> TokenLogprobs:
        if self.hides_drawn:
            return TokenLogprobs(token, -2.5, (((token + 1) % self.vocab_size, -0.25),))
        alternatives = ((token, -0.5), ((token + 1) % self.vocab_size, -1.5))
        return TokenLogprobs(token, -0.5, alternatives[: request.sampling.logprobs])
