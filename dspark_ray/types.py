"""The values that travel through the engine: small, frozen, valid by construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
BypassReason = Literal["predicted_loss", "policy", "no_room"]
"""Why a step drafted for nobody: it would have cost more than it brings, the policy says so, or every request is
about to end."""


class RequestError(ValueError):
    """A request that can never be served: `param` names the field, the message its value and what would be right."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(RuntimeError):
    """The engine holds as many waiting requests as it may; the same request can be accepted later."""


def _check(condition: bool, param: str, value: object, expected: str) -> None:
    if not condition:
        raise RequestError(param, f"{param}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the target's logits become tokens; names and meanings are OpenAI's and vLLM's."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Names the noise: the same seed, prompt and parameters give the same text."""
    max_tokens: int = 16
    min_tokens: int = 0
    """End-of-sequence and stop ids are impossible before this many tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many alternatives; None reports nothing."""

    def __post_init__(self) -> None:
        _check(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "a number in [0, 100]")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive number of tokens")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "a number in [0, 1]")
        _check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "-2 to 2")
        _check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "-2 to 2")
        _check(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", self.repetition_penalty, "(0, 10]")
        _check(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a signed 64-bit integer")
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "0 to max_tokens")
        _check(all(self.stop), "stop", self.stop, "non-empty strings")
        for bias in self.logit_bias.values():
            _check(-100.0 <= bias <= 100.0, "logit_bias", bias, "values in [-100, 100]")
        if self.logprobs is not None:
            _check(0 <= self.logprobs <= 20, "logprobs", self.logprobs, "0 to 20 alternatives")

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def has_filter(self) -> bool:
        """Whether low-probability tokens are removed, which takes a whole row of the vocabulary to decide."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True, kw_only=True)
class SpeculativeParams:
    """What a request asks of speculation; its text does not depend on it in coupled verification."""

    enabled: bool = True
    max_draft_tokens: int | None = None
    """None takes the engine's gamma."""
    confidence_threshold: float = 0.0
    """Drafted positions whose survival is below this are not verified."""

    def __post_init__(self) -> None:
        if self.max_draft_tokens is not None:
            _check(self.max_draft_tokens >= 0, "speculative.max_draft_tokens", self.max_draft_tokens, "0 or more")
        threshold = self.confidence_threshold
        _check(0.0 <= threshold <= 1.0, "speculative.confidence_threshold", threshold, "a number in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class VerificationPolicy:
    """What an operator or a controller lets an engine verify; it acts on top of the schedule and of the request."""

    confidence_threshold: float = 0.0
    """Drafted positions whose survival is below this are not verified."""
    max_draft_tokens: int | None = None
    """Most drafts verified per request and round; None takes the engine's gamma."""
    bypass: bool = False
    """Draft for nobody."""
    version: int = 0
    """Names the decision in records and metrics."""
    valid_seconds: float | None = None
    """From when the engine gets it; afterwards the engine's own policy counts again. None never expires."""

    def __post_init__(self) -> None:
        threshold, most, valid = self.confidence_threshold, self.max_draft_tokens, self.valid_seconds
        _check(0.0 <= threshold <= 1.0, "confidence_threshold", threshold, "a number in [0, 1]")
        _check(most is None or most >= 0, "max_draft_tokens", most, "0 or more, or None")
        _check(valid is None or valid > 0, "valid_seconds", valid, "a positive number of seconds, or None")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, tokenised."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculative: SpeculativeParams = field(default_factory=SpeculativeParams)
    output_token_ids: tuple[int, ...] = ()
    """Tokens another engine already produced for this request: generation goes on behind them."""

    def __post_init__(self) -> None:
        _check(len(self.prompt_token_ids) > 0, "prompt", self.prompt_token_ids, "at least one token")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one generated token under the target's unprocessed distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest (token id, logprob), best first."""


@dataclass(frozen=True)
class SpeculationStats:
    """What speculation did for one request. Drafted, admitted and accepted are three different numbers."""

    num_rounds: int = 0
    """Target forwards that decoded this request."""
    num_drafted: int = 0
    num_admitted: int = 0
    """Drafted tokens that the target saw."""
    num_accepted: int = 0
    accepted_histogram: tuple[int, ...] = ()
    """Entry m counts rounds in which m drafts stood."""

    @property
    def mean_accepted_length(self) -> float:
        """Tokens committed per round, the target's own token included."""
        return 1 + self.num_accepted / self.num_rounds if self.num_rounds else 0.0


@dataclass(frozen=True, kw_only=True)
class SequenceOutput:
    """What one step brought one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token where the request asks for them."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The id that ended the text (end of sequence or a stop id); it is the last of token_ids."""
    stats: SpeculationStats | None = None
    """Totals of the request so far."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step decided, what it expected of that, and what came of it. All times are seconds."""

    step: int
    """Since the start of the engine."""
    ended_at: float
    """Unix time."""
    num_decoding: int
    """Requests that decoded one round."""
    num_prefill_rows: int
    bypass: BypassReason | None
    """Why nobody had a draft; None where drafts were made or nobody asks for any."""
    lengths: tuple[int, ...] = ()
    """Drafts verified of each drafted request."""
    accepted: tuple[int, ...] = ()
    """Drafts that stood of each drafted request."""
    expected: float = 0.0
    """Drafts that were to stand: the summed survival of the verified ones."""
    gamma: int = 0
    """Positions drafted of each drafted request."""
    predicted_draft_seconds: float = 0.0
    measured_draft_seconds: float = 0.0
    predicted_target_seconds: float = 0.0
    """Of everything in the step but the draft: forward, sampling and loop."""
    measured_target_seconds: float = 0.0
    schedule_seconds: float = 0.0
    """Deciding who is drafted and how much is verified, and learning from the step before. Most of it is a part of the
    target's time."""
    confidence_threshold: float = 0.0
    """The policy's."""
    policy_version: int = 0
    cost_drift: float = 1.0
    """Measured over profiled seconds of the target, smoothed."""
    calibration_error: tuple[float | None, ...] = ()
    """Running expected calibration error of the survival, by position; None before there is enough to tell."""

    @property
    def num_drafted(self) -> int:
        """Requests that had a draft."""
        return len(self.lengths)

    @property
    def budget(self) -> int:
        """Drafted tokens verified, all requests."""
        return sum(self.lengths)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Everything that leaves the step loop."""

    sequences: tuple[SequenceOutput, ...] = ()
    record: StepRecord | None = None
    """None where nothing ran."""
    num_running: int = 0
    num_waiting: int = 0
    cache_usage: float = 0.0
    """Share of cache pages in use."""
    num_preemptions: int = 0
    """Since the start."""
