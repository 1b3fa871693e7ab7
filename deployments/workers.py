"""The actors of one gang: each is one long `run`, whose end is its death."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any, Protocol

import ray
import zmq
from pydantic import ValidationError

from autoscale.signals import Place
from deployments.messages import (
    Abort,
    Close,
    Failed,
    FromRank0,
    Heartbeat,
    Outputs,
    Ready,
    Refusal,
    RefusalReason,
    SetPolicy,
    Submit,
    decode,
    encode,
)
from dspark_ray.types import QueueFullError, Request, RequestError, StepOutput, VerificationPolicy

logger = logging.getLogger("ray.serve")

HEARTBEAT_SECONDS = 1.0
_FLUSH_MILLISECONDS = 1000


class SteppingEngine(Protocol):
    """What the step loop needs of an engine; `dspark_ray.engine.Engine` is the real one."""

    def add_request(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def apply_policy(self, policy: VerificationPolicy) -> None: ...

    def has_unfinished(self) -> bool: ...

    def step(self) -> StepOutput: ...

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...


class StepLoop:
    """Runs an engine between two sockets until told to close."""

    def __init__(self, engine: SteppingEngine, inbox: zmq.Socket, outbox: zmq.Socket) -> None:
        self._engine, self._inbox, self._outbox = engine, inbox, outbox
        self._closed = False
        self._spoke_at = time.monotonic()

    def run(self) -> None:
        """Step while there is work, else sleep on the inbox; an exception is reported and raised again."""
        try:
            while not self._closed:
                self._read_inbox()
                if self._engine.has_unfinished():
                    self._send(Outputs(step=self._engine.step()))
                elif time.monotonic() - self._spoke_at >= HEARTBEAT_SECONDS:
                    self._engine.keep_alive()
                    self._send(Heartbeat())
            self._engine.close()
        except Exception as error:
            self._send(Failed(message=f"{type(error).__name__}: {error}"))
            raise

    def _read_inbox(self) -> None:
        """Take everything that has arrived; wait for it only when there is nothing to step."""
        if not self._engine.has_unfinished():
            self._inbox.poll(int(HEARTBEAT_SECONDS * 1000))
        while not self._closed and self._inbox.poll(0):
            self._obey(self._inbox.recv())

    def _obey(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except ValidationError:
            logger.exception("a frame that is not a message was ignored")
            return
        if isinstance(message, Submit):
            self._submit(message.request)
        elif isinstance(message, Abort):
            self._engine.abort(message.request_id)
        elif isinstance(message, SetPolicy):
            self._engine.apply_policy(message.policy)
        elif isinstance(message, Close):
            self._closed = True

    def _submit(self, request: Request) -> None:
        try:
            self._engine.add_request(request)
        except RequestError as error:
            self._refuse(request, "invalid", str(error), error.param)
        except QueueFullError as error:
            self._refuse(request, "queue_full", str(error))

    def _refuse(self, request: Request, reason: RefusalReason, message: str, param: str | None = None) -> None:
        self._send(Refusal(request_id=request.request_id, reason=reason, message=message, param=param))

    def _send(self, message: FromRank0) -> None:
        self._outbox.send(encode(message))
        self._spoke_at = time.monotonic()


def _log_profiling(num_done: int, num_sizes: int) -> None:
    """Say how far the profiling of costs is, at its start and after each quarter."""
    if num_done == 0 or 4 * num_done // num_sizes > 4 * (num_done - 1) // num_sizes:
        logger.info("profiling what steps cost: %d of %d sizes", num_done, num_sizes)


def _set_num_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)


class _Worker:
    """What every member of a gang does before the clocks of torch.distributed start."""

    def __init__(self, num_threads: int | None) -> None:
        """`num_threads` are torch's threads on a CPU; None leaves its default."""
        self._num_threads = num_threads

    def prepare(self) -> Place:
        """Import torch, which takes seconds, and say where this is."""
        import dspark_ray.runtime  # noqa: F401

        _set_num_threads(self._num_threads)
        context = ray.get_runtime_context()
        return Place(node_id=context.get_node_id(), accelerators=tuple(context.get_accelerator_ids()["GPU"]))


class VerifierWorker(_Worker):
    """One tensor-parallel rank of the target; rank 0 also runs the step loop.

    `spec` holds the fields of dspark_ray.runtime.GangSpec, whose module imports torch.
    """

    def meeting_point(self) -> str:
        """A free port of this node, where torch.distributed can meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return f"tcp://{address}:{free.getsockname()[1]}"

    def lead(self, spec: dict[str, Any], inbox_address: str, outbox_address: str) -> None:
        """Be rank 0 until the replica says Close; the addresses are where the replica listens."""
        from dspark_ray.runtime import GangSpec, join_as_leader, leave_gang

        engine = join_as_leader(GangSpec(**spec), _log_profiling)
        context = zmq.Context()
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        outbox.set_hwm(0)
        inbox.connect(inbox_address)
        outbox.connect(outbox_address)
        outbox.send(encode(Ready(gamma=engine.gamma, num_pages=engine.scheduler.pool.num_pages)))
        try:
            StepLoop(engine, inbox, outbox).run()
        finally:
            context.destroy(linger=_FLUSH_MILLISECONDS)
        leave_gang()

    def follow(self, spec: dict[str, Any], rank: int) -> None:
        """Be one of the other ranks until rank 0 closes."""
        from dspark_ray.runtime import GangSpec, join_as_follower, leave_gang

        join_as_follower(GangSpec(**spec), rank).run()
        leave_gang()


class DrafterWorker(_Worker):
    """The draft module, in an actor of its own."""

    def draft(self, spec: dict[str, Any]) -> None:
        """Answer draft requests until rank 0 closes."""
        from dspark_ray.runtime import GangSpec, join_as_drafter, leave_gang

        join_as_drafter(GangSpec(**spec)).run()
        leave_gang()
