"""Corrections of Triton's interpreter where its results differ from a GPU's.

It keeps bfloat16 as integers and multiplies those, cuts off what does not fit into a bfloat16, and loses the carry of
numbers that round up to a power of two in E4M3. It also spends a millisecond on every call of a device function.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, InterpreterError, TensorHandle

_FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def _convert_float(values: numpy.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> numpy.ndarray:
    """To nearest even; what is too large for E4M3 becomes its largest number."""
    numbers = torch.from_numpy(numpy.ascontiguousarray(values)).view(_FLOATS[source]).double()
    if target == tl.float8e4nv:
        numbers = numbers.clamp(-448, 448)
    rounded = numbers.to(_FLOATS[target])
    return rounded.view(_BITS[rounded.itemsize]).numpy().reshape(values.shape)


def _create_dot(_: Any, left: TensorHandle, right: TensorHandle, added: TensorHandle, *args: Any) -> TensorHandle:
    product = numpy.matmul(_numbers(left), _numbers(right), dtype=added.data.dtype)
    return TensorHandle(product + added.data, added.dtype.scalar)


def _numbers(operand: TensorHandle) -> numpy.ndarray:
    kind = operand.dtype.scalar
    if kind not in (tl.bfloat16, tl.float8e4nv):
        return operand.data
    return _convert_float(operand.data, kind, tl.float32, None).view(numpy.float32)


def _call(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A device function: the language is replaced by an interpreted one unless the kernel around it has done that."""
    languages = [value for value in function.fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.arange) for language in languages):
        interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


def compute_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the patch; without effect where kernels are compiled."""
    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _create_dot)
    monkeypatch.setattr(InterpretedFunction, "__call__", _call)
