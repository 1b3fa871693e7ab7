"""The channel between replica and rank 0, and the step loop at its other end, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import zmq
from echo_engine import EchoEngine
from http_server import running_loop

from deployments.channel import EngineChannel
from deployments.messages import MAX_STEPS, Failed, Outputs, Refusal, SetPolicy, Submit, decode, encode
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
        yield channel
        listening.cancel()


def request(request_id: str, max_tokens: int = 9) -> Request:
    return Request(request_id=request_id, prompt_token_ids=(5, 6, 7, 8), sampling=SamplingParams(max_tokens=max_tokens))


async def tokens_of(channel: EngineChannel, request: Request) -> list[int]:
    return [token async for output in channel.generate(request) for token in output.token_ids]


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


async def test_failing_all_ends_every_stream_with_an_error(channel, engine):
    engine.step_gate.clear()
    outputs = channel.generate(request("lost"))
    waiting = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    channel.fail_all("the gang died")
    assert (await waiting).error == "the gang died"
    engine.step_gate.set()


async def test_an_idle_loop_is_heard(channel):
    await asyncio.sleep(0.1)
    silence = channel.seconds_of_silence
    await until(lambda: channel.seconds_of_silence < silence)


async def test_a_policy_reaches_an_idle_engine(channel, engine):
    channel.set_policy(VerificationPolicy(confidence_threshold=0.5, bypass=True, version=7, valid_seconds=3.5))
    await until(lambda: engine.policies)
    assert engine.policies == [VerificationPolicy(confidence_threshold=0.5, bypass=True, version=7, valid_seconds=3.5)]


async def test_a_policy_reaches_a_running_engine_before_its_requests_end(channel, engine):
    async with aclosing(channel.generate(request("long", 10_000))) as outputs:
        await anext(outputs)
        channel.set_policy(VerificationPolicy(bypass=True))
        await until(lambda: channel.steps(1)[0].bypass == "policy")


async def test_records_of_the_latest_steps_are_kept_in_order(channel):
    assert channel.steps(3) == []
    await tokens_of(channel, request("whole", 12))
    assert [step.step for step in channel.steps(100)] == [0, 1, 2, 3]
    assert [step.step for step in channel.steps(2)] == [2, 3]


async def test_no_more_records_are_kept_than_allowed(channel):
    with zmq.Context() as context, context.socket(zmq.PUSH) as rank_0:
        rank_0.set_hwm(0)
        rank_0.connect(channel.outputs_address)
        for step in range(MAX_STEPS + 10):
            rank_0.send(encode(Outputs(step=StepOutput(record=record(step)))))
        await until(lambda: channel.steps(1) == [record(MAX_STEPS + 9)])
    assert [step.step for step in channel.steps(2 * MAX_STEPS)] == list(range(10, MAX_STEPS + 10))


async def test_a_step_in_which_nothing_ran_leaves_no_record(channel):
    with zmq.Context() as context, context.socket(zmq.PUSH) as rank_0:
        rank_0.connect(channel.outputs_address)
        rank_0.send(encode(Outputs(step=StepOutput())))
        rank_0.send(encode(Outputs(step=StepOutput(record=record(0)))))
        await until(lambda: channel.steps(5))
    assert channel.steps(5) == [record(0)]


async def test_garbage_on_the_port_is_ignored(channel):
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.connect(channel.outputs_address)
        stranger.send(b"not a message")
        stranger.send(encode(Failed(message="still listening")))
        await until(lambda: channel.failure == "still listening")


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
