"""FLOPs of the ops for torch.utils.flop_counter: those of their references' products and convolutions.

They are the model's FLOPs: what a kernel leaves out, or computes again in the backward pass, makes no difference.
"""

import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._definitions import Definition, definitions

_COUNTER = "torch.utils.flop_counter"


def count_flops(definition: Definition) -> None:
    """Tells the counter how to count both ops, now or when it is imported. It imports Triton: others decide on that."""
    if _COUNTER in sys.modules:
        _register(definition)
    elif _counter_finder not in sys.meta_path:
        sys.meta_path.insert(0, _counter_finder)


def _register(definition: Definition) -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op in (definition.forward, definition.backward):
        if op.overloadpacket not in flop_registry:
            names = [argument.name for argument in op._schema.arguments]
            register_flop_formula(op.overloadpacket, get_raw=True)(functools.partial(_flops, definition, names))


def _flops(definition: Definition, names: Sequence[str], *given: Any, out_val: Any = None, **named: Any) -> int:
    """Of the forward op, or of the backward op if `needs` says which gradients are computed."""
    values = dict(zip(names, given, strict=False)) | named
    op, needs = definition.op, values.get("needs")
    arguments = op.arguments(*(_on_meta(values[field]) for field in op.arguments._fields))
    # In a thread without the modes of this one, in which autograd is switched off besides.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_count, op, arguments, needs).result()


def _count(op: Any, arguments: Any, needs: Sequence[bool] | None) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [t.requires_grad_() for t, needed in zip(op.tensors(arguments), needs or (), strict=False) if needed]
    with torch.set_grad_enabled(bool(inputs)), FlopCounterMode(display=False) as forward:
        y = op.reference(arguments)
    if needs is None:
        return forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        if inputs:
            torch.autograd.grad(y, inputs, torch.empty_like(y))
    return backward.get_total_flops()


def _on_meta(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_meta(v) for v in value]
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


class _CounterFinder:
    """Finds the counter as other finders do; what is defined then is registered behind its import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            for definition in definitions.values():
                _register(definition)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_counter_finder = _CounterFinder()
