"""What ends a replica that cannot go on, and what keeps its background tasks from ending unseen."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger("ray.serve")

_POLL_SECONDS = 0.5
_SETTLE_SECONDS = 0.3
"""A dead process makes its peers raise; wait so long, so that the log has all reasons."""
_BEFORE_EXIT_SECONDS = 1.5
"""For `before_exit`; after twice as long the process ends without it."""
_RESTART_SECONDS = 1.0


class Watchdog:
    """Ends this process when a run that it watches ends, or when something that should be heard is silent.

    It is a thread: nothing that holds up the event loop can hold it up. Runs report to it from the threads of Ray.
    """

    def __init__(self, before_exit: Callable[[str], None], exit_process: Callable[[int], None] = os._exit) -> None:
        """`before_exit(reason)` is called in the watchdog's thread and may take _BEFORE_EXIT_SECONDS."""
        self._before_exit, self._exit = before_exit, exit_process
        self._checks: list[Callable[[], str | None]] = []
        self._reasons: list[str] = []
        self._is_lost, self._is_stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def watch(self, name: str, run: Future[Any]) -> None:
        """The end of `run` is the end of this process."""
        run.add_done_callback(lambda run: self.lose(f"{name} {_how_it_ended(run)}"))

    def check(self, find_fault: Callable[[], str | None]) -> None:
        """Call this twice a second; what it returns, unless None, is why this process ends."""
        self._checks.append(find_fault)

    def start(self) -> None:
        """Act from now on; runs may have ended before, and more may be added."""
        self._thread.start()

    def stop(self) -> None:
        """Let runs end: the replica is closing."""
        self._is_stopped.set()

    def lose(self, reason: str) -> None:
        """End this process, soon; callable from any thread."""
        self._reasons.append(reason)
        self._is_lost.set()

    @property
    def reason(self) -> str | None:
        """Why the process is about to end; None while nothing is wrong."""
        return "; ".join(self._reasons) if self._is_lost.is_set() else None

    def _run(self) -> None:
        while not self._is_lost.wait(_POLL_SECONDS):
            self._run_checks()
        if self._is_stopped.is_set():
            return
        # A `before_exit` or a log handler that never returns must not keep a lost replica alive.
        guard = threading.Timer(_SETTLE_SECONDS + 2 * _BEFORE_EXIT_SECONDS, self._exit, [1])
        guard.daemon = True
        guard.start()
        time.sleep(_SETTLE_SECONDS)
        reason = self.reason or ""
        try:
            logger.critical("the gang is lost, this replica ends: %s", reason)
            self._before_exit(reason)
        except Exception:
            logger.exception("streams were not told that the gang is lost")
        guard.cancel()
        if not self._is_stopped.is_set():
            self._exit(1)

    def _run_checks(self) -> None:
        for find_fault in self._checks:
            fault = find_fault()
            if fault is not None and not self._is_stopped.is_set():
                self.lose(fault)


def _how_it_ended(run: Future[Any]) -> str:
    if run.cancelled():
        return "was cancelled"
    error = run.exception()
    return "ended its run" if error is None else f"failed: {error!r}"


class BackgroundTasks:
    """The asyncio tasks of a replica. None of them ends without a line in the log and a count."""

    def __init__(self, count_failure: Callable[[str], None], on_end: Callable[[str], None]) -> None:
        """`count_failure(task name)` counts; `on_end(reason)` hears of an essential task that has ended."""
        self._count_failure, self._on_end = count_failure, on_end
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, is_essential: bool) -> None:
        """Run `work` until `cancel`. When it ends or raises, an essential one is reported, another is started again."""
        self._tasks.append(asyncio.create_task(self._keep(name, work, is_essential), name=name))

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _keep(self, name: str, work: Callable[[], Coroutine[Any, Any, None]], is_essential: bool) -> None:
        while True:
            try:
                await work()
                reason = f"{name} returned"
            except Exception as error:
                logger.exception("%s failed", name)
                reason = f"{name} failed: {error!r}"
            self._count_failure(name)
            if is_essential:
                self._on_end(reason)
                return
            logger.warning("%s: started again in %s s", reason, _RESTART_SECONDS)
            await asyncio.sleep(_RESTART_SECONDS)
