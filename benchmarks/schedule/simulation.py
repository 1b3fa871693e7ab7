"""Simulates the gain of the prefix schedules for DeepSeek-V4-Flash on four B300, with its measured costs.

    python -m benchmarks.schedule.simulation [--output FILE]      on one core of a CPU

Inputs are the seconds of target and draft (vLLM's measurement, beside the golden numbers of the schedulers) and the
conditional acceptances by position of the DSpark paper's Figure 2, whose drafter is that of Qwen3-4B. Schedules, the
decision to draft and calibration are the engine's own. Assumptions:

* Confidences are calibrated: a draft is accepted with the probability that its confidence states.
* A round has one difficulty, the same for all of its positions: logits of confidences are normal around a centre of
  the position with a standard deviation of 1.5. That is the round number at which a threshold on confidences offers
  and accepts what the paper's Figure 5 shows, which was the only figure looked at (the table prints the distance).
  The centres are then such that mean acceptances are exactly those of Figure 2. Half of the variance belongs to the
  request for as long as it lives, half to the round; no figure tells how much, and it moves the results by 2 % at
  most, whether it is none or nearly all.
* All requests decode: there are no prompts. A request lives for 150 rounds on average and its successor may belong
  to another domain. All arms see the same requests, rounds, confidences and outcomes.
* Sizes that were captured as graphs are padded: 1024 rows of the target, and all sizes of the drafter.
* MTP-1 drafts one token per round, with this drafter's acceptance at the first position and at its price. The price
  is too high for a drafter of one layer, so the gain is also given over an MTP-1 whose drafts cost nothing: the truth
  lies between.

Letters: T rounds, R requests, G gamma.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.harness import report
from dspark_ray.config import ResolvedConfig, ScheduleKind
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.speculative.planner import Batch, DraftedRows, Planner, StepOutcome
from dspark_ray.types import BypassReason

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
COSTS = ROOT / "tests" / "golden" / "schedulers" / "v4flash_tp4_b300_cost_table.json"

ACCEPTANCES = {
    "math": (0.905, 0.890, 0.888, 0.885, 0.887, 0.891, 0.882),
    "code": (0.886, 0.872, 0.860, 0.861, 0.858, 0.859, 0.851),
    "chat": (0.735, 0.738, 0.740, 0.744, 0.758, 0.766, 0.761),
}
"""P(a draft is accepted, given that all before it are) by position, from the paper's Figure 2 (DSpark)."""

THRESHOLD_SWEEP = {
    "math": ((0.5, 7.82, 0.789), (0.7, 7.03, 0.821), (0.9, 4.96, 0.925)),
    "code": ((0.5, 7.48, 0.721), (0.7, 6.48, 0.786), (0.9, 4.08, 0.920)),
    "chat": ((0.5, 4.95, 0.665), (0.7, 3.35, 0.825), (0.9, 2.10, 0.957)),
}
"""(threshold, tokens offered per round with the anchor, share of them accepted), from the paper's Figure 5."""

PAPER_FIGURE_8: dict[str, tuple[Any, ...]] = {
    "concurrency": (10, 25, 50, 100, 150, 200),
    "mtp_1": (1159, 2746, 5078, 8801, 11612, 13797),
    "dspark": (1990, 4526, 7747, 11806, 14280, 16091),
    "gain": (1.72, 1.65, 1.53, 1.34, 1.23, 1.17),
    "budget": (None, 4.88, 4.60, 4.12, 3.75, 3.48),
}
"""V4-Flash: tokens per second and GPU, their ratio, and verified tokens per request with the anchor. Read from the
fitted curves of the paper's Figure 8, which names neither the hardware nor the traffic."""

