"""`dspark-ray`: generate text without Ray, look into a checkpoint or a running server, or calibrate confidences."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args

import torch

from dspark_ray.checkpoint.inspect import describe
from dspark_ray.checkpoint.reader import CheckpointError
from dspark_ray.config import ConfigError, EngineConfig, ScheduleKind
from dspark_ray.engine import Engine
from dspark_ray.evaluation import calibrate
from dspark_ray.records import explain, from_json
from dspark_ray.runtime import build_engine
from dspark_ray.text import TextStream
from dspark_ray.tokenizer import Tokenizer
from dspark_ray.types import (
    Request,
    RequestError,
    SamplingParams,
    SpeculationStats,
    SpeculativeParams,
    StepRecord,
)

_ANSWER_SECONDS = 30
_LIVE_ANSWER_SECONDS = 5
"""So that a server that hangs is seen to."""


class ServerError(RuntimeError):
    """A server that does not answer, or answers with an error."""


@dataclass(frozen=True)
class Generated:
    """What `generate_text` saw."""

    num_tokens: int
    seconds: float
    stats: SpeculationStats
    records: list[StepRecord]


def main(argv: list[str] | None = None) -> int:
    """Entry point; bad input ends with exit code 2 and one line that says what would be right."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ConfigError, CheckpointError, RequestError, ServerError) as error:
        print(f"dspark-ray: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dspark-ray", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="stream a completion to the terminal, without Ray")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", help="text to continue, or a user message with --chat")
    generate.add_argument("--model", default="deployments/tiny", help="checkpoint folder (default: %(default)s)")
    generate.add_argument("--chat", action="store_true", help="treat the prompt as a user message")
    generate.add_argument("--max-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--stop", action="append", default=[], help="end the text here; may be repeated")
    generate.add_argument(
        "--gamma", type=int, default=None, help="drafted tokens per round (default: the checkpoint's)"
    )
    generate.add_argument("--verification", choices=("coupled", "rejection"), default="coupled")
    generate.add_argument("--schedule", choices=get_args(ScheduleKind), help="how many drafts are verified")
    generate.add_argument(
        "--confidence-threshold", type=float, default=0.0, help="verify no drafts whose survival is below this"
    )
    generate.add_argument(
        "--no-cost-cache", action="store_true", help="profile what steps cost again, and keep it nowhere"
    )
    generate.add_argument("--explain", action="store_true", help="show what each step decided, behind the text")
    generate.add_argument("--no-speculation", action="store_true", help="decode one token per forward, for comparison")
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    generate.add_argument("--device", default="cpu")
    generate.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    inspect = commands.add_parser("inspect", help="say what is in a checkpoint, from its headers alone")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", help="checkpoint folder")
    inspect.add_argument("--json", action="store_true")
    calibration = commands.add_parser("calibrate", help="fit the temperatures of the confidences, and report on them")
    calibration.set_defaults(run=calibrate.run)
    calibrate.add_arguments(calibration)
    explained = commands.add_parser("explain", help="show what a running server decided in its latest steps")
    explained.set_defaults(run=_explain)
    explained.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    explained.add_argument("--last", type=int, default=50, help="steps to show (default: %(default)s)")
    explained.add_argument("--json", action="store_true", help="what the server says, as it says it")
    top = commands.add_parser("top", help="watch the devices and replicas of a running server")
    top.set_defaults(run=_top)
    top.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    top.add_argument("--interval", type=float, default=2.0, help="seconds between pictures (default: %(default)s)")
    top.add_argument("--once", action="store_true", help="one picture, as also into a pipe or a file")
    top.add_argument("--json", action="store_true", help="once, what the server says, as it says it")
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    description = describe(Path(arguments.model))
    print(json.dumps(description.to_dict(), indent=2) if arguments.json else description.format())
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    config = EngineConfig(
        max_num_seqs=1,
        gamma=arguments.gamma,
        verification=arguments.verification,
        speculation=not arguments.no_speculation,
        dtype=arguments.dtype,
        device=arguments.device,
        schedule=arguments.schedule,
        confidence_threshold=arguments.confidence_threshold,
        cost_directory=None if arguments.no_cost_cache else str(Path.home() / ".cache" / "dspark-ray"),
    )
    tokenizer = Tokenizer.from_directory(Path(arguments.model))
    request = Request(
        request_id="cli",
        prompt_token_ids=tuple(_prompt_ids(tokenizer, arguments)),
        sampling=SamplingParams(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            max_tokens=arguments.max_tokens,
            stop=tuple(arguments.stop),
        ),
        speculative=SpeculativeParams(enabled=not arguments.no_speculation),
    )
    engine = build_engine(arguments.model, config, _show_profiling)
    generated = generate_text(engine, tokenizer, request, lambda text: print(text, end="", flush=True))
    engine.close()
    print()
    print(_summary(generated), file=sys.stderr)
    if arguments.explain:
        print(explain(generated.records), file=sys.stderr)
    return 0


