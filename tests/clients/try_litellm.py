"""litellm: a conversation by its own message objects, whole and streamed."""

import os

import litellm

options = {
    "model": f"openai/{os.environ['DSPARK_MODEL']}",
    "api_base": f"{os.environ['DSPARK_URL']}/v1",
    "api_key": os.environ["DSPARK_KEY"],
    "max_tokens": 8,
    "num_retries": 0,
}
messages = [{"role": "system", "content": "Be brief."}]
for question in ("What is 1 + 1?", "And 2 + 2?"):
    messages.append({"role": "user", "content": question})
    answer = litellm.completion(messages=messages, **options)
    assert answer.usage.completion_tokens >= 1
    messages.append(answer.choices[0].message)
messages.append({"role": "user", "content": [{"type": "text", "text": "Hm.", "cache_control": {"type": "ephemeral"}}]})

chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **options))
whole = litellm.stream_chunk_builder(chunks, messages=messages)
assert whole.choices[0].message.content
messages += [whole.choices[0].message, {"role": "user", "content": "Bye."}]
assert litellm.completion(messages=messages, **options).choices[0].finish_reason in ("stop", "length")
text = litellm.text_completion(prompt="abc", **(options | {"model": f"text-completion-{options['model']}"}))
assert text.choices[0].text
try:
    litellm.completion(messages=[{"role": "user", "content": "a" * 1_000_000}], **options)
except litellm.ContextWindowExceededError as error:
    print(type(error).__name__)
else:
    raise AssertionError("a prompt that cannot fit was accepted")
print("litellm")
