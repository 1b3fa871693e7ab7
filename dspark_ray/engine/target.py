"""What the step loop asks of a target, however many ranks it has."""

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
    """Segments to run, and the flattened rows whose next token is wanted."""

    segments: tuple[Segment, ...]
    sampled_rows: np.ndarray
    """[n]"""
    sampling: SamplingRows
    """How the n rows become tokens."""
    wants_context_features: bool
    """Whether rank 0 needs the context features of the rows."""


@dataclass(frozen=True)
class ForwardResult:
    """What rank 0 knows after a forward."""

    samples: Samples
    context_features: Tensor | None
    """[N, T*d] of all rows, where the command wants them; on the model's device."""


class Target(Protocol):
    """A target that can run a command, however many ranks it has."""

    @property
    def graph_sizes(self) -> tuple[int, ...]: ...

    def run(self, command: ForwardCommand) -> ForwardResult: ...

    def project(self, features: Tensor) -> Tensor: ...

    def start(self) -> None: ...

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...
