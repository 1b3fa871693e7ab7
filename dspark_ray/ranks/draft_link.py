"""The drafter in a process of its own: the same messages as inline, over a link to rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dspark_ray.drafters.protocol import DraftProposal, DraftRequest
from dspark_ray.ranks.draft_worker import DraftWorker

_KEEP_ALIVE_SECONDS = 5.0
"""Well below the timeout after which a silent member of a gang is treated as dead."""


@dataclass(frozen=True)
class Start:
    """Serving starts: from now on long silence means that rank 0 is dead."""


@dataclass(frozen=True)
class KeepAlive:
    """Keeps an idle link from timing out."""


@dataclass(frozen=True)
class Close:
    """The last message of a link."""


class Link(Protocol):
    """One end of a connection that keeps the order of messages, such as `dspark_ray.ranks.channel.Pair`."""

    def send(self, message: Any) -> None: ...

    def receive(self) -> Any: ...


class RemoteDrafter:
    """Rank 0's end. The drafter works between submit() and collect(), in parallel with rank 0."""

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._clock = link, clock
        self._is_open = False
        self._sent_at = clock()

    def submit(self, request: DraftRequest) -> None:
        assert not self._is_open, "collect() comes before the next submit()"
        self._send(request)
        self._is_open = True

    def collect(self) -> DraftProposal:
        assert self._is_open, "submit() comes before collect()"
        self._is_open = False
        return self._link.receive()

    def start(self) -> None:
        self._send(Start())

    def keep_alive(self) -> None:
        """Send a keep-alive if nothing was sent for some seconds; may be called at any rate."""
        if not self._is_open and self._clock() - self._sent_at >= _KEEP_ALIVE_SECONDS:
            self._send(KeepAlive())

    def close(self) -> None:
        if self._is_open:
            self.collect()
        self._send(Close())

    def _send(self, message: DraftRequest | Start | KeepAlive | Close) -> None:
        self._link.send(message)
        self._sent_at = self._clock()


class DraftServer:
    """The drafter's end: answers requests until the link closes."""

    def __init__(self, worker: DraftWorker, link: Link, on_start: Callable[[], None] = lambda: None) -> None:
        """`on_start` is called when rank 0 begins to serve."""
        self._worker, self._link, self._on_start = worker, link, on_start

    def run(self) -> None:
        """Serve until rank 0 closes the link; raises when rank 0 has died."""
        while not isinstance(message := self._link.receive(), Close):
            if isinstance(message, Start):
                self._on_start()
            elif isinstance(message, DraftRequest):
                self._link.send(self._worker.draft(message))
