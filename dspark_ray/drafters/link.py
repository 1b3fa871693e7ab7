"""The drafter in a process of its own: the same messages as inline, over a link to rank 0."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_ray.drafters.protocol import DraftProposal, DraftRequest
from dspark_ray.drafters.worker import DraftWorker
from dspark_ray.model.channel import Pair


@dataclass(frozen=True)
class KeepAlive:
    """Says nothing, so that an idle link does not time out."""


@dataclass(frozen=True)
class Close:
    """The last message of a link."""


class RemoteDrafter:
    """Rank 0's end. The drafter works between submit() and collect(), while rank 0 does something else."""

    def __init__(self, link: Pair) -> None:
        self._link = link
        self._answers = 0

    def submit(self, request: DraftRequest) -> None:
        self._link.send(request)
        self._answers += 1

    def collect(self) -> DraftProposal:
        assert self._answers == 1, "submit() comes before collect()"
        self._answers = 0
        return self._link.receive()

    def keep_alive(self) -> None:
        if not self._answers:
            self._link.send(KeepAlive())

    def close(self) -> None:
        if self._answers:
            self.collect()
        self._link.send(Close())


class DraftServer:
    """The drafter's end: answers requests until the link closes."""

    def __init__(self, worker: DraftWorker, link: Pair) -> None:
        self._worker, self._link = worker, link

    def run(self) -> None:
        """Serve until rank 0 closes; raises when rank 0 is gone."""
        while not isinstance(message := self._link.receive(), Close):
            if isinstance(message, DraftRequest):
                self._link.send(self._worker.draft(message))
