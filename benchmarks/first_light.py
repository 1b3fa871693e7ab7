"""Measures the whole application with the packaged tiny model on a CPU with two cores.

    python -m benchmarks.first_light              writes benchmarks/results/first_light.json and .png
    python -m benchmarks.first_light --readme     also fills the tables in README.md and docs/performance.md

Figures: speed-up by speculation over HTTP, HTTP over the same gang without Ray, drafter actor over inline drafter, and
accepted lengths by kind of text.

A repeat measures all sides of a ratio one after the other on the same prompts, so that other load on the machine
affects all of them. Finished repeats are kept in .build/, and an interrupted run continues from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.harness import report
from benchmarks.harness.application import Answer, all_together, one_after_the_other, running
from benchmarks.harness.gang import Gang, Job, Outcome, free_port
from benchmarks.harness.notebook import Notebook, fingerprint_of
from deployments.args import AppArgs
from dspark_ray.config import VerificationMode
from dspark_ray.ranks.gang import GangSpec
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.training.corpus import KINDS, held_out_prompts
from dspark_ray.types import Request, SamplingParams, SpeculationStats, VerificationLimits

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".build" / "first_light"

NUM_STREAMS = 8
_SILENCE_SECONDS = 900.0
"""A gang is idle while the others are measured, so a long silence is normal."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement; a change starts it again."""

    config: dict[str, Any]
    """The application's YAML file."""
    repeats: int
    max_tokens: int
    length_prompts: int
    """Prompts of each kind and repeat for the accepted lengths."""

    @property
    def args(self) -> AppArgs:
        return AppArgs.model_validate(self.config["applications"][0]["args"])

    @property
    def fingerprint(self) -> str:
        """Changes with the code, the checkpoint and the settings."""
        return fingerprint_of(repr(self), ROOT, self.args.checkpoint)


class Prompts:
    """Held-out prompts as token ids; every repeat takes new ones."""

    def __init__(self, settings: Settings) -> None:
        tokenizer = Tokenizer.from_directory(settings.args.checkpoint)
        self._per_repeat = settings.length_prompts
        count = settings.repeats * settings.length_prompts
        self._ids = {
            kind: [(tokenizer.bos_token_id, *tokenizer.encode(text)) for text in held_out_prompts(kind, count)]
            for kind in KINDS
        }

    def of_repeat(self, repeat: int) -> dict[str, list[tuple[int, ...]]]:
        """By kind."""
        start = repeat * self._per_repeat
        return {kind: ids[start : start + self._per_repeat] for kind, ids in self._ids.items()}

    def one_of_each_kind(self, repeat: int) -> list[tuple[int, ...]]:
        return [ids[0] for ids in self.of_repeat(repeat).values()]

    def streams(self, repeat: int) -> list[tuple[int, ...]]:
        """NUM_STREAMS prompts of mixed kinds."""
        mixed = [ids for same_place in zip(*self.of_repeat(repeat).values(), strict=True) for ids in same_place]
        return mixed[:NUM_STREAMS]


# Speed: the application over HTTP, the same gang without Ray, and the same gang with the drafter inline.


def measure_speed(settings: Settings, prompts: Prompts, notebook: Notebook) -> None:
    """One entry per repeat, with tokens per second of every side."""
    missing = range(len(notebook.entries("speed")), settings.repeats)
    if not missing:
        return
    with ExitStack() as stack:
        base_url = stack.enter_context(running(settings.config, SCRATCH))
        client = stack.enter_context(httpx.Client(base_url=base_url, timeout=300))
        gangs = {place: stack.enter_context(closing(Gang(_spec(settings, place)))) for place in ("actor", "inline")}
        _speed_of_repeat(replace(settings, max_tokens=8), prompts, 0, client, gangs)  # warm up
        for repeat in missing:
            figures = _speed_of_repeat(settings, prompts, repeat, client, gangs)
            notebook.add("speed", figures)
            print(f"speed {repeat + 1}/{settings.repeats}", _short(figures["tokens_per_second"]), flush=True)