MAIN_MIX = "equal"
"""Chosen before the first run."""
MIXES = {
    MAIN_MIX: (1 / 3, 1 / 3, 1 / 3),
    "mostly_chat": (0.2, 0.2, 0.6),
    "chat": (0.0, 0.0, 1.0),
    "code": (0.0, 1.0, 0.0),
    "math": (1.0, 0.0, 0.0),
}
"""Shares of the domains, in the order of `ACCEPTANCES`."""

CONCURRENCIES = (10, 25, 50, 100, 150, 200, 256)
SCHEDULES: tuple[ScheduleKind, ...] = ("full", "causal", "lagged")
SCHEDULED: ScheduleKind = "full"
"""The engine's own choice with coupled verification; the other schedules run on the main mix only."""
GAMMA, LONGER_GAMMA = 5, 7
"""In production, and as the paper's drafters for Qwen3 were trained."""
MOST_REQUESTS = 256

SPREAD, REQUEST_SHARE = 1.5, 0.5
MEAN_LIFE = 150
"""Rounds"""
NUM_WARM, MIN_ROUNDS, MIN_REQUEST_ROUNDS = 150, 300, 30_000
"""Rounds of warm-up, in which the engine adapts to its traffic, and the least number of counted rounds."""
NOISE = 0.03
"""Relative standard deviation of measured step times."""
CONTEXT = 8192.0
"""Tokens; the context that was profiled."""


# The machine.


@dataclass(frozen=True)
class Machine:
    """Seconds of the target by rows and of the drafter by requests."""

    table: CostTable
    target: np.ndarray
    draft: np.ndarray

    @staticmethod
    def load(max_rows: int) -> Machine:
        """The measured machine."""
        raw = json.loads(COSTS.read_text())
        target = _curve(raw["verify_ms"], padded_to=raw["cudagraph_limit_tokens"])
        draft = _curve(raw["draft_ms"], padded_to=MOST_REQUESTS)
        no_draft = draft.table(MOST_REQUESTS)
        no_draft[0] = 0.0
        return Machine(CostTable.of(target, draft), target.table(max_rows), no_draft)


def _curve(milliseconds: list[list[float]], padded_to: int) -> Curve:
    sizes, values = zip(*milliseconds)
    return Curve(sizes, tuple(value / 1000 for value in values), padded_to)


# The traffic.


@dataclass(frozen=True)
class Traffic:
    """Rounds of R slots, the same for every arm."""

    confidences: np.ndarray
    """[T, R, G]"""
    accepted: np.ndarray
    """[T, R] drafts that are accepted if all are verified"""
    arrives: np.ndarray
    """[T, R] whether a new request has its first round"""

    @property
    def shape(self) -> tuple[int, int, int]:
        num_rounds, num_requests, gamma = self.confidences.shape
        return num_rounds, num_requests, gamma


def traffic(mix: tuple[float, ...], num_requests: int, gamma: int, num_rounds: int, seed: int) -> Traffic:
    """Requests whose domains are drawn from `mix`."""
    rng = np.random.default_rng((seed, num_requests))
    size = (num_rounds, num_requests)
    arrives = rng.random(size) < 1 / MEAN_LIFE
    arrives[0] = True
    born_at = np.maximum.accumulate(np.where(arrives, np.arange(num_rounds)[:, None], 0), 0)
    columns = np.arange(num_requests)
    domain = rng.choice(len(mix), size, p=mix)[born_at, columns]
    of_request = rng.standard_normal(size)[born_at, columns]
    of_round = rng.standard_normal(size)
    difficulty = REQUEST_SHARE**0.5 * of_request + (1 - REQUEST_SHARE) ** 0.5 * of_round
    centres = np.array([_centres(acceptances)[:gamma] for acceptances in ACCEPTANCES.values()])
    confidences = _sigmoid(centres[domain] + SPREAD * difficulty[..., None])
    stood = rng.random(confidences.shape) < confidences
    return Traffic(confidences, stood.cumprod(-1).sum(-1), arrives)


