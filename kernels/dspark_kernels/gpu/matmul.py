"""Products by cuBLAS, without converting operands first."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.linear_float32`."""
    if x.dtype == weight.dtype == torch.bfloat16 and x.is_cuda:
        # Exact products, float32 sums: the result of converting the weight first, without writing a float32 copy.
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), weight.float().t())