def _speed_of_repeat(
    settings: Settings, prompts: Prompts, repeat: int, client: httpx.Client, gangs: dict[str, Gang]
) -> dict[str, Any]:
    single, streams = prompts.one_of_each_kind(repeat), prompts.streams(repeat)
    on, off = (_bodies(settings, single, enabled) for enabled in (True, False))
    job = Job(_requests(settings, single))
    together = Job(_requests(settings, streams), together=True)
    # Every second repeat runs in reverse order, so that no side is always first after a pause.
    sides: dict[str, Callable[[], Any]] = {
        "http_on": lambda: one_after_the_other(client, on),
        "http_off": lambda: one_after_the_other(client, off),
        "gang_actor": lambda: gangs["actor"].run(job),
        "gang_inline": lambda: gangs["inline"].run(job),
        "http_streams": lambda: all_together(client, _bodies(settings, streams, True)),
        "gang_streams": lambda: gangs["actor"].run(together),
    }
    order = list(sides) if repeat % 2 == 0 else list(reversed(sides))
    seen = {name: sides[name]() for name in order}
    texts = [[answer.text for answer in seen[name][1]] for name in ("http_on", "http_off")]
    return {
        "repeat": repeat,
        "tokens_per_second": {name: _tokens_per_second(result) for name, result in seen.items()},
        "loop_seconds_per_round": {
            name: result.loop_seconds_per_round for name, result in seen.items() if isinstance(result, Outcome)
        },
        "same_texts": sum(with_drafts == without for with_drafts, without in zip(*texts, strict=True)),
        "texts": len(single),
    }


def _tokens_per_second(result: Outcome | tuple[float, list[Answer]]) -> float:
    if isinstance(result, Outcome):
        return result.num_tokens / result.seconds
    seconds, answers = result
    return sum(answer.num_tokens for answer in answers) / seconds


def _bodies(settings: Settings, prompts: list[tuple[int, ...]], speculative: bool) -> list[dict[str, Any]]:
    return [
        {
            "model": settings.args.model_name,
            "prompt": list(prompt),
            "max_tokens": settings.max_tokens,
            "temperature": 0,
            "speculative": {"enabled": speculative},
        }
        for prompt in prompts
    ]


