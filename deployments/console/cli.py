"""`dspark-ray`: generate text without Ray, look into a checkpoint or a running server, or calibrate confidences.

Commands import torch when they run: those that talk to a server need none of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

from dspark_ray.checkpoint.errors import CheckpointError
from dspark_ray.config import ConfigError, ScheduleKind
from dspark_ray.engine.records import explain, from_json
from dspark_ray.types import RequestError

_ANSWER_SECONDS = 30
_LIVE_ANSWER_SECONDS = 5
"""So that a server that hangs is seen to."""
_MOST_THREADS = 1024
_LONGEST_INTERVAL = 86400.0


class ServerError(RuntimeError):
    """A server that does not answer, or answers with an error."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code.

    Bad input ends with 2 and one line that says what would be right, Ctrl-C with 130, and a reader of a pipe that has
    gone, as `head` does, with 141: both in silence, as shells expect of a program that a signal ended.
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
    """A terminal that cannot show a character shows another, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """Python flushes once more at exit: what is left goes where that raises nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            _redirect(stream)


def _redirect(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line, as any other bad input; `--help` says the rest."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low} to {high}")

    return parse


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= _LONGEST_INTERVAL:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}: expected a positive number of seconds, at most {_LONGEST_INTERVAL:.0f}"
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
    _add_inspect(commands.add_parser("inspect", help="say what is in a checkpoint, and what is wrong with it"))
    calibrate = "fit the temperatures of the confidences, and report on them"
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
        "--confidence-threshold", type=_number, default=0.0, help="verify no drafts whose survival is below this"
    )
    parser.add_argument(
        "--no-cost-cache", action="store_true", help="profile what steps cost again, and keep it nowhere"
    )
    parser.add_argument("--explain", action="store_true", help="show what each step decided, behind the text")
    parser.add_argument("--no-speculation", action="store_true", help="decode one token per forward, for comparison")
    _add_engine_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="deployments/tiny", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--verification", choices=("coupled", "rejection"), default="coupled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--threads", type=_whole(1, _MOST_THREADS), default=1, help="CPU threads (default: %(default)s)"
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
    parser.add_argument("--max-tokens", type=int, default=96, help="of each text (default: %(default)s)")
    parser.add_argument("--temperature", type=_number, action="append", help="may be repeated (default: 0 and 1)")
    parser.add_argument(
        "--held-out-share", type=_number, default=0.5, help="of the prompts, for the report (default: 0.5)"
    )
    parser.add_argument("--output", type=Path, help="where the temperatures go (default: sts.json of the checkpoint)")
    parser.add_argument("--picture", type=Path, help="where a reliability picture goes, as PNG")
    _add_engine_arguments(parser)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_explain)
    _add_server_arguments(parser)
    parser.add_argument("--last", type=int, default=50, help="steps to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="what the server says, as it says it")


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_top)
    _add_server_arguments(parser)
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, help="seconds between pictures (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="one picture, as also into a pipe or a file")
    parser.add_argument("--json", action="store_true", help="once, what the server says, as it says it")


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    key = os.environ.get("DSPARK_API_KEY")
    parser.add_argument("--api-key", default=key, help="of administration (default: $DSPARK_API_KEY)")


def _generate(arguments: argparse.Namespace) -> int:
    from dspark_ray import generate

    return generate.run(arguments)


def _calibrate(arguments: argparse.Namespace) -> int:
    from dspark_ray.evaluation import calibrate

    return calibrate.run(arguments)


def _show_reading(num_done: int, num_bytes: int) -> None:
    """A line that rewrites itself until it is complete."""
    end = "\n" if num_done == num_bytes else ""
    print(f"\rread {num_done / 2**30:.1f} of {num_bytes / 2**30:.1f} GiB", end=end, file=sys.stderr, flush=True)


def _inspect(arguments: argparse.Namespace) -> int:
    from dspark_ray.checkpoint.inspect import describe

    progress = _show_reading if sys.stderr.isatty() else None
    description = describe(Path(arguments.model), not arguments.headers_only, progress)
    print(json.dumps(description.to_dict(), indent=2) if arguments.json else description.format())
    return 2 if description.problems else 0


def _explain(arguments: argparse.Namespace) -> int:
    answer = _get_json(f"{arguments.url.rstrip('/')}/admin/steps?last={arguments.last}", arguments.api_key)
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
    if arguments.json:
        print(json.dumps(_get_json(url, arguments.api_key), indent=2))
        return 0
    try:
        from deployments.console import top
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise ConfigError("top draws with rich, which is not installed: pip install rich") from None

    def read() -> top.View:
        try:
            return top.parse(_get_json(url, arguments.api_key, _LIVE_ANSWER_SECONDS))
        except (AttributeError, KeyError, TypeError):
            raise _other_version(arguments.url) from None

    top.run(read, ServerError, None if arguments.once else arguments.interval)
    return 0


def _other_version(url: str) -> ServerError:
    return ServerError(f"{url}: not the answer of a dspark-ray of this version")


def _get_json(url: str, api_key: str | None, seconds: float = _ANSWER_SECONDS) -> Any:
    """Raises ServerError."""
    try:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url}: {error.code} {_reason(error)}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise ServerError(f"{url}: {getattr(error, 'reason', error)}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """The message in our error schema, or HTTP's own words where the answer has none."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return error.reason


if __name__ == "__main__":
    sys.exit(main())
