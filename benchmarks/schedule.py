"""Never slower: the scheduled engine against no speculation and against every fixed length, under load.

    python -m benchmarks.schedule [--readme]

One process holds an engine per arm. They take turns every few steps on the same requests, so that whatever else the
machine does meets all of them, and each runs until it has committed the same number of tokens. Coupled verification
makes the texts of all arms the same, so only time tells them apart. Every finished repeat is kept in .build/, and an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dspark_ray.config import EngineConfig
from dspark_ray.engine import Engine
from dspark_ray.tokenizer import Tokenizer
from dspark_ray.training.corpus import held_out_prompts
from dspark_ray.types import Request, SamplingParams

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
_PROMPT_TOKENS = 96
_ANSWER_TOKENS = (32, 96)
"""Shortest and longest; requests that begin together then do not end together."""
_TURN_SECONDS = 0.25


@dataclass(frozen=True)
class Traffic:
    """One kind of request."""

    kind: str
    temperature: float


TRAFFIC = {"easy": Traffic("arithmetic", 0.0), "middle": Traffic("code", 0.0), "hard": Traffic("prose", 1.3)}


def arms(gamma: int, config: EngineConfig) -> dict[str, EngineConfig]:
    """Everything that is compared, by name."""
    fixed = replace(config, schedule="fixed", bypass=False)
    return {
        "off": replace(config, speculation=False),
        **{f"fixed_{length}": replace(fixed, gamma=length) for length in range(1, gamma + 1)},
        "scheduled": config,
    }


@dataclass
class Run:
    """One arm on its way through a point: a closed loop that keeps `concurrency` requests in the engine."""

    engine: Engine
    requests: Iterator[Request]
    concurrency: int
    num_tokens: int
    """To commit before the run ends."""
    committed: int = 0
    seconds: float = 0.0
    rounds: int = 0
    budget: int = 0
    accepted: int = 0
    drafted: int = 0
    schedule_seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.committed >= self.num_tokens

    def take_turn(self, seconds: float) -> None:
        """Step for about so long."""
        started = time.perf_counter()
        while not self.is_over and time.perf_counter() - started < seconds:
            self._step()
        self.seconds += time.perf_counter() - started

    def _step(self) -> None:
        scheduler = self.engine.scheduler
        while len(scheduler.running) + len(scheduler.waiting) < self.concurrency:
            self.engine.add_request(next(self.requests))
        output = self.engine.step()
        self.committed += sum(len(sequence.token_ids) for sequence in output.sequences)
        record = output.record
        assert record is not None
        self.rounds += record.num_decoding
        self.budget += record.budget
        self.accepted += record.num_accepted
        self.drafted += record.num_drafted
        self.schedule_seconds += record.schedule_seconds
        if record.bypass is not None:
            self.reasons[record.bypass] = self.reasons.get(record.bypass, 0) + 1

    def finish(self) -> dict[str, Any]:
        """Leave the engine empty; the figures of the run."""
        for sequence in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.abort(sequence.request.request_id)
        while self.engine.has_unfinished():
            self.engine.step()
        return {
            "tokens": self.committed,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "budget": self.budget,
            "accepted": self.accepted,
            "drafted": self.drafted,
            "schedule_seconds": self.schedule_seconds,
            "bypasses": self.reasons,
        }


class Requests:
    """An endless supply for every point and repeat, the same for every arm."""

    def __init__(self, checkpoint: Path, count: int = 512) -> None:
        tokenizer = Tokenizer.from_directory(checkpoint)
        self._prompts = {
            traffic.kind: [
                (tokenizer.bos_token_id, *tokenizer.encode(text)[-_PROMPT_TOKENS:])
                for text in held_out_prompts(traffic.kind, count)
            ]
            for traffic in TRAFFIC.values()
        }

    def of(self, name: str, concurrency: int, repeat: int) -> Iterator[Request]:
        """Requests of traffic `name`; every repeat and concurrency has its own order, lengths and seeds."""
        traffic, number = TRAFFIC[name], 0
        generator = random.Random(f"{name} {concurrency} {repeat}")
        while True:
            yield Request(
                request_id=f"{number}",
                prompt_token_ids=generator.choice(self._prompts[traffic.kind]),
                sampling=SamplingParams(
                    temperature=traffic.temperature,
                    max_tokens=generator.randint(*_ANSWER_TOKENS),
                    seed=generator.randrange(2**31),
                    ignore_eos=True,
                ),
            )
            number += 1


def measure_point(
    engines: dict[str, Engine], requests: Requests, name: str, concurrency: int, repeat: int, tokens_per_request: int
) -> dict[str, dict[str, Any]]:
    """Figures of every arm for one kind of traffic at one concurrency."""
    num_tokens = tokens_per_request * max(concurrency, 4)
    runs = {
        arm: Run(engine, requests.of(name, concurrency, repeat), concurrency, num_tokens)
        for arm, engine in engines.items()
    }
    turns, generator = list(runs.values()), random.Random(repeat)
    while any(not run.is_over for run in turns):
        generator.shuffle(turns)
        for run in turns:
            run.take_turn(_TURN_SECONDS)
    return {arm: run.finish() for arm, run in runs.items()}
