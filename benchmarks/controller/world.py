"""Fleets of simulated replicas with DeepSeek-V4-Flash's measured costs, in steps of a second.

A replica runs requests of three classes; a step costs `target(rows) + draft(requests)` seconds, times the slowness of
its device. Requests are counted, not simulated one by one: the steps of a second have the mean rows and the mean tokens
of its running requests. Assumptions:

* Confidences are those of benchmarks/schedule/simulation.py: calibrated, around the conditional acceptances of the
  DSpark paper's Figure 2, with the spread that its Figure 5 shows. The rows and tokens that a threshold leaves are
  averages over that distribution, so they are smooth in the threshold.
* The measured curve of the target is averaged over the rows that single steps of a second have, a normal distribution
  whose variance is the mean number of rows, so narrower steps of the curve have no effect.
* Two kinds of engine. `fixed` verifies everything whose survival reaches the controller's threshold, and always drafts.
  `full` makes the choice that commits most tokens per second on its own replica, from the same costs and its running
  requests (a ranking of drafts by survival, so the choice is a threshold as well, or no drafts at all); the
  controller's threshold applies after that. It knows its own costs exactly and nothing of other replicas.
* Answers have geometric lengths, so whether a request ends does not depend on its age. Requests come and go between
  seconds: one that ends within a second commits nothing more and holds its slot until then. A request whose replica
  dies continues on another one, at the end of the queue. A request that arrives at a full queue is refused.
* Tokens of a second vary around their mean: requests differ in difficulty as long as they live (standard deviation of
  0.25 of the mean per request), contexts drift (2 %), and steps are measured with 3 % of noise each.
* Tensor activity is the time that the matrix products of the rows would take at full rate over the step: 12
  microseconds per row, the slope of the measured curve above its knee (256 to 1024 rows). DRAM activity is what
  remains of a busy device's time, and is high at any load. Power over its limit is 0.2 idle, and 0.35 + 0.9 tensor
  activity more while busy, at most 1.
* Devices of a capped node share 70 % of the sum of their limits. When they would draw more, all of them slow down by
  the square root of the missing power, so one replica's rows cost its neighbours time. No local scheduler sees that;
  the clocks (`sw_power_cap`) and the measured step seconds show it.

Letters: F fleets, R replicas, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.controller.traffic import CLASSES, MEAN_TOKENS, Second, Traffic
from benchmarks.schedule import simulation as schedule_simulation

EngineKind = Literal["fixed", "full"]

GAMMA = schedule_simulation.GAMMA
SECONDS_PER_ROW = 12e-6
"""Time of the matrix products of a row at full rate."""
IDLE_POWER, BUSY_POWER, TENSOR_POWER = 0.2, 0.35, 0.9
POWER_BUDGET = 0.7
"""Power budget of a capped node over the sum of its devices' limits."""
_GRID = 200
"""Intervals of the tables over thresholds."""
_OWN_CHOICES = np.arange(0, 181, 6)
"""Grid points among which a `full` engine chooses."""
_DIFFICULTY, _CONTEXT = 0.25, 0.02
_DIFFICULTY_SECONDS, _CONTEXT_SECONDS = 20.0, 300.0
_MOST_REQUESTS = schedule_simulation.MOST_REQUESTS


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, and drafts by threshold; the same for every replica."""

    target: np.ndarray
    """Seconds by rows"""
    draft: np.ndarray
    """Seconds by requests"""
    rows: np.ndarray
    """[grid, K] drafts verified per request and round at a threshold"""
    tokens: np.ndarray
    """[grid, K] drafts accepted per request and round"""

    @staticmethod
    def load() -> Costs:
        """The measured machine with the paper's acceptances."""
        machine = schedule_simulation.Machine.load(2 * _MOST_REQUESTS * (1 + GAMMA))
        most = _MOST_REQUESTS * (1 + GAMMA)
        target = np.array([_smoothed(machine.target, rows) for rows in range(most + 1)])
        tables = [_left_by_thresholds(number) for number in range(len(CLASSES))]
        rows, tokens = (np.stack(columns, axis=1) for columns in zip(*tables))
        return Costs(target, machine.draft, rows, tokens)


def _smoothed(seconds: np.ndarray, rows: int) -> float:
    spread = max(1.0, rows**0.5)
    sizes = np.arange(max(1, int(rows - 3 * spread)), int(rows + 3 * spread) + 2)
    return float(np.average(seconds[sizes], weights=np.exp(-0.5 * ((sizes - rows) / spread) ** 2)))


def _left_by_thresholds(class_number: int) -> tuple[np.ndarray, np.ndarray]:
    """(drafts verified, drafts accepted) per request and round, by threshold."""
    only = tuple(float(class_number == other) for other in range(len(CLASSES)))
    confidences = schedule_simulation.traffic(only, 6000, GAMMA, 60, seed=3).confidences
    survival = np.sort(confidences.cumprod(-1).ravel())
    num_rounds = survival.size / GAMMA
    cut = np.searchsorted(survival, np.linspace(0.0, 1.0, _GRID + 1))
    standing = np.concatenate([[0.0], survival.cumsum()])
    return (survival.size - cut) / num_rounds, (standing[-1] - standing[cut]) / num_rounds


