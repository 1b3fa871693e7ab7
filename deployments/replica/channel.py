"""The replica's end of the channel to rank 0, which sorts its outputs by request."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

import zmq
import zmq.asyncio

from deployments.replica.messages import (
    MAX_STEPS,
    Abort,
    Accepted,
    ChannelMessage,
    EngineEvent,
    EngineLost,
    Failed,
    Outputs,
    Ping,
    Ready,
    Refusal,
    SetPolicy,
    Shutdown,
    Submit,
    decode,
    encode,
)
from deployments.replica.suspects import TrialQueue
from dspark_ray.types import Request, SequenceOutput, StepOutput, StepRecord, VerificationPolicy

logger = logging.getLogger("ray.serve")

MAX_FRAMES = 1000
"""Capacity of the queue in each direction. Rank 0 reads all frames that have arrived once per step. It waits for a
replica that is this many steps behind."""
PING_SECONDS = 1.0
_MAX_UNREAD = 16
_FLUSH_MILLISECONDS = 1000


class Observer:
    """Callbacks for channel traffic; subclasses override the ones they need."""

    def on_request(self, num_prompt_tokens: int) -> None:
        """A request was submitted."""

    def on_first_token(self, seconds: float) -> None:
        """A request has its first token, `seconds` after it was submitted."""

    def on_step(self, step: StepOutput) -> None:
        """The engine has finished a step."""


class EngineChannel:
    """Sends requests to rank 0 and hands its outputs to the generators that wait for them.

    The replica and rank 0 run on the same node (bundle 0) as the same user. They connect over a Unix socket in a folder
    that only this user may enter; the folder is removed once rank 0 has connected. A PAIR socket has a single peer.
    Nothing here blocks the event loop: a frame that cannot be queued at once is not sent.
    """

    def __init__(self, *observers: Observer, max_frames: int = MAX_FRAMES) -> None:
        self._observers = observers
        self._directory = tempfile.mkdtemp(prefix="dspark-")  # mode 0700
        self.address = f"ipc://{Path(self._directory, 'rank0')}"
        """The address to which rank 0 connects a PAIR socket."""
        self._context = zmq.asyncio.Context()
        self._rank_0 = self._context.socket(zmq.PAIR)
        self._rank_0.set_hwm(max_frames)
        self._rank_0.bind(self.address)
        self._readers: dict[str, _Reader] = {}
        self._trials = TrialQueue(self._submit)
        self._unsent_aborts: deque[Abort] = deque()
        self._records: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self._heard_at = self._pinged_at = time.monotonic()
        self._closed = False
        self.ready = asyncio.Event()
        self.failure: str | None = None
        """The message of the exception that the step loop raised; None while it has not."""
        self.lost: str | None = None
        """Why rank 0 is lost; None while it is not."""
        self.num_observer_errors = 0

    @property
    def seconds_of_silence(self) -> float:
        """Since the last frame of rank 0, which sends one per step, and one per second while idle."""
        return time.monotonic() - self._heard_at

    @property
    def seconds_without_ping(self) -> float:
        """Since `ping` last ran; more than a few mean that the event loop is blocked."""
        return time.monotonic() - self._pinged_at

    async def listen(self) -> None:
        """Hand out frames as they arrive, until cancelled.

        Raises pydantic.ValidationError for a frame that is not a message: tokens may have been lost with it.
        """
        while True:
            frame = await self._rank_0.recv()
            self._heard_at = time.monotonic()
            self._hand_out(decode(frame))

    async def ping(self) -> None:
        """Send rank 0 a Ping once a second, until cancelled."""
        while True:
            self._pinged_at = time.monotonic()
            self._send(Ping())
            await asyncio.sleep(PING_SECONDS)

    async def generate(self, request: Request, on_trial: bool = False) -> AsyncGenerator[EngineEvent]:
        """Yields Accepted and then outputs until one has a finish_reason, or a single Refusal.

        Closing the generator early aborts the request. With `on_trial` the request waits until no other suspect is in
        the engine. Raises EngineLost.
        """
        if self.lost is not None:
            raise EngineLost(self.lost)
        reader = self._readers[request.request_id] = _Reader()
        started, has_token = time.monotonic(), False
        if on_trial:
            self._trials.add(request)
        else:
            self._submit(request)
        try:
            while not reader.has_ended:
                event = await reader.next()
                if not has_token and isinstance(event, SequenceOutput):
                    has_token = True
                    self._observe(lambda observer: observer.on_first_token(time.monotonic() - started))
                yield event
        finally:
            del self._readers[request.request_id]
            if reader.is_submitted and not reader.has_ended:
                self._abort(request.request_id)
            self._trials.remove(request.request_id)

    def steps(self, last: int) -> list[StepRecord]:
        """At most `last` of the latest step records, oldest first; MAX_STEPS are kept."""
        return list(self._records)[-last:]

    def set_policy(self, policy: VerificationPolicy) -> None:
        """Apply `policy` from the next step on; its valid_seconds begin when rank 0 receives it.

        Raises EngineLost where the message cannot be sent.
        """
        if self.lost is not None or not self._send(SetPolicy(policy=policy)):
            raise EngineLost(self.lost or "rank 0 accepts no messages")

    def lose(self, reason: str) -> None:
        """End all streams with EngineLost, and every later one at once."""
        self.lost = reason
        for request_id, reader in self._readers.items():
            reader.put(EngineLost(reason, reader.is_submitted, self._trials.is_trying(request_id)))

    async def until_all_read(self) -> None:
        """Wait until every stream has been read to its end."""
        while self._readers:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Tell rank 0 to end the gang, and close the socket. A second call does nothing."""
        if self._closed:
            return
        is_sent = self._send(Shutdown())
        self._closed = True
        self._rank_0.close(linger=_FLUSH_MILLISECONDS if is_sent else 0)
        self._context.term()
        self._remove_directory()

    def _submit(self, request: Request) -> None:
        reader = self._readers[request.request_id]
        if self.lost is not None or not self._send(Submit(request=request)):
            reader.put(EngineLost(self.lost or "rank 0 accepts no messages"))
            return
        reader.is_submitted = True
        self._observe(lambda observer: observer.on_request(len(request.prompt_token_ids)))

    def _abort(self, request_id: str) -> None:
        self._unsent_aborts.append(Abort(request_id=request_id))
        self._send_aborts()

    def _send_aborts(self) -> None:
        while self._unsent_aborts and self._try_to_send(self._unsent_aborts[0]):
            self._unsent_aborts.popleft()

    def _send(self, message: ChannelMessage) -> bool:
        """Whether the message was queued; false where rank 0 has disconnected or its queue is full."""
        self._send_aborts()
        return not self._unsent_aborts and self._try_to_send(message)

    def _try_to_send(self, message: ChannelMessage) -> bool:
        if self._closed:
            return False
        error = self._rank_0.send(encode(message), zmq.DONTWAIT).exception()
        if error is not None and not isinstance(error, zmq.Again):
            raise error
        return error is None

    def _hand_out(self, message: ChannelMessage) -> None:
        if isinstance(message, Outputs):
            self._hand_out_step(message.step)
        elif isinstance(message, Accepted | Refusal):
            self._put(message)
        elif isinstance(message, Ready):
            logger.info("engine ready: gamma=%d, num_pages=%d", message.gamma, message.num_pages)
            self._remove_directory()
            self.ready.set()
        elif isinstance(message, Failed):
            self.failure = message.message

    def _hand_out_step(self, step: StepOutput) -> None:
        if step.record is not None:
            self._records.append(step.record)
        for output in step.sequences:
            self._put(output)
        self._observe(lambda observer: observer.on_step(step))

    def _put(self, event: EngineEvent) -> None:
        reader = self._readers.get(event.request_id)
        if reader is not None:  # Otherwise the caller has disconnected.
            reader.put(event)
        self._trials.on_event(event)

    def _observe(self, notify: Callable[[Observer], None]) -> None:
        """Call all observers; their exceptions are logged and counted, and affect no request."""
        for observer in self._observers:
            try:
                notify(observer)
            except Exception:
                self.num_observer_errors += 1
                if self.num_observer_errors == 1:
                    logger.exception("%s failed; later failures are counted only", type(observer).__name__)

    def _remove_directory(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


class _Reader:
    """The unread events of one request, at most _MAX_UNREAD + 1.

    Further outputs are joined to the last one, so that memory for a slow reader grows with its tokens and not with the
    number of steps.
    """

    def __init__(self) -> None:
        self.is_submitted = False
        self.has_ended = False
        """Whether the final event has been read."""
        self._events: deque[EngineEvent | EngineLost] = deque()
        self._is_filled = asyncio.Event()

    def put(self, event: EngineEvent | EngineLost) -> None:
        last = self._events[-1] if len(self._events) >= _MAX_UNREAD else None
        if isinstance(last, SequenceOutput) and isinstance(event, SequenceOutput):
            self._events[-1] = joined(last, event)
        else:
            self._events.append(event)
        self._is_filled.set()

    async def next(self) -> EngineEvent:
        """Raises EngineLost."""
        await self._is_filled.wait()
        event = self._events.popleft()
        if not self._events:
            self._is_filled.clear()
        if isinstance(event, EngineLost):
            self.has_ended = True
            raise event
        self.has_ended = _ends(event)
        return event


def joined(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two outputs of one request as one."""
    return replace(second, token_ids=first.token_ids + second.token_ids, logprobs=first.logprobs + second.logprobs)


def _ends(event: EngineEvent) -> bool:
    return isinstance(event, Refusal) or (isinstance(event, SequenceOutput) and event.finish_reason is not None)