def _centres(acceptances: tuple[float, ...]) -> np.ndarray:
    """Centres [G] of the logits of confidences for which mean acceptances are `acceptances`.

    A draft is judged where all before it stood, that is mostly in easy rounds.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    centres = []
    for acceptance in acceptances:
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            too_low = np.average(_sigmoid(middle + SPREAD * nodes), weights=weights) < acceptance
            low, high = (middle, high) if too_low else (low, middle)
        centres.append(low)
        weights = weights * _sigmoid(low + SPREAD * nodes)
    return np.array(centres)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


# The arms.


@dataclass(frozen=True)
class Run:
    """Figures of an arm in every counted round."""

    tokens: np.ndarray
    rows: np.ndarray
    seconds: np.ndarray
    num_requests: int

    @property
    def tokens_per_second(self) -> float:
        return float(self.tokens.sum() / self.seconds.sum())

    @property
    def rows_per_request(self) -> float:
        """Verified tokens, the anchor included, as the paper's Figure 8 counts them."""
        return float(self.rows.mean() / self.num_requests)


def fixed(machine: Machine, seen: Traffic, length: int) -> Run:
    """The same draft length for all requests; with 0 nothing is drafted."""
    num_rounds, num_requests, _ = seen.shape
    rows = np.full(num_rounds, num_requests * (1 + length))
    tokens = num_requests + np.minimum(seen.accepted, length).sum(-1)
    seconds = machine.target[rows] + (machine.draft[num_requests] if length else 0.0)
    return _counted(tokens, rows, seconds, num_requests)


def clairvoyant(machine: Machine, seen: Traffic) -> Run:
    """An upper bound: drafts for all requests or none, with knowledge of which drafts will be accepted."""
    _, num_requests, gamma = seen.shape
    most = num_requests * gamma
    verified = np.arange(most + 1)
    seconds = machine.draft[num_requests] + machine.target[num_requests : num_requests + most + 1]
    without = machine.target[num_requests]
    can_stand = seen.accepted.sum(-1)
    rate = num_requests / without
    while True:
        # The ratio of sums is largest where tokens - rate * seconds is, for the rate that comes of it.
        worth = verified - rate * seconds
        best = np.maximum.accumulate(worth)
        budget = np.searchsorted(best, best[can_stand])
        drafts = best[can_stand] > -rate * without
        budget = np.where(drafts, budget, 0)
        took = np.where(drafts, seconds[budget], without)
        run = _counted(num_requests + budget, num_requests + budget, took, num_requests)
        if run.tokens_per_second <= rate * (1 + 1e-9):
            return run
        rate = run.tokens_per_second


def _counted(tokens: np.ndarray, rows: np.ndarray, seconds: np.ndarray, num_requests: int) -> Run:
    return Run(tokens[NUM_WARM:], rows[NUM_WARM:], seconds[NUM_WARM:], num_requests)


