"""langchain-openai: a history of message objects, streaming, a batch."""

import os

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

options = {
    "model": os.environ["DSPARK_MODEL"],
    "base_url": f"{os.environ['DSPARK_URL']}/v1",
    "api_key": os.environ["DSPARK_KEY"],
    "max_tokens": 8,
    "max_retries": 0,
}
chat = ChatOpenAI(**options)
history = [SystemMessage("Be brief.")]
for question in ("What is 1 + 1?", "And 2 + 2?"):
    history.append(HumanMessage(question, name="bob"))
    history.append(chat.invoke(history))
history.append(HumanMessage([{"type": "text", "text": "Thanks."}]))

pieces = list(chat.stream(history, stream_usage=True))
assert "".join(piece.text for piece in pieces)
whole = pieces[0]
for piece in pieces[1:]:
    whole += piece
assert whole.usage_metadata["output_tokens"] >= 1
assert chat.invoke([*history, whole, HumanMessage("Bye.")]).text
assert len(chat.batch(["one", "two"])) == 2
assert OpenAI(**options).invoke("abc")
print("langchain-openai")
