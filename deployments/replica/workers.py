"""The actors of one gang. Each runs one long task; when that returns or raises, the gang is lost."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import time
from typing import Any, Protocol

import ray
import zmq
from pydantic import ValidationError

from autoscale.signals import Place
from deployments.replica.channel import MAX_FRAMES
from deployments.replica.messages import (
    Abort,
    Accepted,
    Failed,
    FromRank0,
    Heartbeat,
    Outputs,
    Ready,
    Refusal,
    RefusalReason,
    SetPolicy,
    Shutdown,
    Submit,
    decode,
    encode,
    request_id_of,
)
from dspark_ray.types import QueueFullError, Request, RequestError, StepOutput, VerificationPolicy

logger = logging.getLogger("ray.serve")

HEARTBEAT_SECONDS = 1.0
_FLUSH_MILLISECONDS = 1000


class SteppingEngine(Protocol):
    """The part of dspark_ray.engine.step_loop.Engine that the step loop uses."""

    def add_request(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def apply_policy(self, policy: VerificationPolicy) -> None: ...

    def has_unfinished(self) -> bool: ...

    def step(self) -> StepOutput: ...

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...


class ReplicaSilent(Exception):
    """The Engine replica neither sends nor reads messages: its process or its event loop is blocked."""


class StepLoop:
    """Runs an engine behind a channel until Shutdown arrives."""

    def __init__(self, engine: SteppingEngine, channel: zmq.Socket, max_silence_seconds: float = math.inf) -> None:
        """`channel` is a connected PAIR socket. ReplicaSilent is raised after `max_silence_seconds` without a message
        from the replica."""
        self._engine, self._channel = engine, channel
        self._max_silence = max_silence_seconds
        if math.isfinite(max_silence_seconds):
            channel.sndtimeo = int(max_silence_seconds * 1000)
        self._closed = False
        self._sent_at = self._heard_at = time.monotonic()

    def run(self) -> None:
        """Step while there are requests, otherwise wait for messages. An exception is reported and raised again.

        Raises ReplicaSilent.
        """
        try:
            while not self._closed:
                self._read_frames()
                if self._engine.has_unfinished():
                    self._send(Outputs(step=self._engine.step()))
                elif time.monotonic() - self._sent_at >= HEARTBEAT_SECONDS:
                    self._engine.keep_alive()
                    self._send(Heartbeat())
            self._engine.close()
        except ReplicaSilent:
            raise
        except Exception as error:
            # The error matters more than a failure to send it.
            with contextlib.suppress(zmq.ZMQError, ReplicaSilent):
                self._send(Failed(message=f"{type(error).__name__}: {error}"))
            raise

    def _read_frames(self) -> None:
        """Handle all frames that have arrived; wait for one only when there is nothing to step."""
        if not self._engine.has_unfinished():
            self._channel.poll(int(HEARTBEAT_SECONDS * 1000))
        while not self._closed and self._channel.poll(0):
            self._heard_at = time.monotonic()
            self._handle(self._channel.recv())
        if time.monotonic() - self._heard_at > self._max_silence:
            raise ReplicaSilent(f"the replica was silent for {self._max_silence:.0f} s")

    def _handle(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except ValidationError as error:
            self._refuse_frame(frame, error)
            return
        if isinstance(message, Submit):
            self._submit(message.request)
        elif isinstance(message, Abort):
            self._engine.abort(message.request_id)
        elif isinstance(message, SetPolicy):
            self._engine.apply_policy(message.policy)
        elif isinstance(message, Shutdown):
            self._closed = True

    def _submit(self, request: Request) -> None:
        """Add a request; an exception refuses this request only."""
        try:
            self._engine.add_request(request)
        except RequestError as error:
            self._refuse(request.request_id, "invalid", str(error), error.param)
        except QueueFullError as error:
            self._refuse(request.request_id, "queue_full", str(error))
        except Exception as error:
            logger.exception("request %s could not be added", request.request_id)
            self._refuse(request.request_id, "failed", f"{type(error).__name__}: {error}")
        else:
            self._send(Accepted(request_id=request.request_id))

    def _refuse_frame(self, frame: bytes, error: ValidationError) -> None:
        request_id = request_id_of(frame)
        logger.error("a frame is not a message (request %s): %s", request_id, error)
        if request_id is not None:
            cause = error.errors()[0].get("ctx", {}).get("error")
            if isinstance(cause, RequestError):
                self._refuse(request_id, "invalid", str(cause), cause.param)
            else:
                self._refuse(request_id, "failed", f"the request could not be decoded: {error}")

    def _refuse(self, request_id: str, reason: RefusalReason, message: str, param: str | None = None) -> None:
        self._send(Refusal(request_id=request_id, reason=reason, message=message, param=param))

    def _send(self, message: FromRank0) -> None:
        try:
            self._channel.send(encode(message))
        except zmq.Again:
            raise ReplicaSilent(f"the replica read no messages for {self._max_silence:.0f} s") from None
        self._sent_at = time.monotonic()


class ReplicaProcess:
    """The process of the Engine replica, identified so that a reused process id cannot be mistaken for it."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except OSError as error:  # Some containers forbid the call.
            logger.warning("a hanging replica cannot be killed from here: %s", error)

    def kill(self) -> None:
        """Kill it, even if it is stopped by a signal. Ray then ends its actors, and Serve starts another replica."""
        if self._descriptor is not None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


