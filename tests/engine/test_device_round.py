"""The round of benchmarks/gpu/device_round.py says what the engine says."""

from __future__ import annotations

import pytest
import torch
from small_model import SMALL, build_small_engine, request, run, small_config, small_modules

from benchmarks.gpu.device_round import DeviceRound, Requests
from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.model.rows import Segment, build_rows

NUM_REQUESTS, NUM_TOKENS = 3, 30
PROMPTS = [tuple((5 * n + 7 * r + 1) % SMALL.vocab_size for n in range(9 + 4 * r)) for r in range(NUM_REQUESTS)]


def prefilled(budget: int, first_tokens: list[int], temperature: float) -> DeviceRound:
    """Prompts are in the cache and in the drafter's context; the first token of each text is its anchor."""
    config, (target, drafter) = small_config(), small_modules()
    shape = CacheShape.of(SMALL, SMALL.gamma, config.page_size, NUM_REQUESTS, 64)
    cache, pools = CacheTensors(SMALL, shape, 4 * NUM_REQUESTS), DraftPools(drafter, NUM_REQUESTS)
    pages = torch.arange(4 * NUM_REQUESTS).view(NUM_REQUESTS, 4)
    for slot, prompt in enumerate(PROMPTS):
        rows = build_rows([Segment(slot, 0, list(prompt), pages[slot].tolist())], shape)
        features = target(rows, cache).context_features
        assert features is not None
        kept = rows.positions[-SMALL.sliding_window :]
        slots = pools.context_slot_mapping(torch.tensor(slot), kept)
        drafter.store_context(drafter.project(features)[-SMALL.sliding_window :], kept, pools.tensors, slots)
    requests = Requests(
        anchors=torch.tensor(first_tokens),
        starts=torch.tensor([len(prompt) for prompt in PROMPTS]),
        slots=torch.arange(NUM_REQUESTS),
        pages=pages,
        seeds=torch.arange(NUM_REQUESTS),
        temperatures=torch.full((NUM_REQUESTS,), temperature, dtype=torch.float64),
    )
    return DeviceRound(target, drafter, cache, pools, requests, budget, max_length=128)


@pytest.mark.parametrize("budget", [0, 4, 15])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_rounds_on_the_device_say_what_the_engine_says(budget: int, temperature: float) -> None:
    asked = [
        request(prompt, str(r), max_tokens=NUM_TOKENS, temperature=temperature, seed=r)
        for r, prompt in enumerate(PROMPTS)
    ]
    expected = run(build_small_engine(), *asked)
    device_round = prefilled(budget, [expected[str(r)][0] for r in range(NUM_REQUESTS)], temperature)
    texts = [[expected[str(r)][0]] for r in range(NUM_REQUESTS)]
    num_accepted = 0
    while min(len(text) for text in texts) < NUM_TOKENS:
        result = device_round.run()
        for text, accepted, drafts, anchor in zip(
            texts, result.num_accepted.tolist(), result.drafts.tolist(), result.next_anchors.tolist(), strict=True
        ):
            text += [*drafts[:accepted], anchor]
            num_accepted += accepted
    assert [text[:NUM_TOKENS] for text in texts] == [expected[str(r)] for r in range(NUM_REQUESTS)]
    assert (num_accepted > 0) == (budget > 0)
