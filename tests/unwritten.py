"""Finds products of PyTorch that are handed memory which nobody wrote.

On processors with AMX PyTorch's bfloat16 product reads past the end of the rows of its left operand, where they are
further apart than they are long, and multiplies what it finds by zero: a NaN there is a NaN in the result. The tests
fill fresh memory with NaN, so on any processor an operand shows what such a product would read. The functions are
patched; a dispatch mode would switch off the direct calls.
"""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

# Where they are looked up, and how many of the first arguments are operands.
PRODUCTS = (
    (torch, ("mm", "bmm", "matmul"), 2),
    (torch, ("addmm", "baddbmm"), 3),
    (torch, ("conv2d",), 3),
    (F, ("linear", "conv2d"), 3),
    (Tensor, ("mm", "bmm", "matmul", "__matmul__", "__rmatmul__"), 2),
    (Tensor, ("addmm", "addmm_", "baddbmm", "baddbmm_"), 3),
    (torch.ops.aten.convolution_backward, ("_op",), 3),  # what it calls: its attributes are looked up, too
)

# The bits of the exponent, all of them set in NaN and infinity, in integers of the dtype's size.
_EXPONENTS = {
    torch.bfloat16: (ctypes.c_uint16, 0x7F80),
    torch.float16: (ctypes.c_uint16, 0x7C00),
    torch.float32: (ctypes.c_uint32, 0x7F800000),
    torch.float64: (ctypes.c_uint64, 0x7FF0000000000000),
}


def span(t: Tensor) -> tuple[int, int]:
    """The first and the last element of storage between which a product may read t, the gap behind its last row
    included, as far as there is storage."""
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    rows = [(stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and stride > 0]
    gap = 0
    if len(rows) > 1:
        (inner, length), (outer, _) = sorted(rows)[:2]
        gap = max(0, outer - inner * length)
    first = t.storage_offset()
    return first, min(first + reach + gap, t.untyped_storage().nbytes() // t.element_size() - 1)


def holds_unwritten(t: object) -> bool:
    """Whether a number in the span of an ordinary CPU tensor is not finite. Reads memory and calls no op, so that
    modes, graphs and profilers see nothing."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu" or t.dtype not in _EXPONENTS:
        return False
    if t.numel() == 0 or t.layout != torch.strided or t.is_neg() or t._is_zerotensor():
        return False
    first, last = span(t)
    integer, exponent = _EXPONENTS[t.dtype]
    begin = t.untyped_storage().data_ptr() + first * t.element_size()
    bits = np.ctypeslib.as_array((integer * (last - first + 1)).from_address(begin))
    return bool(((bits & exponent) == exponent).any())


def checked(function: Callable, name: str, operands: int) -> Callable:
    @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
    def check(*args: object, **kwargs: object) -> object:
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()):
            given = [*args[:operands], *(t for key, t in kwargs.items() if key != "out")]
            found = [i for i, t in enumerate(given) if holds_unwritten(t)]
            assert not found, f"{name}: operand {found[0]} spans numbers that are not finite"
        return function(*args, **kwargs)

    return check


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = [(place, name, getattr(place, name), count) for place, names, count in PRODUCTS for name in names]
    reset = torch._dynamo.reset

    def reset_knowing_pytorch() -> None:
        """torch.compile lists PyTorch's functions by name, anew after a reset: as they are, not as they are patched."""
        reset()
        with monkeypatch.context() as unpatched:
            for place, name, function, _ in patches:
                unpatched.setattr(place, name, function)
            torch._dynamo.trace_rules.get_torch_obj_rule_map()

    for place, name, function, count in patches:
        monkeypatch.setattr(place, name, checked(function, name, count))
    monkeypatch.setattr(torch._dynamo, "reset", reset_knowing_pytorch)