@dataclass(frozen=True)
class Fleet:
    """Replicas that share a router and are compared as one."""

    name: str
    engine: EngineKind
    max_running: int = 160
    """The drafts of 160 requests fit into captured graphs (1024 rows), those of 256 do not."""


@dataclass(frozen=True)
class Observed:
    """Observations of a second, [F, R] each."""

    running: np.ndarray
    waiting: np.ndarray
    rows: np.ndarray
    """Per step"""
    tokens: np.ndarray
    """Committed"""
    steps: np.ndarray
    step_seconds: np.ndarray
    slowness: np.ndarray
    """Measured over profiled step seconds; a constantly slow device was profiled as slow."""
    tensor: np.ndarray
    power: np.ndarray
    """Over the limit"""
    clock: np.ndarray
    """Over the highest"""


class World:
    """All fleets side by side; requests come from `traffic`."""

    def __init__(self, costs: Costs, fleets: Sequence[Fleet], traffic: Traffic, seed: int) -> None:
        self.costs, self.fleets, self.traffic = costs, tuple(fleets), traffic
        self._rng = np.random.default_rng((seed, 2))
        num_fleets, num_replicas, num_classes = len(self.fleets), len(traffic.node_of), len(CLASSES)
        self.shape = num_fleets, num_replicas
        self._full = np.array([fleet.engine == "full" for fleet in self.fleets])
        self.max_running = np.array([fleet.max_running for fleet in self.fleets])[:, None]
        self.thresholds = np.zeros(self.shape)
        """Thresholds in force; written by `Controlled`."""
        self.accepting = np.ones(self.shape, dtype=bool)
        """Replicas that requests are sent to."""
        self.running = np.zeros((*self.shape, num_classes), dtype=np.int64)
        self.waiting = np.zeros_like(self.running)
        self.thinking = np.zeros(num_fleets, dtype=np.int64)
        """Thinking users of closed traffic"""
        self.arrived, self.finished, self.refused = (np.zeros((num_fleets, num_classes)) for _ in range(3))
        self.per_user = np.zeros((*self.shape, num_classes))
        """[F, R, K] tokens per second of a running request, in the last second"""
        self._difficulty, self._context = np.zeros(num_replicas), np.zeros(num_replicas)
        self._now = 0.0

    def step(self) -> tuple[Second, Observed]:
        """Simulate a second."""
        second = self.traffic.second(self._now)
        self._now += 1.0
        open_to = self._open_to(second)
        self._route(self._arrivals(second) + self._expelled(second.dead), open_to)
        self._admit()
        observed = self._serve(second)
        self._finish()
        return second, observed

    # Arrivals.

    def _open_to(self, second: Second) -> np.ndarray:
        """[F, R] live replicas that accept requests."""
        return self.accepting & ~second.dead

    def _arrivals(self, second: Second) -> np.ndarray:
        """[F, K]"""
        num_fleets = len(self.fleets)
        if self.traffic.config.kind == "open":
            arrivals = np.tile(self._rng.poisson(second.requests_per_second), (num_fleets, 1))
        else:
            busy = self.running.sum((1, 2)) + self.waiting.sum((1, 2))
            self.thinking = np.maximum(0, round(second.users) - busy)
            asks = self._rng.binomial(self.thinking, -np.expm1(-1 / self.traffic.config.think_seconds))
            arrivals = self._rng.multinomial(asks, second.shares)
        self.arrived += arrivals
        return arrivals

    def _expelled(self, dead: np.ndarray) -> np.ndarray:
        """[F, K] requests of replicas that died; running ones wait again."""
        if not dead.any():
            return np.zeros_like(self.running[:, 0])
        gone = (self.running[:, dead] + self.waiting[:, dead]).sum(1)
        self.running[:, dead] = 0
        self.waiting[:, dead] = 0
        return gone

    def _route(self, requests: np.ndarray, open_to: np.ndarray) -> None:
        """To the less loaded of two random live replicas, by their loads at the start of the second."""
        num_fleets, num_replicas = self.shape
        num_open = open_to.sum(1)
        self.refused[num_open == 0] += requests[num_open == 0]
        ends = requests.cumsum(1)
        most = int(ends[:, -1].max(initial=0))
        if most == 0:
            return
        places = np.argsort(~open_to, axis=1, kind="stable")
        pair = (self._rng.random((2, 1, most)) * num_open[:, None]).astype(np.int64)
        pair = places[np.arange(num_fleets)[:, None], pair]
        load = (self.running + self.waiting).sum(2) / self.max_running
        first, other = (np.take_along_axis(load, each, 1) for each in pair)
        chosen = np.where(first <= other, pair[0], pair[1])
        number = np.arange(most)
        of_class = (number >= ends[:, :, None]).sum(1)
        exists = (number < ends[:, -1:]) & (num_open[:, None] > 0)
        cell = (np.arange(num_fleets)[:, None] * num_replicas + chosen) * len(CLASSES) + of_class
        counts = np.bincount(cell[exists], minlength=self.waiting.size)
        self.waiting += counts.reshape(self.waiting.shape)

    def _admit(self) -> None:
        """Waiting requests take free slots, classes in proportion; the queue holds as many as can run."""
        entering = _share(self.waiting, self.max_running - self.running.sum(2))
        self.running += entering
        self.waiting -= entering
        kept = _share(self.waiting, np.broadcast_to(self.max_running, self.shape))
        self.refused += (self.waiting - kept).sum(1)
        self.waiting = kept

    # Service.

    def _serve(self, second: Second) -> Observed:
        running = self.running.sum(2)
        place = np.rint(self.thresholds * _GRID).astype(np.int64)
        drafts, standing, drafted = self._verified(place, running)
        rows = running + drafts
        alone = self.costs.target[np.ceil(rows).astype(np.int64)] + np.where(drafted, self.costs.draft[running], 0.0)
        alone = alone * self.traffic.device_factor
        busy = running > 0
        tensor = np.where(busy, np.minimum(1.0, SECONDS_PER_ROW * rows * self.traffic.device_factor / alone), 0.0)
        wanted_power = np.minimum(1.0, IDLE_POWER + busy * (BUSY_POWER + TENSOR_POWER * tensor))
        clock = self._clock(wanted_power)
        self._drift()
        slowness = second.slowness / clock * np.exp(_CONTEXT * self._context)
        seconds = alone * slowness
        steps = busy / seconds
        hard = np.exp(-_DIFFICULTY * self._difficulty / np.sqrt(np.maximum(1, running)))
        self.per_user = (1 + standing * hard[..., None]) * steps[..., None]
        tokens = (self.running * MEAN_TOKENS * self._ending()).sum(2)
        measured = 1 + 0.03 * self._rng.standard_normal(self.shape[1]) / np.sqrt(np.maximum(1.0, steps))
        waiting, power = self.waiting.sum(2), wanted_power * clock
        return Observed(running, waiting, rows, tokens, steps, seconds, slowness * measured, tensor, power, clock)

    def _verified(self, place: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """([F, R] drafts verified per step, [F, R, K] accepted per request and step, [F, R] whether any are made)."""
        drafted = np.ones(self.shape, dtype=bool)
        if self._full.any():
            own, drafts_pay = self._own_choice(self.running[self._full], running[self._full])
            place = place.copy()
            place[self._full] = np.maximum(place[self._full], own)
            drafted[self._full] = drafts_pay
        drafts = (self.running * self.costs.rows[place]).sum(2)
        standing = self.costs.tokens[place] * drafted[..., None]
        return drafts * drafted, standing, drafted

    def _own_choice(self, by_class: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The choice with most tokens per second: (grid point, whether drafting pays)."""
        rows = running[..., None] + by_class @ self.costs.rows[_OWN_CHOICES].T
        tokens = running[..., None] + by_class @ self.costs.tokens[_OWN_CHOICES].T
        seconds = self.costs.target[np.ceil(rows).astype(np.int64)] + self.costs.draft[running][..., None]
        rate = tokens / seconds
        best = rate.argmax(-1)
        plain = running / self.costs.target[running]
        return _OWN_CHOICES[best], np.take_along_axis(rate, best[..., None], -1)[..., 0] >= plain

    def _clock(self, wanted_power: np.ndarray) -> np.ndarray:
        """[F, R] clock over the highest, lower where devices exceed a common budget."""
        traffic = self.traffic
        if not traffic.capped_node.any():
            return np.ones(self.shape)
        sizes = np.bincount(traffic.node_of)
        starts = np.concatenate([[0], sizes.cumsum()[:-1]])
        drawn = np.add.reduceat(wanted_power, starts, axis=1)
        over = np.where(traffic.capped_node, drawn / (POWER_BUDGET * sizes), 0.0)
        return 1 / np.sqrt(np.maximum(1.0, over))[:, traffic.node_of]

    def _drift(self) -> None:
        """First-order autoregressive processes of unit variance, the same in every fleet."""
        for values, seconds in ((self._difficulty, _DIFFICULTY_SECONDS), (self._context, _CONTEXT_SECONDS)):
            kept = np.exp(-1 / seconds)
            values *= kept
            values += np.sqrt(1 - kept**2) * self._rng.standard_normal(len(values))

    def _finish(self) -> None:
        done = self._rng.binomial(self.running, self._ending())
        self.running -= done
        self.finished += done.sum(1)

    def _ending(self) -> np.ndarray:
        """[F, R, K] probability that a request ends in the second, from its rate and its mean length."""
        return -np.expm1(-self.per_user / MEAN_TOKENS)


def _share(requests: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of `requests` [F, R, K], no more than `places` [F, R] in all, classes in proportion; whole numbers."""
    ends = requests.cumsum(2)
    total = np.maximum(1, ends[..., -1:])
    taken = np.minimum(ends[..., -1:], np.maximum(0, places[..., None]))
    return np.diff(ends * taken // total, axis=2, prepend=0)
