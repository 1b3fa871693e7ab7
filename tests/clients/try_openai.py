"""OpenAI's own client: the loop of a chat by message objects, streams, every form of completion, errors."""

import os

import openai

MODEL = os.environ["DSPARK_MODEL"]
client = openai.OpenAI(
    base_url=f"{os.environ['DSPARK_URL']}/v1", api_key=os.environ["DSPARK_KEY"], max_retries=0, timeout=120
)

messages = [{"role": "developer", "content": "Be brief."}]
for question in ("What is 1 + 1?", "And 2 + 2?", "Thanks."):
    messages.append({"role": "user", "content": question})
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
    messages.append(answer.choices[0].message)
assert len(messages) == 7

with client.chat.completions.stream(model=MODEL, messages=messages, max_tokens=8) as stream:
    kinds = [event.type for event in stream]
assert "content.delta" in kinds

chunks = list(
    client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        user="somebody",
        store=False,
    )
)
assert chunks[-1].usage.completion_tokens >= 1

told = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, temperature=1.0)
again = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, temperature=1.0, seed=told.metrics["seed"])
assert again.choices[0].text == told.choices[0].text
assert told._request_id

assert client.models.list().data[0].id == MODEL
for fields, wrong in (({"top_k": 2**63}, "top_k"), ({"max_tokens": 10**9}, "max_tokens")):
    extra = {"extra_body": fields} if wrong == "top_k" else fields
    try:
        client.completions.create(model=MODEL, prompt="abc", **extra)
    except openai.BadRequestError as error:
        assert error.param == wrong, error
    else:
        raise AssertionError(f"{fields} was accepted")
try:
    client.with_options(api_key="wrong").models.list()
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key", error
print("openai", openai.__version__)
