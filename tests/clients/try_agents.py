"""openai-agents without tools: two turns of one agent, whole and streamed."""

import asyncio
import os

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{os.environ['DSPARK_URL']}/v1", api_key=os.environ["DSPARK_KEY"], max_retries=0)
agent = Agent(
    name="counter",
    instructions="Be brief.",
    model=OpenAIChatCompletionsModel(model=os.environ["DSPARK_MODEL"], openai_client=client),
    model_settings=ModelSettings(max_tokens=8),
)


async def main() -> None:
    first = await Runner.run(agent, "What is 1 + 1?")
    assert first.final_output
    second = Runner.run_streamed(agent, [*first.to_input_list(), {"role": "user", "content": "And 2 + 2?"}])
    kinds = [event.type async for event in second.stream_events()]
    assert "raw_response_event" in kinds
    assert second.final_output


asyncio.run(main())
print("openai-agents")
