"""The values that travel through the engine: small, frozen, valid by construction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
BypassReason = Literal["predicted_loss", "policy", "no_room"]
"""Why a step has no drafts: they would cost more than they bring, the policy forbids them, or every request is about
to end."""


# Limits of one request. The HTTP schema uses the same names.

MAX_INT64 = 2**63 - 1
MIN_INT64 = -(2**63)
MAX_TOKEN_ID = 2**31 - 1
"""Of any vocabulary; the engine also checks ids against the model's vocabulary."""
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MAX_PENALTY = 2.0
"""Largest magnitude of presence and frequency penalties."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
"""A logit is divided by it: much smaller values leave float32."""
MAX_BIAS = 100.0
"""Largest magnitude for one token."""
MAX_LOGIT_BIASES = 300
"""Tokens that one request may bias; OpenAI's limit."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
"""Characters of one stop string; as much text may be held back from a stream."""
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
"""Alternatives reported per token."""
MAX_MAX_TOKENS = 2**31 - 1
"""Of max_tokens and min_tokens; max_model_len ends a text earlier."""
MAX_CHOICES = 128
"""Sequences that one HTTP request may start: prompts times n."""
MAX_DRAFT_TOKENS = 1024
"""Of a request's or a policy's limit; the engine never drafts more than gamma."""
MAX_POLICY_SECONDS = 1e9
MAX_REQUEST_ID_LENGTH = 512


