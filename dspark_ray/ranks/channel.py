"""Messages between the processes of a gang, over torch.distributed on the CPU.

One collective per message in the common case: a fixed first frame carries the length and as much as fits.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

_FRAME_BYTES = 16384
_LENGTH_BYTES = 8


def _pack(message: Any) -> tuple[Tensor, Tensor | None]:
    """The first frame, and the rest where the message is longer."""
    data = pickle.dumps(message, protocol=5)
    payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
    frame[:_LENGTH_BYTES] = torch.tensor([len(data)]).view(torch.uint8)
    room = _FRAME_BYTES - _LENGTH_BYTES
    frame[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = payload[:room]
    return frame, payload[room:] if len(data) > room else None


def _rest_bytes(frame: Tensor) -> int:
    length = int(frame[:_LENGTH_BYTES].view(torch.int64))
    return max(0, length - (_FRAME_BYTES - _LENGTH_BYTES))


def _unpack(frame: Tensor, rest: Tensor | None) -> Any:
    length = int(frame[:_LENGTH_BYTES].view(torch.int64))
    data = frame[_LENGTH_BYTES:] if rest is None else torch.cat((frame[_LENGTH_BYTES:], rest))
    # Both ends are processes of one gang, so the bytes come from this program.
    return pickle.loads(data[:length].numpy().tobytes())


def limit_silence(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """From now on a collective of `group` (gloo or NCCL) fails when it takes longer than `timeout`.

    Messages of a `Pair` have a timeout of their own: gloo waits for them with the timeout that the group was made with.
    """
    _set_pg_timeout(timeout, group)


class Broadcast:
    """Messages from rank 0 of a group to all others."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def send(self, message: Any) -> None:
        frame, rest = _pack(message)
        dist.broadcast(frame, src=0, group=self._group)
        if rest is not None:
            dist.broadcast(rest, src=0, group=self._group)

    def receive(self) -> Any:
        frame = torch.empty(_FRAME_BYTES, dtype=torch.uint8)
        dist.broadcast(frame, src=0, group=self._group)
        rest = None
        if _rest_bytes(frame):
            rest = torch.empty(_rest_bytes(frame), dtype=torch.uint8)
            dist.broadcast(rest, src=0, group=self._group)
        return _unpack(frame, rest)


class Pair:
    """Messages between two processes; each end has the other's world rank."""

    def __init__(self, peer: int) -> None:
        self._peer = peer
        self.timeout: timedelta | None = None
        """Timeout of sending or receiving a message; None is the world's timeout."""

    def send(self, message: Any) -> None:
        frame, rest = _pack(message)
        self._wait(dist.isend(frame, self._peer))
        if rest is not None:
            self._wait(dist.isend(rest, self._peer))

    def receive(self) -> Any:
        frame = torch.empty(_FRAME_BYTES, dtype=torch.uint8)
        self._wait(dist.irecv(frame, self._peer))
        rest = None
        if _rest_bytes(frame):
            rest = torch.empty(_rest_bytes(frame), dtype=torch.uint8)
            self._wait(dist.irecv(rest, self._peer))
        return _unpack(frame, rest)

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None, "both processes belong to the world"
        if self.timeout is None:
            work.wait()
        else:
            work.wait(self.timeout)
