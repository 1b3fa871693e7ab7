"""`route` against its reference: by score, by score and bias, and by table."""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, assert_close, integers, random
from torch import Tensor

from dspark_kernels import gpu, reference

# (rows, channels, experts, top_k): one row, several blocks of everything, and powers of two.
SHAPES = [(1, 100, 10, 3), (129, 70, 75, 6), (16, 512, 16, 1), (7, 700, 40, 8)]


def check(
    hidden: Tensor, gate: Tensor, bias: Tensor | None, hashed: Tensor | None, top_k: int, norm: bool = True
) -> None:
    weights, experts = gpu.route(hidden, gate, bias, hashed, top_k, 1.5, norm)
    expected_weights, expected_experts = reference.route(hidden, gate, bias, hashed, top_k, 1.5, norm)
    assert torch.equal(experts, expected_experts)
    assert_close(weights, expected_weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_of_score_and_bias_are_chosen(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    num_rows, d, num_experts, top_k = shape
    gate = random(num_experts, d, dtype=dtype, scale=d**-0.5)
    # Below zero, where what stands behind the last expert must not win either.
    check(random(num_rows, d, dtype=dtype), gate, random(num_experts) - 5, None, top_k)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias_the_best_scores_are_chosen(dtype: torch.dtype, norm: bool) -> None:
    check(random(5, 300, dtype=dtype), random(24, 300, dtype=dtype, scale=0.1), None, None, 4, norm)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_chooses_without_scores(shape: tuple[int, int, int, int], norm: bool) -> None:
    num_rows, d, num_experts, top_k = shape
    hashed = integers(0, num_experts, num_rows, top_k)
    check(random(num_rows, d), random(num_experts, d, scale=d**-0.5), None, hashed, top_k, norm)


def test_a_gate_of_another_dtype_is_multiplied_exactly() -> None:
    check(random(9, 200, dtype=torch.bfloat16), random(12, 200, scale=0.1), random(12), None, 3)


def test_scores_keep_their_precision_far_from_zero() -> None:
    """Logits from -60 to 60: where softplus is tiny, and where it is the logit itself."""
    logits = torch.linspace(-60, 60, 121)
    hidden, gate = random(1, 1).fill_(1.0), random(121, 1)
    gate[:, 0] = logits
    order = torch.arange(121).view(1, -1).to(gate.device)
    weights, _ = gpu.route(hidden, gate, None, order, 121, 1.0, False)
    expected, _ = reference.route(hidden.double(), gate.double(), None, order, 121, 1.0, False)
    for low in range(0, 120, 20):
        assert_close(weights[:, low : low + 20], expected[:, low : low + 20].float())


def test_of_equal_experts_the_lower_ids_win() -> None:
    # Integers, whose sums are the same in every order.
    hidden, gate = integers(-3, 4, 3, 64).float(), integers(-3, 4, 1, 64).float().expand(10, 64)
    _, experts = gpu.route(hidden, gate, None, None, 4, 1.0, True)
    assert torch.equal(experts.cpu(), torch.arange(4).expand(3, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("biased", [True, False])
def test_whatever_rows_hold_experts_are_distinct_and_exist(bad: float, biased: bool) -> None:
    """Any of 10 experts of which kernels look at 16."""
    hidden, gate = random(4, 64), random(10, 64)
    hidden[0, 3], hidden[1] = bad, bad
    gate[7, 5] = torch.nan  # one expert of every row
    bias = random(10) if biased else None
    if bias is not None:
        bias[4:] = -torch.inf
    for side in (gpu, reference):
        weights, experts = side.route(hidden, gate, bias, None, 6, 1.0, True)
        assert ((experts >= 0) & (experts < 10)).all()
        assert all(len(set(row)) == 6 for row in experts.tolist())
        assert (experts[2:] == 7).any(1).all()
        assert weights[2:].isnan().all()


@pytest.mark.parametrize("hashed", [True, False])
def test_padding_rows_choose_no_expert(hashed: bool) -> None:
    hidden, gate = random(7, 64), random(8, 64)
    table = integers(0, 8, 7, 2) if hashed else None
    padding = integers(0, 2, 7) == 1
    weights, experts = gpu.route(hidden, gate, random(8), table, 2, 1.5, True, padding)
    expected_weights, expected = reference.route(hidden, gate, None, table, 2, 1.5, True)
    if hashed:
        assert torch.equal(experts[~padding], expected[~padding])
        assert_close(weights[~padding], expected_weights[~padding])
    assert (experts[padding] == -1).all()
    assert (experts[~padding] >= 0).all()
    assert torch.equal(reference.route(hidden, gate, None, table, 2, 1.5, True, padding)[1] == -1, experts == -1)


@pytest.mark.parametrize("hashed", [True, False])
def test_no_rows_give_no_choices(hashed: bool) -> None:
    table = integers(0, 8, 0, 2) if hashed else None
    weights, experts = gpu.route(random(0, 64), random(8, 64), None, table, 2, 1.0, True)
    assert weights.shape == experts.shape == (0, 2)
    assert weights.dtype == torch.float32
    assert experts.dtype == torch.int64


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="top 5 of 4 experts"):
        gpu.route(random(1, 64), random(4, 64), None, None, 5, 1.0, True)