class RequestError(ValueError):
    """A request that can never be served; `param` is the field, the message has its value and the expectation."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(RuntimeError):
    """The engine holds as many requests as it may; the same request can be accepted later."""


def _check(condition: bool, param: str, value: object, expected: str) -> None:
    if not condition:
        raise RequestError(param, f"{param}={_shown(value)}: expected {expected}")


def _shown(value: object) -> str:
    """A value for an error message, shortened to about 100 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        # Python refuses to write integers of more than 4300 digits.
        return f"<an integer of {value.bit_length()} bits>"
    text = repr(value[:20]) if isinstance(value, str | list | tuple) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_integer(value: object) -> bool:
    """Python's bools are ints, but not valid numbers here."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _check_integer(param: str, value: object, lowest: int, highest: int) -> None:
    in_range = _is_integer(value) and lowest <= value <= highest  # type: ignore[operator]
    _check(in_range, param, value, f"an integer in [{lowest}, {highest}]")


def _check_number(param: str, value: object, lowest: float, highest: float) -> None:
    """NaN is outside every range."""
    in_range = _is_number(value) and lowest <= value <= highest  # type: ignore[operator]
    _check(in_range, param, value, f"a number in [{lowest:g}, {highest:g}]")


def _check_flag(param: str, value: object) -> None:
    _check(isinstance(value, bool), param, value, "true or false")


def _check_size(param: str, values: SequenceOf[object] | Mapping[int, float], most: int, of: str) -> None:
    if len(values) > most:
        raise RequestError(param, f"{param} has {len(values)} {of}: expected at most {most}")


def _check_token_ids(param: str, token_ids: Collection[int]) -> None:
    """Checked in a few passes in C, because a prompt may have a million tokens."""
    if not token_ids:
        return
    are_integers = set(map(type, token_ids)) == {int}
    if are_integers and min(token_ids) >= 0 and max(token_ids) <= MAX_TOKEN_ID:
        return
    wrong = next(t for t in token_ids if type(t) is not int or not 0 <= t <= MAX_TOKEN_ID)
    raise RequestError(param, f"{param} has token id {_shown(wrong)}: expected integers in [0, {MAX_TOKEN_ID}]")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the target's logits become tokens; names and meanings are OpenAI's and vLLM's.

    Raises RequestError for a value of another type or outside the limits above.
    """

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
    """End-of-sequence ids, stop ids and stop strings do not end the text before this many tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many alternatives; None reports nothing."""

    def __post_init__(self) -> None:
        self._check_filters()
        self._check_edits()
        self._check_ends()
        _check_integer("seed", self.seed, MIN_INT64, MAX_INT64)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    def _check_filters(self) -> None:
        _check_number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_integer("top_k", self.top_k, 0, MAX_TOP_K)
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _check_number("min_p", self.min_p, 0, 1)

    def _check_edits(self) -> None:
        _check_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _check(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a bias by token id")
        _check_size("logit_bias", self.logit_bias, MAX_LOGIT_BIASES, "tokens")
        _check_token_ids("logit_bias", self.logit_bias)
        for bias in self.logit_bias.values():
            _check_number("logit_bias", bias, -MAX_BIAS, MAX_BIAS)

    def _check_ends(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1, MAX_MAX_TOKENS)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_flag("ignore_eos", self.ignore_eos)
        _check(isinstance(self.stop, tuple), "stop", self.stop, "a tuple of strings")
        _check_size("stop", self.stop, MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            _check(isinstance(text, str) and text != "", "stop", text, "non-empty strings")
            _check_size("stop", text, MAX_STOP_STRING_LENGTH, "characters in one string")
        _check(isinstance(self.stop_token_ids, tuple), "stop_token_ids", self.stop_token_ids, "a tuple of token ids")
        _check_size("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")
        _check_token_ids("stop_token_ids", self.stop_token_ids)

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def has_filter(self) -> bool:
        """Whether low-probability tokens are removed, which takes a whole row of the vocabulary to decide."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True, kw_only=True)
class VerificationLimits:
    """What may be drafted and verified, of one request or of a whole engine; the schedule decides within these limits.

    They change no text in coupled verification. Raises RequestError for a value of another type or out of range.
    """

    confidence_threshold: float = 0.0
    """Drafted positions whose survival is below this are not verified."""
    max_draft_tokens: int | None = None
    """Most drafts verified per request and round; None takes the engine's gamma."""
    bypass: bool = False
    """Draft nothing."""

    def __post_init__(self) -> None:
        _check_number("confidence_threshold", self.confidence_threshold, 0, 1)
        if self.max_draft_tokens is not None:
            _check_integer("max_draft_tokens", self.max_draft_tokens, 0, MAX_DRAFT_TOKENS)
        _check_flag("bypass", self.bypass)

    @property
    def allow_drafts(self) -> bool:
        return not self.bypass and self.max_draft_tokens != 0


@dataclass(frozen=True, kw_only=True)
class VerificationPolicy(VerificationLimits):
    """The limits that an operator or a controller sets for an engine."""

    version: int = 0
    """Identifies the decision in records and metrics."""
    valid_seconds: float | None = None
    """From when the engine receives it; afterwards the engine's own policy applies again. None never expires."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("version", self.version, MIN_INT64, MAX_INT64)
        seconds = self.valid_seconds
        if seconds is not None:
            in_range = _is_number(seconds) and 0 < seconds <= MAX_POLICY_SECONDS
            _check(in_range, "valid_seconds", seconds, f"a number in (0, {MAX_POLICY_SECONDS:g}], or None")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A tokenised request. Raises RequestError for ids that no vocabulary has."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculative: VerificationLimits = field(default_factory=VerificationLimits)
    output_token_ids: tuple[int, ...] = ()
    """Tokens that another engine already generated for this request; generation continues behind them."""

    def __post_init__(self) -> None:
        _check(isinstance(self.request_id, str), "request_id", self.request_id, "a string")
        _check_size("request_id", self.request_id, MAX_REQUEST_ID_LENGTH, "characters")
        _check(len(self.prompt_token_ids) > 0, "prompt", self.prompt_token_ids, "at least one token")
        _check_token_ids("prompt", self.prompt_token_ids)
        _check_token_ids("output_token_ids", self.output_token_ids)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one generated token under the target's unprocessed distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest (token id, logprob), best first."""


@dataclass(frozen=True)
class SpeculationStats:
    """Totals of speculation for one request: drafted, admitted to verification, and accepted."""

    num_rounds: int = 0
    """Target forwards that decoded this request."""
    num_drafted: int = 0
    num_admitted: int = 0
    """Drafted tokens that were verified."""
    num_accepted: int = 0
    accepted_histogram: tuple[int, ...] = ()
    """Entry m counts rounds in which m drafts were accepted."""

    @property
    def mean_accepted_length(self) -> float:
        """Tokens committed per round, including the target's own token."""
        return 1 + self.num_accepted / self.num_rounds if self.num_rounds else 0.0


@dataclass(frozen=True, kw_only=True)
class SequenceOutput:
    """The result of one step for one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token, if requested."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The id that ended the text (end of sequence or a stop id); it is the last of token_ids."""
    stats: SpeculationStats | None = None
    """Totals of the request so far."""
    error: str | None = None
    """With finish reason "error": a message for the client."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The decisions of one step, the expectations and the results. All times are seconds."""

    step: int
    """Since the start of the engine."""
    ended_at: float
    """Unix time."""
    num_decoding: int
    """Requests that decoded one round."""
    num_prefill_rows: int
    bypass: BypassReason | None
    """Why no request was drafted; None where some were, or where no request speculates."""
    lengths: tuple[int, ...] = ()
    """Verified drafts of each drafted request."""
    accepted: tuple[int, ...] = ()
    """Accepted drafts of each drafted request."""
    expected: float = 0.0
    """Drafts expected to be accepted: the summed survival of the verified ones."""
    gamma: int = 0
    """Drafted positions of each drafted request."""
    predicted_draft_seconds: float = 0.0
    measured_draft_seconds: float = 0.0
    predicted_target_seconds: float = 0.0
    """Of everything in the step except the draft: forward, sampling and loop."""
    measured_target_seconds: float = 0.0
    schedule_seconds: float = 0.0
    """Deciding whether to draft and how much to verify, and learning from the step before; mostly part of the target's
    seconds."""
    confidence_threshold: float = 0.0
    """The policy's."""
    policy_version: int = 0
    cost_drift: float = 1.0
    """Measured over profiled seconds of the target, smoothed."""
    calibration_error: tuple[float | None, ...] = ()
    """Expected calibration error of recent survival, by position; None with too few outcomes."""
    num_nonfinite_drafts: int = 0
    """Requests whose draft had a token outside the vocabulary, or a confidence or distribution that is not finite; it
    was verified only up to there."""
    num_nonfinite_logits: int = 0
    """Sequences that ended because the target's logits were not finite."""

    @property
    def num_drafted(self) -> int:
        """Requests with a draft."""
        return len(self.lengths)

    @property
    def budget(self) -> int:
        """Verified drafts of all requests."""
        return sum(self.lengths)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The output of the step loop for one step."""

    sequences: tuple[SequenceOutput, ...] = ()
    record: StepRecord | None = None
    """None if nothing ran."""
    num_running: int = 0
    num_waiting: int = 0
    cache_usage: float = 0.0
    """Share of cache pages in use."""
    num_preemptions: int = 0
    """Since the start of the engine."""
