"""Checks that an HTTP port is free: Serve's proxies would share it silently with other processes that listen on it."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import ray
from ray._private import state
from ray.serve.context import _get_global_client

_HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_ALL = ("0.0.0.0", "::")


class PortError(RuntimeError):
    """A port that cannot be used; the message has the reason and a remedy."""


def check_free(host: str, port: int) -> None:
    """Raise PortError where this process could not listen, or another process listens already."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise PortError(f"http_options.host={host!r}: {error.strerror}") from None
    taken = [found for found in _listening(port) if _overlap(found.laddr.ip, {str(info[4][0]) for info in infos})]
    if taken:
        raise PortError(_taken(host, port, [found.pid for found in taken if found.pid]))
    family, _, _, _, address = infos[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As Serve's proxies bind, so that closing connections of an earlier one do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise PortError(f"http_options: cannot listen on {host}:{port}: {error.strerror}") from None


def check_not_shared() -> None:
    """Raise PortError where a process of another cluster listens on this cluster's HTTP port, on this node.

    Called when an application is built; this cluster's own proxies listen by then.
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
    """Ids of the processes that listen on this TCP port, as far as this user may see them."""
    return sorted({found.pid for found in _listening(port) if found.pid})


def _listening(port: int) -> list[Any]:
    """psutil's connections; `pid` is None for a process of another user."""
    return [
        connection
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]


def _overlap(listening: str, wanted: set[str]) -> bool:
    """Whether a listener on address `listening` receives requests to one of the `wanted` addresses."""
    return listening in wanted or listening in _ALL or not wanted.isdisjoint(_ALL)


def _taken(host: str, port: int, pids: list[int]) -> str:
    owner = f"process {pids[0]} ({_command(pids[0])})" if pids else "another process"
    return (
        f"http_options.port={port}: {owner} listens on {host}:{port} already, and requests could go to either: stop it,"
        f" or set another port in the YAML file"
    )


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:80] or "?"
    except psutil.Error:
        return "?"