class Engine:
    """The engine's own planner in front of simulated forwards."""

    def __init__(self, machine: Machine, num_requests: int, gamma: int, schedule: ScheduleKind) -> None:
        rows = MOST_REQUESTS * (1 + gamma)
        config = ResolvedConfig(
            gamma=gamma,
            schedule=schedule,
            max_num_seqs=MOST_REQUESTS,
            max_num_batched_tokens=rows,
            num_pages=0,  # nothing here has a cache, or weights
            kv_cache_dtype="fp8",
            keep_quantised=True,
        )
        self.planner = Planner(config, machine.table)
        self._machine, self._gamma = machine, gamma
        self._slots = np.arange(num_requests)
        self._batch = Batch(num_requests, 0, num_requests, CONTEXT)
        self._noise = np.random.default_rng(7)
        self.schedule_seconds: list[float] = []
        """Measured seconds of scheduling, planning and adapting, by round."""

    def run(self, seen: Traffic) -> Run:
        """Serve all rounds."""
        rounds = [self._round(*each) for each in zip(seen.confidences, seen.accepted, seen.arrives)]
        tokens, rows, seconds = (np.array(column) for column in zip(*rounds))
        return _counted(tokens, rows, seconds, len(self._slots))

    def _round(self, confidences: np.ndarray, can_stand: np.ndarray, arrives: np.ndarray) -> tuple[int, int, float]:
        """(tokens, rows, seconds)"""
        self.schedule_seconds.append(0.0)
        for slot in np.flatnonzero(arrives):
            self.planner.admit(int(slot))
        bypass = self._timed(lambda: self.planner.bypass_reason(len(self._slots), self._batch))
        drafted = slice(None) if bypass is None else slice(0)
        lengths = self._lengths(self._slots[drafted], confidences[drafted])
        accepted = np.minimum(can_stand[drafted], lengths)
        rows = len(self._slots) + int(lengths.sum())
        target, draft = float(self._machine.target[rows]), float(self._machine.draft[len(lengths)])
        outcome = self._outcome(accepted, bypass, target, draft)
        self._timed(lambda: self.planner.learn(self._batch, outcome))
        return len(self._slots) + int(accepted.sum()), rows, target + draft

    def _lengths(self, slots: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Drafts to verify of the requests in `slots`."""
        if not len(slots):
            return np.zeros(0, dtype=np.int64)
        rows = DraftedRows(slots, confidences, np.full(len(slots), self._gamma), np.zeros(len(slots)))
        return np.array(self._timed(lambda: self.planner.plan(rows, self._batch)).lengths)

    def _timed(self, decide: Callable[[], T]) -> T:
        started = time.perf_counter()
        decision = decide()
        self.schedule_seconds[-1] += time.perf_counter() - started
        return decision

    def _outcome(self, accepted: np.ndarray, bypass: BypassReason | None, target: float, draft: float) -> StepOutcome:
        target_noise, draft_noise = 1 + NOISE * self._noise.standard_normal(2)
        return StepOutcome(
            num_tokens_accepted=accepted,
            num_committed=accepted,
            num_drafted=len(accepted),
            bypass=bypass,
            draft_seconds=draft * draft_noise,
            target_seconds=target * target_noise,
            schedule_seconds=0.0,
            ended_at=0.0,
        )


# All of it.


def simulate() -> dict[str, Any]:
    """Results as JSON values: per gamma and mix, the arms at every concurrency and the ratios between them."""
    runs = {f"gamma_{GAMMA}": {mix: curve(mix, GAMMA) for mix in MIXES}}
    runs[f"gamma_{LONGER_GAMMA}"] = {MAIN_MIX: curve(MAIN_MIX, LONGER_GAMMA)}
    main = runs[f"gamma_{GAMMA}"][MAIN_MIX]
    crowded = main["points"][-1]["arms"][SCHEDULED]
    return {
        "fig8_gain_min": main["fig8_gain_min"],
        "of_clairvoyant": main["of_clairvoyant"],
        "scheduler_seconds_at_256": crowded["schedule_seconds"],
        "scheduler_share_at_256": crowded["schedule_seconds"] / crowded["step_seconds"],
        "scheduler_share_at_256_mean": crowded["schedule_seconds_mean"] / crowded["step_seconds"],
        "figure_5": threshold_sweep(),
        "paper_figure_8": {name: list(values) for name, values in PAPER_FIGURE_8.items()},
        "runs": runs,
    }


def curve(mix: str, gamma: int) -> dict[str, Any]:
    """All concurrencies of one mix."""
    machine = Machine.load(MOST_REQUESTS * (1 + gamma))
    schedules = SCHEDULES if (mix, gamma) == (MAIN_MIX, GAMMA) else (SCHEDULED,)
    points = [point(machine, mix, num_requests, gamma, schedules) for num_requests in CONCURRENCIES]
    gains = ("gain_over_mtp_1", "gain_over_free_mtp_1", "gain_over_off", "gain_over_best_fixed")
    lowest = {f"{gain}_min": min(each[gain] for each in points) for gain in gains}
    return {
        "points": points,
        **lowest,
        "fig8_gain_min": min(lowest["gain_over_mtp_1_min"], lowest["gain_over_off_min"]),
        "of_clairvoyant": statistics.median(each["of_clairvoyant"] for each in points),
    }


def point(
    machine: Machine, mix: str, num_requests: int, gamma: int, schedules: tuple[ScheduleKind, ...]
) -> dict[str, Any]:
    """Every arm at one concurrency."""
    num_rounds = NUM_WARM + max(MIN_ROUNDS, MIN_REQUEST_ROUNDS // num_requests)
    seen = traffic(MIXES[mix], num_requests, gamma, num_rounds, seed=1)
    fixed_arms = {f"fixed_{length}": fixed(machine, seen, length) for length in range(1, gamma + 1)}
    plain_arms = {"off": fixed(machine, seen, 0), **fixed_arms, "clairvoyant": clairvoyant(machine, seen)}
    plain_arms["free_mtp_1"] = fixed(replace(machine, draft=np.zeros(MOST_REQUESTS + 1)), seen, 1)
    arms = {name: _arm(run) for name, run in plain_arms.items()}
    arms |= {schedule: _scheduled_arm(machine, seen, schedule) for schedule in schedules}
    rates = {name: arm["tokens_per_second"] for name, arm in arms.items()}
    best_fixed = max(fixed_arms, key=lambda name: rates[name])
    return {
        "concurrency": num_requests,
        "best_fixed": int(best_fixed.removeprefix("fixed_")),
        "gain_over_mtp_1": rates[SCHEDULED] / rates["fixed_1"],
        "gain_over_free_mtp_1": rates[SCHEDULED] / rates["free_mtp_1"],
        "gain_over_off": rates[SCHEDULED] / rates["off"],
        "gain_over_best_fixed": rates[SCHEDULED] / rates[best_fixed],
        "of_clairvoyant": rates[SCHEDULED] / rates["clairvoyant"],
        "arms": arms,
    }


def _scheduled_arm(machine: Machine, seen: Traffic, schedule: ScheduleKind) -> dict[str, float]:
    _, num_requests, gamma = seen.shape
    engine = Engine(machine, num_requests, gamma, schedule)
    run = engine.run(seen)
    counted = engine.schedule_seconds[NUM_WARM:]
    seconds = {"schedule_seconds": statistics.median(counted), "schedule_seconds_mean": statistics.fmean(counted)}
    return {**_arm(run), **seconds}


def _arm(run: Run) -> dict[str, float]:
    return {
        "tokens_per_second": run.tokens_per_second,
        "tokens_per_second_per_user": run.tokens_per_second / run.num_requests,
        "budget_per_request": run.rows_per_request,
        "accepted_length": float(run.tokens.mean() / run.num_requests),
        "step_seconds": float(run.seconds.mean()),
    }


def threshold_sweep() -> list[dict[str, Any]]:
    """Tokens that a threshold on the confidences of this traffic offers and accepts, beside the paper's Figure 5."""
    sweep = []
    for number, (domain, expected) in enumerate(THRESHOLD_SWEEP.items()):
        only = tuple(float(number == other) for other in range(len(ACCEPTANCES)))
        seen = traffic(only, 100, LONGER_GAMMA, 400, seed=2)
        for threshold, paper_offered, paper_share in expected:
            lengths = (seen.confidences >= threshold).cumprod(-1).sum(-1)
            offered = 1 + lengths.mean()
            accepted = 1 + np.minimum(seen.accepted, lengths).mean()
            sweep.append(
                {
                    "traffic": domain,
                    "threshold": threshold,
                    "offered": float(offered),
                    "acceptance_rate": float(accepted / offered),
                    "paper_offered": paper_offered,
                    "paper_acceptance_rate": paper_share,
                }
            )
    return sweep


# What is printed.


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    main = results["runs"][f"gamma_{GAMMA}"][MAIN_MIX]["points"]
    lines = [f"Tokens per second, gamma {GAMMA}, {MAIN_MIX} mix:", "", *_throughput_lines(main), ""]
    lines += [f"Budget per request (with the anchor) and gain over MTP-1 of `{SCHEDULED}`, by concurrency:", ""]
    lines += [*_shape_lines(results), "", "A threshold on confidences, beside the paper's Figure 5:", ""]
    lines += [*_threshold_lines(results["figure_5"]), ""]
    lines += [f"{name}: {results[name]:.4g}" for name in ("fig8_gain_min", "of_clairvoyant")]
    microseconds, share = 1e6 * results["scheduler_seconds_at_256"], 100 * results["scheduler_share_at_256"]
    mean_share = 100 * results["scheduler_share_at_256_mean"]
    lines += [f"scheduler at 256 requests: {microseconds:.0f} us, {share:.2f} % of a step (mean {mean_share:.2f} %)"]
    return "\n".join(lines)


def _throughput_lines(points: list[dict[str, Any]]) -> Iterator[str]:
    names = ["off", "fixed_1", *SCHEDULES, "clairvoyant"]
    yield "| requests | best fixed | " + " | ".join(names) + " |"
    yield "|--:" * (2 + len(names)) + "|"
    for each in points:
        best = each["best_fixed"]
        rates = [each["arms"][name]["tokens_per_second"] for name in (f"fixed_{best}", *names)]
        cells = [f"{rates[0]:.0f} (length {best})", *(f"{rate:.0f}" for rate in rates[1:])]
        yield f"| {each['concurrency']} | " + " | ".join(cells) + " |"


def _shape_lines(results: dict[str, Any]) -> Iterator[str]:
    yield "| | | " + " | ".join(map(str, CONCURRENCIES)) + " | least |"
    yield "|---|---" + "|--:" * (1 + len(CONCURRENCIES)) + "|"
    for gamma, mixes in results["runs"].items():
        for mix, curves in mixes.items():
            points = curves["points"]
            budgets = [each["arms"][SCHEDULED]["budget_per_request"] for each in points]
            yield _shape_line(f"{mix}, {gamma}", "budget", budgets)
            for gain in ("gain_over_mtp_1", "gain_over_free_mtp_1", "gain_over_off", "of_clairvoyant"):
                yield _shape_line("", gain, [each[gain] for each in points])
    paper = dict(zip(PAPER_FIGURE_8["concurrency"], zip(PAPER_FIGURE_8["budget"], PAPER_FIGURE_8["gain"])))
    for place, name in enumerate(("budget", "gain_over_mtp_1")):
        values = [paper[number][place] if number in paper else None for number in CONCURRENCIES]
        yield _shape_line("" if place else "paper, Figure 8", name, values)


def _shape_line(label: str, name: str, values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    cells = ["" if value is None else f"{value:.2f}" for value in [*values, min(known)]]
    return f"| {label} | {name.replace('_', ' ')} | " + " | ".join(cells) + " |"


def _threshold_lines(sweep: list[dict[str, Any]]) -> Iterator[str]:
    yield "| traffic | threshold | offered | paper | accepted | paper |"
    yield "|---|--:|--:|--:|--:|--:|"
    for each in sweep:
        offered, share = each["offered"], 100 * each["acceptance_rate"]
        paper_offered, paper_share = each["paper_offered"], 100 * each["paper_acceptance_rate"]
        yield (
            f"| {each['traffic']} | {each['threshold']} | {offered:.2f} | {paper_offered:.2f}"
            f" | {share:.1f} % | {paper_share:.1f} % |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.schedule.simulation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "schedule_simulation.json")
    arguments = parser.parse_args()
    results = report.provenance(ROOT, "python -m benchmarks.schedule.simulation") | simulate()
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