def _requests(
    settings: Settings,
    prompts: list[tuple[int, ...]],
    prefix: str = "",
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[Request, ...]:
    sampling = SamplingParams(temperature=temperature, max_tokens=settings.max_tokens, seed=seed)
    return tuple(
        Request(
            request_id=f"{prefix}{number}",
            prompt_token_ids=prompt,
            sampling=replace(sampling, seed=seed + number),
            speculative=VerificationLimits(),
        )
        for number, prompt in enumerate(prompts)
    )


# Accepted lengths: one process, all requests in one batch; lengths do not depend on the drafter's placement.


def measure_lengths(settings: Settings, prompts: Prompts, notebook: Notebook) -> None:
    """One entry per repeat, with accepted tokens and rounds by kind."""
    missing = range(len(notebook.entries("lengths")), settings.repeats)
    if not missing:
        return
    with ExitStack() as stack:
        gangs = {mode: stack.enter_context(closing(Gang(_single(settings, mode)))) for mode in ("coupled", "rejection")}
        for repeat in missing:
            figures = {
                "repeat": repeat,
                "greedy": _lengths(settings, gangs["coupled"], prompts, repeat, temperature=0.0),
                "sampled": _lengths(settings, gangs["coupled"], prompts, repeat, temperature=1.0),
                "sampled_rejection": _lengths(settings, gangs["rejection"], prompts, repeat, temperature=1.0),
            }
            notebook.add("lengths", figures)
            print(f"lengths {repeat + 1}/{settings.repeats}", _short(_overall(figures)), flush=True)


def _lengths(settings: Settings, gang: Gang, prompts: Prompts, repeat: int, temperature: float) -> dict[str, list[int]]:
    """By kind: accepted drafts and rounds."""
    requests: list[Request] = []
    for kind, ids in prompts.of_repeat(repeat).items():
        requests += _requests(settings, ids, f"{kind}-", temperature, seed=1000 * repeat)
    stats = gang.run(Job(tuple(requests), together=True)).stats
    return {kind: _accepted_and_rounds(stats, kind) for kind in KINDS}


def _accepted_and_rounds(stats: dict[str, SpeculationStats], kind: str) -> list[int]:
    of_kind = [s for request_id, s in stats.items() if request_id.startswith(f"{kind}-")]
    return [sum(s.num_accepted for s in of_kind), sum(s.num_rounds for s in of_kind)]


def _overall(figures: dict[str, Any]) -> dict[str, float]:
    """Mean of the kinds' accepted lengths, with equal weights."""
    modes = ("greedy", "sampled", "sampled_rejection")
    return {mode: _mean([_length(*counts) for counts in figures[mode].values()]) for mode in modes}


def _length(num_accepted: int, num_rounds: int) -> float:
    return 1 + num_accepted / num_rounds


# Engines.


def _spec(settings: Settings, drafter: str) -> GangSpec:
    """The application's gang with the drafter in the place `drafter`."""
    args = settings.args
    return GangSpec(
        checkpoint=str(args.checkpoint),
        engine=args.engine_config(),
        tensor_parallel_size=args.tensor_parallel_size,
        drafter="actor" if drafter == "actor" else "inline",
        init_method=f"tcp://127.0.0.1:{free_port()}",
        timeout_seconds=_SILENCE_SECONDS,
    )


def _single(settings: Settings, verification: str) -> GangSpec:
    """One process, one rank. Every draft is verified, so that lengths do not depend on the machine's speed."""
    mode: VerificationMode = "coupled" if verification == "coupled" else "rejection"
    engine = replace(settings.args.engine_config(), verification=mode, schedule="fixed")
    return GangSpec(checkpoint=str(settings.args.checkpoint), engine=engine)


# Results.


def summarise(notebook: Notebook) -> dict[str, Any]:
    """Ratios within each repeat, then their spread."""
    speed, lengths = notebook.entries("speed"), notebook.entries("lengths")
    overall = [_overall(entry) for entry in lengths]
    return {
        "speedup_single_stream": report.spread(_ratios(speed, "http_on", "http_off")),
        "http_over_engine": report.spread(_ratios(speed, "http_on", "gang_actor")),
        "http_over_engine_8_streams": report.spread(_ratios(speed, "http_streams", "gang_streams")),
        "actor_over_inline": report.spread(_ratios(speed, "gang_actor", "gang_inline")),
        "loop_seconds_per_round": report.spread(e["loop_seconds_per_round"]["gang_actor"] for e in speed),
        "loop_seconds_per_round_inline": report.spread(e["loop_seconds_per_round"]["gang_inline"] for e in speed),
        "accepted_length_greedy": report.spread(o["greedy"] for o in overall),
        "accepted_length_sampled": report.spread(o["sampled"] for o in overall),
        "coupled_over_rejection": report.spread(o["sampled"] / o["sampled_rejection"] for o in overall),
        "accepted_length_by_kind": _by_kind(lengths),
        "tokens_per_second": {
            side: report.spread(e["tokens_per_second"][side] for e in speed) for side in speed[0]["tokens_per_second"]
        },
        "same_texts_on_and_off": f"{sum(e['same_texts'] for e in speed)} of {sum(e['texts'] for e in speed)}",
    }


def _ratios(entries: list[dict[str, Any]], above: str, below: str) -> Iterator[float]:
    rates = (entry["tokens_per_second"] for entry in entries)
    return (rate[above] / rate[below] for rate in rates)


def _by_kind(lengths: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accepted length of all repeats together."""
    modes = ("greedy", "sampled", "sampled_rejection")
    return {
        mode: {
            kind: round(_length(*(sum(column) for column in zip(*(e[mode][kind] for e in lengths), strict=True))), 4)
            for kind in KINDS
        }
        for mode in modes
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _short(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in figures.items())


def main() -> None:
    arguments = _parse()
    settings = _settings(arguments)
    notebook = Notebook(SCRATCH / "repeats.jsonl", settings.fingerprint)
    prompts = Prompts(settings)
    measure_lengths(settings, prompts, notebook)
    measure_speed(settings, prompts, notebook)
    results = report.provenance(ROOT, report.command_line()) | {
        "settings": {
            "checkpoint": settings.args.model,
            "repeats": settings.repeats,
            "max_tokens": settings.max_tokens,
            "prompts_per_kind_and_repeat": settings.length_prompts,
        },
        **summarise(notebook),
    }
    _write(results, arguments)
    (SCRATCH / "repeats.jsonl").unlink()


def _write(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "first_light.json").write_text(json.dumps(results, indent=2) + "\n")
    report.picture(results, arguments.output / "first_light.png")
    print(report.table(results))
    print(f"texts that are the same with and without speculation: {results['same_texts_on_and_off']}")
    if arguments.readme:
        table, picture = report.table(results), "![Accepted lengths and ratios](../benchmarks/results/first_light.png)"
        report.fill(ROOT / "README.md", "first_light", table)
        report.fill(ROOT / "docs" / "performance.md", "first_light", f"{table}\n\n{picture}")


def _settings(arguments: argparse.Namespace) -> Settings:
    config = yaml.safe_load(arguments.config.read_text())
    if arguments.checkpoint is not None:
        config["applications"][0]["args"]["model"] = str(arguments.checkpoint.resolve())
    return Settings(config, arguments.repeats, arguments.max_tokens, arguments.length_prompts)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_light",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=ROOT / "deployments" / "tiny.yaml")
    parser.add_argument("--checkpoint", type=Path, help="a folder to serve instead of the one in the config")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--length-prompts", type=int, default=6, help="prompts per kind and repeat")
    parser.add_argument("--readme", action="store_true", help="fill the table in README.md and docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
