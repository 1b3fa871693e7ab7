"""Measures the scheduled engine against no speculation and every fixed draft length, under load, with the tiny model.

    python -m benchmarks.schedule              writes benchmarks/results/schedule*.json and schedule*.png
    python -m benchmarks.schedule --readme     also fills the table in docs/performance.md

Runs on two cores of a CPU. One process holds an engine per arm. The arms take turns every few steps on the same
requests, so that other load on the machine affects all of them, and each runs until it has committed the same number of
tokens. With coupled verification the texts of all arms are equal, so that only times differ. Finished repeats are kept
in .build/, and an interrupted run continues from them.

The arm of fixed length k is an engine with gamma k, whose drafter stops after k positions.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import report
from benchmarks.harness.notebook import Notebook, fingerprint_of
from benchmarks.schedule import pictures as schedule_pictures
from benchmarks.schedule import simulation as schedule_simulation
from dspark_ray.config import EngineConfig
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import STS_FILE, build_engine
from dspark_ray.speculative.calibration import Temperatures
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.training.corpus import held_out_prompts
from dspark_ray.types import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".build" / "schedule"
CHECKPOINT = ROOT / "deployments" / "tiny"

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CROWD = 256
"""Number of requests for measuring the share of scheduling in a step."""
_PROMPT_TOKENS = 32
"""Tokens from the end of a held-out prompt: prompt rows cost every arm the same and dilute the comparison."""
_ANSWER_TOKENS = (48, 112)
"""Shortest and longest answer, so that requests that begin together do not end together."""
_WARM_TOKENS = 24
"""Tokens per request before a measurement: the first steps of a size are slow, and planners adapt to the traffic."""
_TURN_SECONDS = 0.25
_FEWEST_REQUESTS = 4
"""Smallest number of requests of which a measurement commits tokens."""


@dataclass(frozen=True)
class Traffic:
    """One kind of request."""

    kind: str
    temperature: float


TRAFFIC = {
    "easy": (Traffic("arithmetic", 0.0),),
    "middle": (Traffic("code", 0.0),),
    "hard": (Traffic("prose", 1.3),),
}
"""Kinds of requests, equally frequent."""


def build_arms(config: EngineConfig) -> dict[str, Engine]:
    """The arms by name."""
    fixed = replace(config, schedule="fixed")
    engines = {"off": build_engine(CHECKPOINT, replace(config, speculation=False))}
    gamma = build_engine(CHECKPOINT, fixed).gamma
    for length in range(1, gamma + 1):
        engines[f"fixed_{length}"] = build_engine(CHECKPOINT, replace(fixed, gamma=length))
    return {**engines, "scheduled": build_engine(CHECKPOINT, config)}


@dataclass
class Run:
    """One arm during a measurement: a closed loop that keeps `concurrency` requests in the engine."""

    engine: Engine
    requests: Iterator[Request]
    concurrency: int
    num_tokens: int
    """Tokens to commit before the run ends."""
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

    def start_counting(self, num_tokens: int) -> None:
        """End the warm-up; the run ends after `num_tokens` more tokens."""
        self.num_tokens, self.reasons = num_tokens, {}
        self.committed = self.rounds = self.budget = self.accepted = self.drafted = 0
        self.seconds = self.schedule_seconds = 0.0

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
        """Empty the engine and return the figures of the run."""
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
    """Unlimited requests for every measurement and repeat, the same for every arm."""

    def __init__(self, count: int = 128) -> None:
        tokenizer = Tokenizer.from_directory(CHECKPOINT)
        kinds = {traffic.kind for mix in TRAFFIC.values() for traffic in mix}
        self._prompts = {
            kind: [
                (tokenizer.bos_token_id, *tokenizer.encode(text)[-_PROMPT_TOKENS:])
                for text in held_out_prompts(kind, count)
            ]
            for kind in sorted(kinds)
        }

    def of(self, name: str, concurrency: int, repeat: int) -> Iterator[Request]:
        """Requests of traffic `name`; every repeat and concurrency has its own order, lengths and seeds."""
        number, generator = 0, random.Random(f"{name} {concurrency} {repeat}")
        while True:
            traffic = generator.choice(TRAFFIC[name])
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
    at_once = max(concurrency, _FEWEST_REQUESTS)
    runs = {
        arm: Run(engine, requests.of(name, concurrency, repeat), concurrency, _WARM_TOKENS * at_once)
        for arm, engine in engines.items()
    }
    turns, generator = list(runs.values()), random.Random(repeat)
    _take_turns(turns, generator)
    for run in turns:
        run.start_counting(tokens_per_request * at_once)
    _take_turns(turns, generator)
    return {arm: run.finish() for arm, run in runs.items()}


def _take_turns(runs: list[Run], generator: random.Random) -> None:
    """Run all arms to their end, in turns whose order changes."""
    while any(not run.is_over for run in runs):
        generator.shuffle(runs)
        for run in runs:
            run.take_turn(_TURN_SECONDS)


# All repeats of everything.


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement; a change of anything but the repeats starts it again."""

    repeats: int
    tokens_per_request: int

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            max_num_seqs=max(CONCURRENCIES), max_num_batched_tokens=512, cost_directory=str(SCRATCH / "costs")
        )


