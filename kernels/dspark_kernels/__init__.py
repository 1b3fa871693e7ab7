"""Operations of a DSpark round. `dspark_kernels.<op>` is what the engine calls.

Today every op is its plain-torch reference, which runs on any device.
"""

from .philox import gumbel_noise, philox_4x32, uniform_noise
from .reference import (
    compress,
    fake_quant_fp8,
    indexer_topk,
    mhc_head,
    mhc_read,
    mhc_write,
    moe,
    rms_norm,
    rope,
    route,
    sparse_attention,
    swiglu,
)

__all__ = [
    "compress",
    "fake_quant_fp8",
    "gumbel_noise",
    "indexer_topk",
    "mhc_head",
    "mhc_read",
    "mhc_write",
    "moe",
    "philox_4x32",
    "rms_norm",
    "rope",
    "route",
    "sparse_attention",
    "swiglu",
    "uniform_noise",
]
