"""The interface between the step loop and a target of any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dspark_ray.model.rows import Segment
from dspark_ray.sampling.sampler import Samples
from dspark_ray.sampling.sampling_rows import SamplingRows


@dataclass(frozen=True)
class ForwardCommand:
    """Segments to run, and the flattened rows to sample."""

    segments: tuple[Segment, ...]
    sampled_rows: np.ndarray
    """[n]"""
    sampling: SamplingRows
    """Sampling parameters of the n rows."""
    wants_context_features: bool
    """Whether rank 0 needs the context features of the rows."""


@dataclass(frozen=True)
class ForwardResult:
    """The result of a forward, on rank 0."""

    samples: Samples
    context_features: Tensor | None
    """[N, T*d] of all rows, where the command wants them; on the model's device."""


class Target(Protocol):
    """A target of any number of ranks."""

    @property
    def graph_sizes(self) -> tuple[int, ...]: ...

    def run(self, command: ForwardCommand) -> ForwardResult: ...

    def project(self, features: Tensor) -> Tensor: ...

    def start(self) -> None: ...

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...
