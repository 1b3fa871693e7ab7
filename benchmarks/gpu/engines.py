"""Engines on the tiny checkpoint, and their requests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from benchmarks.gpu.device import Device
from dspark_ray.config import EngineConfig, VerificationMode
from dspark_ray.engine.step_loop import Engine
from dspark_ray.evaluation.accepted_length import KINDS, AcceptedLength, held_out_token_ids
from dspark_ray.ranks.gang import build_engine
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import Request, SamplingParams, SpeculationStats

TINY = Path(__file__).resolve().parents[2] / "deployments" / "tiny"
MAX_REQUESTS = 16

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Output:
    """Results of a run."""

    token_ids: dict[str, list[int]]
    """By request id."""
    accepted: AcceptedLength
    """Of all requests together."""


def build(
    device: Device,
    where: torch.device,
    dtype: DType,
    *,
    replayed: bool,
    speculation: bool,
    verification: VerificationMode = "coupled",
    max_num_seqs: int | None = None,
) -> Engine:
    """An engine that verifies every draft, for `max_num_seqs` or else MAX_REQUESTS requests at once."""
    return build_engine(
        TINY,
        EngineConfig(
            max_num_seqs=max_num_seqs or (4 if device.is_dry else MAX_REQUESTS),
            max_num_batched_tokens=128 if device.is_dry else 256,
            max_model_len=512,
            dtype=dtype,
            device=str(where),
            speculation=speculation,
            verification=verification,
            enforce_eager=not replayed,
            schedule="fixed" if speculation else None,
            bypass=False,
        ),
    )


def held_out_requests(count: int, max_tokens: int, every_kind_of_sampling: bool = False) -> list[Request]:
    """`count` texts that the model was not trained on, every other one greedy, all to `max_tokens`."""
    return [
        Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling=_sampling(number, max_tokens, every_kind_of_sampling),
        )
        for number, prompt in enumerate(_prompts(MAX_REQUESTS)[:count])
    ]


@cache
def _prompts(count: int) -> list[tuple[int, ...]]:
    """Kinds alternate. Searching the corpus takes seconds."""
    by_kind = held_out_token_ids(Tokenizer.from_directory(TINY), -(-count // len(KINDS)))
    return [tuple(prompt) for per_kind in zip(*by_kind.values(), strict=True) for prompt in per_kind]


def _sampling(number: int, max_tokens: int, every_kind: bool) -> SamplingParams:
    plain = SamplingParams(temperature=float(number % 2), seed=number, max_tokens=max_tokens, ignore_eos=True)
    if not every_kind or number % 4 in (0, 1):
        return plain
    return SamplingParams(
        temperature=1.0,
        seed=number,
        max_tokens=max_tokens,
        ignore_eos=True,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.1 if number % 4 == 3 else 1.0,
        logprobs=2 if number % 4 == 3 else None,
    )


def run(engine: Engine, requests: list[Request]) -> Output:
    """All requests together, to their end."""
    for request in requests:
        engine.add_request(request)
    token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    stats: dict[str, SpeculationStats] = {}
    while engine.has_unfinished():
        for output in engine.step().sequences:
            token_ids[output.request_id].extend(output.token_ids)
            if output.stats is not None:
                stats[output.request_id] = output.stats
    accepted = AcceptedLength(
        sum(one.num_rounds for one in stats.values()), sum(one.num_accepted for one in stats.values())
    )
    return Output(token_ids, accepted)
