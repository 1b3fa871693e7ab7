"""The channel between replica and rank 0, and the step loop at its other end, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest
import zmq
from echo_engine import EchoEngine
from http_server import running_loop
from pydantic import ValidationError

from deployments.replica.channel import EngineChannel, Observer
from deployments.replica.messages import (
    MAX_STEPS,
    TRIAL_TOKENS,
    Accepted,
    EngineEvent,
    EngineLost,
    Outputs,
    Refusal,
    SetPolicy,
    Shutdown,
    Submit,
    decode,
    encode,
)
from deployments.replica.workers import StepLoop
from dspark_ray.types import (
    Request,
    SamplingParams,
    SequenceOutput,
    SpeculationStats,
    StepOutput,
    StepRecord,
    TokenLogprobs,
    VerificationPolicy,
)


@pytest.fixture
async def channel(engine: EchoEngine) -> AsyncIterator[EngineChannel]:
    channel = EngineChannel()
    listening = asyncio.create_task(channel.listen())
    with running_loop(engine, channel):
        await until(channel.ready.is_set)
        yield channel
        listening.cancel()


def request(request_id: str, max_tokens: int = 9) -> Request:
    return Request(request_id=request_id, prompt_token_ids=(5, 6, 7, 8), sampling=SamplingParams(max_tokens=max_tokens))


async def tokens_of(channel: EngineChannel, request: Request) -> list[int]:
    return [token async for event in channel.generate(request) for token in getattr(event, "token_ids", ())]


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        ended_at=1.7e9,
        num_decoding=3,
        num_prefill_rows=4,
        bypass=None,
        lengths=(5, 0, 2),
        accepted=(3, 0, 2),
        expected=5.5,
        gamma=5,
        calibration_error=(0.125, None),
    )


@contextmanager
def faulthandler_exits_after(seconds: float) -> Iterator[None]:
    """Ends the process with the stacks of all threads: nothing else ends a blocked event loop."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_get_their_own_outputs_in_order(channel):
    texts = await asyncio.gather(*(tokens_of(channel, request(f"r{n}", 4 + n)) for n in range(8)))
    assert texts == [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7][: 4 + n] for n in range(8)]


async def test_closing_a_stream_early_aborts_its_sequence(channel, engine):
    async with aclosing(channel.generate(request("left", 10_000))) as outputs:
        await anext(outputs)
    await until(lambda: engine.aborted == ["left"])


async def test_a_cancelled_reader_aborts_its_sequence(channel, engine):
    reader = asyncio.create_task(tokens_of(channel, request("cancelled", 10_000)))
    await until(engine.has_unfinished)
    reader.cancel()
    await until(lambda: engine.aborted == ["cancelled"])


async def test_a_finished_stream_aborts_nothing(channel, engine):
    await tokens_of(channel, request("whole"))
    await tokens_of(channel, request("another"))
    assert engine.aborted == []


async def test_a_refusal_is_the_only_output(channel, engine):
    engine.max_requests = 0
    outputs = [output async for output in channel.generate(request("refused"))]
    assert outputs == [Refusal(request_id="refused", reason="queue_full", message="0 requests are waiting")]


async def test_an_exception_in_the_step_loop_is_reported(channel, engine):
    engine.breaks = True
    reader = asyncio.create_task(tokens_of(channel, request("lost")))
    await until(lambda: channel.failure is not None)
    reader.cancel()
    assert channel.failure == "RuntimeError: the engine broke on purpose"


async def test_losing_the_gang_ends_every_stream_now_and_later(channel, engine):
    engine.step_gate.clear()
    reader = asyncio.create_task(tokens_of(channel, request("lost")))
    await until(engine.has_unfinished)
    channel.lose("the gang died")
    engine.step_gate.set()
    with pytest.raises(EngineLost, match="the gang died") as caught:
        await reader
    assert caught.value.in_flight
    with pytest.raises(EngineLost) as caught:
        await tokens_of(channel, request("late"))
    assert not caught.value.in_flight
    with pytest.raises(EngineLost):
        channel.set_policy(VerificationPolicy())


@pytest.fixture
async def dead_channel(engine: EchoEngine) -> AsyncIterator[EngineChannel]:
    """A channel whose rank 0 has raised and closed its end, unknown to the replica."""
    channel = EngineChannel()
    listening = asyncio.create_task(channel.listen())
    engine.breaks = True
    with running_loop(engine, channel, closes=True) as thread:
        await until(channel.ready.is_set)
        reader = asyncio.create_task(tokens_of(channel, request("in flight")))
        await until(lambda: not thread.is_alive())
        await asyncio.sleep(0.1)
        yield channel
        reader.cancel()
        listening.cancel()


