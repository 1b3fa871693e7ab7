"""Noise: published results of the generator, and independence of addresses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dspark_kernels import gumbel_noise, philox_4x32, uniform_noise
from dspark_kernels.philox import STREAM_ACCEPT, STREAM_DRAFT, STREAM_RECOVER, STREAM_SAMPLE

# Known answers of Philox-4x32-10 as published with Random123: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


def noise(
    seed: int = 7, position: int = 3, stream: int = STREAM_SAMPLE, first_id: int = 0, num_ids: int = 40
) -> Tensor:
    return gumbel_noise(torch.tensor([seed]), torch.tensor([position]), stream, first_id, num_ids)[0]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_generator_gives_the_published_results(counter: str, key: str, expected: str) -> None:
    output = philox_4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [int(word) for word in output] == [int(word) for word in words(expected)]


def test_a_key_per_row_meets_every_counter_of_its_row() -> None:
    counters = torch.arange(5)
    zero = torch.zeros_like(counters)
    keys = torch.tensor([[1], [2]]), torch.tensor([[3], [4]])
    together = torch.stack(philox_4x32((counters, zero[:1, None], zero, zero), keys))
    for row in range(2):
        alone = philox_4x32((counters, zero, zero, zero), (keys[0][row], keys[1][row]))
        assert torch.equal(together[:, row], torch.stack(alone))


@pytest.mark.parametrize("boundaries", [(0, 20, 40), (0, 13, 40), (0, 1, 2, 3, 39, 40)])
def test_shards_of_the_vocabulary_have_the_noise_of_the_whole(boundaries: tuple[int, ...]) -> None:
    shards = [noise(first_id=start, num_ids=stop - start) for start, stop in pairwise(boundaries)]
    assert torch.equal(torch.cat(shards), noise())


def test_a_row_has_the_same_noise_alone_and_in_a_batch() -> None:
    seeds, positions = torch.tensor([7, -1, 12]), torch.tensor([3, 3, 2**35])
    batch = gumbel_noise(seeds, positions, STREAM_SAMPLE, 0, 40)
    for row in range(3):
        assert torch.equal(batch[row], noise(seed=int(seeds[row]), position=int(positions[row])))


@pytest.mark.parametrize(
    "address",
    [
        {"seed": 8},
        {"seed": -7},
        {"seed": 7 + 2**32},
        {"seed": 7 - 2**63},
        {"position": 4},
        {"position": 3 + 2**32},
        {"stream": STREAM_DRAFT},
        {"stream": STREAM_ACCEPT},
        {"stream": STREAM_RECOVER},
        {"first_id": 4},
    ],
    ids=str,
)
def test_every_part_of_an_address_changes_the_noise(address: dict[str, int]) -> None:
    assert not torch.isclose(noise(**address), noise(), rtol=1e-4).any()


def test_uniforms_lie_strictly_between_0_and_1_and_fill_it_evenly() -> None:
    draws = uniform_noise(torch.arange(100_000), torch.full((100_000,), 5), STREAM_ACCEPT)
    assert draws.min() > 0
    assert draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 50  # 19 degrees of freedom: exceeded once in ten thousand


def test_the_largest_and_smallest_words_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = tuple(torch.tensor([[word]]) for word in (0, 2**32 - 1, 0, 2**32 - 1))
    monkeypatch.setattr("dspark_kernels.philox.philox_4x32", lambda counter, key: extremes)
    assert noise(num_ids=4).isfinite().all()


def test_the_best_noisy_logit_is_a_draw_from_the_softmax() -> None:
    num_draws, logits = 50_000, torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    seeds, positions = torch.arange(num_draws) - num_draws // 2, torch.full((num_draws,), 9)
    tokens = (logits + gumbel_noise(seeds, positions, STREAM_SAMPLE, 0, 5)).argmax(-1)
    expected = num_draws * logits.softmax(-1)
    chi_square = ((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 24  # 4 degrees of freedom: exceeded once in ten thousand
