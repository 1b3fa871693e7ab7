"""Run many prompts through an engine to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dspark_ray.engine.profiler import Progress
from dspark_ray.engine.step_loop import Engine
from dspark_ray.types import Request, SamplingParams

TokenIds = tuple[int, ...]


def serve(
    engine: Engine, prompts: Sequence[TokenIds], samplings: Sequence[SamplingParams], progress: Progress | None = None
) -> None:
    """Run every prompt with every sampling to its end; every request has its own seed."""
    total, done = len(samplings) * len(prompts), 0
    for number in range(total):
        sampling = samplings[number // len(prompts)]
        engine.add_request(
            Request(
                request_id=f"prompt-{number}",
                prompt_token_ids=prompts[number % len(prompts)],
                sampling=replace(sampling, seed=sampling.seed + number),
            )
        )
    while engine.has_unfinished():
        finished = sum(output.finish_reason is not None for output in engine.step().sequences)
        done += finished
        if finished and progress is not None:
            progress(done, total)
