"""Measures a whole round of a DeepSeek-V4-Flash-shaped model on a GPU: draft, plan, verify, accept.

    python -m benchmarks.gpu.round                                    as many layers as fit
    python -m benchmarks.gpu.round --requests 1,32 --layers 8
    python -m benchmarks.gpu.round --shape tiny                       on a CPU: a test of this program

Weights are random, in the precision of a release: FP8 linears, FP4 experts, bfloat16 elsewhere. For every number of
requests, three times are measured in turns: milliseconds of a round launched kernel by kernel, of the same round as one
CUDA graph, and of its kernels alone; the rest is time outside kernels. Results go to benchmarks/results/round.json
after every number of requests, and a second run of the same commit continues from them. `--picture` draws them, on any
machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.device_round import DeviceRound, Requests
from benchmarks.harness import report
from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.checkpoint.layout import FP8_WEIGHTS, local_name
from dspark_ray.checkpoint.stored import keep_stored
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import DSparkModule
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.runner.graphs import CudaCapture

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "round.json"
PAGE_SIZE = 128
ROUNDS_PER_TURN, TURNS = 4, 12
MEMORY_MARGIN = 6 * 2**30
"""Memory that stays free for activations, graphs and libraries."""

FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 65536},
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}
TINY: dict[str, Any] = FLASH | {
    "vocab_size": 300,
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 80,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "compress_ratios": [0, 0, 4, 128, 4, 0, 0, 0],
    "index_n_heads": 16,
    "index_head_dim": 32,
    "n_routed_experts": 16,
    "moe_intermediate_size": 128,
    "dspark_noise_token_id": 299,
    "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 32,
}


def with_layers(raw: dict[str, Any], count: int) -> dict[str, Any]:
    """The first `count` layers of a shape, and its draft stages behind them."""
    ratios, total = raw["compress_ratios"], raw["num_hidden_layers"]
    return raw | {
        "num_hidden_layers": count,
        "compress_ratios": [*ratios[:count], *ratios[total:]],
        "dspark_target_layer_ids": [count - 3, count - 2, count - 1],
    }


def released_dtype(name: str) -> str:
    """How a release stores the tensor `name`, as safetensors spells it."""
    local = local_name(name)
    if local.startswith("ffn.experts."):
        return "I8"
    return "F8_E4M3" if local in FP8_WEIGHTS else "BF16"


def random_module(module: nn.Module, config: ModelConfig, device: torch.device) -> nn.Module:
    """Fill a module on the meta device with random weights in a release's precision, on `device`."""
    keep_stored(module, config, ParallelGroup(), released_dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        _fill(name, tensor, config, generator)
    return module.eval().requires_grad_(False)


def _fill(name: str, tensor: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    if tensor.dtype == torch.float8_e8m0fnu:
        tensor.view(torch.uint8).random_(115, 119, generator=generator)  # 2^-12 .. 2^-9
    elif tensor.dtype == torch.float8_e4m3fn:
        # 0 .. 0x7E and the same with a sign; 0x7F and 0xFF are not numbers.
        code = tensor.view(torch.uint8).random_(0, 254, generator=generator)
        code.add_((code >= 127).to(torch.uint8))
    elif tensor.dtype == torch.int8:
        tensor.view(torch.uint8).random_(0, 256, generator=generator)
    elif tensor.dtype == torch.int64:
        tensor.random_(0, config.n_routed_experts, generator=generator)
    elif tensor.dim() == 1:
        tensor.fill_(1.0 if name.endswith("norm.weight") else 0.1)
    else:
        tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)


def num_layers_that_fit(device: torch.device) -> int:
    """Of Flash, beside embedding, head, drafter and a cache, in the memory that is free."""
    if device.type == "cpu":
        return TINY["num_hidden_layers"]
    free, _ = torch.cuda.mem_get_info(device)
    d, experts, width = FLASH["hidden_size"], FLASH["n_routed_experts"], FLASH["moe_intermediate_size"]
    expert_bytes = 3 * experts * width * d * 17 // 32  # half a byte, and a byte of scale for 32 values
    layer_bytes = expert_bytes + 300 * 2**20  # attention, shared expert, window, raw rows and staging
    fixed = 2 * 2 * FLASH["vocab_size"] * d + 3 * layer_bytes + MEMORY_MARGIN
    return max(3, min(FLASH["num_hidden_layers"], (free - fixed) // layer_bytes))


class Bench:
    """One model, and rounds over it."""

    def __init__(self, raw: dict[str, Any], device: torch.device, most_requests: int, context: int) -> None:
        self.config = replace(ModelConfig.from_dict(raw), kv_fake_quant=True)
        self.device, self.context, self.max_length = device, context, context + 64
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                target, drafter = DeepSeekV4(self.config), DSparkModule(self.config)
        finally:
            torch.set_default_dtype(before)
        self.target, self.drafter = target, drafter
        random_module(target, self.config, device)
        random_module(drafter, self.config, device)
        drafter.share(target.embed.weight, target.head.weight)
        gamma = drafter.gamma
        shape = CacheShape.of(self.config, gamma, PAGE_SIZE, most_requests, most_requests * (1 + gamma))
        self.pages_per_request = -(-self.max_length // PAGE_SIZE)
        num_pages = most_requests * self.pages_per_request
        self.cache = CacheTensors(self.config, shape, num_pages, torch.bfloat16, device, packed=True)
        self.pools = DraftPools(drafter, most_requests)

    def round(self, num_requests: int, temperature: float) -> DeviceRound:
        """`num_requests` requests of `context` tokens, all their drafts verified."""
        numbers = torch.arange(num_requests, device=self.device)
        pages = torch.arange(num_requests * self.pages_per_request, device=self.device).view(num_requests, -1)
        requests = Requests(
            anchors=numbers + 5,
            starts=torch.full_like(numbers, self.context),
            slots=numbers.clone(),
            pages=pages,
            seeds=numbers.clone(),
            temperatures=torch.full((num_requests,), temperature, dtype=torch.float64, device=self.device),
        )
        budget = num_requests * self.drafter.gamma
        return DeviceRound(
            self.target, self.drafter, self.cache, self.pools, requests, budget, max_length=self.max_length
        )

    def at_context(self, device_round: DeviceRound) -> Callable[[], tuple[Tensor, ...]]:
        """The round, always at the same position of the text."""

        def run() -> tuple[Tensor, ...]:
            device_round.requests.starts.fill_(self.context)
            result = device_round.run()
            return result.num_accepted, result.next_anchors, result.drafts

        return run


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int = ROUNDS_PER_TURN) -> float:
    """Of one round, as the mean of a few in a row."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    _wait(device)
    return 1e3 * (time.perf_counter() - started) / rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_milliseconds(run: Callable[[], object]) -> dict[str, float]:
    """By kernel, of one round."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(ROUNDS_PER_TURN):
            run()
        torch.cuda.synchronize()
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[kernel_name(event.name)] += event.time_range.elapsed_us() / 1e3 / ROUNDS_PER_TURN
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def kernel_name(name: str) -> str:
    """Names of this project's kernels stay; those of libraries are shortened."""
    if name.startswith("_") and name.endswith("_kernel"):
        return name.strip("_").removesuffix("_kernel")
    if re.search(r"gemm|cutlass|cublas|nvjet", name):
        return "matrix products of cuBLAS"
    return "copies and fills" if re.search(r"[Mm]emcpy|[Mm]emset|copy|fill|FillFunctor", name) else "torch, elementwise"


def measure(bench: Bench, num_requests: int, temperature: float) -> dict[str, Any]:
    """Figures of one number of requests; nothing of kernels and graphs where there is no GPU."""
    device = bench.device
    run = bench.at_context(bench.round(num_requests, temperature))
    run()
    figures: dict[str, Any] = {"requests": num_requests, "rows": num_requests * (1 + bench.drafter.gamma)}
    if device.type != "cuda":
        return figures | {"launched_ms": [milliseconds(run, device, 1)]}
    replay, _ = CudaCapture()(run)
    launched, replayed = [], []
    for _ in range(TURNS):
        launched.append(milliseconds(run, device))
        replayed.append(milliseconds(replay, device))
    kernels = kernel_milliseconds(replay)
    in_kernels = sum(kernels.values())
    return figures | {
        "launched_ms": launched,
        "replayed_ms": replayed,
        "launched_over_replayed": statistics.median(launched) / statistics.median(replayed),
        "kernel_ms": kernels,
        "outside_kernels_launched": 1 - in_kernels / statistics.median(launched),
        "outside_kernels_replayed": 1 - in_kernels / statistics.median(replayed),
    }


def describe(figures: dict[str, Any]) -> str:
    """One number of requests, as lines to read."""
    launched = statistics.median(figures["launched_ms"])
    if "replayed_ms" not in figures:
        return f"{figures['requests']} requests: {launched:.1f} ms a round, launched; no GPU, so nothing is recorded"
    replayed = statistics.median(figures["replayed_ms"])
    lines = [
        f"{figures['requests']} requests, {figures['rows']} rows:"
        f" launched {launched:.2f} ms, replayed {replayed:.2f} ms ({figures['launched_over_replayed']:.2f}x);"
        f" outside kernels {figures['outside_kernels_launched']:.0%} and {figures['outside_kernels_replayed']:.0%}"
    ]
    total = sum(figures["kernel_ms"].values())
    for name, value in list(figures["kernel_ms"].items())[:16]:
        lines.append(f"    {value:8.3f} ms {value / total:6.1%}  {name}")
    return "\n".join(lines)


def draw(content: dict[str, Any], path: Path) -> None:
    """The parts of a replayed round, by number of requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = list(content["results"].values())
    totals: dict[str, float] = defaultdict(float)
    for figures in results:
        for name, value in figures["kernel_ms"].items():
            totals[name] += value / sum(figures["kernel_ms"].values())
    shown = sorted(totals, key=lambda name: -totals[name])[:10]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    greys = {"other kernels": "grey", "outside kernels": "lightgrey"}
    places, bottom = range(len(results)), [0.0] * len(results)
    for name in [*shown, "other kernels", "outside kernels"]:
        values = [_part(figures, name, shown) for figures in results]
        axes.bar(places, values, bottom=bottom, label=name, color=greys.get(name))
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_xticks(places, [str(figures["requests"]) for figures in results])
    axes.set_xlabel("requests")
    axes.set_ylabel("milliseconds of a round")
    axes.set_title(f"{content['settings']['layers']} layers, {content['origin']['machine']['gpu']}")
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=120)


def _part(figures: dict[str, Any], name: str, shown: list[str]) -> float:
    """Milliseconds of one part of a replayed round."""
    kernels = figures["kernel_ms"]
    if name == "outside kernels":
        return max(0.0, statistics.median(figures["replayed_ms"]) - sum(kernels.values()))
    if name == "other kernels":
        return sum(value for kernel, value in kernels.items() if kernel not in shown)
    return kernels.get(name, 0.0)


def _write(path: Path, content: dict[str, Any]) -> None:
    """An interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.round", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", default="1,8,32,128,256", help="numbers of requests (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="target layers (default: as many as fit)")
    parser.add_argument("--context", type=int, default=8192, help="tokens before the round (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--shape", choices=("flash", "tiny"), default="flash")
    parser.add_argument("--json", type=Path, help="results (default: benchmarks/results/round.json, on a GPU alone)")
    parser.add_argument("--commit", help="commit of this copy, on a machine without the repository")
    parser.add_argument(
        "--compile", action="store_true", help="run every round once, for Triton's cache, and measure nothing"
    )
    parser.add_argument("--picture", action="store_true", help="draw the results that are there, and measure nothing")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path: Path = arguments.json or RESULT
    if arguments.picture:
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        return 0
    if device.type == "cpu" and arguments.shape == "flash":
        print("no GPU: nothing to measure (--shape tiny shows that the program runs)")
        return 1
    numbers = [int(number) for number in arguments.requests.split(",")]
    whole = FLASH if arguments.shape == "flash" else TINY
    layers = arguments.layers or (num_layers_that_fit(device) if whole is FLASH else TINY["num_hidden_layers"])
    origin = report.provenance(ROOT, " ".join(["python -m benchmarks.gpu.round", *sys.argv[1:]]))
    origin |= {"commit": arguments.commit} if arguments.commit else {}
    settings = {"shape": arguments.shape, "layers": layers, "context": arguments.context}
    kept = json.loads(path.read_text()) if path.exists() else {}
    same = kept.get("origin", {}).get("commit") == origin["commit"] and kept.get("settings") == settings
    results: dict[str, Any] = kept["results"] if same else {}
    with torch.inference_mode():
        bench = Bench(with_layers(whole, layers), device, max(numbers), arguments.context)
        if arguments.compile:
            for number in numbers:
                bench.at_context(bench.round(number, arguments.temperature))()
            return 0
        for number in numbers:
            if str(number) not in results:
                results[str(number)] = measure(bench, number, arguments.temperature)
                if device.type == "cuda" or arguments.json is not None:
                    _write(path, {"origin": origin, "settings": settings, "results": results})
            print(describe(results[str(number)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
