"""The dispatcher's ops, defined once in a process, however often the package is imported."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _internals
from ._autograd import _flat, any_requires_grad, gradients, keep


@dataclass
class Definition:
    """`vision_ops::<name>` and `vision_ops::<name>_backward`; they call `op`, the FusedOp that was made last."""

    name: str
    schemas: tuple[str, str]
    forward: Any
    backward: Any
    op: Any = None


def define(name: str, arguments: str, results: str, backward: str) -> Definition:
    """A new definition, or that of the same schemas. Another op of this name gets a number.

    backward: what the backward op takes after the gradient and the arguments.
    """
    schemas = f"({arguments}) -> {results}", f"(Tensor grad, {arguments}, {backward}) -> Tensor[]"
    unique, count = name, 1
    while unique in definitions and definitions[unique].schemas != schemas:
        count += 1
        unique = f"{name}_{count}"
    if unique not in definitions:
        names = unique, f"{unique}_backward"
        for each, schema in zip(names, schemas, strict=True):
            library.define(each + schema, tags=(torch.Tag.pt2_compliant_tag,))
        ops = (getattr(torch.ops.vision_ops, each).default for each in names)
        definitions[unique] = Definition(unique, schemas, *ops)
    return definitions[unique]


def implement(d: Definition) -> None:
    """Tells the dispatcher what to call. Autograd stands above the kernels: graphs hold the op, and its gradient."""

    def run(*given: Any, key: str) -> Any:
        return d.op.kernels[key][0](d.op.arguments(*_resolved(given)))

    def run_backward(grad: Tensor, *rest: Any, key: str | None = None) -> list[Tensor]:
        *given, needs = rest if key is None else _resolved(rest)
        saved = given.pop() if d.op._saved else []
        found = d.op.gradients(None if key is None else d.op.kernels[key][1], grad, given, saved, needs)
        # An op cannot return None: a gradient that is not needed is an empty tensor.
        return [grad.new_empty(0) if g is None else g for g in found]

    names = d.name, f"{d.name}_backward"
    torch.library.register_fake(d.forward, lambda *given: d.op.output(d.op.arguments(*given)), lib=library)
    torch.library.register_fake(d.backward, run_backward, lib=library)
    for key in d.op.kernels:
        library.impl(names[0], functools.partial(run, key=key), key)
        library.impl(names[1], functools.partial(run_backward, key=key), key)
    if _internals.BelowAutograd is None:
        _differentiate_publicly(d)
        return

    def autograd(*given: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(given):
            return d.op._function.apply(None, d.op.arguments(*given), *d.op.tensors(given))
        with _internals.BelowAutograd():
            return d.forward(*given)

    def refuse_autograd(*given: Any) -> list[Tensor]:
        if torch.is_grad_enabled() and any_requires_grad(given):
            raise RuntimeError(_not_twice(d))
        with _internals.BelowAutograd():
            return d.backward(*given)

    library.impl(names[0], autograd, "Autograd")
    library.impl(names[1], refuse_autograd, "Autograd")


def _resolved(values: Any) -> list[Any]:
    """The dispatcher gives kernels no lazily negated tensors and none of zeros only, but in lists of optional ones."""
    return [_resolved(v) if isinstance(v, list) else _materialized(v) if isinstance(v, Tensor) else v for v in values]


def _materialized(t: Tensor) -> Tensor:
    return torch.zeros_like(t) if t._is_zerotensor() else t.resolve_neg()


def _not_twice(d: Definition) -> str:
    return f"torch.ops.vision_ops.{d.name}_backward has no gradient of its own"


def _differentiate_publicly(d: Definition) -> None:
    """The same by PyTorch's means, with which only the public functions, not the ops, refuse forward-mode AD."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        op = d.op
        needs = _flat(ctx.needs_input_grad[: op._tensors])
        keep(op, ctx, op.tensors(inputs), needs, op.arguments(*inputs), output)

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        found = gradients(d.op, ctx, grad, _flat(ctx.needs_input_grad[: d.op._tensors]))
        return (*d.op.nested(found, ctx.lengths), *(None for _ in ctx.options))

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(_not_twice(d))

    torch.library.register_autograd(d.forward, backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(d.backward, refuse, lib=library)


# In the dispatcher's own namespace, which no import makes anew. An op goes when its library does.
_kept = vars(torch.ops.vision_ops)
if "_library" not in _kept:
    _kept.update(_library=torch.library.Library("vision_ops", "FRAGMENT"), _definitions={})
library: torch.library.Library = _kept["_library"]
definitions: dict[str, Definition] = _kept["_definitions"]
