"""Tests of the HTTP application with an echoing engine, and of the whole application with a small random model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports Ray: a local cluster must neither read nor write a token in the user's home.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
# By default Ray's workers have a lower priority than other processes, and run into timeouts on a busy machine.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import openai
import pytest
from byte_tokenizer import EOS, NUM_TOKENS, save_byte_tokenizer
from echo_engine import EchoEngine
from http_server import Server, running_server

from dspark_ray.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(directory)
    return Tokenizer.from_directory(Path(directory))


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine(NUM_TOKENS, EOS)


@pytest.fixture(scope="session")
def shared_server(tokenizer: Tokenizer) -> Iterator[Server]:
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS)) as running:
        yield running


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server, reset after the test."""
    yield shared_server
    shared_server.client.reset()
    shared_server.engine.reset()


@pytest.fixture
def echo(server: Server) -> EchoEngine:
    """The engine behind the server."""
    return server.engine


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as api:
        yield api
