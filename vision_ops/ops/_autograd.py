"""What differentiates the ops: their kernels, or their references where only PyTorch's own ops serve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _internals
from .._internals import holds_transformed

if TYPE_CHECKING:
    from ._devices import Kernels
    from ._registration import FusedOp


def _flat(nested: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for item in nested:
        if isinstance(item, (list, tuple)):
            found += item
        else:
            found.append(item)
    return found


def any_requires_grad(arguments: Sequence[Any]) -> bool:
    for a in arguments:
        if isinstance(a, Tensor):
            if a.requires_grad:
                return True
        elif isinstance(a, (list, tuple)) and any_requires_grad(a):
            return True
    return False


def function_of(op: "FusedOp") -> type[torch.autograd.Function]:
    # The arguments, which hold the tensors, too: as a tuple it looks at no other.
    def forward(ctx: Any, kernels: "Kernels | None", arguments: Any, *tensors: Tensor | None) -> Any:
        if kernels is None:
            result = op._forward(*arguments)
        else:
            with _internals.BelowAutograd():
                result = kernels[0](arguments)
        keep(op, ctx, tensors, ctx.needs_input_grad[2:], arguments, result)
        return result

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return None, None, *gradients(op, ctx, grad, ctx.needs_input_grad[2:])

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fused{op.name.title().replace('_', '')}", (torch.autograd.Function,), methods)


def keep(
    op: "FusedOp",
    ctx: Any,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    arguments: Any,
    result: Any,
) -> None:
    """For `gradients`."""
    ctx.options, ctx.lengths = arguments[op._tensors :], op.lengths(arguments)
    if op.passes is not None:
        passed = getattr(arguments, op.passes)
        ctx.passed_dtype = None if passed is None else passed.dtype
    if op.unread is not None:
        tensors = op.without_unread(tensors, needs, arguments)
    if op._saved:
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *result[1:])
    else:
        ctx.save_for_backward(*tensors)


def gradients(op: "FusedOp", ctx: Any, grad: Tensor | None, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """Of all tensor arguments, flat."""
    if grad is None:
        return (None,) * len(needs)
    if not op.ungraded:
        return _computed(op, ctx, grad, needs)
    computed = op.graded(needs, ctx.lengths)
    found = list(_computed(op, ctx, grad, computed)) if any(computed) else [None] * len(needs)
    if op.passes is not None and needs[place := op.places(ctx.lengths)[op.passes]]:
        found[place] = grad.to(ctx.passed_dtype)
    return found


def _computed(op: "FusedOp", ctx: Any, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    kept = ctx.saved_tensors
    tensors, saved = kept[: len(needs)], kept[len(needs) :]
    compiling = torch.compiler.is_compiling()
    differentiates = torch.is_grad_enabled() and not compiling  # create_graph=True
    kernels = None if differentiates or compiling else op.direct((grad, *kept))
    # The latter where vmap has the backward pass alone.
    if differentiates or (kernels is None and holds_transformed((grad, *kept))):
        return _reference_gradients(op, ctx, grad, tensors, needs)
    given = *op.nested(tensors, ctx.lengths), *ctx.options
    if kernels is not None:
        with _internals.BelowAutograd():
            return op.gradients(kernels[1], grad, given, saved, needs)
    extra = (list(saved),) if op._saved else ()
    computed = op._backward(grad, *given, *extra, list(needs))
    return [g if needed else None for g, needed in zip(computed, needs, strict=True)]


def _reference_gradients(
    op: "FusedOp", ctx: Any, grad: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Views, so that gradients stop here even where one argument was computed from another.
        views = [t if t is None else t.view_as(t) for t in tensors]
        y = op.reference(op.arguments(*op.nested(views, ctx.lengths), *ctx.options))
        inputs = [t for t, needed in zip(views, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y, inputs, grad, create_graph=create_graph))
    return [next(found) if needed else None for needed in needs]
