"""Admission of prefixes and their layout in rows. All results are integers, and equal."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, DTYPES, generator, integers, random
from torch import Tensor

from dspark_kernels import gpu, reference

SHAPES = ((1, 1), (1, 5), (7, 16), (129, 5), (300, 3))


def uniforms(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator()).to(DEVICE)


def assert_admitted(confidences: Tensor, limits: Tensor, thresholds: Tensor, budget: int) -> Tensor:
    """The kernel's lengths, which are those of the reference.

    The reference runs on the CPU: a GPU's running product may multiply in another order.
    """
    lengths = gpu.admit_prefixes(confidences, limits, thresholds, torch.tensor(budget, device=DEVICE))
    expected = reference.admit_prefixes(confidences.cpu(), limits.cpu(), thresholds.cpu(), torch.tensor(budget))
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == expected.tolist()
    return lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_requests", "gamma"), SHAPES)
def test_the_best_survivals_are_admitted(num_requests: int, gamma: int, dtype: torch.dtype) -> None:
    confidences = uniforms(num_requests, gamma).sqrt().to(dtype)
    limits = integers(0, gamma + 1, num_requests)
    thresholds = uniforms(num_requests) * 0.3
    num_allowed = int(limits.sum())
    for budget in (0, 1, num_allowed // 3, num_allowed - 1, num_allowed, num_requests * gamma + 7):
        assert_admitted(confidences, limits, thresholds, budget)


@pytest.mark.parametrize(("num_requests", "gamma"), SHAPES)
def test_of_equal_survivals_the_earlier_request_comes_first(num_requests: int, gamma: int) -> None:
    confidences = integers(0, 3, num_requests, gamma) / 2
    confidences[:, 0] = 1.0
    limits = integers(0, gamma + 2, num_requests)
    none = torch.zeros(num_requests, device=DEVICE)
    for budget in range(0, num_requests * gamma + 1, max(1, num_requests * gamma // 13)):
        assert_admitted(confidences, limits, none, budget)


def test_a_thousand_requests_share_a_budget() -> None:
    confidences = (uniforms(1000, 16) * 8).round() / 8
    assert_admitted(confidences, integers(0, 17, 1000), uniforms(1000) * 0.01, 5000)


@pytest.mark.parametrize("budget", [1, 40, 10**12])
def test_a_limit_of_zero_admits_nothing(budget: int) -> None:
    limits = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    lengths = assert_admitted(uniforms(9, 5), limits, torch.zeros(9, device=DEVICE), budget)
    assert not lengths.any()


@pytest.mark.parametrize("budget", [-3, 0])
def test_without_a_budget_nothing_is_admitted(budget: int) -> None:
    limits = torch.full((9,), 5, device=DEVICE)
    lengths = assert_admitted(torch.ones(9, 5, device=DEVICE), limits, torch.zeros(9, device=DEVICE), budget)
    assert not lengths.any()


def test_a_survival_that_equals_its_threshold_is_kept() -> None:
    confidences = uniforms(50, 7)
    # The product from left to right, to its last bit.
    survival = confidences.double().cpu().cumprod(-1)
    thresholds = survival.gather(1, torch.arange(50).remainder(7).unsqueeze(1)).squeeze(1).to(DEVICE)
    limits = torch.full((50,), 7, device=DEVICE)
    lengths = assert_admitted(confidences, limits, thresholds, 350)
    assert lengths.tolist() == [1 + request % 7 for request in range(50)]


def test_confidences_may_be_a_slice_or_transposed() -> None:
    limits, none = torch.full((6,), 4, device=DEVICE), torch.zeros(6, device=DEVICE)
    wide = uniforms(6, 9)
    assert_admitted(wide[:, 3:7], limits, none, 11)
    assert_admitted(uniforms(4, 6).t(), limits, none, 11)
    assert_admitted(wide[:, :4], limits.expand(2, 6).t()[:, 0], wide[:, 8], 11)


def test_no_requests_are_admitted_nothing() -> None:
    empty = torch.zeros(0, device=DEVICE)
    assert gpu.admit_prefixes(empty.view(0, 5), empty.long(), empty, torch.tensor(3, device=DEVICE)).shape == (0,)


def test_more_candidates_than_one_program_holds_are_refused() -> None:
    confidences = torch.zeros(2049, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2049, 8\).*16384"):
        gpu.admit_prefixes(confidences, confidences[:, 0], confidences[:, 0], torch.tensor(3, device=DEVICE))


def assert_packed(lengths: Tensor, drafts: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """The kernel's rows, which are those of the reference."""
    anchors, starts = integers(0, 10**6, len(lengths)), integers(0, 2**40, len(lengths))
    packed = gpu.pack_rows(lengths, anchors, drafts, starts, num_rows)
    for result, expected in zip(packed, reference.pack_rows(lengths, anchors, drafts, starts, num_rows)):
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)
    return packed


@pytest.mark.parametrize("num_empty", [0, 1, 3000])
@pytest.mark.parametrize(("num_requests", "gamma"), [*SHAPES, (1100, 2), (40, 17)])
def test_rows_are_anchors_with_their_drafts(num_requests: int, gamma: int, num_empty: int) -> None:
    lengths = integers(0, gamma + 1, num_requests)
    assert_packed(lengths, integers(0, 10**6, num_requests, gamma), num_requests + int(lengths.sum()) + num_empty)


def test_drafts_may_be_a_slice_or_transposed() -> None:
    lengths = integers(0, 6, 33)
    assert_packed(lengths, integers(0, 10**6, 33, 9)[:, 2:7], 33 * 6)
    assert_packed(lengths, integers(0, 10**6, 5, 33).t(), 33 * 6)


def test_requests_without_drafts_have_one_row_each() -> None:
    _, _, owners, first_rows = assert_packed(integers(0, 1, 20), integers(0, 1, 20, 0), 23)
    assert owners.tolist() == [*range(20), -1, -1, -1]
    assert first_rows.tolist() == list(range(21))


@pytest.mark.parametrize("num_rows", [0, 5, 700])
def test_without_requests_all_rows_are_empty(num_rows: int) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    token_ids, positions, owners, first_rows = gpu.pack_rows(none, none, none.view(0, 5), none, num_rows)
    assert first_rows.tolist() == [0]
    assert token_ids.tolist() == positions.tolist() == [0] * num_rows
    assert owners.tolist() == [-1] * num_rows


def test_admitted_prefixes_are_packed_without_synchronisation() -> None:
    confidences, drafts = random(20, 5).sigmoid(), integers(0, 99, 20, 5)
    limits, none = torch.full((20,), 5, device=DEVICE), torch.zeros(20, device=DEVICE)
    lengths = assert_admitted(confidences, limits, none, 44)
    assert int(lengths.sum()) == 44
    assert_packed(lengths, drafts, 64)
