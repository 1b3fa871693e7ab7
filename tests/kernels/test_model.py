"""The full network through kernels against references: layers, cache, drafts, recorded steps, text.

Kernels are interpreted where there is no GPU, so networks and texts are as small as they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from compare import DEVICE
from small_network import (
    ALL_KINDS,
    GAMMA,
    MAX_ROWS,
    NUM_PAGES,
    NUM_SEQUENCES,
    PAGE_SIZE,
    in_float32,
    keys_in,
    network,
    new_cache,
    run,
    segment,
)
from torch import Tensor

import dspark_kernels
from dspark_kernels import gpu, reference
from dspark_ray.config import EngineConfig
from dspark_ray.drafters.dspark import BlockOutput, DSparkModule, FeatureProjector
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.engine.step_loop import Engine
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.ranks.draft_worker import DraftWorker, InlineDrafter
from dspark_ray.ranks.executor import LocalTarget, TargetRank
from dspark_ray.runner.decode import DraftGraphs, TargetGraphs
from dspark_ray.runner.graphs import Capture, CudaCapture, Outputs, Replay
from dspark_ray.types import Request, SamplingParams, VerificationLimits


@contextmanager
def through(path: str) -> Iterator[None]:
    """Inside, operations on the test's device run as kernels, or as references."""
    with pytest.MonkeyPatch.context() as patch:
        taken = path == "kernels"
        patch.setattr("dspark_kernels.takes_kernel", lambda tensor, *_: taken and tensor.device.type == DEVICE.type)
        yield


def test_kernels_take_the_arguments_of_their_references() -> None:
    """In the same order: a network passes most of them by position. Kernels may take more, which have defaults."""
    for name in gpu.__all__:
        ours, theirs = (list(signature(getattr(where, name)).parameters.values()) for where in (gpu, reference))
        assert [x.name for x in ours[: len(theirs)]] == [x.name for x in theirs], name
        assert [x.default for x in ours[: len(theirs)]] == [x.default for x in theirs], name
        assert all(x.default is not x.empty for x in ours[len(theirs) :]), name


def test_operations_run_as_kernels_only_where_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise both sides of the comparisons below would be the same."""
    called: list[str] = []
    monkeypatch.setattr(dspark_kernels, "rms_norm", dspark_kernels._operation(reference.rms_norm))
    monkeypatch.setattr(gpu, "rms_norm", lambda x, *_: called.append("kernel") or x)
    for path, expected in (("references", []), ("kernels", ["kernel"])):
        with through(path):
            dspark_kernels.rms_norm(torch.ones(2, 4, device=DEVICE), None, 1e-6)
        assert called == expected


# --- layers, cache and drafts -------------------------------------------------------------------------------------

STEPS = (
    [(0, 0, 3, 0), (1, 0, 13, 0)],  # two prompts, of which one is longer than a ring
    [(0, 3, 4, 0), (1, 13, 3, 0)],  # an anchor and three drafts, an anchor and two
    [(0, 5, 5, 1), (1, 14, 3, 1)],  # a chunk of a prompt, and other tokens in the places of rejected drafts
)
"""Forwards of segments (sequence, first position, tokens, draft)."""

ON_GPU = DEVICE.type == "cuda"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A comparison of kernels with references and its bounds, relative to the typical length of a row."""

    dtype: torch.dtype
    stored: bool
    """Weights in FP8 and FP4, and keys too."""
    most: float
    """Bound of every row's error ..."""
    usual: float
    """... and of four rows in five."""
    ratios: tuple[int, ...] = (4, 8)
    """Compression ratios of the target's layers."""

    @property
    def modules(self) -> tuple[DeepSeekV4, DSparkModule]:
        return network(self.dtype, self.stored, self.ratios)


# In float32 the order of sums is all that differs. Where values are rounded to FP8, one of several hundred thousand
# sits so near the middle between two that the order decides, and what follows from its row moves a little. In bfloat16
# every value may round to its neighbour; see also `assert_as_exact`.
NETWORKS = {
    "float32": Network(torch.float32, False, most=1e-4, usual=1e-4, ratios=ALL_KINDS),
    "float32, quantised": Network(torch.float32, True, most=0.05, usual=1e-4),
    "bfloat16": Network(torch.bfloat16, False, most=0.05, usual=0.03),
    "bfloat16, quantised": Network(torch.bfloat16, True, most=0.3, usual=0.15),
}


# Interpreted, a network takes half a minute, and bfloat16 alone shows nothing that the other three do not.
COMPARED = [name for name in NETWORKS if ON_GPU or name != "bfloat16"]


@pytest.fixture(scope="module", params=[NETWORKS[name] for name in COMPARED], ids=COMPARED)
def which(request: pytest.FixtureRequest) -> Network:
    return request.param


