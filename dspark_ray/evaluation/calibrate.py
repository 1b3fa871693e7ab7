"""Fit temperatures of the confidences on one part of the prompts, and report calibration errors on the other.

    dspark-ray calibrate --model deployments/tiny --picture reliability.png

Every drafted token is verified, so that the known outcomes do not depend on the confidences to be calibrated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_ray.config import ConfigError, EngineConfig, ModelConfig
from dspark_ray.engine.offline import TokenIds, serve
from dspark_ray.engine.step_loop import Engine
from dspark_ray.evaluation.accepted_length import held_out_token_ids
from dspark_ray.evaluation.pictures import ReliabilityPanel, draw_reliability
from dspark_ray.ranks.gang import STS_FILE, build_engine
from dspark_ray.speculative.calibration import (
    Reliability,
    Temperatures,
    area_under_curve,
    calibrated,
    expected_calibration_error,
    fit_temperatures,
    logits,
    reliability,
)
from dspark_ray.speculative.prefix_schedule import survival
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.types import RequestError, SamplingParams

Progress = Callable[[int, int], None]
"""(requests finished, requests in total)"""

_MAX_NUM_SEQS = 16


@dataclass(frozen=True)
class Rounds:
    """Outcomes of N rounds: confidences [N, G], number of verified and of accepted drafts [N]."""

    confidences: np.ndarray
    admitted: np.ndarray
    accepted: np.ndarray


class RoundRecorder:
    """A planner's listener that keeps every round."""

    def __init__(self, gamma: int) -> None:
        self._rounds = [Rounds(np.empty((0, gamma)), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]

    def __call__(self, confidences: np.ndarray, admitted: np.ndarray, accepted: np.ndarray) -> None:
        self._rounds.append(Rounds(confidences.copy(), admitted.copy(), accepted.copy()))

    def rounds(self) -> Rounds:
        """All rounds recorded so far."""
        return Rounds(
            np.concatenate([part.confidences for part in self._rounds]),
            np.concatenate([part.admitted for part in self._rounds]),
            np.concatenate([part.accepted for part in self._rounds]),
        )


@dataclass(frozen=True)
class Split:
    """Disjoint prompts for the fit and for the report."""

    fitted_on: list[TokenIds]
    reported_on: list[TokenIds]


@dataclass(frozen=True)
class PositionReport:
    """Effect of one temperature on rounds outside of the fit."""

    temperature: float
    ece_before: float
    ece_after: float
    area_under_curve: float
    """AUC of the calibrated survival."""
    count: int
    """Number of rounds that verified the position."""
    before: Reliability
    after: Reliability


# Prompts.


def split_prompts(groups: Iterable[Sequence[TokenIds]], held_out_share: float, seed: int) -> Split:
    """Shuffle each group and keep a share, at least one prompt, for the report; ConfigError if that is impossible."""
    if not 0 < held_out_share < 1:
        raise ConfigError(f"held_out_share={held_out_share}: expected a number between 0 and 1")
    fitted_on: list[TokenIds] = []
    reported_on: list[TokenIds] = []
    for group in groups:
        prompts = list(dict.fromkeys(group))
        if len(prompts) < 2:
            raise ConfigError(f"{len(prompts)} different prompts: expected at least 2, to fit on and to report on")
        random.Random(seed).shuffle(prompts)
        num_reported = min(max(1, round(len(prompts) * held_out_share)), len(prompts) - 1)
        reported_on += prompts[:num_reported]
        fitted_on += prompts[num_reported:]
    return Split(fitted_on, reported_on)


def prompts_from_file(path: Path, tokenizer: Tokenizer) -> list[TokenIds]:
    """One JSON object per line, {"prompt": text} or {"messages": [...]}; raises ConfigError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                prompts.append(_prompt_of(json.loads(line), tokenizer))
        except (ValueError, RequestError) as error:  # ConfigError and what json raises are ValueErrors
            raise ConfigError(f"{path} line {number}: {error}") from None
    return prompts


def _prompt_of(raw: Any, tokenizer: Tokenizer) -> TokenIds:
    expected = 'expected {"prompt": text} or {"messages": [{"role": ..., "content": ...}, ...]}'
    if not isinstance(raw, dict) or ("prompt" in raw) == ("messages" in raw):
        raise ConfigError(f"{json.dumps(raw)[:80]}: {expected}")
    if "prompt" in raw:
        if not isinstance(raw["prompt"], str):
            raise ConfigError(f"prompt={json.dumps(raw['prompt'])[:80]}: {expected}")
        return (tokenizer.bos_token_id, *tokenizer.encode(raw["prompt"]))
    messages = raw["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConfigError(f"messages={json.dumps(messages)[:80]}: {expected}")
    return tuple(tokenizer.encode(tokenizer.apply_chat(messages)))


def _held_out_groups(tokenizer: Tokenizer, count: int) -> list[list[TokenIds]]:
    if count < 2:
        raise ConfigError(f"count={count}: expected at least 2 prompts of each kind, to fit on and to report on")
    try:
        by_kind = held_out_token_ids(tokenizer, count)
    except ValueError as error:  # the corpus has only so many
        raise ConfigError(f"count={count}: {error}") from None
    return [[tuple(prompt) for prompt in prompts] for prompts in by_kind.values()]


# Measuring.


def collect(
    engine: Engine, prompts: Sequence[TokenIds], samplings: Sequence[SamplingParams], progress: Progress | None = None
) -> Rounds:
    """All rounds of all prompts with all samplings, each request with its own seed."""
    recorder = RoundRecorder(engine.gamma)
    engine.planner.listener = recorder
    serve(engine, prompts, samplings, progress)
    engine.planner.listener = None
    return recorder.rounds()


def report(temperatures: Temperatures, rounds: Rounds) -> list[PositionReport]:
    """Calibration errors on `rounds` before and after the temperatures, by position."""
    in_use = np.array(temperatures.temperatures)
    before = survival(rounds.confidences.astype(np.float64))
    after = survival(calibrated(rounds.confidences.astype(np.float64), in_use))
    reports = []
    for position, temperature in enumerate(temperatures.temperatures):
        rows = rounds.admitted > position
        is_accepted = rounds.accepted[rows] > position
        old, new = before[rows, position], after[rows, position]
        reports.append(
            PositionReport(
                temperature=temperature,
                ece_before=expected_calibration_error(old, is_accepted),
                ece_after=expected_calibration_error(new, is_accepted),
                area_under_curve=area_under_curve(new, is_accepted),
                count=len(is_accepted),
                before=reliability(old, is_accepted),
                after=reliability(new, is_accepted),
            )
        )
    return reports


def table(reports: Sequence[PositionReport]) -> str:
    """The reports as lines of text, followed by their means."""
    lines = ["position  temperature  ECE before  ECE after    AUC   count"]
    for number, found in enumerate(reports, start=1):
        lines.append(
            f"{number:8d}  {found.temperature:11.3f}  {found.ece_before:10.2%}  {found.ece_after:9.2%}"
            f"  {found.area_under_curve:5.3f}  {found.count:6d}"
        )
    before, after, area = (
        _mean([getattr(found, name) for found in reports]) for name in ("ece_before", "ece_after", "area_under_curve")
    )
    lines.append(f"{'mean':>8}  {'':11}  {before:10.2%}  {after:9.2%}  {area:5.3f}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _panels(reports: Sequence[PositionReport]) -> list[ReliabilityPanel]:
    return [
        ReliabilityPanel(
            f"position {number}: ECE {found.ece_before:.1%} → {found.ece_after:.1%}, AUC {found.area_under_curve:.3f}",
            found.before,
            found.after,
        )
        for number, found in enumerate(reports, start=1)
    ]


# The command.


def run(arguments: argparse.Namespace) -> int:
    """Fit, report, write. The file contains the errors of the report, on prompts outside of the fit."""
    torch.set_num_threads(arguments.threads)
    config = _engine_config(arguments)
    output = arguments.output or Path(arguments.model) / STS_FILE
    for path in (output, arguments.picture):
        _check_writable(path)
    prompts = _prompts(arguments, config.max_model_len)
    fitted_on, reported_on = _measure(arguments, config, prompts)
    fitted = fit_temperatures(
        logits(fitted_on.confidences.astype(np.float64)),
        fitted_on.accepted,
        fitted_on.admitted,
        dataset=_dataset(arguments),
    )
    reports = report(fitted, reported_on)
    errors = (tuple(found.ece_before for found in reports), tuple(found.ece_after for found in reports))
    replace(fitted, ece_before=errors[0], ece_after=errors[1]).save(output)
    print(table(reports))
    print(
        f"fitted on {len(fitted_on.admitted)} rounds of {len(prompts.fitted_on)} prompts, "
        f"reported on {len(reported_on.admitted)} rounds of {len(prompts.reported_on)} others; wrote {output}"
    )
    if arguments.picture is not None:
        _draw(reports, arguments.picture)
    return 0


def _measure(arguments: argparse.Namespace, config: EngineConfig, prompts: Split) -> tuple[Rounds, Rounds]:
    """(rounds for the fit, rounds for the report); raises ConfigError if no draft was verified in one of them."""
    samplings = [
        SamplingParams(temperature=temperature, max_tokens=arguments.max_tokens, seed=arguments.seed)
        for temperature in _temperatures(arguments)
    ]
    most_requests = len(samplings) * max(len(prompts.fitted_on), len(prompts.reported_on))
    config = replace(config, max_waiting=most_requests)
    # Temperatures stored with the checkpoint are about to be replaced, so they are not read.
    gamma = ModelConfig.from_file(Path(arguments.model)).gamma
    engine = build_engine(arguments.model, config, temperatures=Temperatures.identity(gamma))
    rounds = (
        collect(engine, prompts.fitted_on, samplings, _progress("fit")),
        collect(engine, prompts.reported_on, samplings, _progress("report")),
    )
    engine.close()
    if not all((part.admitted > 0).any() for part in rounds):
        raise ConfigError(f"max_tokens={arguments.max_tokens}: no draft was verified: expected more tokens, or prompts")
    return rounds


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """A configuration that verifies every draft and updates nothing. Raises ConfigError without a DSpark module."""
    model = ModelConfig.from_file(Path(arguments.model))
    if model.dspark is None:
        raise ConfigError(f"{arguments.model}: the checkpoint has no DSpark module, so there is nothing to calibrate")
    return EngineConfig(
        max_num_seqs=_MAX_NUM_SEQS,
        max_model_len=min(EngineConfig.max_model_len, model.max_position_embeddings),
        verification=arguments.verification,
        dtype=arguments.dtype,
        device=arguments.device,
        schedule="fixed",
        bypass=False,
        calibrate_online=False,
    )


def _prompts(arguments: argparse.Namespace, max_model_len: int) -> Split:
    tokenizer = Tokenizer.from_directory(arguments.model)
    if arguments.prompts is None:
        groups = _held_out_groups(tokenizer, arguments.count)
        return split_prompts(groups, arguments.held_out_share, arguments.seed)
    prompts = prompts_from_file(arguments.prompts, tokenizer)
    fitting = [prompt for prompt in prompts if len(prompt) < max_model_len]
    if len(fitting) < len(prompts):
        left_out = len(prompts) - len(fitting)
        print(f"dspark-ray: left out {left_out} prompts of {max_model_len} tokens or more", file=sys.stderr)
    try:
        return split_prompts([fitting], arguments.held_out_share, arguments.seed)
    except ConfigError as error:
        raise ConfigError(f"{arguments.prompts}: {error}") from None


def _check_writable(path: Path | None) -> None:
    """Raise ConfigError for an unwritable path, before the measurement."""
    if path is None:
        return
    if not path.parent.is_dir() or path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path}: cannot be written: expected a file in a folder that exists and can be written to")


def _temperatures(arguments: argparse.Namespace) -> tuple[float, ...]:
    return tuple(arguments.temperature or (0.0, 1.0))


def _dataset(arguments: argparse.Namespace) -> str:
    """Description of the data of the fit, for the file."""
    source = arguments.prompts.name if arguments.prompts else f"{arguments.count} held-out prompts of each kind"
    sampled = ", ".join(f"{temperature:g}" for temperature in _temperatures(arguments))
    return f"{source}; temperature {sampled}; {arguments.verification} verification; seed {arguments.seed}"


def _progress(part: str) -> Progress:
    """Report every tenth of the requests on stderr."""

    def tell(done: int, total: int) -> None:
        if done == total or done * 10 // total > (done - 1) * 10 // total:
            print(f"calibrate: {part}: {done} of {total} texts", file=sys.stderr)

    return tell


def _draw(reports: Sequence[PositionReport], path: Path) -> None:
    try:
        draw_reliability(_panels(reports), path)
    except ImportError:
        print("dspark-ray: no picture without matplotlib: pip install 'dspark-ray[plot]'", file=sys.stderr)
        return
    print(f"wrote {path}")
