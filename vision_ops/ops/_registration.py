"""How every op enters PyTorch: forward and backward are each an op of the dispatcher, autograd stands outside them.

That is the cheapest arrangement per call, a few microseconds against 16 to 19 for `register_autograd` and `custom_op`
(measured on a prototype), and `register_autograd` alone would give a silently wrong jvp.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native
from ..dispatch import Explanation, resolve_backend
from ._checks import autocast_enabled

_library = torch.library.Library("vision_ops", "DEF")

# forward(arguments) -> y, and backward(grads, grad_y, arguments), which writes into grads: None where none is needed.
Kernels = tuple[Callable[[Any], Tensor], Callable[[list[Tensor | None], Tensor, Any], None]]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
    list[int]: "int[]",
    str | None: "str?",
}


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


def channels_dense(t: Tensor) -> bool:
    """Whether neighbouring channels are neighbours in memory, as the march kernels of CUDA want."""
    return t.stride(1) == 1 or t.shape[1] == 1


def to_channels_dense(t: Tensor) -> Tensor:
    return t if channels_dense(t) else t.contiguous(memory_format=torch.channels_last)


def allocate_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    return allocate(shape, like, torch.channels_last)


def workspace(size: int, like: Tensor) -> Tensor:
    return allocate((size // like.element_size(),), like)


def _gradient_like(t: Tensor) -> Tensor:
    return empty(t.shape, t) if t.ndim == 4 and t.shape[1] > 1 else allocate(t.shape, t)


class FusedOp:
    """One op: `vision_ops::<name>`, `vision_ops::<name>_backward`, their fakes and their gradient.

    arguments: a NamedTuple, tensors first; its annotations are the schema, and every tensor gets a gradient. The
    functions take one: output is the empty result, reference the op in PyTorch, predicate two lists of reasons against
    the kernels: why they cannot run, and why they would be slower; runs names the kernel. autocast: whether tensors are
    cast to its dtype; norms take them as they are.
    """

    def __init__(
        self,
        name: str,
        arguments: type[NamedTuple],
        *,
        output: Callable[[Any], Tensor],
        kernels: Mapping[str, Kernels],
        reference: Callable[[Any], Tensor],
        predicate: Callable[[Any], tuple[list[str], list[str]]],
        runs: Callable[[Any], str] = lambda a: _native.kernel_name(a[0].device.type),
        autocast: bool = True,
    ) -> None:
        self.name, self.arguments, self.reference = name, arguments, reference
        self.kernels, self.predicate, self.runs, self._autocasts = kernels, predicate, runs, autocast
        types = {field: _SCHEMA_TYPES[kind] for field, kind in typing.get_type_hints(arguments).items()}
        self._tensors = count = sum(kind.startswith("Tensor") for kind in types.values())
        schema = ", ".join(f"{kind} {field}" for field, kind in types.items())
        forward = _define(f"{name}({schema}) -> Tensor")
        gradients = ", ".join(["Tensor"] * count)
        backward = _define(f"{name}_backward(Tensor grad, {schema}, bool[] needs) -> ({gradients})")
        function = _function(self, forward, backward)

        # Where graphs come: compiled, exported and traced ones hold the op.
        def autograd(*given: Any) -> Tensor:
            if torch.is_grad_enabled() and _any_requires_grad(given):
                return function.apply(*given)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*given)

        def refuse_autograd(*given: Any) -> tuple[Tensor, ...]:
            if torch.is_grad_enabled() and _any_requires_grad(given):
                raise RuntimeError(f"torch.ops.vision_ops.{name}_backward has no gradient of its own")
            with torch._C._AutoDispatchBelowAutograd():
                return backward(*given)

        _library.impl(name, autograd, "Autograd")
        _library.impl(f"{name}_backward", refuse_autograd, "Autograd")

        def empty_gradients(given: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
            pairs = zip(given[:count], needs, strict=True)
            return [_gradient_like(t) if needed else None for t, needed in pairs]

        # An op cannot return None: a gradient that is not needed is an empty tensor.
        def filled(grads: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor, ...]:
            return tuple(grad.new_empty(0) if g is None else g for g in grads)

        def fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            *given, needs = rest
            return filled(empty_gradients(given, needs), grad)

        torch.library.register_fake(forward, lambda *given: output(arguments(*given)), lib=_library)
        torch.library.register_fake(backward, fake_backward, lib=_library)
        for key, (run_forward, run_backward) in kernels.items():

            def forward_kernel(*given: Any, run: Any = run_forward) -> Tensor:
                return run(arguments(*given))

            def backward_kernel(grad: Tensor, *rest: Any, run: Any = run_backward) -> tuple[Tensor, ...]:
                *given, needs = rest
                grads = empty_gradients(given, needs)
                run(grads, grad, arguments(*given))
                return filled(grads, grad)

            _library.impl(name, forward_kernel, key)
            _library.impl(f"{name}_backward", backward_kernel, key)

        self._forward = forward
        self._function = function

    def __call__(self, *given: Any, backend: str | None = None) -> Tensor:
        """Runs the op on checked arguments."""
        backend = resolve_backend(backend)
        arguments = self.arguments(*self._autocast(given))
        if backend == "reference" or _needs_reference():
            return self.reference(arguments)
        cannot, slower = self.predicate(arguments)
        if cannot and backend == "fused":
            raise ValueError(f"backend='fused', but fused_{self.name} cannot run: {'; '.join(cannot)}")
        if cannot or (slower and backend == "auto"):
            return self.reference(arguments)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._forward(*arguments)
        # The shortest ways through the dispatcher.
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            return self._function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(*arguments)

    def explain(self, *given: Any, backend: str | None = None) -> Explanation:
        backend, arguments = resolve_backend(backend), self.arguments(*self._autocast(given))
        cannot, slower = self.predicate(arguments)
        fused = not cannot and (backend == "fused" or (backend == "auto" and not slower))
        runs = self.runs(arguments) if fused else "PyTorch"
        if backend == "fused" and cannot:
            runs = "nothing: a ValueError"
        return Explanation(self.name, backend, {self.name: runs}, cannot, slower)

    def _autocast(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._autocasts or not autocast_enabled(given[0]):
            return given
        dtype = torch.get_autocast_dtype(given[0].device.type)
        cast = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in given[: self._tensors])
        return (*cast, *given[self._tensors :])


def _define(schema: str) -> torch._ops.OpOverload:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.vision_ops, schema.split("(")[0]).default


def _any_requires_grad(arguments: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _needs_reference() -> bool:
    """Whether something is active that only PyTorch's own ops support."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return (torch.jit.is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export()


