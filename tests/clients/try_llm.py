"""The `llm` command: a prompt with a system prompt, and a second one that continues the conversation."""

import os
import subprocess
import sys
from pathlib import Path

folder = Path(os.environ["HOME"], "llm")
folder.mkdir(parents=True, exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: dspark\n  model_name: {os.environ['DSPARK_MODEL']}\n  api_base: {os.environ['DSPARK_URL']}/v1\n"
    f"  api_key_name: dspark\n"
)


def llm(*arguments: str) -> str:
    command = [Path(sys.executable).with_name("llm"), *arguments]
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


llm("keys", "set", "dspark", "--value", os.environ["DSPARK_KEY"])
assert llm("-m", "dspark", "-s", "Be brief.", "-o", "max_tokens", "8", "What is 1 + 1?").strip()
assert llm("-c", "-o", "max_tokens", "8", "And 2 + 2?").strip()
assert llm("-m", "dspark", "--no-stream", "-o", "max_tokens", "8", "-o", "seed", "7", "Bye.").strip()
print("llm")
