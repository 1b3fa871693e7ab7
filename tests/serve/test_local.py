"""`make serve`: refusals before anything starts, and no processes left when it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray_application import free_port, wait_until
from test_processes import ROOT, is_running, wait_until_gone

from deployments.launch import local, ports
from deployments.launch.ports import PortError, check_free, check_not_shared, listeners

pytestmark = pytest.mark.ray

HELLO = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: hello
    import_path: hello:app
    route_prefix: /
"""

APPLICATION = "applications: [{{name: a, import_path: 'deployments.app:build', args: {{{args}}}}}]"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that shares its port as Serve's proxies do (SO_REUSEPORT)."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


# --- ports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_refused_with_its_user(listener, host):
    port = port_of(listener)
    with pytest.raises(PortError) as caught:
        check_free(host, port)
    assert f"http_options.port={port}: process {os.getpid()} (" in str(caught.value)
    assert "stop it, or set another port in the YAML file" in str(caught.value)


def test_a_port_is_free_again_when_its_user_has_gone(listener):
    port = port_of(listener)
    with socket.create_connection(("127.0.0.1", port)):
        connection, _ = listener.accept()
        connection.close()  # The server's side closes first, and the port stays in TIME_WAIT.
    listener.close()
    check_free("127.0.0.1", port)


def test_an_address_of_another_machine_is_named():
    with pytest.raises(PortError, match=r"cannot listen on 192\.0\.2\.1:"):
        check_free("192.0.2.1", free_port())


def cluster(monkeypatch: pytest.MonkeyPatch, port: int, *proxies: int) -> None:
    """A cluster that serves this port, with these processes as its proxies."""
    client = SimpleNamespace(http_config=SimpleNamespace(host="127.0.0.1", port=port))
    actors = {str(pid): {"Pid": pid, "ActorClassName": "ProxyActor"} for pid in proxies}
    actors["other"] = {"Pid": os.getpid() + 1, "ActorClassName": "ServeReplica:app:Engine"}
    monkeypatch.setattr(ports.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ports, "_get_global_client", lambda **_: client)
    monkeypatch.setattr(ports.state, "actors", lambda: actors)


def test_an_application_does_not_share_its_port_with_another_cluster(listener, monkeypatch):
    assert listeners(port_of(listener)) == [os.getpid()]
    cluster(monkeypatch, port_of(listener), os.getpid())
    check_not_shared()
    cluster(monkeypatch, port_of(listener))
    with pytest.raises(PortError, match=f"http_options.port={port_of(listener)}: process {os.getpid()}"):
        check_not_shared()


def test_without_serve_there_is_no_port_to_share():
    check_not_shared()


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], config: Path, locks: Path) -> str:
    assert local.main([str(config), "--locks", str(locks)]) == 2
    return capsys.readouterr().err


def test_a_port_in_use_starts_nothing(listener, tmp_path, capsys):
    config = write(tmp_path, HELLO.format(port=port_of(listener)))
    assert f"{config}: http_options.port={port_of(listener)}: process" in refused(capsys, config, tmp_path)


def test_a_second_one_in_a_checkout_starts_nothing(tmp_path, capsys):
    port = free_port()
    config = write(tmp_path, HELLO.format(port=port))
    with local.only_one(tmp_path, port):
        error = refused(capsys, config, tmp_path)
    assert f"this checkout serves port {port} already (process {os.getpid()}): end that one first" in error
    with local.only_one(tmp_path, port):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("applications: [", "expected"),
        ("[]", "config.yaml"),
        (APPLICATION.format(args="modle: tiny"), "modle"),
        (APPLICATION.format(args="model: tiny, health: {peer_timeout_s: .inf}"), "health.peer_timeout_s"),
        ("applications: 3", "applications"),
    ],
)
def test_a_bad_file_starts_nothing(tmp_path, capsys, text, expected):
    assert expected in refused(capsys, write(tmp_path, text), tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert "No such file" in refused(capsys, tmp_path / "nothing.yaml", tmp_path)


# --- with Ray -----------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path: those of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def make_serve(folder: Path, port: int, **options: object) -> subprocess.Popen[bytes]:
    """`make serve` below a shell, in a session of its own."""
    config = write(folder, HELLO.format(port=port))
    tests = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"), tests)),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    installed = f"{sys.prefix}/.installed"
    command = f"make serve VENV={sys.prefix} -o {installed} CONFIG={config}; exit $?"
    return subprocess.Popen(["sh", "-c", command], cwd=ROOT, env=environment, start_new_session=True, **options)


def below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(processes: list[psutil.Process], *words: str) -> psutil.Process | None:
    """The last process whose command line has these words; supervising processes have them too."""
    for process in reversed(processes):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if all(word in line for word in words):
            return process
    return None


# One of each kind; test_processes.py has more, without Ray.
WAYS = {
    "Ctrl-C in the terminal": (None, signal.SIGINT),
    "SIGTERM to make": ("make serve", signal.SIGTERM),
    "SIGKILL to the launcher": ("-m deployments.launch.local", signal.SIGKILL),
}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str, temporary: Path) -> None:
    port = free_port()
    shell = make_serve(temporary, port)
    top = psutil.Process(shell.pid)
    try:
        wait_until(lambda: answers(port), 240)
        family = below(top)
        for name in ("raylet", "gcs_server", "ServeController", "ServeReplica", "ProxyActor"):
            assert named(family, name), name
        second = make_serve(temporary, port, stderr=subprocess.PIPE)
        assert b"this checkout serves port" in second.communicate(timeout=120)[1]
        assert second.returncode != 0
        whom, number = WAYS[way]
        if whom is None:
            os.killpg(shell.pid, number)
        else:
            chosen = named(family, whom)
            assert chosen is not None
            chosen.send_signal(number)
        shell.wait(120)
        wait_until_gone([process.pid for process in family], 60)
    finally:
        for process in [*below(top), *(family if "family" in locals() else [])]:
            if is_running(process.pid):
                process.kill()
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait(30)


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.settimeout(5)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"hello" in connection.makefile("rb").read()
    except OSError:
        time.sleep(0.2)
        return False
