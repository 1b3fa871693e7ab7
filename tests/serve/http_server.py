"""The ingress and the engine's channel without Ray: HTTP on the loopback, the step loop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

import uvicorn
import zmq
from byte_tokenizer import BOS
from echo_engine import EchoEngine

from deployments.admin import ControllerClient
from deployments.channel import EngineChannel
from deployments.generation import EngineBusy, EngineLost
from deployments.ingress import Service, build_http
from deployments.messages import Refusal, StepLog
from deployments.workers import StepLoop
from dspark_ray.tokenizer import Tokenizer
from dspark_ray.types import Request, SequenceOutput, VerificationPolicy

MAX_MODEL_LEN = 256


@contextlib.contextmanager
def running_loop(engine: EchoEngine, channel: EngineChannel) -> Iterator[threading.Thread]:
    """Rank 0's step loop on the other end of the channel; ends when the channel is closed."""
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(channel.requests_address)
    outbox.connect(channel.outputs_address)
    thread = threading.Thread(target=_run_quietly, args=(StepLoop(engine, inbox, outbox),), daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        channel.close()
        thread.join(10)
        context.destroy(linger=0)


def _run_quietly(loop: StepLoop) -> None:
    with contextlib.suppress(RuntimeError):
        loop.run()


class ChannelClient:
    """An EngineClient in this process; `faults` are raised instead of, or in the middle of, answers."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self.reset()

    def reset(self) -> None:
        self.healthy = True
        self.is_busy = False
        self.num_losses = 0
        """How many streams still break off after their first output."""

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput | Refusal]:
        if self.is_busy:
            raise EngineBusy("too many queued requests")
        async with contextlib.aclosing(self._channel.generate(request)) as outputs:
            async for output in outputs:
                yield output
                if self.num_losses > 0:
                    self.num_losses -= 1
                    raise EngineLost("lost on purpose")

    async def is_healthy(self) -> bool:
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
    """What a test may touch."""

    url: str
    engine: EchoEngine
    client: ChannelClient
    tokenizer: Tokenizer


@contextlib.contextmanager
def running_server(
    tokenizer: Tokenizer, engine: EchoEngine, controller: ControllerClient | None = None
) -> Iterator[Server]:
    """Serve HTTP on a free port until the block ends."""
    started: list[Server] = []
    is_up, stop = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_serve(tokenizer, engine, controller, started, is_up.set, stop)), daemon=True
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
        max_resubmissions=2,
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
