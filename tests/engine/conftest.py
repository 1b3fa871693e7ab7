"""Small random models: with coupled noise and flat logits, drafts are often right and often wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_model import SMALL, build_small_engine

from dspark_ray.engine.step_loop import Engine

torch.set_num_threads(1)


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Builds an engine on the small model; keyword arguments are EngineConfig's."""
    return build_small_engine


@pytest.fixture
def prompt() -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randint(2, SMALL.vocab_size, (23,), generator=generator).tolist())
