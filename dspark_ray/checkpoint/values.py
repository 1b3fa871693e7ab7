"""Search for NaN and infinity in weights: a single one makes every logit NaN."""

from __future__ import annotations

import torch
from torch import Tensor

_NAN_BYTES = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e8m0fnu: (0xFF, 0xFF)}
"""(mask, value) of the bytes that are NaN; neither format has an infinity."""


def first_bad_value(values: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity; None if all values are finite."""
    if values.dtype in _NAN_BYTES:
        mask, nan = _NAN_BYTES[values.dtype]
        bad = (values.contiguous().view(torch.uint8) & mask) == nan
    # A sum is several times as fast as a test of every value; it is finite if all are, except for overflow.
    elif not values.is_floating_point() or torch.isfinite(values.sum(dtype=torch.float32)):
        return None
    else:
        bad = ~torch.isfinite(values)
    return tuple(torch.nonzero(bad)[0].tolist()) if bad.any() else None
