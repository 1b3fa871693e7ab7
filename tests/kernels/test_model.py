"""The whole network through kernels says what it says through references: layers, cache, drafts, recorded steps, text.

Kernels are interpreted where there is no GPU, so networks and texts are as small as they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from compare import DEVICE
from small_network import CONFIG, GAMMA, NUM_SEQUENCES, PAGE_SIZE, SHAPE, keys_in, network, new_cache, segment
from torch import Tensor

from dspark_ray.config import EngineConfig
from dspark_ray.drafters.dspark import BlockOutput, DSparkModule, FeatureProjector
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.drafters.worker import DraftWorker, InlineDrafter
from dspark_ray.engine import Engine
from dspark_ray.model.executor import LocalTarget, TargetRank
from dspark_ray.model.rows import Segment, build_rows
from dspark_ray.runner.decode import DraftGraphs, TargetGraphs
from dspark_ray.runner.graphs import Capture, CudaCapture, Outputs, Replay
from dspark_ray.types import Request, SamplingParams, SpeculativeParams


@contextmanager
def through(path: str) -> Iterator[None]:
    """Inside, operations on the test's device run as kernels, or as references."""
    with pytest.MonkeyPatch.context() as patch:
        taken = path == "kernels"
        patch.setattr("dspark_kernels.takes_kernel", lambda tensor: taken and tensor.device.type == DEVICE.type)
        yield


