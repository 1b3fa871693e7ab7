"""What one engine says to Prometheus; vLLM's names behind a `dspark_` prefix."""

from __future__ import annotations

from typing import TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram

from dspark_ray.types import SequenceOutput, StepOutput

MetricT = TypeVar("MetricT", Gauge, Counter, Histogram)
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_LENGTHS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0]


class EngineMetrics:
    """Updated once per step of the engine; lives in the Engine replica, so Serve adds its tags."""

    def __init__(self, model_name: str) -> None:
        self._tags = {"model_name": model_name}
        self._running = self._gauge("num_requests_running", "Requests that hold cache.")
        self._waiting = self._gauge("num_requests_waiting", "Requests accepted but not running.")
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of cache pages in use, 0 to 1.")
        self._preemptions = self._counter("num_preemptions", "Sequences that lost their cache to older ones.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generated = self._counter("generation_tokens", "Tokens committed.")
        self._rounds = self._counter("spec_decode_num_drafts", "Rounds of sequences that ended.")
        self._drafted = self._counter("draft_tokens_drafted", "Tokens the drafter proposed.")
        self._admitted = self._counter("draft_tokens_admitted", "Drafted tokens the target saw.")
        self._accepted = self._counter("draft_tokens_accepted", "Drafted tokens that stood.")
        self._finished = self._counter("request_success", "Requests ended, by reason.", "finished_reason")
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival here.", _SECONDS)
        self._length = self._histogram("accepted_length", "Mean tokens per round of a request.", _LENGTHS)
        self._num_preemptions = 0

    def on_request(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def on_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def on_step(self, step: StepOutput) -> None:
        self._running.set(step.num_running)
        self._waiting.set(step.num_waiting)
        self._cache_usage.set(step.cache_usage)
        _increase(self._preemptions, step.num_preemptions - self._num_preemptions)
        self._num_preemptions = step.num_preemptions
        _increase(self._generated, sum(len(output.token_ids) for output in step.sequences))
        for output in step.sequences:
            if output.finish_reason is not None:
                self._on_end(output)

    def _on_end(self, output: SequenceOutput) -> None:
        self._finished.inc(tags={**self._tags, "finished_reason": str(output.finish_reason)})
        stats = output.stats
        if stats is None or stats.num_rounds == 0:
            return
        _increase(self._rounds, stats.num_rounds)
        _increase(self._drafted, stats.num_drafted)
        _increase(self._admitted, stats.num_admitted)
        _increase(self._accepted, stats.num_accepted)
        self._length.observe(stats.mean_accepted_length)

    def _gauge(self, name: str, description: str) -> Gauge:
        return self._tagged(Gauge(f"dspark_{name}", description, tag_keys=("model_name",)))

    def _counter(self, name: str, description: str, *tag_keys: str) -> Counter:
        return self._tagged(Counter(f"dspark_{name}", description, tag_keys=("model_name", *tag_keys)))  # type: ignore[arg-type]

    def _histogram(self, name: str, description: str, boundaries: list[float]) -> Histogram:
        return self._tagged(Histogram(f"dspark_{name}", description, boundaries, tag_keys=("model_name",)))

    def _tagged(self, metric: MetricT) -> MetricT:
        metric.set_default_tags(dict(self._tags))  # Serve adds its own tags to the very dictionary it is given.
        return metric


def _increase(counter: Counter, amount: int) -> None:
    if amount > 0:  # Ray's counters refuse zero.
        counter.inc(amount)
