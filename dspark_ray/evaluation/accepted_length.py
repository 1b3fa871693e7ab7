"""Mean accepted length on held-out prompts.

    python -m dspark_ray.evaluation.accepted_length --model deployments/tiny

Accepted length is the number of tokens committed per round, the target's own token included. Every draft is verified,
so that the result does not depend on the machine's costs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspark_ray.config import EngineConfig, VerificationMode
from dspark_ray.engine.step_loop import Engine
from dspark_ray.ranks.gang import build_engine
from dspark_ray.text.tokenizer import Tokenizer
from dspark_ray.training.corpus import held_out_prompts
from dspark_ray.types import Request, SamplingParams

KINDS = ("code", "prose", "arithmetic", "chat")


@dataclass(frozen=True)
class AcceptedLength:
    """Sums over requests; `mean` is committed tokens per round."""

    num_rounds: int = 0
    num_accepted: int = 0

    @property
    def mean(self) -> float:
        return 1 + self.num_accepted / self.num_rounds if self.num_rounds else 0.0

    def plus(self, other: AcceptedLength) -> AcceptedLength:
        return AcceptedLength(self.num_rounds + other.num_rounds, self.num_accepted + other.num_accepted)


def held_out_token_ids(tokenizer: Tokenizer, count: int, kinds: tuple[str, ...] = KINDS) -> dict[str, list[list[int]]]:
    """`count` prompts of each kind, each after the begin token as in training."""
    return {
        kind: [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in held_out_prompts(kind, count)]
        for kind in kinds
    }


def measure(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> AcceptedLength:
    """Generate from all prompts, with a seed each, and sum their rounds."""
    for number, prompt in enumerate(prompts):
        request = Request(
            request_id=f"prompt-{number}",
            prompt_token_ids=tuple(prompt),
            sampling=replace(sampling, seed=sampling.seed + number),
        )
        engine.add_request(request)
    total = AcceptedLength()
    while engine.has_unfinished():
        for output in engine.step().sequences:
            if output.finish_reason is not None and output.stats is not None:
                total = total.plus(AcceptedLength(output.stats.num_rounds, output.stats.num_accepted))
    return total


def report(
    model: Path, count: int, max_tokens: int, gamma: int | None, verification: VerificationMode
) -> dict[str, dict[str, float]]:
    """Accepted length by temperature ("greedy", "sampled") and kind, with "all" for all kinds together."""
    tokenizer = Tokenizer.from_directory(model)
    config = EngineConfig(max_num_seqs=16, gamma=gamma, verification=verification, schedule="fixed")
    engine = build_engine(model, config)
    prompts = held_out_token_ids(tokenizer, count)
    results: dict[str, dict[str, float]] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=False)
        by_kind = {kind: measure(engine, prompts[kind], sampling) for kind in KINDS}
        total = AcceptedLength()
        for length in by_kind.values():
            total = total.plus(length)
        results[name] = {kind: round(length.mean, 3) for kind, length in by_kind.items()}
        results[name]["all"] = round(total.mean, 3)
        results[name]["rounds"] = total.num_rounds
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("deployments/tiny"))
    parser.add_argument("--count", type=int, default=16, help="prompts of each kind")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--gamma", type=int, default=None)
    parser.add_argument("--verification", choices=("coupled", "rejection"), default="coupled")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = report(arguments.model, arguments.count, arguments.max_tokens, arguments.gamma, arguments.verification)
    print(json.dumps({"verification": arguments.verification, **results}, indent=2))


if __name__ == "__main__":
    main()