def measure(settings: Settings, notebook: Notebook) -> None:
    """Every point of every repeat that is not in the notebook yet."""
    requests = Requests()
    arms = [(repeat, name, c) for repeat in range(settings.repeats) for name in TRAFFIC for c in CONCURRENCIES]
    _measure_points(settings, notebook, arms, requests)
    if not notebook.entries("sweep"):
        notebook.add("sweep", {"rows": list(threshold_sweep(settings, requests))})
    if not notebook.entries("crowd"):
        notebook.add("crowd", share_in_a_crowd(requests))


def _measure_points(
    settings: Settings,
    notebook: Notebook,
    points: list[tuple[int, str, int]],
    requests: Requests,
) -> None:
    missing = points[len(notebook.entries("arms")) :]
    if not missing:
        return
    engines = build_arms(settings.config)
    for repeat, name, concurrency in missing:
        arms = measure_point(engines, requests, name, concurrency, repeat, settings.tokens_per_request)
        notebook.add("arms", {"repeat": repeat, "traffic": name, "concurrency": concurrency, "arms": arms})
        rates = "  ".join(f"{arm} {f['tokens'] / f['seconds']:.0f}" for arm, f in arms.items())
        print(f"{repeat + 1}/{settings.repeats} {name} {concurrency}: {rates}", flush=True)


def threshold_sweep(settings: Settings, requests: Requests) -> Iterator[dict[str, Any]]:
    """Tokens that a static threshold alone offers and accepts, per request and round, with the target's own token."""
    for threshold in THRESHOLDS:
        config = replace(settings.config, schedule="fixed", confidence_threshold=threshold, calibrate_online=False)
        engine = build_engine(CHECKPOINT, config)
        for name in TRAFFIC:
            run = Run(engine, requests.of(name, 16, -2), 16, 48 * 16)
            while not run.is_over:
                run.take_turn(1.0)
            figures = run.finish()
            offered, accepted = (1 + figures[key] / figures["rounds"] for key in ("budget", "accepted"))
            yield {
                "threshold": threshold,
                "traffic": name,
                "offered": offered,
                "accepted": accepted,
                "acceptance_rate": accepted / offered,
            }


def share_in_a_crowd(requests: Requests) -> dict[str, float]:
    """Seconds of scheduling in a step of many requests, and of the whole step."""
    config = EngineConfig(
        max_num_seqs=CROWD, max_num_batched_tokens=6 * CROWD, max_model_len=512, cost_directory=str(SCRATCH / "costs")
    )
    engine = build_engine(CHECKPOINT, config)
    supply = requests.of("middle", CROWD, 0)
    for _ in range(CROWD):
        engine.add_request(next(supply))
    schedule, steps = [], []
    while len(schedule) < 24 and engine.has_unfinished():
        record = engine.step().record
        if record is not None and record.num_decoding == CROWD:
            schedule.append(record.schedule_seconds)
            steps.append(record.measured_draft_seconds + record.measured_target_seconds)
    return {"schedule_seconds": statistics.median(schedule), "step_seconds": statistics.median(steps)}