async def test_what_is_sent_to_a_rank_0_that_has_gone_does_not_block(dead_channel):
    # A blocked event loop could not enforce a timeout, so a thread does.
    with faulthandler_exits_after(20):
        with pytest.raises(EngineLost, match="rank 0 accepts no messages") as caught:
            await tokens_of(dead_channel, request("late"))
        assert not caught.value.in_flight
        with pytest.raises(EngineLost):
            dead_channel.set_policy(VerificationPolicy())
        beating = asyncio.create_task(dead_channel.ping())
        await asyncio.sleep(0.05)
        assert not beating.done()
        beating.cancel()
        dead_channel.close()


async def test_what_a_busy_rank_0_does_not_read_is_bounded_and_nothing_is_forgotten(engine):
    channel = EngineChannel(max_frames=4)
    listening = asyncio.create_task(channel.listen())
    with faulthandler_exits_after(60), running_loop(engine, channel, max_frames=4):
        await until(channel.ready.is_set)
        engine.step_gate.clear()
        first = asyncio.create_task(tokens_of(channel, request("first", 10_000)))
        await until(engine.has_unfinished)
        await asyncio.sleep(0.1)  # the loop is in the step, and reads nothing until it ends
        readers = [asyncio.create_task(tokens_of(channel, request(f"r{n}", 8))) for n in range(500)]
        await until(lambda: any(reader.done() for reader in readers))
        lost = [reader for reader in readers if reader.done()]
        assert all(isinstance(reader.exception(), EngineLost) for reader in lost)
        assert not any(reader.exception().in_flight for reader in lost)
        first.cancel()
        await asyncio.wait([first])
        engine.step_gate.set()
        engine.max_requests = 1000
        await asyncio.gather(*(reader for reader in readers if reader not in lost))
        channel.set_policy(VerificationPolicy(version=3))  # sends what could not be sent before
        await until(lambda: engine.aborted == ["first"])
        listening.cancel()


async def test_a_slow_reader_keeps_its_tokens_in_few_outputs(channel, engine):
    events = channel.generate(request("slow", 900))
    accepted = await anext(events)
    assert accepted == Accepted(request_id="slow")
    await until(lambda: not engine.has_unfinished())
    await asyncio.sleep(0.2)
    outputs = [event async for event in events]
    assert len(outputs) < 30
    assert sum((output.token_ids for output in outputs), ()) == ((5, 6, 7, 8) * 225)
    assert outputs[-1].finish_reason == "length"


async def test_an_idle_loop_is_heard(channel):
    await asyncio.sleep(0.1)
    silence = channel.seconds_of_silence
    await until(lambda: channel.seconds_of_silence < silence)


async def test_a_policy_reaches_an_idle_engine(channel, engine):
    channel.set_policy(VerificationPolicy(confidence_threshold=0.5, bypass=True, version=7, valid_seconds=3.5))
    await until(lambda: engine.policies)
    assert engine.policies == [VerificationPolicy(confidence_threshold=0.5, bypass=True, version=7, valid_seconds=3.5)]


async def test_a_policy_reaches_a_running_engine_before_its_requests_end(channel, engine):
    async with aclosing(channel.generate(request("long", 10_000))) as events:
        await anext(events)
        await until(lambda: channel.steps(1))
        channel.set_policy(VerificationPolicy(bypass=True))
        await until(lambda: channel.steps(1)[0].bypass == "policy")


async def test_records_of_the_latest_steps_are_kept_in_order(channel):
    assert channel.steps(3) == []
    await tokens_of(channel, request("whole", 12))
    assert [step.step for step in channel.steps(100)] == [0, 1, 2, 3]
    assert [step.step for step in channel.steps(2)] == [2, 3]