def _function(
    op: FusedOp, forward_op: torch._ops.OpOverload, backward_op: torch._ops.OpOverload
) -> type[torch.autograd.Function]:
    count = op._tensors

    def forward(ctx: Any, *given: Any) -> Tensor:
        ctx.save_for_backward(*given[:count])
        ctx.options = given[count:]
        return forward_op(*given)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:count]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            # Views, so that gradients stop here even where one argument was computed from another.
            tensors = [t if t is None else t.view_as(t) for t in tensors]
            with torch.autocast(grad.device.type, enabled=False):
                y = op.reference(op.arguments(*tensors, *ctx.options))
                inputs = [t for t, needed in zip(tensors, needs, strict=True) if needed]
                found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            grads = tuple(next(found) if needed else None for needed in needs)
        else:
            computed = backward_op(grad, *tensors, *ctx.options, list(needs))
            grads = tuple(g if needed else None for g, needed in zip(computed, needs, strict=True))
        return (*grads, *(None for _ in ctx.options))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fused{op.name.title().replace('_', '')}", (torch.autograd.Function,), methods)


def device_reasons(x: Tensor, kernels: Mapping[str, Kernels], *, triton: bool = False) -> list[str]:
    """Why the kernels cannot run on the device of x. triton: its kernels serve CUDA."""
    kind = x.device.type
    if kind == "cpu":
        return [_native.cpu_missing] if _native.cpu_missing else []
    if kind == "cuda":
        missing = _native.triton_missing if triton else _native.gpu_missing(x.device.index)
        return [missing] if missing else []
    return [] if kind.upper() in kernels else [f"there is no kernel for device {kind!r}"]
