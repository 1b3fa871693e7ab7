"""Whether an HTTP port is taken. Serve's proxies share a port silently, with those of any other application on it."""

from __future__ import annotations

import errno
import os
import socket

import psutil
import ray
from ray._private import state
from ray.serve.context import _get_global_client

_HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_CONFLICTS = (errno.EADDRINUSE,)


class PortError(RuntimeError):
    """A port that cannot be used; the message says why, and what to do."""


def check_free(host: str, port: int) -> None:
    """Raise PortError where this process could not be the only one that listens there."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections that are still closing do not matter; without SO_REUSEPORT a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in _CONFLICTS:
                raise PortError(_taken(host, port, listeners(port))) from None
            raise PortError(f"http_options: cannot listen on {host}:{port}: {error.strerror}") from None


def check_not_shared() -> None:
    """Raise PortError where a process that is not of this cluster listens on its HTTP port, on this node.

    Called where an application is built, when this cluster's own proxies listen already.
    """
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None or os.environ.get(_HA_PROXY) == "1":
        return
    port = client.http_config.port
    proxies = {actor["Pid"] for actor in state.actors().values() if actor["ActorClassName"] == "ProxyActor"}
    others = [pid for pid in listeners(port) if pid not in proxies]
    if others:
        raise PortError(_taken(client.http_config.host, port, others))


def listeners(port: int) -> list[int]:
    """Ids of the processes that listen on this TCP port, of those that this user may look into."""
    found = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid
    }
    return sorted(found)


def _taken(host: str, port: int, pids: list[int]) -> str:
    owner = f"process {pids[0]} ({_command(pids[0])})" if pids else "another process"
    return (
        f"http_options.port={port}: {owner} listens on {host}:{port} already, and requests would go to either: stop it,"
        f" or set another port in the YAML file"
    )


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:80] or "?"
    except psutil.Error:
        return "?"
