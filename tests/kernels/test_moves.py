"""Kernels load and store what they declare, in the interpreter: the ledger counts by it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from every_op import NAMES, every_op

pytest.importorskip("triton")

import emulation
from launches import kernel_modules
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

TRITONS = sorted({*NAMES} - {"dwconv", "multi_order_dwconv", "global_filter", "split_cascade"})


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def touched(addresses: list[np.ndarray], t: torch.Tensor) -> bool:
    begin = t.untyped_storage().data_ptr()
    return any(((a >= begin) & (a < begin + t.untyped_storage().nbytes())).any() for a in addresses)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRITONS)
def test_kernels_move_what_they_declare(name, interpreter, monkeypatch):
    loaded: list[np.ndarray] = []
    stored: list[np.ndarray] = []
    checked: set[str] = set()
    load, store, run = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpretedFunction.run,
    )

    def noted_load(self, ptrs, mask, *rest):
        loaded.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *rest)

    def noted_store(self, ptrs, value, mask, *rest):
        stored.append(ptrs.data[mask.data])
        return store(self, ptrs, value, mask, *rest)

    def checking(self, *args, **options):
        loaded.clear()
        stored.clear()
        result = run(self, *args, **options)
        moves, given = self.fn.moves, dict(zip(self.arg_names, args, strict=False))
        of = [(pointer, t) for pointer, value in given.items() for t in tensors_in(value)]
        shared = [t.untyped_storage().data_ptr() for _, t in of]
        for pointer, t in of:
            if shared.count(t.untyped_storage().data_ptr()) > 1 or t.numel() == 0:
                continue  # whose accesses cannot be told apart
            writes = pointer in (*moves.written, *moves.updated, *moves.partly)
            assert touched(stored, t) == writes, (self.fn.__name__, pointer)
            assert touched(loaded, t) == (pointer not in moves.written) or pointer == "sums_ptr", pointer
        checked.add(self.fn.__name__)
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    monkeypatch.setattr(InterpretedFunction, "run", checking)
    interpreter.redirect(monkeypatch, emulation.kernels(), convolves=False)
    case = every_op(size=7)[name]
    y = case.run(leaves := case.leaves(), "fused")
    torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], torch.ones_like(y))
    assert checked


def test_every_kernel_declares():
    assert triton_interpreter and all(
        hasattr(kernel.fn, "moves") for module in kernel_modules() for kernel in module.KERNELS
    )