# Results.


def summarise(settings: Settings, notebook: Notebook, simulation: dict[str, Any]) -> dict[str, Any]:
    """Figures of all repeats together."""
    points = [_point(entries) for entries in _grouped(notebook.entries("arms"))]
    crowd = notebook.entries("crowd")[0]
    ratios = [point["ratio"] for point in points]
    calibration = Temperatures.load(CHECKPOINT / STS_FILE)
    return {
        "settings": {
            "checkpoint": "tiny",
            "repeats": settings.repeats,
            "tokens_per_request": settings.tokens_per_request,
            "warm_tokens_per_request": _WARM_TOKENS,
            "prompt_tokens": _PROMPT_TOKENS,
            "answer_tokens": list(_ANSWER_TOKENS),
            "traffic": {name: [vars(traffic) for traffic in TRAFFIC[name]] for name in TRAFFIC},
        },
        "worst_ratio": min(ratios),
        "median_ratio": statistics.median(ratios),
        "best_ratio": max(ratios),
        "worst_over_off": min(point["over_off"] for point in points),
        "points_below_0_97": sum(ratio < 0.97 for ratio in ratios),
        "ece_before": statistics.fmean(calibration.ece_before),
        "ece_after": statistics.fmean(calibration.ece_after),
        "scheduler_share_at_256": crowd["schedule_seconds"] / crowd["step_seconds"],
        "scheduler_seconds_at_256": crowd["schedule_seconds"],
        "scheduler_share_at_256_of_v4_flash": simulation["scheduler_share_at_256"],
        "fig8_gain_min": simulation["fig8_gain_min"],
        "of_clairvoyant": simulation["of_clairvoyant"],
        "points": points,
        "threshold_sweep": notebook.entries("sweep")[0]["rows"],
    }


def _grouped(entries: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["traffic"], entry["concurrency"]), []).append(entry)
    return groups.values()


