"""How every op enters PyTorch: forward and backward are each an op of the dispatcher, autograd stands outside them.

Graphs, fake tensors, dispatch modes and a profiler of the calling thread see them; observers of other threads do not.
Where none of these looks, the kernels are called directly: the dispatcher's way to a kernel in Python takes tens of
microseconds in a training step.
Autograd outside costs less than `register_autograd` or `custom_op`, and `register_autograd` alone would give a silently
wrong jvp.
"""

import functools
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _internals, _native
from .._internals import dispatch_modes, function_modes, is_transformed, is_wrapper, profiler_enabled
from ..dispatch import Explanation, Question, resolve_backend
from ._allocation import gradient_like
from ._autograd import _flat, any_requires_grad, function_of
from ._checks import autocast_enabled
from ._definitions import define, implement
from ._devices import Kernels
from ._flops import count_flops

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
    list[int]: "int[]",
    str: "str",
    str | None: "str?",
}


fused_ops: dict[str, "FusedOp"] = {}  # by name


class FusedOp:
    """One op: `vision_ops::<name>`, `vision_ops::<name>_backward`, their fakes and their gradient.

    arguments: a NamedTuple, tensors and lists of tensors first; its annotations are the schema, and every tensor gets a
    gradient. The functions take one: output is the empty result, reference the op in PyTorch, predicate two lists of
    reasons against the kernels: why they cannot run, and why they would be slower. triton: the CUDA kernels are.
    autocast: whether tensors are cast to its dtype, all but those named in `uncast`; norms take them as they are. wide:
    those that the kernels take in float32 beside a half x, so that they are cast for the reference only.

    saved: for every tensor, besides the arguments, that the forward kernel computes for the backward kernel, what gives
    it the layout again in which it was written: hooks on saved tensors may return it in another one. Kernels and output
    then have (y, *saved) for a result, and so has the op in graphs; the public result is y.

    passes: the tensor whose gradient is that of y, which is handed on. constants: tensors that have none. unread: given
    the arguments and which of their tensors need a gradient, those that the backward kernel does not read, which are
    not kept. parts: which part of the op runs where, for `explain`; without it the op is one part. FLOPs are counted
    from the reference (`_flops.py`).
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
        wide: Sequence[str] = (),
        saved: Sequence[Callable[[Tensor], Tensor]] = (),
        passes: str | None = None,
        constants: Sequence[str] = (),
        unread: Callable[[Any, Any], Sequence[str]] | None = None,
        parts: Callable[[Any], dict[str, str]] | None = None,
        dims: str = "N, C, H, W",
        public: bool = True,
    ) -> None:
        self.name, self.arguments, self.reference, self.output = name, arguments, reference, output
        self.predicate, self.kernels, self._triton = predicate, kernels, triton
        self._autocasts, self._uncast, self._wide = autocast, uncast, wide
        self._layouts, self._saved, self._parts, self.dims = saved, len(saved), parts, dims
        self.passes, self.unread = passes, unread
        self.ungraded = (*constants, *((passes,) if passes else ()))
        types = self._types = {field: _SCHEMA_TYPES[kind] for field, kind in typing.get_type_hints(arguments).items()}
        self._tensors = count = sum(kind.startswith("Tensor") for kind in types.values())
        self.options = [*types][count:]
        self._lists = any(kind.startswith("Tensor") and kind.endswith("[]") for kind in types.values())
        self.places = functools.cache(self._places_of)
        schema = ", ".join(f"{kind} {field}" for field, kind in types.items())
        results = f"({', '.join(['Tensor'] * (1 + len(saved)))})" if saved else "Tensor"
        definition = define(name, schema, results, "Tensor[] saved, bool[] needs" if saved else "bool[] needs")
        self._forward, self._backward = definition.forward, definition.backward
        self._function = function_of(self)
        # Without its look at functorch, which __call__ has had.
        self._short_apply = _internals.short_apply(self._function)
        is_new, definition.op = definition.op is None, self
        if is_new:
            implement(definition)
            count_flops(definition)
        if public:
            fused_ops[name] = self

    def __call__(self, *given: Any, backend: str | None = None) -> Any:
        """Runs the op on checked arguments."""
        return self.with_saved(*given, backend=backend)[0]

    def with_saved(
        self, *given: Any, backend: str | None = None, reference: Callable[[], Tensor] | None = None
    ) -> Sequence[Any]:
        """The same, with what the forward kernel saves; y alone where the reference runs. reference: in its place."""
        if type(backend) is Question:
            return (self.explain(*given, backend=backend),)
        backend = resolve_backend(backend)
        arguments = self.arguments(*self._autocast(given))
        in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        takes_reference = backend == "reference" or is_transformed(arguments) or (in_graph and self._cannot_export())
        if not takes_reference:
            cannot, slower = self.predicate(arguments)
            if cannot and backend == "fused":
                raise ValueError(f"backend='fused', but fused_{self.name} cannot run: {'; '.join(cannot)}")
            takes_reference = bool(cannot) or (bool(slower) and backend == "auto")
        if takes_reference:
            return (self._by_reference(arguments) if reference is None else reference(),)
        result = self._forward(*arguments) if in_graph else self._run(arguments)
        return result if self._saved else (result,)

    def _by_reference(self, arguments: Any) -> Tensor:
        return self.reference(self.arguments(*self._autocast(arguments, wide=())))

    def _cannot_export(self) -> bool:
        """Whether the graph that is being made takes only PyTorch's own ops. torch.jit.trace knows no lists of optional
        tensors."""
        return torch.onnx.is_in_onnx_export() or (self._lists and torch.jit.is_tracing())

    def _run(self, arguments: Any) -> Any:
        tensors = self.tensors(arguments)
        kernels = self.direct(tensors)
        if torch.is_grad_enabled() and any_requires_grad(tensors):
            return (self._function.apply if kernels is None else self._short_apply)(kernels, arguments, *tensors)
        if kernels is None:
            return self._forward(*arguments)
        with _internals.BelowAutograd():
            return kernels[0](arguments)

    def direct(self, tensors: Sequence[Tensor | None]) -> Kernels | None:
        """The kernels for these tensors, the first of which is not None, if they are ordinary ones and nothing in this
        thread looks at ops."""
        if dispatch_modes() or not _internals.calls_directly or function_modes() or profiler_enabled():
            return None
        for t in tensors:
            if t is None:
                continue
            # Neither wrapped, nor lazily negated, nor of zeros only.
            if type(t) not in _PLAIN_TYPES or is_wrapper(t) or t.is_neg() or t._is_zerotensor():
                return None
        return self.kernels.get(_native.device_kind(tensors[0]).upper())

    def gradients(
        self,
        run: Callable[..., None] | None,
        grad: Tensor,
        given: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Of all tensor arguments, flat; empty ones without `run`, the backward kernel."""
        lengths = self.lengths(given)
        if self.ungraded:
            needs = self.graded(needs, lengths)
        pairs = zip(self.tensors(given), needs, strict=True)
        flat = [gradient_like(t, grad) if needed and t is not None else None for t, needed in pairs]
        if run is not None:
            grads = flat if lengths is None else self.nested(flat, lengths)
            laid_out = [lay_out(t) for lay_out, t in zip(self._layouts, saved, strict=True)]
            run(grads, grad, self.arguments(*given), *laid_out)
        return flat

    def graded(self, needs: Sequence[bool], lengths: tuple[int | None, ...] | None) -> list[bool]:
        """Which gradients a kernel computes: none of a constant, nor that of y."""
        places, needs = self.places(lengths), list(needs)
        for name in self.ungraded:
            needs[places[name]] = False
        return needs

    def tensors(self, given: Sequence[Any]) -> Sequence[Tensor | None]:
        """The tensor arguments, flat: an autograd.Function sees none inside of lists."""
        return _flat(given[: self._tensors]) if self._lists else given[: self._tensors]

    def lengths(self, given: Sequence[Any]) -> tuple[int | None, ...] | None:
        """Of the lists among the tensor arguments."""
        if not self._lists:
            return None
        return tuple([len(t) if isinstance(t, (list, tuple)) else None for t in given[: self._tensors]])

    def nested(self, tensors: Sequence[Any], lengths: tuple[int | None, ...] | None) -> list[Any]:
        """The tensor arguments from `tensors` and `lengths`."""
        if lengths is None:
            return list(tensors)
        found: list[Any] = []
        at = 0
        for n in lengths:
            found.append(tensors[at] if n is None else list(tensors[at : at + n]))
            at += 1 if n is None else n
        return found

    def partial(self, given: Mapping[str, Any]) -> list[Any]:
        """The arguments, of which some are missing, for `explain`."""

        def value(name: str, kind: str) -> Any:
            found = given.get(name)
            if kind.endswith("[]"):
                return list(found) if isinstance(found, (list, tuple)) else []
            return False if found is None and kind == "bool" else found

        return [value(name, kind) for name, kind in self._types.items()]

    def _places_of(self, lengths: tuple[int | None, ...] | None) -> dict[str, int]:
        """Of the tensors among all, flat."""
        counts = [1] * self._tensors if lengths is None else [1 if n is None else n for n in lengths]
        firsts = itertools.accumulate(counts, initial=0)
        return dict(zip(self.arguments._fields, firsts, strict=False))

    def without_unread(
        self, tensors: Sequence[Tensor | None], needs: Sequence[bool], arguments: Any
    ) -> list[Tensor | None]:
        """What is to be kept of the tensors; in place of those that backward does not read, one number that has their
        shape and dtype."""
        assert self.unread is not None
        lengths = self.lengths(arguments)
        kept, places = list(tensors), self.places(lengths)
        needed = self.arguments(*self.nested(needs, lengths), *arguments[self._tensors :])
        for name in self.unread(arguments, needed):
            t = kept[places[name]]
            if t is not None:
                kept[places[name]] = t.new_empty_strided(t.shape, (0,) * t.ndim)
        return kept

    def explain(self, *given: Any, backend: str) -> Explanation:
        backend, arguments = str(backend), self.arguments(*self._autocast(given))
        cannot, slower = self.predicate(arguments)
        fused = not cannot and (backend == "fused" or (backend == "auto" and not slower))
        device = _native.device_kind(arguments[0])
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

    def _autocast(self, given: tuple[Any, ...], wide: Sequence[str] | None = None) -> tuple[Any, ...]:
        """wide: in the place of the op's own."""
        if not self._autocasts or not autocast_enabled(given[0]):
            return given
        dtype = torch.get_autocast_dtype(_native.device_kind(given[0]))

        def cast(t: Any, kept: tuple[torch.dtype, ...]) -> Any:
            if isinstance(t, (list, tuple)):
                return [cast(u, kept) for u in t]
            return t if t is None or t.dtype in kept else t.to(dtype)

        kept, wide = (torch.float64,), self._wide if wide is None else wide
        found = []
        for name, t in zip(self.arguments._fields, given[: self._tensors], strict=False):
            of_kernels = (*kept, torch.float32) if name in wide else kept
            found.append(t if name in self._uncast else cast(t, of_kernels))
        return (*found, *given[self._tensors :])


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