@contextmanager
def rank_0_of(channel: EngineChannel) -> Iterator[zmq.Socket]:
    """Rank 0's end of the channel, for a test."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as rank_0:
        rank_0.sndtimeo, rank_0.rcvtimeo, rank_0.linger = 10_000, 10_000, 0
        rank_0.connect(channel.address)
        yield rank_0


@pytest.fixture
async def listening_channel() -> AsyncIterator[EngineChannel]:
    """A channel with the test in the role of rank 0."""
    channel = EngineChannel()
    listening = asyncio.create_task(channel.listen())
    yield channel
    listening.cancel()
    channel.close()


async def test_no_more_records_are_kept_than_allowed(listening_channel):
    with rank_0_of(listening_channel) as rank_0:
        for step in range(MAX_STEPS + 10):
            await asyncio.to_thread(rank_0.send, encode(Outputs(step=StepOutput(record=record(step)))))
        await until(lambda: listening_channel.steps(1) == [record(MAX_STEPS + 9)])
    assert [step.step for step in listening_channel.steps(2 * MAX_STEPS)] == list(range(10, MAX_STEPS + 10))


async def test_a_step_in_which_nothing_ran_leaves_no_record(listening_channel):
    with rank_0_of(listening_channel) as rank_0:
        rank_0.send(encode(Outputs(step=StepOutput())))
        rank_0.send(encode(Outputs(step=StepOutput(record=record(0)))))
        await until(lambda: listening_channel.steps(5))
    assert listening_channel.steps(5) == [record(0)]


async def test_a_frame_that_is_no_message_ends_the_listener_with_its_reason():
    channel = EngineChannel()
    listening = asyncio.create_task(channel.listen())
    with rank_0_of(channel) as rank_0:
        rank_0.send(b"not a message")
        with pytest.raises(ValidationError):
            await asyncio.wait_for(listening, 10)
    channel.close()


async def test_a_frame_that_rank_0_cannot_decode_is_refused_by_its_id(engine):
    submit = json.loads(encode(Submit(request=request("r"))))
    submit["request"]["sampling"]["top_p"] = 7
    invalid = json.dumps(submit).encode()
    submit["request"]["sampling"] = "nothing"
    broken = json.dumps(submit).encode()
    with zmq.Context() as context, context.socket(zmq.PAIR) as replica, context.socket(zmq.PAIR) as rank_0:
        replica.rcvtimeo = 10_000
        rank_0.connect(f"tcp://127.0.0.1:{replica.bind_to_random_port('tcp://127.0.0.1')}")
        thread = threading.Thread(target=StepLoop(engine, rank_0).run)
        thread.start()
        for frame in (b"not a message", invalid, broken):
            replica.send(frame)
        first, second = (decode(replica.recv()) for _ in range(2))
        replica.send(encode(Shutdown()))
        thread.join(10)
    assert (first.request_id, first.reason, first.param) == ("r", "invalid", "top_p")
    assert (second.request_id, second.reason) == ("r", "failed")


async def test_what_adding_a_request_raises_refuses_that_request_alone(channel, engine):
    engine.chokes_on = "bad"
    outputs = [output async for output in channel.generate(request("bad"))]
    assert [(output.reason, output.message) for output in outputs] == [("failed", "RuntimeError: cannot add it")]
    assert await tokens_of(channel, request("good")) == [5, 6, 7, 8, 5, 6, 7, 8, 5]


async def test_an_observer_that_raises_costs_no_request(engine, caplog):
    class Broken(Observer):
        def on_step(self, step: StepOutput) -> None:
            raise ZeroDivisionError

        on_request = on_first_token = on_step

    channel = EngineChannel(Broken())
    listening = asyncio.create_task(channel.listen())
    with running_loop(engine, channel):
        await until(channel.ready.is_set)
        assert await tokens_of(channel, request("r", 6)) == [5, 6, 7, 8, 5, 6]
        assert channel.num_observer_errors >= 4
        listening.cancel()
    assert caplog.text.count("Broken failed") == 1


# Strangers: other users of the machine.


async def test_the_socket_is_in_a_folder_for_this_user_alone_and_gone_once_rank_0_is_there(engine):
    channel = EngineChannel()
    folder = Path(channel.address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    listening = asyncio.create_task(channel.listen())
    with running_loop(engine, channel):
        await until(channel.ready.is_set)
        assert not folder.exists()
        listening.cancel()


_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(sys.argv[1])
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_another_user_cannot_connect():
    channel = EngineChannel()
    path = channel.address.removeprefix("ipc://")
    stranger = [sys.executable, "-I", "-c", _STRANGER, path]
    answer = await asyncio.to_thread(subprocess.run, stranger, capture_output=True, text=True, timeout=60)
    channel.close()
    assert answer.stdout.strip() == "PermissionError", answer.stderr


async def test_a_second_peer_neither_reads_prompts_nor_forges_answers(engine):
    channel = EngineChannel()
    listening = asyncio.create_task(channel.listen())
    # After Ready, the folder would have been removed.
    with running_loop(engine, channel, says_ready=False), contextlib.ExitStack() as stack:
        await asyncio.sleep(0.1)
        silence = channel.seconds_of_silence
        await until(lambda: channel.seconds_of_silence < silence)
        stranger = stack.enter_context(rank_0_of(channel))
        readers = [asyncio.create_task(tokens_of(channel, request(f"r{n}", 400))) for n in range(10)]
        await until(lambda: len(engine.seen) == 10)
        forged = SequenceOutput(request_id="r0", token_ids=(66,), finish_reason="stop")
        with contextlib.suppress(zmq.Again):
            stranger.send(encode(Outputs(step=StepOutput(sequences=(forged,)))), zmq.DONTWAIT)
        assert await asyncio.gather(*readers) == [[5, 6, 7, 8] * 100] * 10
        assert not stranger.poll(300)
        listening.cancel()


# Suspects: requests that were in flight when an engine died.


async def test_suspects_run_one_at_a_time_and_others_beside_them(channel, engine):
    suspects = [channel.generate(request(f"suspect {n}", TRIAL_TOKENS - 1), on_trial=True) for n in range(3)]
    innocents = [channel.generate(request(f"innocent {n}", 100)) for n in range(2)]
    await asyncio.gather(*map(collect, suspects + innocents))
    assert engine.most_suspects == 1
    names = [seen.request_id for seen in engine.seen]
    assert [name for name in names if name.startswith("suspect")] == ["suspect 0", "suspect 1", "suspect 2"]
    # Other requests do not wait for suspects.
    assert names.index("innocent 1") < names.index("suspect 1")


async def test_a_suspect_that_goes_on_lets_the_next_one_in(channel, engine):
    long = channel.generate(request("long", 10_000), on_trial=True)
    await anext(long)
    short = asyncio.create_task(collect(channel.generate(request("short", 3), on_trial=True)))
    await short
    assert "long" in {running.request_id for running in engine.running}
    await long.aclose()


async def test_a_suspect_that_leaves_lets_the_next_one_in(channel, engine):
    engine.step_gate.clear()
    first = asyncio.create_task(collect(channel.generate(request("first"), on_trial=True)))
    await until(lambda: len(engine.seen) == 1)
    second = asyncio.create_task(collect(channel.generate(request("second"), on_trial=True)))
    third = asyncio.create_task(collect(channel.generate(request("third"), on_trial=True)))
    await asyncio.sleep(0.05)
    second.cancel()
    first.cancel()
    engine.step_gate.set()
    assert len(await third) > 1
    assert [seen.request_id for seen in engine.seen] == ["first", "third"]


async def test_a_suspect_that_still_waits_was_not_in_flight(channel, engine):
    engine.step_gate.clear()
    first = asyncio.create_task(collect(channel.generate(request("first"), on_trial=True)))
    second = asyncio.create_task(collect(channel.generate(request("second"), on_trial=True)))
    await until(lambda: len(engine.seen) == 1)
    channel.lose("the gang died")
    engine.step_gate.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [(result.in_flight, result.on_trial) for result in results] == [(True, True), (False, False)]


async def collect(events: AsyncGenerator[EngineEvent]) -> list[EngineEvent]:
    return [event async for event in events]


@pytest.mark.parametrize(
    "message",
    [
        Submit(
            request=Request(
                request_id="r",
                prompt_token_ids=(1, 2),
                sampling=SamplingParams(logit_bias={3: -1.5}, seed=-(2**63), stop=("é",), stop_token_ids=(4,)),
                output_token_ids=(7,),
            )
        ),
        Outputs(
            step=StepOutput(
                sequences=(
                    SequenceOutput(
                        request_id="r",
                        token_ids=(1,),
                        logprobs=(TokenLogprobs(1, -0.1, ((2, float("-inf")),)),),
                        finish_reason="stop",
                        stop_token_id=1,
                        stats=SpeculationStats(1, 2, 3, 4, (5, 6)),
                    ),
                ),
                record=record(9),
                num_running=2,
                cache_usage=0.5,
            )
        ),
        SetPolicy(policy=VerificationPolicy(confidence_threshold=0.25, max_draft_tokens=2, version=3)),
    ],
)
def test_a_message_survives_the_wire(message):
    assert decode(encode(message)) == message