def _show_profiling(num_done: int, num_sizes: int) -> None:
    """A line that rewrites itself until it is complete."""
    end = "\n" if num_done == num_sizes else ""
    print(f"\rprofiling what steps cost: {num_done}/{num_sizes}", end=end, file=sys.stderr, flush=True)


def _prompt_ids(tokenizer: Tokenizer, arguments: argparse.Namespace) -> list[int]:
    if arguments.chat:
        return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": arguments.prompt}]))
    return [tokenizer.bos_token_id, *tokenizer.encode(arguments.prompt)]


def generate_text(engine: Engine, tokenizer: Tokenizer, request: Request, emit: Callable[[str], object]) -> Generated:
    """Run one request to its end, passing text to `emit` as it comes; ends at a stop string too."""
    text = TextStream(tokenizer, request.sampling.stop)
    engine.add_request(request)
    num_tokens, stats, stopped, started = 0, SpeculationStats(), False, time.perf_counter()
    records: list[StepRecord] = []
    while engine.has_unfinished():
        step = engine.step()
        if step.record is not None:
            records.append(step.record)
        for output in step.sequences:
            delta = text.push(output.token_ids[:-1] if output.stop_token_id is not None else output.token_ids)
            emit(delta.text)
            stats = output.stats or stats
            if stopped:
                continue
            stopped = delta.stopped
            num_tokens += delta.num_tokens_kept if stopped else len(output.token_ids)
            if stopped:
                engine.abort(request.request_id)
    emit(text.flush())
    return Generated(num_tokens, time.perf_counter() - started, stats, records)


def _summary(generated: Generated) -> str:
    stats, seconds = generated.stats, max(generated.seconds, 1e-9)
    return (
        f"{generated.num_tokens} tokens in {seconds:.2f} s = {generated.num_tokens / seconds:.1f} tokens/s; "
        f"accepted length {stats.mean_accepted_length:.2f} "
        f"(drafted {stats.num_drafted}, admitted {stats.num_admitted}, accepted {stats.num_accepted})"
    )


def _explain(arguments: argparse.Namespace) -> int:
    answer = _get_json(f"{arguments.url.rstrip('/')}/admin/steps?last={arguments.last}")
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
        print(json.dumps(_get_json(url), indent=2))
        return 0
    if not arguments.interval > 0:
        raise ConfigError(f"--interval={arguments.interval}: expected a positive number of seconds")
    try:
        from dspark_ray import top
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise ConfigError("top draws with rich, which is not installed: pip install rich") from None

    def read() -> top.View:
        try:
            return top.parse(_get_json(url, _LIVE_ANSWER_SECONDS))
        except (AttributeError, KeyError, TypeError):
            raise _other_version(arguments.url) from None

    top.run(read, ServerError, None if arguments.once else arguments.interval)
    return 0


def _other_version(url: str) -> ServerError:
    return ServerError(f"{url}: not the answer of a dspark-ray of this version")


def _get_json(url: str, seconds: float = _ANSWER_SECONDS) -> Any:
    """Raises ServerError."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:
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
