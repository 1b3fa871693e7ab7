"""Generate training text for the drafter with the target (paper, section 5.1).

    python -m dspark_ray.training.regenerate --model CHECKPOINT --data DIR --minutes 6

Prompts are cut out of the training stream; half of the continuations are greedy, half sampled. Texts are saved as they
are generated, and another run adds to them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dspark_ray.config import EngineConfig
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import build_engine
from dspark_ray.types import Request, SamplingParams

PROMPT_TOKENS, TOTAL_TOKENS = 96, 512
_BATCH = 32


def regenerate(engine: Engine, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Each prompt with the target's continuation, TOTAL_TOKENS in total; every second one is greedy."""
    texts = {str(number): list(prompt) for number, prompt in enumerate(prompts)}
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=float(number % 2),
            seed=seed + number,
            max_tokens=TOTAL_TOKENS - len(prompt),
            ignore_eos=True,
        )
        engine.add_request(Request(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=sampling))
    while engine.has_unfinished():
        for output in engine.step().sequences:
            texts[output.request_id].extend(output.token_ids)
    return list(texts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(".build/tiny"))
    parser.add_argument("--minutes", type=float, default=6.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = np.load(arguments.data / "train.npy", mmap_mode="r")
    output = arguments.data / "regenerated.npy"
    texts: list[list[int]] = np.load(output).reshape(-1, TOTAL_TOKENS).tolist() if output.exists() else []
    engine = build_engine(arguments.model, EngineConfig(max_num_seqs=_BATCH, schedule="fixed"))
    started = time.monotonic()
    while time.monotonic() - started < 60 * arguments.minutes:
        seed = len(texts)
        starts = np.random.default_rng(seed).integers(0, len(tokens) - PROMPT_TOKENS, _BATCH)
        prompts = [tokens[start : start + PROMPT_TOKENS].tolist() for start in starts]
        texts.extend(regenerate(engine, prompts, seed))
        np.save(output, np.array(texts, dtype=np.uint16).flatten())
        print(f"{len(texts)} texts, {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
