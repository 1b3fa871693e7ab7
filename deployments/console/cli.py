"""`dspark-ray`: generate text without Ray, inspect a checkpoint or a running server, or calibrate confidences.

Commands import what they need when they run, so that those that talk to a server start without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO, get_args

from deployments.console.client import ServerError, get_json
from dspark_ray.checkpoint.errors import CheckpointError
from dspark_ray.config import ConfigError, ScheduleKind
from dspark_ray.engine.records import explain, from_json
from dspark_ray.types import RequestError

_TIMEOUT_SECONDS = 30.0
_LIVE_TIMEOUT_SECONDS = 5.0
"""Of the live picture, which shows a server that hangs as stale."""
_MAX_THREADS = 1024
_MAX_INTERVAL_SECONDS = 86400.0
_CLI_PACKAGES = ("httpx", "rich")
"""The `cli` extra of pyproject.toml."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code.

    Bad input ends with 2 and one line on stderr with the expected value. Ctrl-C ends with 130, and a pipe that its
    reader has closed, as `head` does, with 141: both print nothing, as shells expect of a program that a signal ended.
    """
    _write_any_text()
    try:
        arguments = _parser().parse_args(argv)
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ConfigError, CheckpointError, RequestError, ServerError, OSError) as error:
        print(f"dspark-ray: {error}", file=sys.stderr)
        return 2


def _write_any_text() -> None:
    """Replace characters that the terminal cannot show, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """Send what is left in the buffers to /dev/null: Python flushes once more at exit, which would raise again."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            _redirect(stream)


def _redirect(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line, like any other bad input, and without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _integer(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low} to {high}")

    return parse


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= _MAX_INTERVAL_SECONDS:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}: expected a positive number of seconds, at most {_MAX_INTERVAL_SECONDS:.0f}"
    )


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dspark-ray", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="stream a completion to the terminal, without Ray"))
    _add_inspect(commands.add_parser("inspect", help="describe a checkpoint and report its problems"))
    calibrate = "fit the temperatures of the confidences, and report their calibration"
    _add_calibrate(commands.add_parser("calibrate", help=calibrate))
    _add_explain(commands.add_parser("explain", help="show what a running server decided in its latest steps"))
    _add_top(commands.add_parser("top", help="watch the devices and replicas of a running server"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", help="text to continue, or a user message with --chat")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user message")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=_number, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=_number, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="end the text here; may be repeated")
    parser.add_argument("--gamma", type=int, default=None, help="drafted tokens per round (default: the checkpoint's)")
    parser.add_argument("--schedule", choices=get_args(ScheduleKind), help="how many drafts are verified")
    parser.add_argument(
        "--confidence-threshold", type=_number, default=0.0, help="do not verify drafts whose survival is below this"
    )
    parser.add_argument("--no-cost-cache", action="store_true", help="profile step costs anew, and do not keep them")
    parser.add_argument("--explain", action="store_true", help="show what each step decided, after the text")
    parser.add_argument("--no-speculation", action="store_true", help="decode one token per forward, for comparison")
    _add_engine_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="deployments/tiny", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--verification", choices=("coupled", "rejection"), default="coupled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--threads", type=_integer(1, _MAX_THREADS), default=1, help="CPU threads (default: %(default)s)"
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_inspect)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--headers-only", action="store_true", help="do not read the weights to look for NaN and infinity"
    )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_calibrate)
    parser.add_argument(
        "--prompts", type=Path, help='your own traffic: JSON lines, {"prompt": ...} or {"messages": ...}'
    )
    parser.add_argument("--count", type=int, default=64, help="held-out prompts of each kind (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="length of each text (default: %(default)s)")
    parser.add_argument("--temperature", type=_number, action="append", help="may be repeated (default: 0 and 1)")
    parser.add_argument(
        "--held-out-share",
        type=_number,
        default=0.5,
        help="share of the prompts held out for the report (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="file for the temperatures (default: the checkpoint's sts.json)")
    parser.add_argument("--picture", type=Path, help="file for a reliability diagram (PNG)")
    _add_engine_arguments(parser)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_explain)
    _add_server_arguments(parser)
    parser.add_argument("--last", type=int, default=50, help="steps to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the server's JSON unchanged")


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_top)
    _add_server_arguments(parser)
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, help="seconds between pictures (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="draw one picture and end, as for a pipe or a file")
    parser.add_argument("--json", action="store_true", help="print the server's JSON once, unchanged")


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://localhost:8000", help="address of the server (default: %(default)s)")
    key = os.environ.get("DSPARK_API_KEY")
    parser.add_argument("--api-key", default=key, help="key for the /admin routes (default: $DSPARK_API_KEY)")


def _generate(arguments: argparse.Namespace) -> int:
    from deployments.user_cache import cache_directory
    from dspark_ray import generate

    arguments.cost_directory = None if arguments.no_cost_cache else cache_directory()
    return generate.run(arguments)


def _calibrate(arguments: argparse.Namespace) -> int:
    from dspark_ray.evaluation import calibrate

    return calibrate.run(arguments)


def _show_reading(num_done: int, num_bytes: int) -> None:
    """Progress on stderr, on one line that is overwritten."""
    end = "\n" if num_done == num_bytes else ""
    print(f"\rread {num_done / 2**30:.1f} of {num_bytes / 2**30:.1f} GiB", end=end, file=sys.stderr, flush=True)


def _inspect(arguments: argparse.Namespace) -> int:
    from dspark_ray.checkpoint.inspect import describe

    progress = _show_reading if sys.stderr.isatty() else None
    description = describe(Path(arguments.model), not arguments.headers_only, progress)
    print(json.dumps(description.to_dict(), indent=2) if arguments.json else description.format())
    return 2 if description.problems else 0


def _explain(arguments: argparse.Namespace) -> int:
    url = f"{arguments.url.rstrip('/')}/admin/steps?last={arguments.last}"
    with _cli_packages():
        answer = get_json(url, arguments.api_key, _TIMEOUT_SECONDS)
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    try:
        table = explain([from_json(step) for step in answer["steps"]])
        print(f"replica {answer['replica']}\n{table}")
    except (AttributeError, KeyError, TypeError):
        raise _other_version(arguments.url) from None
    return 0


def _top(arguments: argparse.Namespace) -> int:
    url = f"{arguments.url.rstrip('/')}/admin/load"
    with _cli_packages():
        if arguments.json:
            print(json.dumps(get_json(url, arguments.api_key, _TIMEOUT_SECONDS), indent=2))
            return 0
        from deployments.console import top
        from deployments.console.view import View, parse

        def read() -> View:
            try:
                return parse(get_json(url, arguments.api_key, _LIVE_TIMEOUT_SECONDS))
            except (AttributeError, KeyError, TypeError):
                raise _other_version(arguments.url) from None

        top.run(read, ServerError, None if arguments.once else arguments.interval)
    return 0


@contextlib.contextmanager
def _cli_packages() -> Iterator[None]:
    """Raises ConfigError for a package of the `cli` extra that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _CLI_PACKAGES:
            raise
        message = f"this command needs {package}, which is not installed: pip install 'dspark-ray[cli]'"
        raise ConfigError(message) from None


def _other_version(url: str) -> ServerError:
    return ServerError(f"{url}: not the answer of a dspark-ray of this version")


if __name__ == "__main__":
    sys.exit(main())
