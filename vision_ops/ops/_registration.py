"""How every op enters PyTorch: forward and backward are each an op of the dispatcher, autograd stands outside them.

Graphs, fake tensors, dispatch modes and a profiler of the calling thread see them; observers of other threads do not.
Where none of these looks, the kernels are called directly: the dispatcher's way to a kernel in Python takes tens of
microseconds in a training step.
Autograd outside costs less than `register_autograd` or `custom_op`, and `register_autograd` alone would give a silently
wrong jvp.
"""

import functools
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

# forward(arguments) -> y, or (y, *what the op saves); backward(grads, grad_y, arguments, *saved), which writes into
# grads: one for each tensor argument, a list for a list, None where none is needed.
Kernels = tuple[Callable[[Any], Any], Callable[..., None]]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
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
    shape: Sequence[int],
    like: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Where every output of every kernel comes from; the tests fill it with NaN. strides: in place of a format."""
    if strides is not None:
        return torch.empty_strided(shape, strides, dtype=dtype or like.dtype, device=like.device)
    if memory_format is torch.contiguous_format:
        return like.new_empty(shape, dtype=dtype)  # takes half the time
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output in the memory format of `like`, for the kernels and for the fakes alike."""
    return allocate(shape, like, memory_format(like))


def allocate_contiguous(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return allocate(shape, like, dtype=dtype)


def channels_dense(t: Tensor) -> bool:
    """Whether neighbouring channels are neighbours in memory, as the march kernels of CUDA want."""
    return t.stride(1) == 1 or t.shape[1] == 1


def to_channels_dense(t: Tensor) -> Tensor:
    return t if channels_dense(t) else t.contiguous(memory_format=torch.channels_last)


def allocate_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    return allocate(shape, like, torch.channels_last)


def workspace(size: int, like: Tensor) -> Tensor:
    return allocate((size // like.element_size(),), like)


def gradient_like(t: Tensor) -> Tensor:
    if t.is_contiguous():
        return torch.empty_like(t)  # takes a third of the time
    return empty(t.shape, t) if t.ndim == 4 and t.shape[1] > 1 else allocate(t.shape, t)


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For kernels that call PyTorch's GEMMs: FusedOp has cast what is to be cast."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return kernel(*args)

    return run


# Multiply-adds of a pass from which it runs on several threads: kSerialWork in csrc/cpu/parallel.h. So much pays for a
# crew (measured on two threads).
CREW_WORK = 1 << 19


def with_crew(kernel: Callable[..., Any], pays: Callable[[Tensor], bool]) -> Callable[..., Any]:
    """For CPU kernels of several passes: the threads are woken once. PyTorch's ops run on one thread meanwhile.

    pays: whether that is faster, given the first of the op's arguments, which are a NamedTuple.
    """

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        arguments = next(a for a in args if isinstance(a, tuple))
        return _native.kernels().with_crew(kernel, *args) if pays(arguments[0]) else kernel(*args)

    return run


class FusedOp:
    """One op: `vision_ops::<name>`, `vision_ops::<name>_backward`, their fakes and their gradient.

    arguments: a NamedTuple, tensors and lists of tensors first; its annotations are the schema, and every tensor gets a
    gradient. The functions take one: output is the empty result, reference the op in PyTorch, predicate two lists of
    reasons against the kernels: why they cannot run, and why they would be slower. triton: the CUDA kernels are.
    autocast: whether tensors are cast to its dtype, all but those named in `uncast`; norms take them as they are.

    saved: how many tensors, besides the arguments, the forward kernel computes for the backward kernel. Kernels and
    output then have (y, *saved) for a result, and so has the op in graphs; the public result is y. parts: which part of
    the op runs where, for `explain`; without it the op is one part.
    """

    def __init__(
        self,
        name: str,
        arguments: type[NamedTuple],
        *,
        output: Callable[[Any], Any],
        kernels: Mapping[str, Kernels],
        reference: Callable[[Any], Tensor],
        predicate: Callable[[Any], tuple[list[str], list[str]]],
        triton: bool = False,
        autocast: bool = True,
        uncast: Sequence[str] = (),
        saved: int = 0,
        parts: Callable[[Any], dict[str, str]] | None = None,
    ) -> None:
        self.name, self.arguments, self.reference, self.predicate = name, arguments, reference, predicate
        self.kernels, self._triton, self._autocasts, self._uncast = kernels, triton, autocast, uncast
        self._saved, self._parts = saved, parts
        types = {field: _SCHEMA_TYPES[kind] for field, kind in typing.get_type_hints(arguments).items()}
        self._tensors = count = sum(kind.startswith("Tensor") for kind in types.values())
        self._options = len(types) - count
        self._lists = any(kind.startswith("Tensor") and kind.endswith("[]") for kind in types.values())
        schema = ", ".join(f"{kind} {field}" for field, kind in types.items())
        results = f"({', '.join(['Tensor'] * (1 + saved))})" if saved else "Tensor"
        forward = _define(f"{name}({schema}) -> {results}")
        needs = "Tensor[] saved, bool[] needs" if saved else "bool[] needs"
        backward = _define(f"{name}_backward(Tensor grad, {schema}, {needs}) -> Tensor[]")
        self._forward = forward
        self._function = _function(self, forward, backward)
        # Without its look at functorch, which _needs_reference has had: half of the time.
        self._short_apply: Callable[..., Any] = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]

        # Where graphs come: compiled, exported and traced ones hold the op.
        def autograd(*given: Any) -> Any:
            if torch.is_grad_enabled() and _any_requires_grad(given):
                return self._differentiable(self._function.apply, None, given)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*given)

        def refuse_autograd(*given: Any) -> list[Tensor]:
            if torch.is_grad_enabled() and _any_requires_grad(given):
                raise RuntimeError(f"torch.ops.vision_ops.{name}_backward has no gradient of its own")
            with torch._C._AutoDispatchBelowAutograd():
                return backward(*given)

        _library.impl(name, autograd, "Autograd")
        _library.impl(f"{name}_backward", refuse_autograd, "Autograd")

        def gradients(grad: Tensor, *rest: Any, run: Callable[..., None] | None = None) -> list[Tensor]:
            *given, needs = rest
            kept = given.pop() if saved else []
            # An op cannot return None: a gradient that is not needed is an empty tensor.
            return [grad.new_empty(0) if g is None else g for g in self.gradients(run, grad, given, kept, needs)]

        torch.library.register_fake(forward, lambda *given: output(arguments(*given)), lib=_library)
        torch.library.register_fake(backward, gradients, lib=_library)
        for key, (run_forward, run_backward) in kernels.items():

            def forward_kernel(*given: Any, run: Any = run_forward) -> Any:
                return run(arguments(*given))

            _library.impl(name, forward_kernel, key)
            _library.impl(f"{name}_backward", functools.partial(gradients, run=run_backward), key)

    def __call__(self, *given: Any, backend: str | None = None) -> Tensor:
        """Runs the op on checked arguments."""
        backend = resolve_backend(backend)
        arguments = self.arguments(*self._autocast(given))
        # torch.jit.trace knows no lists of optional tensors.
        if backend == "reference" or _needs_reference() or (self._lists and torch.jit.is_tracing()):
            return self.reference(arguments)
        cannot, slower = self.predicate(arguments)
        if cannot and backend == "fused":
            raise ValueError(f"backend='fused', but fused_{self.name} cannot run: {'; '.join(cannot)}")
        if cannot or (slower and backend == "auto"):
            return self.reference(arguments)
        result = self._run(arguments)
        return result[0] if self._saved else result

    def _run(self, arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._forward(*arguments)
        kernels = self.direct(_flat(arguments[: self._tensors]))
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            apply = self._function.apply if kernels is None else self._short_apply
            return self._differentiable(apply, kernels, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(*arguments) if kernels is None else kernels[0](arguments)

    def direct(self, tensors: Sequence[Tensor | None]) -> Kernels | None:
        """The kernels for these tensors, the first of which is not None, if they are ordinary ones and nothing in this
        thread looks at ops."""
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return None
        if torch.autograd._profiler_enabled():
            return None
        kind = tensors[0].device.type  # type: ignore[union-attr]
        plain = _plain_keys(kind)
        for t in tensors:
            if t is None:
                continue
            if type(t) not in _PLAIN_TYPES or torch._C._dispatch_keys(t).raw_repr() not in plain:
                return None
        return self.kernels.get(kind.upper())

    def gradients(
        self,
        run: Callable[..., None] | None,
        grad: Tensor,
        given: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Of all tensor arguments, flat; empty ones without `run`, the backward kernel."""
        needed = iter(needs)

        def empty_gradient(t: Any) -> Any:
            if isinstance(t, (list, tuple)):
                return [empty_gradient(u) for u in t]
            return gradient_like(t) if next(needed) else None

        grads = [empty_gradient(t) for t in given[: self._tensors]]
        if run is not None:
            run(grads, grad, self.arguments(*given), *saved)
        return _flat(grads)

    def _differentiable(self, apply: Callable[..., Any], kernels: Kernels | None, given: Sequence[Any]) -> Any:
        """Through the autograd.Function, which sees no tensors inside of lists."""
        if not self._lists:
            return apply(kernels, None, *given)
        tensors = given[: self._tensors]
        lengths = tuple(len(t) if isinstance(t, (list, tuple)) else None for t in tensors)
        return apply(kernels, lengths, *_flat(tensors), *given[self._tensors :])

    def nested(self, tensors: Sequence[Tensor | None], lengths: tuple[int | None, ...] | None) -> list[Any]:
        """The tensor arguments from what `_differentiable` made of them."""
        if lengths is None:
            return list(tensors)
        rest = iter(tensors)
        return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]

    def explain(self, *given: Any, backend: str | None = None) -> Explanation:
        backend, arguments = resolve_backend(backend), self.arguments(*self._autocast(given))
        cannot, slower = self.predicate(arguments)
        fused = not cannot and (backend == "fused" or (backend == "auto" and not slower))
        device = arguments[0].device.type
        if fused and self._parts is not None:
            return Explanation(self.name, backend, self._parts(arguments), cannot, slower)
        if not fused:
            runs = "PyTorch"
        elif self._triton and device == "cuda":
            runs = "Triton kernel"
        else:
            runs = _native.kernel_name(device)
        if backend == "fused" and cannot:
            runs = "nothing: a ValueError"
        return Explanation(self.name, backend, {self.name: runs}, cannot, slower)

    def _autocast(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._autocasts or not autocast_enabled(given[0]):
            return given
        dtype = torch.get_autocast_dtype(given[0].device.type)

        def cast(t: Any) -> Any:
            if isinstance(t, (list, tuple)):
                return [cast(u) for u in t]
            return t if t is None or t.dtype == torch.float64 else t.to(dtype)

        tensors = zip(self.arguments._fields, given[: self._tensors], strict=False)
        return (*(t if name in self._uncast else cast(t) for name, t in tensors), *given[self._tensors :])


def _define(schema: str) -> torch._ops.OpOverload:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.vision_ops, schema.split("(")[0]).default


def _flat(nested: Sequence[Any]) -> list[Any]:
    return [t for item in nested for t in (item if isinstance(item, (list, tuple)) else (item,))]


def _any_requires_grad(arguments: Sequence[Any]) -> bool:
    for a in arguments:
        if isinstance(a, Tensor):
            if a.requires_grad:
                return True
        elif isinstance(a, (list, tuple)) and _any_requires_grad(a):
            return True
    return False


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@functools.cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of ordinary tensors: none of a wrapper, a lazily negated tensor or one of zeros only."""
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(keys)


def _needs_reference() -> bool:
    """Whether something is active that only PyTorch's own ops support."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return (torch.jit.is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export()


def _function(
    op: FusedOp, forward_op: torch._ops.OpOverload, backward_op: torch._ops.OpOverload
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, kernels: Kernels | None, lengths: tuple[int | None, ...] | None, *given: Any) -> Any:
        count = len(given) - op._options
        tensors, ctx.options, ctx.lengths = given[:count], given[count:], lengths
        arguments = op.arguments(*op.nested(tensors, lengths), *ctx.options)
        if kernels is None:
            result = forward_op(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                result = kernels[0](arguments)
        if op._saved:
            ctx.mark_non_differentiable(*result[1:])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *result[1:])
        else:
            ctx.save_for_backward(*tensors)
        return result

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        count = len(kept) - op._saved
        tensors, saved, needs = kept[:count], kept[count:], ctx.needs_input_grad[2 : 2 + count]
        if grad is None:
            return (None,) * (2 + count + len(ctx.options))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            # Views, so that gradients stop here even where one argument was computed from another.
            tensors = [t if t is None else t.view_as(t) for t in tensors]
            with torch.autocast(grad.device.type, enabled=False):
                y = op.reference(op.arguments(*op.nested(tensors, ctx.lengths), *ctx.options))
                inputs = [t for t, needed in zip(tensors, needs, strict=True) if needed]
                found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            grads = tuple(next(found) if needed else None for needed in needs)
        else:
            given = *op.nested(tensors, ctx.lengths), *ctx.options
            kernels = None if torch.compiler.is_compiling() else op.direct((grad, *kept))
            if kernels is None:
                extra = (list(saved),) if op._saved else ()
                computed = backward_op(grad, *given, *extra, list(needs))
                grads = tuple(g if needed else None for g, needed in zip(computed, needs, strict=True))
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    grads = tuple(op.gradients(kernels[1], grad, given, saved, needs))
        return (None, None, *grads, *(None for _ in ctx.options))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fused{op.name.title().replace('_', '')}", (torch.autograd.Function,), methods)


def device_reasons(x: Tensor, kernels: Mapping[str, Kernels], *, triton: bool = False) -> list[str]:
    """Why the kernels cannot run on the device of x. triton: its kernels serve CUDA."""
    kind = x.device.type
    if kind == "cpu":
        return [_native.cpu_missing] if _native.cpu_missing else []
    if kind == "cuda":
        missing = _native.triton_missing(x.device.index) if triton else _native.gpu_missing(x.device.index)
        return [missing] if missing else []
    return [] if kind.upper() in kernels else [f"there is no kernel for device {kind!r}"]
