"""Ends a replica that has failed, and reports background tasks that end."""

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
"""Wait before the end: peers of a dead process raise too, and the log should have all reasons."""
_BEFORE_EXIT_SECONDS = 1.5
"""Expected limit of `before_exit`; after twice this time the process ends without it."""
_RESTART_SECONDS = 1.0


class Watchdog:
    """Ends this process when a watched run ends or a check finds a fault.

    It is a thread, so that a blocked event loop does not block it. Runs report to it from Ray's threads.
    """

    def __init__(self, before_exit: Callable[[str], None], exit_process: Callable[[int], None] = os._exit) -> None:
        """`before_exit(reason)` is called in the watchdog's thread and may take _BEFORE_EXIT_SECONDS."""
        self._before_exit, self._exit = before_exit, exit_process
        self._checks: list[Callable[[], str | None]] = []
        self._reasons: list[str] = []
        self._is_lost, self._is_stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def watch(self, name: str, run: Future[Any]) -> None:
        """End this process when `run` ends."""
        run.add_done_callback(lambda run: self.lose(f"{name} {_how_it_ended(run)}"))

    def check(self, find_fault: Callable[[], str | None]) -> None:
        """Call `find_fault` twice a second; end this process when it returns a reason."""
        self._checks.append(find_fault)

    def start(self) -> None:
        """Start the thread. Runs that have ended before count too, and more can be added later."""
        self._thread.start()

    def stop(self) -> None:
        """Ignore the end of runs from now on, as the replica is being stopped."""
        self._is_stopped.set()

    def lose(self, reason: str) -> None:
        """End this process within two seconds. Callable from any thread."""
        self._reasons.append(reason)
        self._is_lost.set()

    @property
    def reason(self) -> str | None:
        """Why the process is about to end; None while it is not."""
        return "; ".join(self._reasons) if self._is_lost.is_set() else None

    def _run(self) -> None:
        while not self._is_lost.wait(_POLL_SECONDS):
            self._run_checks()
        if self._is_stopped.is_set():
            return
        # A `before_exit` or a log handler that never returns must not keep a failed replica alive.
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
    """The asyncio tasks of a replica. When one ends, it is logged and counted."""

    def __init__(self, count_failure: Callable[[str], None], on_end: Callable[[str], None]) -> None:
        """`count_failure` gets the name of a task that ended; `on_end` gets the reason where the task is essential."""
        self._count_failure, self._on_end = count_failure, on_end
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]], *, is_essential: bool) -> None:
        """Run `work` until `cancel`. If it ends or raises, an essential task is reported and another one restarted."""
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
