"""The HTTP application on the echoing engine of tests/serve, on a free port, until the process is terminated."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))

from byte_tokenizer import EOS, NUM_TOKENS, save_byte_tokenizer
from echo_engine import EchoEngine
from http_server import running_server
from test_admin import LocalController

from dspark_ray.text.tokenizer import Tokenizer

if __name__ == "__main__":
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with tempfile.TemporaryDirectory() as folder:
        save_byte_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_directory(folder)
    keys = {"api_keys": sys.argv[1:], "admin_api_keys": sys.argv[1:]}
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), LocalController(), **keys) as server:
        print(server.url, flush=True)
        stop.wait()
