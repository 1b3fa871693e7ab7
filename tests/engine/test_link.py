"""A drafter that is not needed for a while must not take silence for death."""

from __future__ import annotations

from typing import Any

from small_model import SMALL, build_small_engine, request, run, small_config, small_modules

from dspark_ray.drafters.protocol import DraftRequest
from dspark_ray.ranks.draft_link import Close, DraftServer, KeepAlive, RemoteDrafter
from dspark_ray.ranks.draft_worker import DraftWorker

PROMPT = tuple((3 * n + 2) % SMALL.vocab_size for n in range(15))


class DirectLink:
    """Both ends in one process: what rank 0 sends is answered at once."""

    def __init__(self) -> None:
        self.worker = DraftWorker(small_modules()[1], small_config())
        self.sent: list[Any] = []
        self.answers: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)
        if isinstance(message, DraftRequest):
            self.answers.append(self.worker.draft(message))

    def receive(self) -> Any:
        return self.answers.pop(0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def test_requests_that_do_not_speculate_keep_the_link_alive():
    link = DirectLink()
    engine = build_small_engine(drafter=RemoteDrafter(link, Clock()))
    run(engine, request(PROMPT, speculate=False))
    engine.close()
    kinds = [type(message) for message in link.sent]
    assert kinds.count(KeepAlive) >= 5
    assert set(kinds) == {KeepAlive, Close}


def test_a_link_in_use_carries_nothing_but_drafts():
    link = DirectLink()
    engine = build_small_engine(drafter=RemoteDrafter(link, Clock()))
    expected = run(build_small_engine(), request(PROMPT))
    assert run(engine, request(PROMPT)) == expected
    assert {type(message) for message in link.sent} == {DraftRequest}


def test_closing_takes_an_open_proposal_back_first():
    link = DirectLink()
    engine = build_small_engine(drafter=RemoteDrafter(link))
    engine.add_request(request(PROMPT))
    engine.step()
    engine.close()
    assert isinstance(link.sent[-1], Close)
    assert link.answers == []


class Replay:
    """Rank 0's end as a recording."""

    def __init__(self, messages: list[Any]) -> None:
        self.inbox = messages
        self.answers: list[Any] = []

    def receive(self) -> Any:
        return self.inbox.pop(0)

    def send(self, message: Any) -> None:
        self.answers.append(message)


def test_the_server_answers_requests_until_the_link_closes():
    recorded = DirectLink()
    run(build_small_engine(drafter=RemoteDrafter(recorded)), request(PROMPT))
    link = Replay([*recorded.sent, KeepAlive(), Close()])
    DraftServer(DraftWorker(small_modules()[1], small_config()), link).run()
    assert len(link.answers) == len(recorded.sent)
    assert link.inbox == []
