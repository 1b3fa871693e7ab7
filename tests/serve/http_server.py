"""The HTTP application and the channel without Ray: a server on the loopback interface, the step loop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
import zmq
from byte_tokenizer import BOS
from echo_engine import EchoEngine

from deployments.http.interfaces import ControllerClient, EngineBusy
from deployments.http.resubmission import ResubmissionPolicy
from deployments.http.routes import build_http
from deployments.http.service import Service
from deployments.replica.channel import MAX_FRAMES, EngineChannel
from deployments.replica.messages import EngineEvent, EngineLost, Ready, StepLog, encode
from deployments.replica.workers import StepLoop
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import Request, SequenceOutput, VerificationPolicy

MAX_MODEL_LEN = 256

HTTP = httpx.Client(verify=False, timeout=60)
"""One client for all tests, because each new client loads the machine's certificates."""


@contextlib.contextmanager
def running_loop(
    engine: EchoEngine,
    channel: EngineChannel,
    closes: bool = False,
    says_ready: bool = True,
    max_frames: int = MAX_FRAMES,
) -> Iterator[threading.Thread]:
    """Rank 0's step loop on the other end of the channel; ends when the channel is closed.

    With `closes` its end of the channel closes with the loop, as where the process of rank 0 ends.
    """
    context = zmq.Context()
    rank_0 = context.socket(zmq.PAIR)
    rank_0.set_hwm(max_frames)
    rank_0.connect(channel.address)
    if says_ready:
        rank_0.send(encode(Ready(gamma=5, num_pages=1)))

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            StepLoop(engine, rank_0).run()
        if closes:
            context.destroy(linger=100)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        channel.close()
        thread.join(10)
        context.destroy(linger=0)


class ChannelClient:
    """An EngineClient in this process; `faults` are raised instead of, or in the middle of, answers."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self.reset()

    def reset(self) -> None:
        self.healthy = True
        self.trials: list[bool] = []
        """`on_trial` of each attempt."""
        self.health_gate = threading.Event()
        """Cleared while calls of `is_healthy` hang."""
        self.health_gate.set()
        self.is_busy = False
        self.failure: Exception | None = None
        """Raised instead of an answer."""
        self.late_failure: Exception | None = None
        """Raised after the first output."""
        self.num_losses = 0
        """The number of further streams that break."""
        self.tokens_before_loss = 1
        """Tokens after which a stream breaks, counted from its submission to this engine."""

    async def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        if self.is_busy:
            raise EngineBusy("too many queued requests")
        if self.failure is not None:
            raise self.failure
        self.trials.append(on_trial)
        num_tokens = 0
        async with contextlib.aclosing(self._channel.generate(request, on_trial)) as events:
            async for event in events:
                yield event
                num_tokens += len(event.token_ids) if isinstance(event, SequenceOutput) else 0
                if self.late_failure is not None and num_tokens:
                    raise self.late_failure
                if self.num_losses > 0 and num_tokens >= self.tokens_before_loss:
                    self.num_losses -= 1
                    raise EngineLost("lost on purpose")

    async def is_healthy(self) -> bool:
        while not self.health_gate.is_set():
            await asyncio.sleep(0.05)
        return self.healthy

    async def steps(self, last: int) -> StepLog:
        return StepLog("only", self._channel.steps(last))

    async def set_policy(self, policy: VerificationPolicy) -> str:
        if self.is_busy:
            raise EngineBusy("too many queued requests")
        self._channel.set_policy(policy)
        return "only"


@dataclass
class Server:
    """A running server and its parts."""

    url: str
    engine: EchoEngine
    client: ChannelClient
    tokenizer: Tokenizer


@contextlib.contextmanager
def running_server(
    tokenizer: Tokenizer, engine: EchoEngine, controller: ControllerClient | None = None, **options: Any
) -> Iterator[Server]:
    """Serve HTTP on a free port until the block ends; `options` are more fields of the Service."""
    started: list[Server] = []
    is_up, stop = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_serve(tokenizer, engine, controller, options, started, is_up.set, stop)),
        daemon=True,
    )
    thread.start()
    assert is_up.wait(20), "the server did not start"
    try:
        yield started[0]
    finally:
        stop.set()
        thread.join(20)


async def _serve(
    tokenizer: Tokenizer,
    engine: EchoEngine,
    controller: ControllerClient | None,
    options: dict[str, Any],
    started: list[Server],
    on_up: Callable[[], None],
    stop: threading.Event,
) -> None:
    channel = EngineChannel()
    client = ChannelClient(channel)
    service = Service(
        client=client,
        controller=controller,
        tokenizer=tokenizer,
        model_name="echo",
        max_model_len=MAX_MODEL_LEN,
        gamma=5,
        bos_token_id=BOS,
        resubmission=ResubmissionPolicy(max_losses=2, deadline_seconds=2),
        **options,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_http(service), log_level="warning", lifespan="off"))
    with running_loop(engine, channel):
        listening = asyncio.create_task(channel.listen())
        serving = asyncio.create_task(server.serve([listener]))
        started.append(Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, client, tokenizer))
        while not server.started:
            await asyncio.sleep(0.01)
        on_up()
        while not stop.is_set():
            await asyncio.sleep(0.05)
        server.should_exit = True
        await serving
        listening.cancel()