def target_outputs(target: DeepSeekV4, which: Network) -> Tensors:
    """Rows of hidden states, context features and logits of all steps, and of the cache after them."""
    cache = new_cache(target, packed=which.stored)
    outputs = [run(target, cache, [segment(*piece) for piece in step]) for step in STEPS]
    hidden = torch.cat([output.hidden for output in outputs])
    features = torch.cat([output.context_features for output in outputs if output.context_features is not None])
    return {"hidden": hidden, "features": features, "logits": target.logits(hidden)} | keys_in(cache, target.config)


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Length of each row's error, relative to the usual length of rows; NaN must stand in the same places."""
    assert found.shape == expected.shape
    found, expected = found.flatten(0, -2).double(), expected.flatten(0, -2).double()
    assert torch.equal(found.isnan(), expected.isnan())
    written = ~expected.isnan().all(1)
    lengths = expected[written].nan_to_num().norm(dim=1)
    return (found - expected)[written].nan_to_num().norm(dim=1) / lengths.square().mean().sqrt()


def assert_agree(found: Tensors, expected: Tensors, which: Network) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        errors = row_errors(found[name], expected[name])
        assert errors.max() <= which.most, f"{name}: largest error {errors.max():.2g}"
        assert errors.quantile(0.8) <= which.usual, f"{name}: most errors are up to {errors.quantile(0.8):.2g}"


def assert_as_exact(found: Tensors, expected: Tensors, exact: Tensors) -> None:
    """Kernels and references differ from float32 by the same amount up to a third: neither rounds more often."""
    for name in expected:
        ours, theirs = (row_errors(outputs[name], exact[name]).mean() for outputs in (found, expected))
        assert ours <= 4 / 3 * theirs, f"{name}: off by {ours:.2g}, references by {theirs:.2g}"


def test_a_forward_through_kernels_equals_one_through_references(which: Network) -> None:
    target, _ = which.modules
    with through("references"):
        expected = target_outputs(target, which)
        exact = target_outputs(in_float32(target), which)
    with through("kernels"):
        found = target_outputs(target, which)
    assert_agree(found, expected, which)
    if which.dtype != torch.float32:
        assert_as_exact(found, expected, exact)


def draft_block(module: DSparkModule, pools: DraftPools, features: Tensor) -> BlockOutput:
    """Blocks of two requests behind contexts of 13 and 5 tokens; one has seen more than a window."""
    for sequence, length in ((0, 13), (1, 5)):
        for first in range(0, length, pools.window):
            positions = torch.arange(first, min(first + pools.window, length), device=DEVICE)
            slots = pools.context_slot_mapping(torch.full_like(positions, sequence), positions)
            module.store_context(module.project(features[positions]), positions, pools.tensors, slots)
    anchors, starts, slots = (torch.tensor(x, device=DEVICE) for x in ([7, 200], [13, 5], [0, 1]))
    return module.cached_block(anchors, starts, pools.tensors, pools.index(slots, starts))


def drafted(module: DSparkModule, block: BlockOutput, temperature: float) -> tuple[Tensor, Tensor]:
    anchors, starts, seeds = (torch.tensor(x, device=DEVICE) for x in ([7, 200], [13, 5], [3, 4]))
    temperatures = torch.full((2,), temperature, dtype=torch.float64, device=DEVICE)
    return module.sample(block, anchors, starts, temperatures, seeds, GAMMA)


def test_a_draft_through_kernels_equals_one_through_references(which: Network) -> None:
    _, module = which.modules
    features = torch.randn(13, 2 * module.config.hidden_size, generator=torch.Generator().manual_seed(5)).to(
        DEVICE, which.dtype
    )
    blocks, pools = {}, {}
    for path in ("references", "kernels"):
        pools[path] = DraftPools(module, NUM_SEQUENCES)
        with through(path):
            blocks[path] = draft_block(module, pools[path], features)
    found, expected = (
        {"hidden": blocks[path].hidden, "base logits": blocks[path].base_logits}
        | {f"stage {stage}": pool for stage, pool in enumerate(pools[path].tensors)}
        for path in ("kernels", "references")
    )
    assert_agree(found, expected, which)
    for temperature in (0.0, 1.0):
        # In float32 of its own block; else of the very same one, where only equal numbers could change places.
        block = blocks["kernels" if which is NETWORKS["float32"] else "references"]
        with through("references"):
            tokens, confidences = drafted(module, blocks["references"], temperature)
        with through("kernels"):
            found_tokens, found_confidences = drafted(module, block, temperature)
        assert torch.equal(found_tokens, tokens)
        torch.testing.assert_close(found_confidences, confidences, atol=1e-3, rtol=0)


# --- recorded steps -----------------------------------------------------------------------------------------------


class Rerun:
    """A `Capture` for machines without a GPU: it computes anew, from the same inputs into the same outputs."""

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        outputs, is_first = function(), True

        def replay() -> None:
            nonlocal is_first
            # Here a recording is made when it is wanted, and has just computed what its first replay would.
            for kept, fresh in zip(outputs, () if is_first else function(), strict=not is_first):
                kept.copy_(fresh)
            is_first = False

        return replay, outputs


