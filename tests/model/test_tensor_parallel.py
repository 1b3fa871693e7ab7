"""The target split over processes (gloo) gives the results of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import SIZES, run_rank, work
from small_targets import build_pair
from torch import Tensor, multiprocessing

from dspark_ray.config import DSparkConfig
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import split_range

Outputs = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def whole() -> DeepSeekV4:
    """Four groups of heads; 97 tokens and 6 experts, which four ranks cannot share evenly."""
    pair = build_pair(o_groups=4)
    dspark = DSparkConfig(gamma=5, noise_token_id=96, target_layer_ids=(1, 2, 4), markov_rank=8, num_stages=2)
    model = DeepSeekV4(replace(pair.ours.config, dspark=dspark, raw={}))
    model.load_state_dict(pair.ours.state_dict())
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(whole: DeepSeekV4, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of every rank of every group size."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(whole.config, folder / "config.pt")
    torch.save(whole.state_dict(), folder / "weights.pt")
    multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=max(SIZES))
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_features_do_not_depend_on_the_number_of_ranks(whole: DeepSeekV4, folder: Path, size: int) -> None:
    expected_logits, expected_features = work(whole)
    outputs: list[Outputs] = [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]
    logits = torch.cat([logits for logits, _ in outputs], dim=-1)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    for _, features in outputs:
        torch.testing.assert_close(features, expected_features, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_ranges_of_all_ranks_cover_everything_once(size: int) -> None:
    covered = [unit for rank in range(size) for unit in range(*split_range(10, size, rank))]
    assert covered == list(range(10))
