"""The same text from one process and from a gang, wherever the drafter lives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gang import gang_spec, run_in_gang
from small_model import SMALL, request, run, save_small_checkpoint, small_config

from dspark_ray.config import ConfigError
from dspark_ray.ranks.gang import GangSpec, build_engine

PROMPT = tuple((11 * n + 5) % SMALL.vocab_size for n in range(70))
REQUESTS = [
    request(PROMPT, "greedy", temperature=0.0),
    request(PROMPT[:9], "sampled", seed=4),
    request(PROMPT[:30], "filtered", seed=5, top_k=12, top_p=0.9, frequency_penalty=0.5),
    request(PROMPT[:12], "plain", speculate=False, seed=6),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def texts(checkpoint: Path) -> dict[str, list[int]]:
    """Each request alone, one process, no speculation."""
    spec = gang_spec(checkpoint, 1, "inline", speculation=False)
    return {r.request_id: run(build_engine(checkpoint, spec.engine), r)[r.request_id] for r in REQUESTS}


@pytest.mark.parametrize(
    ("tensor_parallel_size", "drafter", "gamma"),
    [(1, "actor", 3), (2, "inline", 5), (2, "actor", 1), (2, "actor", 5)],
)
def test_a_gang_says_the_same_as_one_process(tensor_parallel_size, drafter, gamma, checkpoint, texts, tmp_path):
    spec = gang_spec(checkpoint, tensor_parallel_size, drafter, gamma=gamma)
    assert run_in_gang(spec, REQUESTS, tmp_path / "texts.pt") == texts


def test_rejection_runs_over_the_link(checkpoint, tmp_path):
    # A text by rejection depends on how much is verified, and costs would decide that.
    spec = gang_spec(checkpoint, 2, "actor", verification="rejection", schedule="fixed")
    inline = build_engine(checkpoint, spec.engine)
    assert run_in_gang(spec, REQUESTS, tmp_path / "texts.pt") == run(inline, *REQUESTS)


def test_a_size_that_does_not_divide_the_groups_is_refused(checkpoint):
    spec = GangSpec(checkpoint=str(checkpoint), tensor_parallel_size=3, init_method="tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="tensor_parallel_size=3: expected a divisor of o_groups=2"):
        spec.resolve()


def test_a_gang_without_a_meeting_place_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="init_method is missing: expected a rendezvous for 2 processes"):
        GangSpec(checkpoint=str(checkpoint), tensor_parallel_size=2)


def test_a_rank_lets_no_product_add_up_in_bfloat16(checkpoint):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    build_engine(checkpoint, small_config())
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
