"""Shared by kernel tests: fresh random inputs and the error bounds of kernels/README.md."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)

# Relative to the largest magnitude of the expected values. Kernels sum in float32, in another order than the
# reference; a bfloat16 result may round to the neighbour (2^-8), and so may one intermediate before it.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}

_calls = itertools.count()


def generator() -> torch.Generator:
    """Another one every time; a failing test is repeated by its order, which pytest keeps."""
    return torch.Generator().manual_seed(next(_calls))


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the test's device."""
    return (torch.randn(*shape, generator=generator()) * scale).to(dtype).to(DEVICE)


def integers(low: int, high: int, *shape: int) -> Tensor:
    """int64 numbers low .. high - 1."""
    return torch.randint(low, high, shape, generator=generator()).to(DEVICE)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Same shape and dtype, all finite where expected, and within the bound of `dtype` (the expected one's)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    if expected.numel() == 0:
        return
    same_infinities = torch.equal(actual.isinf() * actual.sign(), expected.isinf() * expected.sign())
    assert same_infinities, "infinities differ"
    finite = expected.isfinite()
    assert actual[finite].isfinite().all(), f"{(~actual[finite].isfinite()).sum()} values were not written or overflow"
    largest = expected[finite].abs().max().item() if finite.any() else 0.0
    error = (actual[finite].double() - expected[finite].double()).abs().max().item() if finite.any() else 0.0
    bound = BOUNDS[dtype or expected.dtype] * max(largest, 1e-30)
    assert error <= bound, f"largest error {error:.3g}, bound {bound:.3g} (largest value {largest:.3g})"
