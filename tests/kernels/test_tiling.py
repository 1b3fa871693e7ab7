"""Tilings of launchers by number of rows: tables for an H200 (132 processors) and DeepSeek-V4-Flash."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from compare import DEVICE, integers, random

from dspark_kernels import gpu
from dspark_kernels.gpu.weights import FP4, FP8, PLAIN

BF16, PROCESSORS = torch.bfloat16, 132

# The package's names of these modules are their operations.
moe = import_module("dspark_kernels.gpu.moe")
mhc = import_module("dspark_kernels.gpu.mhc")


# --- moe ----------------------------------------------------------------------------------------------------------

FLASH_EXPERTS, PRO_EXPERTS, TOP_K = 256, 384, 6


@pytest.mark.parametrize("weight_format", [FP4, FP8, PLAIN])
@pytest.mark.parametrize(
    ("num_experts", "num_rows", "tile_rows"),
    [
        (FLASH_EXPERTS, 1, 8),
        (FLASH_EXPERTS, 36, 8),
        (FLASH_EXPERTS, 256, 8),
        (FLASH_EXPERTS, 257, 64),
        (FLASH_EXPERTS, 1536, 64),
        (PRO_EXPERTS, 48, 8),
        (PRO_EXPERTS, 384, 8),
        (PRO_EXPERTS, 385, 64),
    ],
)
def test_experts_with_few_pairs_each_get_small_tiles(
    weight_format: int, num_experts: int, num_rows: int, tile_rows: int
) -> None:
    assert moe._tiling_of(weight_format, BF16, num_rows * TOP_K, num_experts).rows == tile_rows


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize(("num_rows", "tile_rows"), [(16, 8), (48, 8), (49, 64)])
def test_every_rank_uses_the_tiles_of_the_full_layer(
    num_ranks: int, num_rows: int, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs that a rank is given are those of all ranks: they must not be divided by its own experts alone."""
    num_experts, top_k, d = 16, 2, 16
    chosen, choose = [], moe._tiling_of
    monkeypatch.setattr(moe, "_tiling_of", lambda *shape: chosen.append(choose(*shape)) or chosen[-1])
    local = num_experts // num_ranks
    w13, w2 = random(local, 32, d, dtype=BF16), random(local, d, 16, dtype=BF16)
    hidden, weights = random(num_rows, d, dtype=BF16), random(num_rows, top_k)
    gpu.moe(hidden, weights, integers(0, num_experts, num_rows, top_k), w13, w2, 10.0, num_experts, num_experts - local)
    assert [tiling.rows for tiling in chosen] == [tile_rows]


# --- mhc_read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "tile", "splits"),
    [
        (1, (16, 128), 128),
        (16, (16, 128), 128),
        (17, (32, 64), 128),
        (32, (32, 64), 128),
        (33, (64, 128), 128),
        (64, (64, 128), 128),
        (65, (128, 64), 128),
        (129, (128, 64), 64),
        (1536, (128, 64), 32),
    ],
)
def test_streams_are_projected_in_tiles_that_fit_in_registers(
    num_rows: int, tile: tuple[int, int], splits: int
) -> None:
    tiling = mhc._Tiling.of(num_rows, 4 * 4096, BF16, PROCESSORS)
    assert ((tiling.rows, tiling.columns), tiling.splits) == (tile, splits)


@pytest.mark.parametrize("tile", [(16, 128), (32, 32), (64, 64)])
def test_any_tile_gives_the_same_mixes(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiles can be compared by time alone."""
    streams, fn, base = random(19, 2, 96, dtype=BF16), random(8, 192), random(8)
    arguments = (streams, fn, base, torch.ones(3, device=DEVICE), random(96, dtype=BF16), 3, 1e-6, 1e-6)
    _, _, expected = gpu.mhc_read(*arguments)
    monkeypatch.setattr(mhc, "_tile_of", lambda num_rows, dtype: tile)
    torch.testing.assert_close(gpu.mhc_read(*arguments)[2], expected)
