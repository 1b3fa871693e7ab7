"""Resubmission: when a request continues on another engine, when it waits, and when it is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest

from deployments.http import resubmission
from deployments.http.interfaces import EngineBusy, EngineFailed, RequestRefused
from deployments.http.resubmission import ResubmissionPolicy, events_of
from deployments.replica import routing
from deployments.replica.messages import TRIAL_TOKENS, Accepted, EngineEvent, EngineLost, Refusal
from deployments.replica.routing import AvoidingRouter
from dspark_ray.types import Request, SamplingParams, SequenceOutput

REQUEST = Request(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=1000))
POLICY = ResubmissionPolicy(max_losses=3, deadline_seconds=30)


def accepted(replica: str = "a") -> Accepted:
    return Accepted(request_id="r", replica=replica)


def tokens(count: int, finish_reason: str | None = None) -> SequenceOutput:
    return SequenceOutput(request_id="r", token_ids=(7,) * count, finish_reason=finish_reason)  # type: ignore[arg-type]


def refusal(reason: str) -> Refusal:
    return Refusal(request_id="r", reason=reason, message="no")  # type: ignore[arg-type]


END = tokens(1, "stop")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only in delays."""
    clock = Clock()

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(resubmission, "asyncio", SimpleNamespace(sleep=sleep))
    return clock


class ScriptedClient:
    """Each attempt replays the next script of events, which may end with an exception. The last script repeats."""

    def __init__(self, *scripts: list[EngineEvent | Exception]) -> None:
        self._scripts = list(scripts)
        self.attempts: list[tuple[Request, bool, str | None]] = []

    async def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        self.attempts.append((request, on_trial, avoid))
        for item in self._scripts[0] if len(self._scripts) == 1 else self._scripts.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


async def run(client: ScriptedClient, clock: Clock, policy: ResubmissionPolicy = POLICY) -> int:
    """The number of tokens."""
    return sum(
        [
            len(event.token_ids)
            async for event in events_of(client, REQUEST, policy, clock)
            if isinstance(event, SequenceOutput)
        ]
    )


async def test_a_request_goes_on_behind_its_tokens_at_another_replica_and_on_trial(clock):
    client = ScriptedClient([accepted("a"), tokens(3), EngineLost("died", True)], [accepted("b"), END])
    assert await run(client, clock) == 4
    (first, *rest_of_first), (second, *rest_of_second) = client.attempts
    assert (first.request_id, first.output_token_ids, rest_of_first) == ("r.0", (), [False, None])
    assert (second.request_id, second.output_token_ids, rest_of_second) == ("r.1", (7, 7, 7), [True, "a"])


async def test_a_request_that_no_engine_had_begun_is_no_suspect(clock):
    client = ScriptedClient([EngineLost("unreachable")], [EngineLost("unreachable")], [accepted(), END])
    await run(client, clock)
    assert [on_trial for _, on_trial, _ in client.attempts] == [False] * 3


async def test_a_process_that_dies_with_an_accepted_request_makes_it_a_suspect(clock):
    client = ScriptedClient([accepted(), EngineLost("actor died")], [accepted(), END])
    await run(client, clock)
    assert [on_trial for _, on_trial, _ in client.attempts] == [False, True]


async def test_a_suspect_whose_engine_dies_again_is_given_up(clock):
    client = ScriptedClient(
        [accepted(), tokens(500), EngineLost("died", True)],
        [accepted(), tokens(TRIAL_TOKENS - 1), EngineLost("died", True)],
        [accepted(), END],
    )
    with pytest.raises(EngineFailed) as caught:
        await run(client, clock)
    assert caught.value.request_id == "r"
    assert len(client.attempts) == 2


async def test_a_suspect_whose_trial_was_over_where_it_ran_is_not_given_up(clock):
    """The tokens that ended its trial did not arrive before the next suspect killed the engine."""
    client = ScriptedClient(
        [accepted(), EngineLost("died", True)],
        [accepted(), tokens(TRIAL_TOKENS - 1), EngineLost("died", True, on_trial=False)],
        [accepted(), tokens(1), EngineLost("died", True, on_trial=True)],
    )
    with pytest.raises(EngineFailed):
        await run(client, clock)
    assert len(client.attempts) == 3


