"""How every op enters PyTorch: forward and backward are each an op of the dispatcher, autograd stands outside them.

Measured per call without the kernel: 2 us without gradients and 7 us with, against 16-19 us for `register_autograd` or
`custom_op`, whose jvp would also be silently wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native
from ..dispatch import Explanation, resolve_backend
from ._checks import autocast_enabled

_library = torch.library.Library("vision_ops", "DEF")

# forward(*arguments) -> y, and backward(grads, grad_y, *arguments), which writes into grads: None where none is needed.
Kernels = tuple[Callable[..., Tensor], Callable[..., None]]


def memory_format(t: Tensor) -> torch.memory_format:
    """The format of what is computed from t: channels_last where its channels are neighbours, slices included."""
    return torch.channels_last if t.stride(1) == 1 and not t.is_contiguous() else torch.contiguous_format


def allocate(
    shape: Sequence[int], like: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Where every output of every kernel comes from; the tests fill it with NaN."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output in the memory format of `like`, for the kernels and for the fakes alike."""
    return allocate(shape, like, memory_format(like))


def _gradient_like(t: Tensor) -> Tensor:
    return empty(t.shape, t) if t.ndim == 4 and t.shape[1] > 1 else allocate(t.shape, t)


class FusedOp:
    """One op: `vision_ops::<name>`, `vision_ops::<name>_backward`, their fakes and their gradient.

    tensors, options: the two halves of the schema; every tensor gets a gradient. output(*arguments) is the empty
    result. reference(*arguments) is the op in PyTorch. predicate(*arguments) is two lists of reasons against the
    kernels: why they cannot run, and why they would be slower.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        options: str,
        output: Callable[..., Tensor],
        kernels: dict[str, Kernels],
        reference: Callable[..., Tensor],
        predicate: Callable[..., tuple[list[str], list[str]]],
    ) -> None:
        self.name = name
        self.reference = reference
        self.predicate = predicate
        self._tensors = count = tensors.count("Tensor")
        forward = _define(f"{name}({tensors}, {options}) -> Tensor")
        backward = _define(
            f"{name}_backward(Tensor grad, {tensors}, {options}, bool[] needs) -> ({', '.join(['Tensor'] * count)})"
        )
        function = _function(name, count, forward, backward, reference)

        # Where graphs come: compiled, exported and traced ones hold the op.
        def autograd(*arguments: Any) -> Tensor:
            if torch.is_grad_enabled() and _any_requires_grad(arguments):
                return function.apply(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*arguments)

        def refuse_autograd(*arguments: Any) -> tuple[Tensor, ...]:
            if torch.is_grad_enabled() and _any_requires_grad(arguments):
                raise RuntimeError(f"torch.ops.vision_ops.{name}_backward has no gradient of its own")
            with torch._C._AutoDispatchBelowAutograd():
                return backward(*arguments)

        _library.impl(name, autograd, "Autograd")
        _library.impl(f"{name}_backward", refuse_autograd, "Autograd")

        def gradients(arguments: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
            pairs = zip(arguments[:count], needs, strict=True)
            return [_gradient_like(t) if needed else None for t, needed in pairs]

        # An op cannot return None: a gradient that is not needed is an empty tensor.
        def filled(grads: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor, ...]:
            return tuple(grad.new_empty(0) if g is None else g for g in grads)

        def fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            *arguments, needs = rest
            return filled(gradients(arguments, needs), grad)

        torch.library.register_fake(forward, output, lib=_library)
        torch.library.register_fake(backward, fake_backward, lib=_library)
        for key, (run_forward, run_backward) in kernels.items():

            def backward_kernel(
                grad: Tensor, *rest: Any, run: Callable[..., None] = run_backward
            ) -> tuple[Tensor, ...]:
                *arguments, needs = rest
                grads = gradients(arguments, needs)
                run(grads, grad, *arguments)
                return filled(grads, grad)

            _library.impl(name, run_forward, key)
            _library.impl(f"{name}_backward", backward_kernel, key)

        self._forward = forward
        self._function = function

    def __call__(self, *arguments: Any, backend: str | None = None) -> Tensor:
        """Runs the op on checked arguments, tensors first."""
        backend = resolve_backend(backend)
        arguments = self._autocast(arguments)
        if backend == "reference" or _needs_reference():
            return self.reference(*arguments)
        cannot, slower = self.predicate(*arguments)
        if cannot and backend == "fused":
            raise ValueError(f"backend='fused', but fused_{self.name} cannot run: {'; '.join(cannot)}")
        if cannot or (slower and backend == "auto"):
            return self.reference(*arguments)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._forward(*arguments)
        # The shortest ways through the dispatcher.
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            return self._function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(*arguments)

    def explain(self, *arguments: Any, backend: str | None = None) -> Explanation:
        backend = resolve_backend(backend)
        cannot, slower = self.predicate(*arguments)
        fused = not cannot and (backend == "fused" or (backend == "auto" and not slower))
        runs = _native.kernel_name(arguments[0].device.type) if fused else "PyTorch"
        if backend == "fused" and cannot:
            runs = "nothing: a ValueError"
        return Explanation(self.name, backend, {self.name: runs}, cannot, slower)

    def _autocast(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not autocast_enabled(arguments[0]):
            return arguments
        dtype = torch.get_autocast_dtype(arguments[0].device.type)
        cast = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in arguments[: self._tensors])
        return (*cast, *arguments[self._tensors :])


def _define(schema: str) -> torch._ops.OpOverload:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.vision_ops, schema.split("(")[0]).default


def _any_requires_grad(arguments: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _needs_reference() -> bool:
    """Whether something is active that only PyTorch's own ops support."""
    if torch.onnx.is_in_onnx_export():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _function(
    name: str,
    count: int,
    forward_op: torch._ops.OpOverload,
    backward_op: torch._ops.OpOverload,
    reference: Callable[..., Tensor],
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:count])
        ctx.options = arguments[count:]
        return forward_op(*arguments)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:count]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            with torch.enable_grad():
                y = reference(*tensors, *ctx.options)
                inputs = [t for t, needed in zip(tensors, needs, strict=True) if needed]
                found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            grads = tuple(next(found) if needed else None for needed in needs)
        else:
            computed = backward_op(grad, *tensors, *ctx.options, list(needs))
            grads = tuple(g if needed else None for g, needed in zip(computed, needs, strict=True))
        return (*grads, *(None for _ in ctx.options))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fused{name.title().replace('_', '')}", (torch.autograd.Function,), methods)


def device_reasons(x: Tensor, kernels: dict[str, Kernels]) -> list[str]:
    """Why the kernels cannot run on the device of x."""
    kind = x.device.type
    if kind == "cpu":
        return [_native.cpu_missing] if _native.cpu_missing else []
    if kind == "cuda" and _native.cuda_missing:
        return [_native.cuda_missing]
    return [] if kind.upper() in kernels else [f"there is no kernel for device {kind!r}"]
