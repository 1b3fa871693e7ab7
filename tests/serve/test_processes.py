"""A supervised command with descendants that ignore signals, ended in every way, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

FAMILY = """
import os, signal, subprocess, sys, time
how, pids = sys.argv[1:]
sleep = "import time; time.sleep(600)"
ignore = "import signal; [signal.signal(number, signal.SIG_IGN) for number in (1, 2, 15)]; print(1, flush=True);"
deaf = ignore + sleep
child = subprocess.Popen([sys.executable, "-c", sleep])
orphan = f'''
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {deaf!r}], start_new_session=True, stdout=-1, stderr=-3)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
'''
adopted = subprocess.run([sys.executable, "-c", orphan], capture_output=True, text=True, start_new_session=True).stdout
if how == "deaf":
    for number in (1, 2, 15):
        signal.signal(number, signal.SIG_IGN)
with open(pids + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid} {adopted}")
os.rename(pids + ".new", pids)
if how == "ends":
    sys.exit(3)
try:
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(0)
"""


class Family:
    """A supervised command, its child, and a grandchild in another session that ignores all but SIGKILL."""

    def __init__(self, folder: Path, how: str = "polite", wrap: Callable[[list[str]], list[str]] = list) -> None:
        script, pids = folder / "family.py", folder / "pids"
        script.write_text(FAMILY)
        command = [sys.executable, "-m", "deployments.launch.processes", sys.executable, str(script), how, str(pids)]
        self.top = subprocess.Popen(wrap(command), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not pids.exists():
            assert time.monotonic() < deadline, "the family did not start"
            time.sleep(0.05)
        self.pids = [int(pid) for pid in pids.read_text().split()]
        self.command = self.pids[0]

    def end(self) -> int:
        """The exit code, after all processes have ended."""
        code = self.top.wait(120)
        wait_until_gone(self.pids)
        return code


def wait_until_gone(pids: list[int], seconds: float = 30) -> None:
    """Whether none of these processes is left, other than as a zombie."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def start(*arguments: object) -> Family:
        families.append(Family(tmp_path, *arguments))  # type: ignore[arg-type]
        return families[-1]

    yield start
    for each in families:
        for pid in (*each.pids, each.top.pid):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        each.top.wait(30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all(family: Callable[..., Family], number: signal.Signals) -> None:
    running = family()
    running.top.send_signal(number)
    assert running.end() == 128 + number


def test_a_terminals_ctrl_c_ends_all(family: Callable[..., Family]) -> None:
    running = family()
    os.killpg(running.top.pid, signal.SIGINT)
    assert running.end() == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_alone_takes_all_along(family: Callable[..., Family], number: signal.Signals) -> None:
    running = family()
    os.kill(running.command, number)
    assert running.end() == 128 + number


def test_a_command_that_ends_by_itself_keeps_its_exit_code(family: Callable[..., Family]) -> None:
    assert family("ends").end() == 3


def test_more_signals_end_a_command_that_does_not_listen(family: Callable[..., Family]) -> None:
    running = family("deaf")
    for _ in range(3):
        running.top.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert running.end() == 143


def test_a_command_dies_with_the_process_that_watches_it(family: Callable[..., Family]) -> None:
    running = family()
    running.top.kill()
    wait_until_gone([running.command])


@pytest.mark.parametrize("whose", ["outer", "inner"])
def test_of_two_that_watch_either_ends_all_when_the_other_is_killed(family: Callable[..., Family], whose: str) -> None:
    def twice(command: list[str]) -> list[str]:
        return [*command[:3], *command]

    running = family("polite", twice)
    (inner,) = psutil.Process(running.top.pid).children()
    (running.top if whose == "outer" else inner).kill()
    wait_until_gone([*running.pids, inner.pid], 60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_parent_ends_all_where_it_is_asked_for(
    family: Callable[..., Family], number: signal.Signals
) -> None:
    def below_another(command: list[str]) -> list[str]:
        program = f"""
import subprocess, sys
code = "import sys; from deployments.launch.processes import supervise; supervise(sys.argv[1:], ends_with_parent=True)"
subprocess.run([sys.executable, "-c", code, *{command[3:]!r}])
"""
        return [sys.executable, "-c", program]

    running = family("polite", below_another)
    running.top.send_signal(number)
    running.end()


def test_signals_that_a_shell_made_its_background_jobs_ignore_count(family: Callable[..., Family]) -> None:
    def ignoring(command: list[str]) -> list[str]:
        program = "import os, signal, sys; signal.signal(2, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
        return [sys.executable, "-c", program, *command]

    running = family("polite", ignoring)
    running.top.send_signal(signal.SIGINT)
    assert running.end() == 130
