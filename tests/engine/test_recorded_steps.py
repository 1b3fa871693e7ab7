"""What a function that is recorded may not do: wait for the device, or bring numbers from the host.

On a GPU either would end the recording, or be missing from every replay. Torch operations are watched; the project's
own run unwatched, because their references may ask what kernels need not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from small_model import SMALL, build_small_engine, request, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dspark_kernels
from dspark_kernels import reference
from dspark_ray.runner.graphs import Outputs, Replay

OPERATIONS = [name for name in dspark_kernels.__all__ if hasattr(getattr(dspark_kernels, name), "__wrapped__")]
REFUSED = {
    "aten::_local_scalar_dense": "a number is read on the host",
    "aten::equal": "a comparison is read on the host",
    "aten::is_nonzero": "a truth value is read on the host",
    "aten::item": "a number is read on the host",
    "aten::lift_fresh": "a tensor is made of numbers on the host",
    "aten::masked_select": "the size of the result is read on the host",
    "aten::nonzero": "the size of the result is read on the host",
    "aten::repeat_interleave": "the size of the result is read on the host",
    "aten::_unique2": "the size of the result is read on the host",
}


class Watch(TorchDispatchMode):
    """Refuses what cannot be recorded, unless an operation of the project is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.num_watched = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.num_watched += 1
            name = function.name().split(".")[0]
            assert name not in REFUSED, f"{name}: {REFUSED[name]}"
            if name in ("aten::index", "aten::index_put", "aten::index_put_"):
                kinds = [index.dtype for index in args[1] if index is not None]
                assert torch.bool not in kinds, f"{name} by a mask: its size is read on the host"
        return function(*args, **(kwargs or {}))


class Watched:
    """A `Capture` that watches what it records, and computes anew at every replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.watch = Watch()
        for name in OPERATIONS:
            monkeypatch.setattr(dspark_kernels, name, self._unwatched(getattr(reference, name)))

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        function()  # warms up: tables are made
        with self.watch:
            outputs = function()

        def replay() -> None:
            for kept, fresh in zip(outputs, function(), strict=True):
                kept.copy_(fresh)

        return replay, outputs

    def _unwatched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(operation)
        def paused(*args: Any, **kwargs: Any) -> Any:
            before, self.watch.paused = self.watch.paused, True
            try:
                return operation(*args, **kwargs)
            finally:
                self.watch.paused = before

        return paused


def test_recorded_steps_neither_wait_nor_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets short enough for every entry and longer, with drafts that are replayed."""
    capture = Watched(monkeypatch)
    prompt = tuple((7 * n + 3) % SMALL.vocab_size for n in range(23))
    asked = [request(prompt[: 3 + 9 * number], str(number), seed=number, max_tokens=20) for number in range(3)]
    texts = run(build_small_engine(capture=capture), *asked)
    assert [len(text) for text in texts.values()] == [20] * 3
    assert capture.watch.num_watched > 1000


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.max().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x.sum() if x.any() else x,
        lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.int64)),
    ],
)
def test_the_watch_sees_what_a_recording_cannot_hold(
    forbidden: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Watched(monkeypatch)
    with pytest.raises(AssertionError, match="host"):
        capture(lambda: (forbidden(torch.ones(2)),))