def _log_profiling(num_done: int, num_sizes: int) -> None:
    """Log the progress of cost profiling at its start and after each quarter."""
    if num_done == 0 or 4 * num_done // num_sizes > 4 * (num_done - 1) // num_sizes:
        logger.info("profiling step costs: %d of %d sizes", num_done, num_sizes)


def _set_num_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)


class _Worker:
    """What all members of a gang have in common: they import torch before torch.distributed's timeouts begin."""

    def __init__(self, num_threads: int | None) -> None:
        """`num_threads` are torch's threads on a CPU; None leaves its default."""
        self._num_threads = num_threads

    def prepare(self) -> Place:
        """Import torch, which takes seconds; returns where this actor runs."""
        import dspark_ray.ranks.gang  # noqa: F401

        _set_num_threads(self._num_threads)
        context = ray.get_runtime_context()
        accelerators = named_by_driver(tuple(context.get_accelerator_ids()["GPU"]))
        return Place(node_id=context.get_node_id(), accelerators=accelerators)


def named_by_driver(accelerators: tuple[str, ...]) -> tuple[str, ...]:
    """NVML's UUIDs of the GPUs that Ray calls `accelerators` and that this process sees.

    Ray numbers GPUs as CUDA does, the fastest first, and NVML by PCI address, so on a node with different GPUs the same
    number can mean another one. Names that are not numbers, as those of MIG instances, are returned unchanged.
    """
    import torch

    if not all(name.isdigit() for name in accelerators) or not torch.cuda.is_available():
        return accelerators
    if torch.cuda.device_count() != len(accelerators):
        return accelerators
    uuids = (str(torch.cuda.get_device_properties(index).uuid) for index in range(len(accelerators)))
    return tuple(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in uuids)


class VerifierWorker(_Worker):
    """One tensor-parallel rank of the target; rank 0 also runs the step loop.

    `spec` holds the fields of dspark_ray.ranks.gang.GangSpec, whose module imports torch.
    """

    def meeting_point(self) -> str:
        """An address with a free port of this node, at which torch.distributed connects the ranks."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return f"tcp://{address}:{free.getsockname()[1]}"

    def lead(self, spec: dict[str, Any], address: str, replica_pid: int, max_silence_seconds: float) -> None:
        """Run as rank 0 until the replica sends Shutdown; `address` is the replica's channel.

        A replica that is silent for longer than `max_silence_seconds` is killed: Serve would stop it gracefully, which
        takes as long as the longest answer.
        """
        from dspark_ray.ranks.gang import GangSpec, join_as_leader, leave_gang

        replica = ReplicaProcess(replica_pid)
        engine = join_as_leader(GangSpec(**spec), _log_profiling)
        context = zmq.Context()
        channel = context.socket(zmq.PAIR)
        channel.set_hwm(MAX_FRAMES)
        channel.connect(address)
        channel.send(encode(Ready(gamma=engine.gamma, num_pages=engine.scheduler.pool.num_pages)))
        try:
            StepLoop(engine, channel, max_silence_seconds).run()
        except ReplicaSilent as error:
            logger.critical("%s: it is killed", error)
            replica.kill()
            raise
        finally:
            context.destroy(linger=_FLUSH_MILLISECONDS)
        leave_gang()

    def follow(self, spec: dict[str, Any], rank: int) -> None:
        """Run as one of the other ranks until rank 0 ends."""
        from dspark_ray.ranks.gang import GangSpec, join_as_follower, leave_gang

        join_as_follower(GangSpec(**spec), rank).run()
        leave_gang()


class DrafterWorker(_Worker):
    """The draft module, in an actor of its own."""

    def draft(self, spec: dict[str, Any]) -> None:
        """Answer draft requests until rank 0 ends."""
        from dspark_ray.ranks.gang import GangSpec, join_as_drafter, leave_gang

        join_as_drafter(GangSpec(**spec)).run()
        leave_gang()