def capture() -> Capture:
    return CudaCapture() if ON_GPU else Rerun()


PREFILLED = [(0, 0, 7, 0), (1, 0, 4, 0)]
RECORDED = (
    [(0, 5, 4, 1), (1, 2, 2, 1)],  # of both sequences two drafts were rejected
    [(0, 6, 1, 0), (1, 3, 2, 1)],  # texts of up to 8 tokens, of which every entry is chosen
    [(0, 7, 2, 1), (1, 5, 4, 0)],  # the first recording again
)


@pytest.mark.parametrize("stored", [False, True] if ON_GPU else [False], ids="float32, quantised {}".format)
def test_replayed_steps_through_kernels_equal_launched_ones(stored: bool) -> None:
    target, _ = network(torch.float32, stored, (4,))
    recorded, launched = new_cache(target, stored), new_cache(target, stored)
    with through("references"):
        for cache in (recorded, launched):
            run(target, cache, [segment(*piece) for piece in PREFILLED])
    with through("kernels"):
        graphs = TargetGraphs(target, recorded, NUM_SEQUENCES, NUM_PAGES * PAGE_SIZE, capture())
        graphs.sizes = (7,)  # so that every step is filled up
        for step in RECORDED if ON_GPU else RECORDED[:1]:
            pieces = [segment(*piece) for piece in step]
            expected = run(target, launched, pieces)
            found = graphs.run(pieces)
            bound = NETWORKS["float32, quantised" if stored else "float32"].most
            assert row_errors(found.hidden, expected.hidden).max() < bound
            assert row_errors(found.context_features, expected.context_features).max() < bound


def test_replayed_drafts_through_kernels_equal_launched_ones() -> None:
    _, module = network(torch.float32, False, (4,))
    pools = DraftPools(module, NUM_SEQUENCES)
    for number, pool in enumerate(pools.tensors):
        pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(number)))
    anchors, starts, slots, seeds = (torch.tensor(x, device=DEVICE) for x in ([7, 9], [13, 5], [0, 1], [3, 4]))
    temperatures = torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE)
    with through("kernels"):
        block = module.cached_block(anchors, starts, pools.tensors, pools.index(slots, starts))
        tokens, confidences = module.sample(block, anchors, starts, temperatures, seeds, GAMMA)
        graphs = DraftGraphs(module, pools, NUM_SEQUENCES, capture())
        for rows in (slice(0, 2), slice(1, 2), slice(0, 2)) if ON_GPU else (slice(0, 2),):
            found = graphs.run(anchors[rows], starts[rows], slots[rows], seeds[rows], temperatures[rows])
            assert torch.equal(found[0], tokens[rows])
            torch.testing.assert_close(found[1], confidences[rows], atol=1e-5, rtol=0)


# --- text ---------------------------------------------------------------------------------------------------------


def text(speculate: bool) -> list[tuple[int, ...]]:
    """Eight sampled tokens behind a prompt of five, step by step, from an engine whose operations are kernels."""
    target, module = network(torch.float32, False, (4,))
    config = EngineConfig(
        max_num_seqs=NUM_SEQUENCES,
        max_num_batched_tokens=MAX_ROWS,
        max_model_len=PAGE_SIZE,
        page_size=PAGE_SIZE,
        speculation=speculate,
    ).for_model(target.config)
    cache = new_cache(target, packed=False)
    projector = FeatureProjector(target.config).to(DEVICE)
    projector.load_state_dict({name: module.state_dict()[name] for name in projector.state_dict()})
    with through("kernels"):
        graphs, captured = None, None
        if ON_GPU and speculate:
            captured = CudaCapture()
            graphs = TargetGraphs(target, cache, NUM_SEQUENCES, PAGE_SIZE, captured)
        rank = TargetRank(target, cache, projector.requires_grad_(False), graphs)
        drafter = InlineDrafter(DraftWorker(module, config, captured)) if speculate else None
        engine = Engine(config, target.config, LocalTarget(rank), drafter)
        request = Request(
            request_id="r",
            prompt_token_ids=tuple(segment(0, 0, 5).token_ids),
            sampling=SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True, seed=3),
            speculative=VerificationLimits(bypass=not speculate),
        )
        engine.add_request(request)
        steps = []
        while engine.has_unfinished():
            steps += [tuple(output.token_ids) for output in engine.step().sequences]
    return steps


def test_text_through_kernels_is_the_same_with_and_without_speculation() -> None:
    plain, speculated = text(speculate=False), text(speculate=True)
    assert [len(tokens) for tokens in plain] == [1] * 8
    assert sum(speculated, ()) == sum(plain, ())
    assert len(speculated) < 8, "no draft was ever right"
