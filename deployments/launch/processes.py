"""Runs a command and ends it together with all processes that it has started. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GRACE_SECONDS = 20.0
"""Time after SIGINT, in which Serve lets replicas finish."""
_TERM_SECONDS = 5.0
"""Time between SIGTERM and SIGKILL."""
_LINGER_SECONDS = 3.0
"""Time for processes that the command has left behind to end by themselves."""
_TICK_SECONDS = 0.5


def supervise(command: Sequence[str], *, ends_with_parent: bool = False, grace_seconds: float = _GRACE_SECONDS) -> int:
    """Run the command until it ends or this process gets SIGINT, SIGTERM or SIGHUP; returns an exit code.

    Whichever signal arrives, the command gets SIGINT first; SIGTERM after `grace_seconds` or at a second signal; then
    SIGKILL. Processes that it has started and left behind become children of this process, also from other sessions,
    and are ended after it. When this process is killed, the command is killed too. With `ends_with_parent`, the end of
    the parent counts as SIGTERM.
    """
    _adopt_orphans()
    with _blocked_signals():
        if ends_with_parent:
            _end_with_parent(signal.SIGTERM)
        # In a session of its own, so that only this process gets a terminal's Ctrl-C, and passes it on once.
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=_prepare_command)
        ended_by = _wait(process, grace_seconds)
        _end_descendants()
    if ended_by is not None:
        return 128 + ended_by
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


class _blocked_signals:
    """Blocks signals, so that they can be waited for; also those that shells let background jobs ignore."""

    def __enter__(self) -> None:
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in (*_ENDS, signal.SIGCHLD)}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], grace_seconds: float) -> int | None:
    """Wait until the command has ended; returns the signal that ended it, None where there was none."""
    ended_by, deadline = None, float("inf")
    steps = [(signal.SIGINT, grace_seconds), (signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, float("inf"))]
    while process.poll() is None:
        arrived = signal.sigtimedwait({*_ENDS, signal.SIGCHLD}, _TICK_SECONDS)
        is_asked = arrived is not None and arrived.si_signo in _ENDS
        if is_asked and arrived is not None:
            ended_by = ended_by or arrived.si_signo
        if (is_asked or time.monotonic() > deadline) and steps:
            number, seconds = steps.pop(0)
            process.send_signal(number)
            deadline = time.monotonic() + seconds
        _reap_orphans(process.pid)
    return ended_by


def _end_descendants() -> None:
    """End all descendants of this process, with SIGTERM first."""
    left = _wait_for(_descendants(), _LINGER_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Repeated, as processes may start while others end.
        while left:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            left = _wait_for(_descendants(), _TERM_SECONDS)
            if number is signal.SIGTERM:
                break


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _wait_for(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for the processes to end; returns the descendants that are left."""
    psutil.wait_procs(processes, timeout=seconds)
    return _descendants()


def _reap_orphans(command: int) -> None:
    """Reap adopted processes that have ended, but not the command itself."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid != command and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def _prepare_command() -> None:
    """Called in the new process: restore default signals, and end the process when its parent ends."""
    for number in (*_ENDS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _end_with_parent(signal.SIGKILL)


def _adopt_orphans() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this signal when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


if __name__ == "__main__":
    # As a command of `supervise`, this is the second of two processes that watch: when one is killed, the other ends
    # everything.
    sys.exit(supervise(sys.argv[1:], ends_with_parent=True))
