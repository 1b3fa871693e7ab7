"""A network of every kind of layer, small enough that a forward takes a millisecond."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.checkpoint.writer import save_checkpoint
from dspark_ray.config import EngineConfig, ModelConfig, ResolvedConfig
from dspark_ray.drafters.dspark import DSparkModule, FeatureProjector
from dspark_ray.drafters.protocol import Drafter
from dspark_ray.engine.step_loop import Engine
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.ranks.draft_worker import DraftWorker, InlineDrafter
from dspark_ray.ranks.executor import LocalTarget, TargetRank
from dspark_ray.runner.decode import TargetGraphs
from dspark_ray.runner.graphs import Capture
from dspark_ray.speculative.cost_table import CostTable, Curve
from dspark_ray.speculative.planner import Planner
from dspark_ray.training.initial import initialise
from dspark_ray.types import Request, SamplingParams, SequenceOutput, VerificationLimits

RAW = {
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 16, 4, 0, 0],
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 64},
    "dspark_block_size": 5,
    "dspark_noise_token_id": 60,
    "dspark_target_layer_ids": [2, 3],
    "dspark_markov_rank": 8,
}
SMALL = ModelConfig.from_dict(RAW)


@cache
def small_modules() -> tuple[DeepSeekV4, DSparkModule]:
    """The target and its drafter, from fixed seeds."""
    model, drafter = DeepSeekV4(SMALL), DSparkModule(SMALL)
    initialise(model, seed=0)
    initialise(drafter, seed=1)
    with torch.no_grad():
        model.head.weight *= 0.7  # flat enough that shared noise often makes drafter and target agree
    drafter.share(model.embed.weight, model.head.weight)
    return model.requires_grad_(False), drafter.requires_grad_(False)


COST_TABLE = "cost_table.json"
"""Beside the checkpoint: profiling takes longer than most tests."""


def save_small_checkpoint(directory: Path) -> Path:
    """The small model as files; weights are rounded to bfloat16 on the way."""
    save_checkpoint(directory, *small_modules(), RAW)
    CostTable.of(Curve((1, 64), (0.01, 0.0101)), Curve((1, 8), (0.0001, 0.0002))).save(directory / COST_TABLE)
    return directory


def small_config(**changes: object) -> ResolvedConfig:
    """A configuration for the small model, with room for 8 sequences of 256 tokens."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "page_size": 32}
    return EngineConfig(**{**defaults, **changes}).for_model(SMALL)  # type: ignore[arg-type]


def build_small_engine(
    drafter: Drafter | None = None,
    clock: Callable[[], float] = time.perf_counter,
    capture: Capture | None = None,
    planner: Planner | None = None,
    **changes: object,
) -> Engine:
    """An engine in this process; by default with an inline drafter, and with a planner that knows no costs.

    With `capture`, decode steps of target and drafter are recorded and replayed.
    """
    config = small_config(**changes)
    model, module = small_modules()
    shape = CacheShape.of(SMALL, config.gamma, config.page_size, config.max_num_seqs, config.max_num_batched_tokens)
    cache_tensors = CacheTensors(SMALL, shape, config.num_pages)
    projector = FeatureProjector(SMALL)
    projector.load_state_dict({name: module.state_dict()[name] for name in projector.state_dict()})
    graphs = None
    if capture is not None:
        graphs = TargetGraphs(model, cache_tensors, config.max_num_seqs, config.max_model_len, capture)
    target = LocalTarget(TargetRank(model, cache_tensors, projector.requires_grad_(False), graphs))
    drafter = drafter or InlineDrafter(DraftWorker(module, config, capture))
    return Engine(config, SMALL, target, drafter, planner, clock)


def request(prompt: tuple[int, ...], request_id: str = "r", speculate: bool = True, **sampling: object) -> Request:
    """A request for 40 tokens unless said otherwise."""
    params = {"max_tokens": 40, "ignore_eos": True, **sampling}
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        speculative=VerificationLimits(bypass=not speculate),
    )


def run(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    """Serve `requests` together; the tokens of each, by id."""
    return {request_id: tokens_of(outputs) for request_id, outputs in run_outputs(engine, *requests).items()}


def run_outputs(engine: Engine, *requests: Request) -> dict[str, list[SequenceOutput]]:
    """Serve `requests` together; every output of each, by id."""
    outputs: dict[str, list[SequenceOutput]] = {r.request_id: [] for r in requests}
    for r in requests:
        engine.add_request(r)
    for _ in range(10_000):
        if not engine.has_unfinished():
            engine.scheduler.check_idle()
            return outputs
        for output in engine.step().sequences:
            outputs[output.request_id].append(output)
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    """All tokens of one request."""
    return [token for output in outputs for token in output.token_ids]
