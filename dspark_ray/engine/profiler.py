"""Measuring the cost of steps on an engine like the one that will serve.

Sequences of random tokens are put into the engine as if they had been computed up to some length. Whole steps are
timed, with forward, sampling, loop and messages, on every rank and with the drafter in its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dspark_ray.config import ConfigError, ModelConfig, ResolvedConfig
from dspark_ray.engine.sequence import Sequence
from dspark_ray.engine.step_loop import Engine
from dspark_ray.engine.timing import StepTiming
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.types import Request, SamplingParams, VerificationLimits

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of measured sizes and the number of all sizes."""

_MIN_PASSES, _MIN_MEASUREMENTS = 3, 60
"""Engines with few sizes are measured more often, because single steps are noisy."""
_STEPS_PER_PASS = 2
_STEPS_PER_SIZE = 1 + _STEPS_PER_PASS
"""The first step requests the first drafts and is not timed."""
_SHORT_CONTEXT = 16
_KEY_PACKAGES = ("torch", "triton", "numpy")


@dataclass(frozen=True)
class _Size:
    """One size of a step: the number of requests, their length, and the verified drafts of each."""

    num_requests: int
    num_drafts: int | None
    """None: nothing is drafted."""
    context: int


def profile(engine: Engine, progress: Progress | None = None) -> CostTable:
    """Median seconds by rows and by drafted requests, at a short and at a long context; the engine must be idle.

    Every pass goes through all sizes, so that a disturbance of the machine does not affect a single size only. Row
    counts that several sizes share are measured together.
    """
    assert not engine.has_unfinished(), "profiling needs the engine for itself"
    targets: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    drafts: dict[int, list[float]] = defaultdict(list)
    sizes = list(_sizes(engine))
    sizes *= max(_MIN_PASSES, -(-_MIN_MEASUREMENTS // len(sizes)))
    for done, size in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        rows = _run_as(size.num_requests * (1 + (size.num_drafts or 0)), engine.graph_sizes)
        for timing in _timings(engine, size):
            targets[size.context][rows].append(timing.total - timing.draft)
            if size.num_drafts is not None:
                drafts[size.num_requests].append(timing.draft)
    if progress is not None:
        progress(len(sizes), len(sizes))
    padded_to = engine.graph_sizes[-1] if engine.graph_sizes else 0
    curves = {context: _curve(seconds, padded_to) for context, seconds in targets.items()}
    draft = _curve(drafts) if drafts else Curve((1,), (0.0,))
    return CostTable(curves, draft).without_needless_contexts()


def _run_as(rows: int, graph_sizes: tuple[int, ...]) -> int:
    """The number of rows after padding to the size of a recorded graph."""
    return next((size for size in graph_sizes if size >= rows), rows)


def _curve(seconds: dict[int, list[float]], padded_to: int = 0) -> Curve:
    sizes = sorted(seconds)
    medians = [statistics.median(seconds[size]) for size in sizes]
    return Curve(tuple(sizes), tuple(_rising(medians)), padded_to)


def _rising(values: list[float]) -> list[float]:
    """Isotonic regression by pooling: where values fall, neighbours share their mean.

    A running maximum would let one disturbed size raise all larger ones.
    """
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and statistics.fmean(groups[-2]) > statistics.fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [statistics.fmean(group) for group in groups for _ in group]


def _sizes(engine: Engine) -> Iterator[_Size]:
    config, gamma = engine.config, engine.gamma if engine.can_draft else 0
    requests = [1]
    while requests[-1] < config.max_num_seqs:
        requests.append(min(2 * requests[-1], config.max_num_seqs))
    short = min(_SHORT_CONTEXT, config.max_model_len // 4)
    long = config.max_model_len // 2
    drafts = [None, *(sorted({1, (gamma + 1) // 2, gamma}) if gamma else [])]
    # Sizes for which the cache has too few pages are not measured; they cannot occur either.
    for num_requests in (number for number in requests if _fits(engine, number, short)):
        for num_drafts in drafts:
            yield _Size(num_requests, num_drafts, short)
    for num_requests in {requests[0], requests[len(requests) // 2], requests[-1]}:
        if _fits(engine, num_requests, long):
            for num_drafts in (None, gamma) if gamma else (None,):
                yield _Size(num_requests, num_drafts, long)


def _fits(engine: Engine, num_requests: int, context: int) -> bool:
    """Whether the cache has pages for `num_requests` sequences until the end of their timed steps."""
    num_positions = context + 1 + _STEPS_PER_SIZE * (1 + engine.gamma) + engine.gamma
    num_positions = min(num_positions, engine.config.max_model_len)
    pool = engine.scheduler.pool
    return num_requests * pool.num_missing([], num_positions) <= pool.num_pages


def _timings(engine: Engine, size: _Size) -> list[StepTiming]:
    """Timings of the steps of one size."""
    generator, timings = random.Random(0), []
    sequences = [_sequence(engine, number, size, generator) for number in range(size.num_requests)]
    for sequence in sequences:
        engine.scheduler.add_computed(sequence)
    for step in range(_STEPS_PER_SIZE):
        engine.step()
        if step > 0 and len(engine.scheduler.running) == size.num_requests:
            timings.append(engine.last_step_timing)
    for sequence in sequences:
        engine.abort(sequence.request.request_id)
    while engine.has_unfinished():
        engine.step()
    return timings


def _sequence(engine: Engine, number: int, size: _Size, generator: random.Random) -> Sequence:
    vocabulary = range(engine.model_config.vocab_size)
    request = Request(
        request_id=f"profile-{number}",
        prompt_token_ids=tuple(generator.choices(vocabulary, k=size.context)),
        output_token_ids=tuple(generator.choices(vocabulary, k=1)),
        sampling=SamplingParams(temperature=1.0, seed=number, max_tokens=engine.config.max_model_len, ignore_eos=True),
        speculative=VerificationLimits(bypass=size.num_drafts is None, max_draft_tokens=size.num_drafts),
    )
    return engine.sequence_of(request)


# Cost tables on disk.


def load_or_profile(
    engine: Engine, checkpoint: Path, gang: dict[str, Any], progress: Progress | None = None
) -> CostTable:
    """The table named by the config, or the one saved for the same deployment, or a new one, which is saved.

    `gang` has what else the cost of steps depends on: ranks and the drafter's placement. Raises ConfigError where the
    config names a bad file.
    """
    config = engine.config
    if config.cost_table is not None:
        return CostTable.load(Path(config.cost_table))
    if config.cost_directory is None:
        return profile(engine, progress)
    key = deployment_key(engine.model_config, config, checkpoint, gang)
    path = Path(config.cost_directory) / f"cost-{_digest(key)}.json"
    saved = _saved(path)
    if saved is not None and saved.key == key:
        return saved
    table = replace(profile(engine, progress), key=key)
    try:
        table.save(path)
    except OSError as error:
        logger.warning("the cost table cannot be saved for the next start: %s", error)
    return table


def deployment_key(
    model: ModelConfig, config: ResolvedConfig, checkpoint: Path, gang: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the cost of a step depends on."""
    engine = {
        name: getattr(config, name)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "page_size",
            "gamma",
            "dtype",
            "keep_quantised",
            "kv_cache_dtype",
            "enforce_eager",
        )
    }
    return {
        "model": checkpoint.name,
        "config": _digest(model.raw),
        "device": _device_name(config.device),
        "engine": {**engine, "verification": config.verification},
        "gang": gang,
        "versions": {name: _version(name) for name in ("dspark-ray", *_KEY_PACKAGES)},
    }


def _saved(path: Path) -> CostTable | None:
    """None for a file that cannot be read: costs are measured again, and the file is replaced."""
    try:
        return CostTable.load(path)
    except (ConfigError, OSError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
