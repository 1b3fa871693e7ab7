"""The replica's end of the channel to rank 0: one stream in, one stream per request out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator

import zmq
import zmq.asyncio
from pydantic import ValidationError

from deployments.messages import (
    MAX_STEPS,
    Abort,
    Close,
    Failed,
    Message,
    Outputs,
    Ready,
    Refusal,
    SetPolicy,
    Submit,
    decode,
    encode,
)
from dspark_ray.types import Request, SequenceOutput, StepOutput, StepRecord, VerificationPolicy

logger = logging.getLogger("ray.serve")

_FLUSH_MILLISECONDS = 1000


class Observer:
    """Who wants to know what passes overrides what it wants to know."""

    def on_request(self, num_prompt_tokens: int) -> None:
        """A request was submitted."""

    def on_first_token(self, seconds: float) -> None:
        """A request has its first token, so long after it was submitted."""

    def on_step(self, step: StepOutput) -> None:
        """The engine made a step."""


class EngineChannel:
    """Demultiplexes rank 0's outputs to the requests that wait for them.

    The replica and rank 0 share a node (bundle 0), so both sockets are bound on its loopback.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._context = zmq.Context()
        self._from_rank_0 = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._to_rank_0 = self._context.socket(zmq.PUSH)
        for socket in (self._from_rank_0, self._to_rank_0):
            socket.set_hwm(0)
        self.outputs_address = _bind(self._from_rank_0)
        self.requests_address = _bind(self._to_rank_0)
        self._queues: dict[str, asyncio.Queue[SequenceOutput | Refusal]] = {}
        self._records: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self._heard_at = time.monotonic()
        self.ready = asyncio.Event()
        self.failure: str | None = None
        """Why the step loop raised, once it has."""

    @property
    def seconds_of_silence(self) -> float:
        """Since rank 0 last said something; it speaks at least once per step and once a second when idle."""
        return time.monotonic() - self._heard_at

    async def listen(self) -> None:
        """Hand out what comes, for ever."""
        while True:
            frame = await self._from_rank_0.recv()
            self._heard_at = time.monotonic()
            try:
                self._hand_out(decode(frame))
            except ValidationError:
                logger.exception("a frame that is not a message was ignored")

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput | Refusal]:
        """Outputs until one has a finish_reason, or one Refusal; closing it early aborts the request."""
        queue: asyncio.Queue[SequenceOutput | Refusal] = asyncio.Queue()
        self._queues[request.request_id] = queue
        started, has_token, has_ended = time.monotonic(), False, False
        self._send(Submit(request=request))
        for observer in self._observers:
            observer.on_request(len(request.prompt_token_ids))
        try:
            while not has_ended:
                output = await queue.get()
                has_ended = isinstance(output, Refusal) or output.finish_reason is not None
                if not has_token and isinstance(output, SequenceOutput):
                    has_token = True
                    for observer in self._observers:
                        observer.on_first_token(time.monotonic() - started)
                yield output
        finally:
            del self._queues[request.request_id]
            if not has_ended:
                self._send(Abort(request_id=request.request_id))

    def steps(self, last: int) -> list[StepRecord]:
        """Records of the latest steps, at most `last` of the MAX_STEPS that are kept, oldest first."""
        return list(self._records)[-last:]

    def set_policy(self, policy: VerificationPolicy) -> None:
        """Let `policy` bound what is verified from the next step on; its time runs from when rank 0 gets it."""
        self._send(SetPolicy(policy=policy))

    def fail_all(self, error: str) -> None:
        """End every request in flight."""
        for request_id, queue in self._queues.items():
            queue.put_nowait(SequenceOutput(request_id=request_id, finish_reason="error", error=error))

    def close(self) -> None:
        """Ask rank 0 to end the gang; nothing can be sent or heard afterwards."""
        self._send(Close())
        self._from_rank_0.close()
        self._to_rank_0.close(linger=_FLUSH_MILLISECONDS)
        self._context.term()

    def _send(self, message: Message) -> None:
        # Without a high-water mark this never blocks.
        self._to_rank_0.send(encode(message))

    def _hand_out(self, message: Message) -> None:
        if isinstance(message, Outputs):
            if message.step.record is not None:
                self._records.append(message.step.record)
            for observer in self._observers:
                observer.on_step(message.step)
            for output in message.step.sequences:
                self._put(output)
        elif isinstance(message, Refusal):
            self._put(message)
        elif isinstance(message, Ready):
            logger.info("engine ready: gamma=%d, num_pages=%d", message.gamma, message.num_pages)
            self.ready.set()
        elif isinstance(message, Failed):
            self.failure = message.message

    def _put(self, output: SequenceOutput | Refusal) -> None:
        queue = self._queues.get(output.request_id)
        if queue is not None:  # Else its reader has left.
            queue.put_nowait(output)


def _bind(socket: zmq.Socket) -> str:
    return f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
