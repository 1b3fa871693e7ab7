"""Operations of a DSpark round, called as `dspark_kernels.<op>`.

Each is a plain-torch function in `reference.py` and a kernel of the same name and signature in `gpu/`. CPU tensors use
the reference, CUDA tensors the kernel, except where an argument's gradient is recorded: kernels have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import reference
from .philox import gumbel_noise, philox_4x32, uniform_noise
from .reference import apply_temperature, fake_quant_fp8, overlapping, softmax_pool

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def has_kernels(tensor: Tensor) -> bool:
    """Whether there are kernels for the device that `tensor` is on."""
    return tensor.is_cuda


def takes_kernel(tensor: Tensor, *others: object) -> bool:
    """Whether an operation with these arguments runs as a kernel.

    Enabled gradients alone do not count: a caller without `torch.inference_mode` still gets kernels.
    """
    if not has_kernels(tensor):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(argument, Tensor) and argument.requires_grad for argument in (tensor, *others))


def _operation(reference_op: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """An operation that runs where its first argument, a tensor, is."""
    kernel: Callable[_Arguments, _Result] | None = None

    @wraps(reference_op)
    def operation(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        nonlocal kernel
        if not takes_kernel(*args, *kwargs.values()):  # type: ignore[arg-type]
            return reference_op(*args, **kwargs)
        if kernel is None:
            # Triton is imported with the first kernel call, so that machines without a GPU do not need it.
            from . import gpu

            kernel = getattr(gpu, reference_op.__name__)
        return kernel(*args, **kwargs)

    return operation


accept_coupled = _operation(reference.accept_coupled)
accept_rejection = _operation(reference.accept_rejection)
admit_prefixes = _operation(reference.admit_prefixes)
compress = _operation(reference.compress)
edit_logits = _operation(reference.edit_logits)
filter_threshold = _operation(reference.filter_threshold)
gumbel_argmax = _operation(reference.gumbel_argmax)
indexer_topk = _operation(reference.indexer_topk)
linear_float32 = _operation(reference.linear_float32)
linear_fp8 = _operation(reference.linear_fp8)
markov_sample = _operation(reference.markov_sample)
mhc_head = _operation(reference.mhc_head)
mhc_read = _operation(reference.mhc_read)
mhc_write = _operation(reference.mhc_write)
moe = _operation(reference.moe)
norm_rope = _operation(reference.norm_rope)
pack_rows = _operation(reference.pack_rows)
rms_norm = _operation(reference.rms_norm)
rope = _operation(reference.rope)
route = _operation(reference.route)
sparse_attention = _operation(reference.sparse_attention)
store_raw = _operation(reference.store_raw)
store_window = _operation(reference.store_window)
swiglu = _operation(reference.swiglu)

__all__ = [
    "accept_coupled",
    "accept_rejection",
    "admit_prefixes",
    "apply_temperature",
    "compress",
    "edit_logits",
    "fake_quant_fp8",
    "filter_threshold",
    "gumbel_argmax",
    "gumbel_noise",
    "indexer_topk",
    "linear_float32",
    "linear_fp8",
    "markov_sample",
    "mhc_head",
    "mhc_read",
    "mhc_write",
    "moe",
    "norm_rope",
    "overlapping",
    "pack_rows",
    "philox_4x32",
    "rms_norm",
    "rope",
    "route",
    "softmax_pool",
    "sparse_attention",
    "store_raw",
    "store_window",
    "swiglu",
    "uniform_noise",
]