def _point(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one measurement: tokens over seconds of all repeats, by arm, and the scheduled arm's ratios."""
    concurrency = entries[0]["concurrency"]
    arms = {arm: _arm([entry["arms"][arm] for entry in entries], concurrency) for arm in entries[0]["arms"]}
    point = {"traffic": entries[0]["traffic"], "concurrency": concurrency, "arms": arms}
    rates = {arm: figures["tokens_per_second"] for arm, figures in arms.items()}
    scheduled = rates.pop("scheduled")
    best = max(rates, key=lambda arm: rates[arm])
    point |= {"best": best, "ratio": scheduled / rates[best]}
    point["ratio_by_repeat"] = [_ratio(entry["arms"], best) for entry in entries]
    point["over_off"] = scheduled / rates["off"]
    return point


def _ratio(arms: dict[str, Any], other: str) -> float:
    mine, theirs = arms["scheduled"], arms[other]
    return (mine["tokens"] / mine["seconds"]) / (theirs["tokens"] / theirs["seconds"])


def _arm(repeats: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
    total = {key: sum(repeat[key] for repeat in repeats) for key in repeats[0] if key != "bypasses"}
    rate, rounds = total["tokens"] / total["seconds"], max(1, total["rounds"])
    return {
        "tokens_per_second": rate,
        "tokens_per_second_per_user": rate / concurrency,
        "budget_per_request": 1 + total["budget"] / rounds,
        "accepted_length": 1 + total["accepted"] / rounds,
        "drafted_share": total["drafted"] / rounds,
        "schedule_share": total["schedule_seconds"] / total["seconds"],
        "repeats": [repeat["tokens"] / repeat["seconds"] for repeat in repeats],
    }


def _rate(point: dict[str, Any], arm: str) -> float:
    return float(point["arms"][arm]["tokens_per_second"])


def table(results: dict[str, Any]) -> str:
    """Tokens per second of all arms in Markdown, with the best static arm in bold."""
    arms = list(results["points"][0]["arms"])
    heads = [arm.replace("fixed_", "always ") for arm in arms]
    lines = ["| traffic | requests | " + " | ".join(heads) + " | over the best | verified + anchor |"]
    lines.append("|---|--:" + "|--:" * (len(arms) + 2) + "|")
    for point in results["points"]:
        rates = [f"{_rate(point, arm):.0f}" for arm in arms]
        cells = [f"**{rate}**" if arm == point["best"] else rate for arm, rate in zip(arms, rates, strict=True)]
        budget = point["arms"]["scheduled"]["budget_per_request"]
        ends = [f"{point['ratio']:.2f}", f"{budget:.1f}"]
        lines.append(f"| {point['traffic']} | {point['concurrency']} | " + " | ".join([*cells, *ends]) + " |")
    return "\n".join(lines)


def readme_text(results: dict[str, Any]) -> str:
    """The table, its summary, and the pictures."""
    names = ("worst_ratio", "median_ratio", "best_ratio", "worst_over_off")
    worst, middle, best, off = (results[name] for name in names)
    share, error = 100 * results["scheduler_share_at_256"], 100 * results["ece_after"]
    folder = "../benchmarks/results"
    return "\n".join(
        [
            table(results),
            "",
            "Bold is the best static arm of a line.",
            f"Scheduled over it: worst {worst:.2f}, median {middle:.2f}, best {best:.2f};",
            f"over no speculation at worst {off:.2f}.",
            f"Below 0.97 are {results['points_below_0_97']} of {len(results['points'])} points.",
            "Single points scatter by some percent from repeat to repeat (`ratio_by_repeat`).",
            f"Deciding takes {share:.2f} % of a step of 256 requests.",
            f"The calibration error after STS is {error:.1f} %.",
            report.origin(results, results["settings"]["repeats"]),
            "",
            f"![Throughput over none drafted, and budgets, by requests]({folder}/schedule_figure_8.png)",
            "",
            f"Drawn as the paper's figures: [throughput against speed per user (7)]({folder}/schedule_figure_7.png),",
            f"[a static threshold's sweep (5)]({folder}/schedule_figure_5.png), and",
            f"[a simulation with DeepSeek-V4-Flash's measured costs (8)]({folder}/schedule_simulation.png),",
            f"in which scheduling reaches {100 * results['of_clairvoyant']:.0f} % of a clairvoyant optimum.",
            f"All numbers are in [schedule.json]({folder}/schedule.json)",
            f"and [schedule_simulation.json]({folder}/schedule_simulation.json).",
        ]
    )


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    settings = Settings(arguments.repeats, arguments.tokens)
    same_for_all = repr(replace(settings, repeats=0))
    notebook = Notebook(SCRATCH / "repeats.jsonl", fingerprint_of(same_for_all, ROOT, CHECKPOINT))
    measure(settings, notebook)
    simulation = schedule_simulation.simulate()
    results = report.provenance(ROOT, "python -m benchmarks.schedule") | summarise(settings, notebook, simulation)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, content in (("schedule", results), ("schedule_simulation", simulation)):
        (arguments.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    schedule_pictures.figure_5(results["threshold_sweep"], arguments.output / "schedule_figure_5.png")
    schedule_pictures.figure_7(results, arguments.output / "schedule_figure_7.png")
    schedule_pictures.figure_8_measured(results, arguments.output / "schedule_figure_8.png")
    schedule_pictures.figure_8(simulation, arguments.output / "schedule_simulation.png")
    print(table(results))
    print({key: value for key, value in results.items() if isinstance(value, float | int)})
    if arguments.readme:
        report.fill(ROOT / "docs" / "performance.md", "schedule", readme_text(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="committed per request of the concurrency")
    parser.add_argument("--readme", action="store_true", help="fill the table in docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
