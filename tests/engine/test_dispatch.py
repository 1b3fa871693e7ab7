"""Where the operations of a serving step run, decided as on a GPU: kernels are counted, and compute as references."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_model import build_small_engine, request, run, small_modules

import dspark_kernels
from dspark_kernels import reference

OPERATIONS = [name for name in dspark_kernels.__all__ if hasattr(getattr(dspark_kernels, name), "__wrapped__")]
PROMPT = (3, 14, 15, 9, 26, 5)


@dataclass
class Calls:
    """Names of the operations that ran, each as often as it did."""

    kernels: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every operation anew, as if CPU tensors were on a GPU."""
    found = Calls()

    def counted(name: str, ran: list[str]) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return getattr(reference, name)(*args, **kwargs)

        operation.__name__ = name
        return operation

    kernels = SimpleNamespace(**{name: counted(name, found.kernels) for name in OPERATIONS})
    monkeypatch.setattr(dspark_kernels, "gpu", kernels, raising=False)
    monkeypatch.setitem(sys.modules, "dspark_kernels.gpu", kernels)
    monkeypatch.setattr(dspark_kernels, "has_kernels", lambda tensor: True)
    for name in OPERATIONS:
        monkeypatch.setattr(dspark_kernels, name, dspark_kernels._operation(counted(name, found.references)))
    assert torch.is_grad_enabled(), "gradient mode is on by default, as in a serving process"
    return found


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_serving_takes_kernels_alone(verification: str, calls: Calls) -> None:
    sampled = request(PROMPT, temperature=1.0, top_p=0.9, max_tokens=12, logit_bias={7: 1.0})
    tokens = run(build_small_engine(verification=verification), sampled)
    assert len(tokens["r"]) == 12
    assert calls.references == []
    expected = {"mhc_read", "moe", "sparse_attention", "gumbel_argmax", "edit_logits", "filter_threshold"}
    expected |= {"accept_rejection"} if verification == "rejection" else set()
    assert expected <= set(calls.kernels)


def test_training_takes_references(calls: Calls) -> None:
    """What has to pass a gradient on; what needs none may run as a kernel."""
    _, drafter = small_modules()
    drafter = type(drafter)(drafter.config)
    stage = drafter.stages[0]
    hidden = torch.randn(3, drafter.config.hidden_size)
    stage.ffn(hidden, torch.tensor([1, 2, 3])).sum()
    assert calls.kernels == []
    assert {"route", "moe", "swiglu"} <= set(calls.references)


def test_frozen_weights_do_not_hide_a_gradient_of_the_rows(calls: Calls) -> None:
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    dspark_kernels.rms_norm(x, weight, eps=1e-6).sum().backward()
    dspark_kernels.rms_norm(x.detach(), weight=torch.nn.Parameter(weight), eps=1e-6).sum().backward()
    with torch.no_grad():
        dspark_kernels.rms_norm(x, weight, 1e-6)
    dspark_kernels.rms_norm(x.detach(), weight, 1e-6)
    assert (calls.references, calls.kernels) == (["rms_norm"] * 2, ["rms_norm"] * 2)
    assert x.grad is not None
