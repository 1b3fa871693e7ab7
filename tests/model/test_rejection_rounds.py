"""Rejection only reduces the length: random rounds of accepted and rejected drafts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from serving import Serving, random_tokens
from small_targets import TargetPair, build_pair
from torch import Tensor

from dspark_ray.cache.shape import CacheShape

TOLERANCE = 1e-4
PAGE_SIZE = 16
TEXT_LENGTH = 160


@pytest.fixture(scope="module")
def pair() -> TargetPair:
    return build_pair()


@dataclass
class Request:
    """One sequence: the text that verification accepts, and its committed length."""

    text: list[int]
    expected: Tensor
    length: int = 0
    """Committed tokens, the anchor text[length] not among them."""
    errors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """Requests in one cache, advancing by verify blocks and prefill chunks in the same forwards."""

    serving: Serving
    requests: list[Request]
    gamma: int
    random: random.Random

    def round(self) -> int:
        """One forward with a piece of some requests that have text left; how many verify blocks it had."""
        pieces, kept = {}, {}
        for number, request in self._shuffled():
            piece, kept[number] = self._prefill(request) if request.length == 0 else self._verify(request)
            pieces[number] = (request.length, piece)
        blocks = sum(start > 0 for start, _ in pieces.values())
        for number, logits in self.serving.logits(pieces).items():
            request, count = self.requests[number], kept[number]
            expected = request.expected[request.length : request.length + count]
            request.errors.append((logits[:count] - expected).abs().nan_to_num(float("inf")).max().item())
            request.length += count
        return blocks

    def _shuffled(self) -> Iterator[tuple[int, Request]]:
        waiting = [(n, r) for n, r in enumerate(self.requests) if r.length + self.gamma + 1 < len(r.text)]
        self.random.shuffle(waiting)
        return iter(waiting[: self.random.randint(1, len(self.requests))])

    def _prefill(self, request: Request) -> tuple[list[int], int]:
        count = self.random.randint(1, 40)
        return request.text[:count], count

    def _verify(self, request: Request) -> tuple[list[int], int]:
        """[anchor, drafts], of which the first so many are the text and the others anything."""
        num_drafts = self.random.randint(0, self.gamma)
        accepted = min(self.random.choice((0, self.random.randint(0, self.gamma))), num_drafts)
        kept = request.text[request.length : request.length + 1 + accepted]
        vocab_size = self.serving.model.config.vocab_size
        rejected = [self.random.randrange(vocab_size) for _ in range(num_drafts - accepted)]
        return kept + rejected, 1 + accepted

    @property
    def worst(self) -> float:
        return max(error for request in self.requests for error in request.errors)


def workload(pair: TargetPair, gamma: int, num_requests: int, shape: CacheShape | None = None) -> Workload:
    texts = [random_tokens(TEXT_LENGTH, pair.vocab_size, seed=100 * gamma + n) for n in range(num_requests)]
    serving = Serving(
        pair.ours,
        num_sequences=num_requests,
        gamma=gamma,
        max_length=TEXT_LENGTH,
        page_size=PAGE_SIZE,
        shape=shape,
    )
    requests = [Request(text, pair.expected(text)) for text in texts]
    return Workload(serving, requests, gamma, random.Random(gamma))


@pytest.mark.parametrize("gamma", range(1, 8))
def test_accepted_rows_equal_transformers_after_any_rejections(pair: TargetPair, gamma: int) -> None:
    work = workload(pair, gamma, num_requests=4)
    blocks = 0
    while blocks < 80 and any(request.length + gamma + 1 < TEXT_LENGTH for request in work.requests):
        blocks += work.round()
    assert blocks >= 75, "fewer rounds than this test is meant to run"
    assert work.worst < TOLERANCE


def shortened(shape: CacheShape, state: str) -> CacheShape:
    """One slot fewer in the ring of keys ("window") or of raw rows of a ratio."""
    if state == "window":
        return replace(shape, window_ring=shape.window_ring - 1)
    ratio = int(state)
    return replace(shape, raw_rings=shape.raw_rings | {ratio: shape.raw_rings[ratio] - 1})


@pytest.mark.parametrize("state", ["window", "4", "16"])
def test_one_slot_fewer_in_any_ring_loses_a_row_still_needed(pair: TargetPair, state: str) -> None:
    gamma = 3
    shape = CacheShape.of(pair.ours.config, gamma, PAGE_SIZE, num_slots=4, max_rows=4 * TEXT_LENGTH)
    work = workload(pair, gamma, num_requests=4, shape=shortened(shape, state))
    for _ in range(60):
        work.round()
    assert work.worst > 100 * TOLERANCE


def test_a_sequence_has_the_same_logits_alone_and_among_others(pair: TargetPair) -> None:
    lengths = {0: 1, 1: 37, 2: 8, 3: 64}
    texts = {n: random_tokens(length + 20, pair.vocab_size, seed=n) for n, length in lengths.items()}
    # Some decode, one starts, one goes on with its prompt.
    pieces = {3: (64, texts[3][64:84]), 0: (1, texts[0][1:3]), 2: (8, texts[2][8:16]), 1: (0, texts[1][:57])}
    together = Serving(pair.ours, num_sequences=4, gamma=7)
    for n in (2, 3, 0):
        together.prefill(n, texts[n][: lengths[n]], [lengths[n]])
    logits = together.logits(pieces)
    for n, (start, token_ids) in pieces.items():
        alone = Serving(pair.ours, num_sequences=1, gamma=7)
        if start:
            alone.prefill(0, texts[n][:start], [start])
        expected = alone.logits({0: (start, token_ids)})[0]
        torch.testing.assert_close(logits[n], expected, atol=1e-5, rtol=0)
