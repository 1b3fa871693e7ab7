"""Run client libraries and schemathesis against a server: `make test-clients`, or with --url against one that runs.

The clients live in a virtual environment of their own, .build/clients; without --url the server is the application on
an engine that echoes, without Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".build" / "clients"
CLIENTS = ("openai", "litellm", "langchain", "agents", "llm")
START_SECONDS = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(CLIENTS)} and schemathesis (default: all)")
    parser.add_argument("--url", help="of a running server (default: start one that echoes)")
    parser.add_argument("--model", default="echo", help="the model it serves (default: %(default)s)")
    parser.add_argument("--api-key", default="key", help="default: %(default)s")
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis, per route (default: %(default)s)")
    arguments = parser.parse_args()
    python = installed()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(echo_server(arguments.api_key))
        environment = {
            **os.environ,
            "DSPARK_URL": url,
            "DSPARK_MODEL": arguments.model,
            "DSPARK_KEY": arguments.api_key,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "HOME": stack.enter_context(tempfile.TemporaryDirectory()),
        }
        names = arguments.names or [*CLIENTS, "schemathesis"]
        results = {name: run(python, name, environment, arguments.examples) for name in names}
    for name, passed in results.items():
        print(f"{name:14}{'passed' if passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


def installed() -> Path:
    """The interpreter of the clients' environment, which is created if it is missing or older than requirements.txt."""
    requirements, stamp = HERE / "requirements.txt", ENVIRONMENT / "installed"
    python = ENVIRONMENT / "bin" / "python"
    if not stamp.exists() or stamp.stat().st_mtime < requirements.stat().st_mtime:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.touch()
    return python


@contextlib.contextmanager
def echo_server(api_key: str) -> Iterator[str]:
    """The URL of the HTTP application on an echoing engine, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, HERE / "serve_echo.py", api_key], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            deadline = time.monotonic() + START_SECONDS
            while not is_ready(url):
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def run(python: Path, name: str, environment: dict[str, str], examples: int) -> bool:
    """Whether the checks of one client pass."""
    print(f"--- {name}", flush=True)
    command: list[str | Path] = [python, HERE / f"try_{name}.py"]
    if name == "schemathesis":
        command = [
            python.with_name("schemathesis"),
            *("--config-file", HERE / "schemathesis.toml"),
            *("run", f"{environment['DSPARK_URL']}/openapi.json"),
            *("--header", f"Authorization: Bearer {environment['DSPARK_KEY']}"),
            *("--max-examples", str(examples)),
        ]
    return subprocess.run(command, env=environment, cwd=environment["HOME"], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