def test_operations_run_as_kernels_only_where_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else both sides of the comparisons below would be the same."""
    import dspark_kernels
    from dspark_kernels import gpu

    called: list[str] = []
    monkeypatch.setattr(dspark_kernels, "rms_norm", dspark_kernels._operation(dspark_kernels.reference.rms_norm))
    monkeypatch.setattr(gpu, "rms_norm", lambda x, *_: called.append("kernel") or x)
    for path, expected in (("references", []), ("kernels", ["kernel"])):
        with through(path):
            dspark_kernels.rms_norm(torch.ones(2, 4, device=DEVICE), None, 1e-6)
        assert called == expected


# --- layers, cache and drafts -------------------------------------------------------------------------------------

STEPS = (
    [(0, 0, 11, 0), (1, 0, 21, 0)],  # two prompts
    [(0, 11, 4, 0), (1, 21, 3, 0)],  # an anchor and three drafts, an anchor and two
    [(0, 13, 4, 1), (1, 22, 4, 1)],  # of each sequence two drafts were rejected
    [(1, 26, 5, 0), (0, 14, 1, 2)],  # a chunk of a prompt beside an anchor alone
)
"""Forwards of segments (sequence, first position, tokens, draft): in the end every entry and ring has been used."""


@dataclass(frozen=True)
class Network:
    """What kernels have to agree with references about, and how closely."""

    dtype: torch.dtype
    stored: bool
    """Weights in FP8 and FP4, and keys too."""
    bound: float
    """Of a row's error, relative to the rows' usual length ..."""
    share: float
    """... which this part of all rows must keep ..."""
    loosest: float
    """... and that of the others."""


# In float32 the order of sums is all that differs. Where values are rounded to FP8, one of several hundred thousand
# sits so near the middle between two that the order decides, and all that follows from its row moves a little. In
# bfloat16 every value may round to its neighbour, and entries that are nearly equal be chosen in another order.
NETWORKS = {
    "float32": Network(torch.float32, False, bound=1e-4, share=1.0, loosest=1e-4),
    "float32, quantised": Network(torch.float32, True, bound=1e-4, share=0.8, loosest=0.05),
    "bfloat16": Network(torch.bfloat16, False, bound=0.02, share=0.9, loosest=0.2),
    "bfloat16, quantised": Network(torch.bfloat16, True, bound=0.05, share=0.9, loosest=0.3),
}


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS.keys())
def which(request: pytest.FixtureRequest) -> Network:
    return request.param


def target_outputs(which: Network) -> dict[str, Tensor]:
    """Rows of hidden states, features and logits of all steps, and of the cache that they leave."""
    target, _ = network(which.dtype, which.stored)
    cache = new_cache(which.dtype, packed=which.stored)
    outputs = [target(build_rows([segment(*piece) for piece in step], SHAPE, DEVICE), cache) for step in STEPS]
    hidden = torch.cat([output.hidden for output in outputs])
    features = torch.cat([output.features for output in outputs if output.features is not None])
    return {"hidden": hidden, "features": features, "logits": target.logits(hidden)} | keys_in(cache)


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Length of each row's error, relative to the usual length of rows; NaN must stand in the same places."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.flatten(0, -2).double(), expected.flatten(0, -2).double()
    assert torch.equal(found.isnan(), expected.isnan())
    written = ~expected.isnan().all(1)
    lengths = expected[written].nan_to_num().norm(dim=1)
    return (found - expected)[written].nan_to_num().norm(dim=1) / lengths.square().mean().sqrt()


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], which: Network) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        errors = row_errors(found[name], expected[name])
        kept = (errors <= which.bound).double().mean().item()
        assert kept >= which.share, f"{name}: {kept:.0%} of rows within {which.bound}, largest error {errors.max():.2g}"
        assert errors.max() <= which.loosest, f"{name}: largest error {errors.max():.2g}"


def test_a_forward_through_kernels_leaves_what_one_through_references_leaves(which: Network) -> None:
    with through("references"):
        expected = target_outputs(which)
    with through("kernels"):
        found = target_outputs(which)
    assert_agree(found, expected, which)


def draft_block(module: DSparkModule, pools: DraftPools, features: Tensor) -> BlockOutput:
    """Blocks of two requests behind contexts of 13 and 5 tokens; one has seen more than a window."""
    for sequence, length in ((0, 13), (1, 5)):
        for first in range(0, length, pools.window):
            positions = torch.arange(first, min(first + pools.window, length), device=DEVICE)
            slots = pools.context_slots(torch.full_like(positions, sequence), positions)
            module.store_context(module.project(features[positions]), positions, pools.tensors, slots)
    anchors, starts, slots = (torch.tensor(x, device=DEVICE) for x in ([7, 200], [13, 5], [0, 1]))
    return module.cached_block(anchors, starts, pools.tensors, pools.index(slots, starts))


def drafted(module: DSparkModule, block: BlockOutput, temperature: float) -> tuple[Tensor, Tensor]:
    anchors, starts, seeds = (torch.tensor(x, device=DEVICE) for x in ([7, 200], [13, 5], [3, 4]))
    temperatures = torch.full((2,), temperature, dtype=torch.float64, device=DEVICE)
    return module.sample(block, anchors, starts, temperatures, seeds, GAMMA)


def test_a_draft_through_kernels_is_that_of_references(which: Network) -> None:
    _, module = network(which.dtype, which.stored)
    width = len(CONFIG.dspark.target_layer_ids) * CONFIG.hidden_size  # type: ignore[union-attr]
    features = torch.randn(13, width, generator=torch.Generator().manual_seed(5)).to(DEVICE, which.dtype)
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
        with through("references"):
            tokens, confidences = drafted(module, blocks["references"], temperature)
        with through("kernels"):
            # Of the very same block, in which only numbers that are as good as equal could change places.
            same = drafted(module, blocks["references"], temperature)
            own = drafted(module, blocks["kernels"], temperature)
        assert torch.equal(same[0], tokens)
        torch.testing.assert_close(same[1], confidences, atol=1e-4, rtol=0)
        if which.dtype == torch.float32:
            assert torch.equal(own[0], tokens)
            torch.testing.assert_close(own[1], confidences, atol=max(1e-4, which.loosest), rtol=0)


# --- recorded steps -----------------------------------------------------------------------------------------------


class Rerun:
    """A `Capture` for machines without a GPU: it computes anew, from the same inputs into the same outputs."""

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        outputs = function()

        def replay() -> None:
            for kept, fresh in zip(outputs, function(), strict=True):
                kept.copy_(fresh)

        return replay, outputs


def capture() -> Capture:
    return CudaCapture() if DEVICE.type == "cuda" else Rerun()


RECORDED = ([(0, 0, 4, 0), (1, 0, 1, 0)], [(0, 2, 4, 1), (1, 1, 4, 0)], [(1, 5, 3, 0)], [(0, 6, 2, 0), (1, 6, 2, 1)])
"""Blocks, in graphs of 5, 8, 3 and 4 rows; the same sizes again for texts beyond the first 16 tokens."""


@pytest.mark.parametrize("stored", [False, True], ids=["float32", "float32, quantised"])
def test_replayed_steps_through_kernels_are_launched_ones(stored: bool) -> None:
    target, _ = network(torch.float32, stored)
    recorded, launched = new_cache(torch.float32, packed=stored), new_cache(torch.float32, packed=stored)
    with through("kernels"):
        graphs = TargetGraphs(target, recorded, NUM_SEQUENCES, max_length=48, capture=capture())
        later = [[(sequence, start + 14, count, draft) for sequence, start, count, draft in RECORDED[1]]]
        prompts = [segment(0, 8, 8), segment(1, 8, 8)]
        for step in (*RECORDED, prompts, *later):
            pieces = step if isinstance(step[0], Segment) else [segment(*piece) for piece in step]
            expected = target(build_rows(pieces, SHAPE, DEVICE), launched)
            if not graphs.fits(pieces):
                target(build_rows(pieces, SHAPE, DEVICE), recorded)
                continue
            found = graphs.run(pieces)
            torch.testing.assert_close(found.hidden, expected.hidden, atol=2e-4, rtol=0)
            torch.testing.assert_close(found.features, expected.features, atol=2e-4, rtol=0)


def test_replayed_drafts_through_kernels_are_launched_ones() -> None:
    _, module = network(torch.float32, False)
    pools = DraftPools(module, NUM_SEQUENCES)
    for number, pool in enumerate(pools.tensors):
        pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(number)))
    anchors, starts, slots, seeds = (torch.tensor(x, device=DEVICE) for x in ([7, 9], [13, 5], [0, 1], [3, 4]))
    temperatures = torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE)
    with through("kernels"):
        block = module.cached_block(anchors, starts, pools.tensors, pools.index(slots, starts))
        tokens, confidences = module.sample(block, anchors, starts, temperatures, seeds, GAMMA)
        graphs = DraftGraphs(module, pools, NUM_SEQUENCES, capture())
        for rows in (slice(0, 2), slice(1, 2), slice(0, 2)):
            found = graphs.run(anchors[rows], starts[rows], slots[rows], seeds[rows], temperatures[rows])
            assert torch.equal(found[0], tokens[rows])
            torch.testing.assert_close(found[1], confidences[rows], atol=1e-5, rtol=0)


# --- text ---------------------------------------------------------------------------------------------------------


def text(speculate: bool, temperature: float, recorded: bool) -> list[int]:
    """Eight tokens behind a prompt of seven, from an engine whose operations are kernels."""
    target, module = network(torch.float32, False)
    config = EngineConfig(
        max_num_seqs=NUM_SEQUENCES,
        max_num_batched_tokens=SHAPE.max_rows,
        max_model_len=PAGE_SIZE,
        page_size=PAGE_SIZE,
        speculation=speculate,
    ).for_model(CONFIG)
    cache = new_cache(torch.float32, packed=False)
    projector = FeatureProjector(CONFIG).to(DEVICE)
    projector.load_state_dict({name: module.state_dict()[name] for name in projector.state_dict()})
    with through("kernels"):
        captured = capture() if recorded else None
        graphs = None if captured is None else TargetGraphs(target, cache, NUM_SEQUENCES, PAGE_SIZE, captured)
        rank = TargetRank(target, cache, projector.requires_grad_(False), graphs)
        drafter = InlineDrafter(DraftWorker(module, config)) if speculate else None
        engine = Engine(config, CONFIG, LocalTarget(rank), drafter)
        sampling = SamplingParams(max_tokens=8, temperature=temperature, ignore_eos=True, seed=3)
        prompt = tuple(segment(0, 0, 7).token_ids)
        speculative = SpeculativeParams(enabled=speculate)
        engine.add_request(Request(request_id="r", prompt_token_ids=prompt, sampling=sampling, speculative=speculative))
        tokens: list[int] = []
        while engine.has_unfinished():
            tokens += [token for output in engine.step().sequences for token in output.token_ids]
    return tokens


def test_text_with_speculation_through_kernels_is_text_without() -> None:
    plain = text(speculate=False, temperature=1.0, recorded=False)
    assert len(plain) == 8
    assert text(speculate=True, temperature=1.0, recorded=True) == plain
