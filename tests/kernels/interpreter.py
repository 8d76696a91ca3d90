"""Triton's interpreter, made to compute as a GPU does, and an op's CUDA implementation on CPU tensors in it.

TRITON_INTERPRET is set in tests/conftest.py: it has to be, before anything imports triton.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from vision_ops import _native
from vision_ops.ops import (
    _channel_aggregation,
    _channel_aggregation_passes,
    _mbconv,
    _registration,
    gnconv,
    moga_aggregation,
)


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 in Triton 3.6 to 3.9, whose interpreter keeps it as bits: products of the bits, truncating casts."""
    builder = interpreter.InterpreterBuilder
    create_dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return widened(source)
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data, np.float32).view(np.uint32)
        to_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        quiet = bits >> 16 | 0x40
        return interpreter.TensorHandle(np.where(np.isnan(source.data), quiet, to_even).astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "cast_impl", rounded)
    _patch_once(monkeypatch)


def _patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The language is patched at a launch, not again at every call within a kernel: that takes longer than the call."""
    patch, language = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patch(language))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


class _OnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: _registration.FusedOp, lengths: Any, *given: Any) -> Tensor:
        count = len(given) - len(op.options)
        ctx.op, ctx.lengths, ctx.options = op, lengths, given[count:]
        result = op.kernels["CUDA"][0](op.arguments(*op.nested(given[:count], lengths), *ctx.options))
        y, *saved = result if op._saved else (result,)
        ctx.save_for_backward(*given[:count], *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op, kept = ctx.op, ctx.saved_tensors
        count = len(kept) - op._saved
        needs = ctx.needs_input_grad[2 : 2 + count]
        given = *op.nested(kept[:count], ctx.lengths), *ctx.options
        found = op.gradients(op.kernels["CUDA"][1], grad, given, kept[count:], needs)
        if op.passes is not None and needs[place := op.places(ctx.lengths)[op.passes]]:
            found[place] = grad.to(kept[place].dtype)
        return (None, None, *found, *(None for _ in ctx.options))


def run(op: _registration.FusedOp, *given: Any) -> Tensor:
    """The op's CUDA implementation, forward and backward, on CPU tensors. `given` is all its arguments in order."""
    tensors = given[: op._tensors]
    lengths = tuple(len(t) if isinstance(t, list) else None for t in tensors)
    return _OnCPU.apply(op, lengths, *op.tensors(given), *given[op._tensors :])


def redirect(monkeypatch: pytest.MonkeyPatch, cuda: Any, convolves: bool = True) -> None:
    """For a test, the public functions run what they run on a GPU, unless the backend is "reference", on tensors of any
    device. cuda: in the place of the compiled CUDA kernels. convolves: whether they are what blocks convolve with."""
    monkeypatch.setattr(_native, "cuda", cuda)
    monkeypatch.setattr(_native, "target", lambda t: (0, 0))
    for op in (_mbconv, _channel_aggregation_passes, gnconv, moga_aggregation):
        monkeypatch.setattr(op, "convolves_cuda", lambda x: convolves)
    monkeypatch.setattr(_channel_aggregation, "_fc1_channels", lambda a: a.dw_weight.shape[0])
    call = _registration.FusedOp.with_saved

    def redirected(op: Any, *given: Any, backend: str | None = None, reference: Any = None) -> Any:
        if backend == "reference":
            return call(op, *given, backend=backend, reference=reference)
        return (run(op, *op._autocast(given)),)

    monkeypatch.setattr(_registration.FusedOp, "with_saved", redirected)
