"""Kernels of hyper-connections against `reference.py`."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, DTYPES, assert_close, random
from torch import Tensor

from dspark_kernels import gpu, reference
from dspark_kernels.gpu import mhc

# Large, so that each place where they are added shows.
EPS, RMS_EPS = 1e-2, 1e-2

# Rows, streams and channels: one row, a tile that is not full, streams that are no power of two, several tiles.
SHAPES = [(1, 2, 100), (7, 4, 300), (5, 3, 50), (3, 1, 64), (20, 2, 33), (129, 2, 20)]


def streams_of(num_rows: int, m: int, d: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size."""
    return (random(num_rows, m, d) * torch.exp(2 * random(num_rows, 1, 1))).to(dtype)


def read_weights(m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fn, base, scale, norm."""
    mixes = (2 + m) * m
    return random(mixes, m * d, scale=(m * d) ** -0.5), random(mixes), random(3), 1 + random(d, scale=0.1).to(dtype)


def head_weights(m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base, scale."""
    return random(m, m * d, scale=(m * d) ** -0.5), random(m), random(1)


def assert_reads(streams: Tensor, iters: int = 3) -> None:
    _, m, d = streams.shape
    weights = read_weights(m, d, streams.dtype)
    actual = gpu.mhc_read(streams, *weights, iters, EPS, RMS_EPS)
    expected = reference.mhc_read(streams, *weights, iters, EPS, RMS_EPS)
    for actual_part, expected_part in zip(actual, expected):
        assert_close(actual_part, expected_part)


def assert_collapses(streams: Tensor) -> None:
    _, m, d = streams.shape
    weights = head_weights(m, d)
    assert_close(
        gpu.mhc_head(streams, *weights, EPS, RMS_EPS),
        reference.mhc_head(streams, *weights, EPS, RMS_EPS),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_read_is_that_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_reads(streams_of(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_head_is_that_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_collapses(streams_of(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 5000)])
def test_write_is_that_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_rows, m, d = shape
    args = random(num_rows, d, dtype=dtype), streams_of(*shape, dtype), random(num_rows, m), random(num_rows, m, m)
    assert_close(gpu.mhc_write(*args), reference.mhc_write(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_keep_all_bits_of_the_weights(dtype: torch.dtype) -> None:
    """Two channels cancel but for the last bits of fn, which a large scale brings up."""
    streams = torch.zeros(2, 2, 20, dtype=dtype, device=DEVICE)
    streams[:, 0, 3], streams[:, 1, 7] = 1, -1
    fn, base, _, norm = read_weights(2, 20)
    fn[:, 3], fn[:, 27] = 1 + 2**-9 + 2**-20, 1 + 2**-9
    weights = fn, base, 2**19 * (1 + random(3).abs()), norm
    _, post, comb = gpu.mhc_read(streams, *weights, 1, EPS, RMS_EPS)
    _, expected_post, expected_comb = reference.mhc_read(streams, *weights, 1, EPS, RMS_EPS)
    assert_close(post, expected_post)
    assert_close(comb, expected_comb)


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn_makes_as_many_steps_as_asked(iters: int) -> None:
    assert_reads(streams_of(3, 4, 40, torch.bfloat16), iters)


@pytest.mark.parametrize(("lag", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (3, torch.float32)])
def test_tiling_does_not_change_results(lag: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles, the last not full, of two steps in each split; several programs that mix."""
    tiling = mhc._Tiling(rows=16, columns=32, splits=8, mixed_rows=4, mixed_splits=2, lag=lag)
    monkeypatch.setattr(mhc._Tiling, "of", lambda *args: tiling)
    streams = streams_of(34, 4, 100, dtype)
    assert_reads(streams)
    assert_collapses(streams)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    streams = streams_of(3, 2, 40, dtype)
    streams[1] = 0
    assert_reads(streams)
    assert_collapses(streams)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    streams = torch.empty(0, 4, 64, dtype=dtype, device=DEVICE)
    assert_reads(streams)
    assert_collapses(streams)
    args = streams[:, 0], streams, random(0, 4), random(0, 4, 4)
    assert_close(gpu.mhc_write(*args), reference.mhc_write(*args))


def test_launches_leave_the_counters_at_zero_and_results_do_not_vary() -> None:
    streams, weights = streams_of(5, 4, 60, torch.bfloat16), read_weights(4, 60)
    first = gpu.mhc_read(streams, *weights, 3, EPS, RMS_EPS)
    for _ in range(2):
        gpu.mhc_head(streams, *head_weights(4, 60), EPS, RMS_EPS)
        again = gpu.mhc_read(streams, *weights, 3, EPS, RMS_EPS)
        assert all(torch.equal(one, other) for one, other in zip(first, again))
    assert not mhc._tile_counters(streams.device).any()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CPUs have no graphs")
def test_a_graph_of_them_can_be_replayed() -> None:
    """Many tiles, whose waits must end however programs are spread."""
    shape = 1537, 4, 512
    streams, weights = streams_of(*shape, torch.bfloat16), read_weights(4, 512)
    gpu.mhc_read(streams, *weights, 3, EPS, RMS_EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden, post, comb = gpu.mhc_read(streams, *weights, 3, EPS, RMS_EPS)
        written = gpu.mhc_write(hidden, streams, post, comb)
    for _ in range(5):
        streams.copy_(streams_of(*shape, torch.bfloat16))
        graph.replay()
        expected = reference.mhc_read(streams, *weights, 3, EPS, RMS_EPS)
        for actual_part, expected_part in zip((hidden, post, comb), expected):
            assert_close(actual_part, expected_part)
        assert_close(written, reference.mhc_write(hidden, streams, post, comb))
    assert not mhc._tile_counters(streams.device).any()


def test_unusual_strides_are_read_correctly() -> None:
    streams = streams_of(4, 3, 70, torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1)
    assert_reads(streams)
    assert_collapses(streams)
    args = random(70, 4, dtype=torch.bfloat16).T, streams, random(3, 4).T, random(4, 3, 3).mT
    assert_close(gpu.mhc_write(*args), reference.mhc_write(*args))


def test_unsupported_inputs_are_refused() -> None:
    streams, weights = streams_of(2, 2, 40, torch.bfloat16), read_weights(2, 40)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        gpu.mhc_read(streams.half(), *weights, 20, EPS, RMS_EPS)
    with pytest.raises(ValueError, match="fn must be"):
        gpu.mhc_read(streams[:, :, 1:], *weights, 20, EPS, RMS_EPS)
    with pytest.raises(ValueError, match="iters"):
        gpu.mhc_read(streams, *weights, 0, EPS, RMS_EPS)
    with pytest.raises(ValueError, match="registers"):
        gpu.mhc_head(streams.new_empty(1, 4, 20000), *head_weights(2, 40), EPS, RMS_EPS)
    with pytest.raises(ValueError, match="post must be"):
        gpu.mhc_write(streams[:, 0], streams, random(2, 3), random(2, 2, 2))
