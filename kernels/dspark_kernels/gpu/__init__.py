"""The kernels: same names and signatures as in `reference.py`."""

from .accept import accept_coupled, accept_rejection
from .attention import sparse_attention
from .compress import compress, store_raw
from .indexer import indexer_topk
from .keys import store_window
from .linear import linear_fp8
from .logits import edit_logits, filter_threshold
from .matmul import linear_float32
from .mhc import mhc_head, mhc_read, mhc_write
from .moe import moe
from .norm import norm_rope, rms_norm, rope, swiglu
from .plan import admit_prefixes, pack_rows
from .router import route
from .sample import gumbel_argmax, markov_sample

__all__ = [
    "accept_coupled",
    "accept_rejection",
    "admit_prefixes",
    "compress",
    "edit_logits",
    "filter_threshold",
    "gumbel_argmax",
    "indexer_topk",
    "linear_float32",
    "linear_fp8",
    "markov_sample",
    "mhc_head",
    "mhc_read",
    "mhc_write",
    "moe",
    "norm_rope",
    "pack_rows",
    "rms_norm",
    "rope",
    "route",
    "sparse_attention",
    "store_raw",
    "store_window",
    "swiglu",
]