async def test_a_suspect_that_waited_in_an_engine_that_died_has_the_whole_deadline_again(clock):
    """The engine took longer to start than the deadline, and another suspect killed it."""
    client = ScriptedClient(
        [accepted(), EngineLost("died", True, on_trial=False)],
        *[[EngineLost("died", False, on_trial=False)]] * 60,
        [accepted(), END],
    )
    await run(client, clock)
    assert len(client.attempts) == 62


async def test_a_suspect_that_waits_for_its_trial_does_not_count_a_loss(clock):
    client = ScriptedClient(
        [accepted(), EngineLost("died", True)],
        [EngineLost("died", False)],
        [EngineLost("died", False)],
        [accepted(), END],
    )
    await run(client, clock)
    assert [on_trial for _, on_trial, _ in client.attempts] == [False, True, True, True]


async def test_losses_in_all_are_bounded_for_requests_that_are_trusted_again(clock):
    client = ScriptedClient([accepted(), tokens(TRIAL_TOKENS), EngineLost("died", True)])
    with pytest.raises(EngineLost):
        await run(client, clock)
    assert len(client.attempts) == POLICY.max_losses + 1


async def test_engines_that_cannot_be_reached_are_tried_until_the_deadline(clock):
    client = ScriptedClient([EngineLost("ActorUnavailableError")])
    with pytest.raises(EngineLost):
        await run(client, clock)
    assert 30 <= clock.now < 35
    assert 15 < len(client.attempts) < 60


async def test_the_deadline_begins_again_with_each_engine(clock):
    lost = [EngineLost("unreachable")]
    client = ScriptedClient(*[lost] * 14, [accepted(), EngineLost("died", True)], *[lost] * 14, [accepted(), END])
    assert await run(client, clock) == 1
    assert clock.now > 30


async def test_an_accepted_request_waits_for_room_and_a_new_one_does_not(clock):
    full = [[EngineBusy("full")]] * 40 + [[refusal("queue_full")]] * 40
    client = ScriptedClient([accepted(), EngineLost("died", True)], *full, [accepted(), END])
    assert await run(client, clock) == 1
    with pytest.raises(EngineBusy):
        await run(ScriptedClient([EngineBusy("full")]), clock)
    with pytest.raises(RequestRefused):
        await run(ScriptedClient([refusal("queue_full")]), clock)


async def test_a_wrong_request_is_refused_at_any_attempt(clock):
    with pytest.raises(RequestRefused):
        await run(ScriptedClient([accepted(), EngineLost("died", True)], [refusal("invalid")]), clock)


async def test_what_the_engine_failed_on_is_logged_with_the_id_and_told_by_the_id_alone(clock, caplog):
    with pytest.raises(EngineFailed) as caught:
        await run(ScriptedClient([Refusal(request_id="r.0", reason="failed", message="KeyError: 17")]), clock)
    assert caught.value.request_id == "r"
    assert "request r failed: KeyError: 17" in caplog.text


def test_delays_are_random_and_bounded():
    progress = resubmission._Progress(REQUEST, POLICY, Clock())
    delays = [progress.delay() for _ in range(12)]
    assert all(0.05 <= delay <= 2 for delay in delays)
    assert len(set(delays)) == 12
    assert min(delays[-5:]) >= 1


# The router.


def replica(name: str) -> SimpleNamespace:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch):
    """choose_replicas of a router whose own choice is the first two candidates."""

    async def first_two(self: object, candidates: list[object], pending_request: object = None) -> list[list[object]]:
        return [candidates[:2]]

    monkeypatch.setattr(routing.PowerOfTwoChoicesRequestRouter, "choose_replicas", first_two)
    router = object.__new__(AvoidingRouter)

    def choose(names: str, avoid: str | None) -> list[list[str]]:
        pending = SimpleNamespace(kwargs={"avoid": avoid})
        ranks = asyncio.run(router.choose_replicas([replica(name) for name in names], pending))
        return [sorted(candidate.replica_id.unique_id for candidate in rank) for rank in ranks]

    return choose


def test_the_replica_that_was_lost_is_tried_last(choose):
    assert choose("ab", avoid="a") == [["b"], ["a", "b"]]
    first, _ = choose("abcd", avoid="a")
    assert len(first) == 2
    assert "a" not in first


def test_without_a_replica_to_avoid_or_another_one_serve_chooses(choose):
    assert choose("ab", avoid=None) == [["a", "b"]]
    assert choose("a", avoid="a") == [["a"]]
