"""Contracts of the reference operations in cases that forwards do not reach; kernels must follow them too."""

from __future__ import annotations

import pytest
import torch

import dspark_kernels as ops

NAN = float("nan")
LOW, HIGH = slice(0, 2), slice(2, 6)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pooling_ignores_invalid_rows() -> None:
    kv, gate = random(2, 8, 5, seed=1), random(2, 8, 5, seed=2)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, :4] = False
    expected = torch.stack((ops.softmax_pool(kv[:1, 4:], gate[:1, 4:])[0], ops.softmax_pool(kv[1:], gate[1:])[0]))
    kv[~valid], gate[~valid] = NAN, NAN
    torch.testing.assert_close(ops.softmax_pool(kv, gate, valid), expected)


def test_attention_ignores_keys_that_are_not_indexed() -> None:
    query, keys, sink = random(3, 2, 8, seed=1), random(6, 8, seed=2), random(2, seed=3)
    index = torch.tensor([[1, 2, -1], [-1, -1, -1], [5, -1, 3]])
    entries, entry_index = random(4, 8, seed=4), torch.tensor([[-1, 2], [-1, -1], [1, -1]])

    def attend() -> torch.Tensor:
        return ops.sparse_attention(query, keys, index, entries, entry_index, sink, 8**-0.5)

    expected = attend()
    keys[[0, 4]], entries[[0, 3]] = NAN, NAN
    torch.testing.assert_close(attend(), expected)
    assert not attend()[1].any()  # a row without keys attends to its sink alone


def test_of_equal_scores_the_earlier_entry_is_chosen() -> None:
    query, keys, head_weights = torch.ones(1, 4, 8), torch.ones(6, 8), torch.ones(1, 4)
    entry_index = torch.tensor([[5, 4, 3, 2, -1, -1]])
    assert ops.indexer_topk(query, head_weights, keys, entry_index, topk=2).tolist() == [[5, 4]]


def test_a_row_that_sees_fewer_entries_than_are_wanted_is_filled_with_none() -> None:
    entry_index = torch.tensor([[3, -1, -1, -1]])
    chosen = ops.indexer_topk(random(1, 4, 8), random(1, 4), random(5, 8), entry_index, topk=2)
    assert chosen.tolist() == [[3, -1]]


@pytest.mark.parametrize("num_rows", [1, 40, 100])
def test_experts_of_two_ranks_add_up_to_those_of_one(num_rows: int) -> None:
    """Few rows take the dense mixture, many the grouped one."""
    hidden, w13, w2 = random(num_rows, 8), random(6, 10, 8, seed=1), random(6, 8, 5, seed=2)
    weights, experts = random(num_rows, 2, seed=3), random(num_rows, 6, seed=4).argsort(1)[:, :2]
    whole = ops.moe(hidden, weights, experts, w13, w2, limit=1.0, num_experts=6)
    parts = [ops.moe(hidden, weights, experts, w13[part], w2[part], 1.0, 6, part.start) for part in (LOW, HIGH)]
    torch.testing.assert_close(sum(parts), whole)


def test_mixed_experts_equal_one_row_at_a_time() -> None:
    hidden, w13, w2 = random(100, 8), random(6, 10, 8, seed=1), random(6, 8, 5, seed=2)
    weights, experts = random(100, 2, seed=3), random(100, 6, seed=4).argsort(1)[:, :2]
    together = ops.moe(hidden, weights, experts, w13, w2, limit=1.0, num_experts=6)
    for row in (0, 17, 99):
        expected = torch.zeros(8)
        for weight, expert in zip(weights[row], experts[row], strict=True):
            gate, up = (w13[expert] @ hidden[row]).chunk(2)
            expected += weight * (w2[expert] @ ops.swiglu(gate, up, 1.0))
        torch.testing.assert_close(together[row], expected)


def test_rounding_keys_twice_changes_nothing_more() -> None:
    once = ops.fake_quant_fp8(random(5, 72), num_channels=64)
    assert torch.equal(ops.fake_quant_fp8(once, num_channels=64), once)


def test_rounding_leaves_the_rotary_part_alone() -> None:
    keys = random(5, 72)
    rounded = ops.fake_quant_fp8(keys, num_channels=64)
    assert torch.equal(rounded[:, 64:], keys[:, 64:])
    assert not torch.equal(rounded[:, :64], keys[:, :64])


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
def test_rounding_survives_extreme_keys(magnitude: float) -> None:
    assert ops.fake_quant_fp8(random(2, 64) * magnitude, num_channels=64).isfinite().all()
