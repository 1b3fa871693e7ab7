"""`dspark-ray generate`: one text in the terminal, from an engine in this process."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_ray.config import EngineConfig
from dspark_ray.engine.records import explain
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import build_engine
from dspark_ray.text.stream import TextStream
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import Request, SamplingParams, SpeculationStats, StepRecord, VerificationLimits


@dataclass(frozen=True)
class Generated:
    """The statistics of one generated text."""

    num_tokens: int
    seconds: float
    stats: SpeculationStats
    records: list[StepRecord]


def run(arguments: argparse.Namespace) -> int:
    """Stream the text to stdout, a summary to stderr. Raises ConfigError, CheckpointError and RequestError."""
    torch.set_num_threads(arguments.threads)
    tokenizer = Tokenizer.from_directory(Path(arguments.model))
    request = _request(tokenizer, arguments)
    engine = build_engine(arguments.model, _engine_config(arguments), _show_profiling)
    generated = generate_text(engine, tokenizer, request, lambda text: print(text, end="", flush=True))
    engine.close()
    print()
    print(_summary(generated), file=sys.stderr)
    if arguments.explain:
        print(explain(generated.records), file=sys.stderr)
    return 0


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=1,
        gamma=arguments.gamma,
        verification=arguments.verification,
        speculation=not arguments.no_speculation,
        dtype=arguments.dtype,
        device=arguments.device,
        schedule=arguments.schedule,
        confidence_threshold=arguments.confidence_threshold,
        cost_directory=arguments.cost_directory,
    )


def _request(tokenizer: Tokenizer, arguments: argparse.Namespace) -> Request:
    return Request(
        request_id="cli",
        prompt_token_ids=tuple(_prompt_ids(tokenizer, arguments)),
        sampling=SamplingParams(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            max_tokens=arguments.max_tokens,
            stop=tuple(arguments.stop),
        ),
        speculative=VerificationLimits(bypass=arguments.no_speculation),
    )


def _show_profiling(num_done: int, num_sizes: int) -> None:
    """Show the progress in one line, which is overwritten until it is complete."""
    end = "\n" if num_done == num_sizes else ""
    print(f"\rprofiling step costs: {num_done}/{num_sizes}", end=end, file=sys.stderr, flush=True)


def _prompt_ids(tokenizer: Tokenizer, arguments: argparse.Namespace) -> list[int]:
    if arguments.chat:
        return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": arguments.prompt}]))
    return [tokenizer.bos_token_id, *tokenizer.encode(arguments.prompt)]


def generate_text(engine: Engine, tokenizer: Tokenizer, request: Request, emit: Callable[[str], object]) -> Generated:
    """Run one request to its end or to a stop string, passing text to `emit` as it is generated."""
    text = TextStream(tokenizer, request.sampling.stop)
    engine.add_request(request)
    num_tokens, stats, stopped, started = 0, SpeculationStats(), False, time.perf_counter()
    records: list[StepRecord] = []
    while engine.has_unfinished():
        step = engine.step()
        if step.record is not None:
            records.append(step.record)
        for output in step.sequences:
            delta = text.push(output.token_ids[:-1] if output.stop_token_id is not None else output.token_ids)
            emit(delta.text)
            stats = output.stats or stats
            if stopped:
                continue
            stopped = delta.stopped
            num_tokens += delta.num_tokens_kept if stopped else len(output.token_ids)
            if stopped:
                engine.abort(request.request_id)
    emit(text.flush())
    return Generated(num_tokens, time.perf_counter() - started, stats, records)


def _summary(generated: Generated) -> str:
    stats, seconds = generated.stats, max(generated.seconds, 1e-9)
    return (
        f"{generated.num_tokens} tokens in {seconds:.2f} s = {generated.num_tokens / seconds:.1f} tokens/s; "
        f"accepted length {stats.mean_accepted_length:.2f} "
        f"(drafted {stats.num_drafted}, admitted {stats.num_admitted}, accepted {stats.num_accepted})"
    )
