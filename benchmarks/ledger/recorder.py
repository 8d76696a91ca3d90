"""CUDA's way through the package on meta tensors: every launch is recorded, none runs.

Meta tensors have shapes and strides but no values, and no autocast: a mode of functions stands for it, with PyTorch's
lists of what it casts. For CUDA C++ the real host code runs, in the emulation of csrc/emu, which records.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks.ledger.constants import CALL_US, HOST_US
from benchmarks.ledger.launches import Launch, resident_blocks
from benchmarks.ledger.pytorch import laid_out, launches_of, numbers_bytes, tensors_in
from vision_ops import _native
from vision_ops.ops import _registration

# Of autocast on CUDA: by their names in Python.
TO_HALF = {"conv2d", "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
TO_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "normalize", "norm"}


@dataclass
class Recorder:
    """launches: in order. ours: within how many calls of our kernels we are, whose casts are not autocast's."""

    launches: list[Launch] = field(default_factory=list)
    ours: int = 0
    casts: int = 0
    calls: int = 0  # of the binding of CUDA C++

    def taken(self) -> list[Launch]:
        """Those since the last time."""
        found, self.launches = self.launches, []
        return found

    @contextlib.contextmanager
    def within(self, what: str) -> Iterator[None]:
        setattr(self, what, getattr(self, what) + 1)
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) - 1)


class _PyTorch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, recorder = kwargs or {}, self._recorder
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        result = laid_out(func, args, func(*args, **kwargs))
        # In a backward pass, outside of our kernels, what changes a dtype gives a parameter's gradient its own.
        gives_dtype = func._schema.name == "aten::_to_copy" and not torch.is_grad_enabled()
        casts = recorder.casts or (gives_dtype and not recorder.ours)
        recorder.launches += launches_of(func, args, kwargs, result, "cast" if casts else "PyTorch")
        return result


class _Autocast(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self._recorder.ours and (name in TO_HALF or name in TO_FLOAT32):
            dtype = torch.get_autocast_dtype("cuda") if name in TO_HALF else torch.float32
            with self._recorder.within("casts"):
                args, kwargs = _cast(args, dtype), {key: _cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value) if not isinstance(value, torch.Size) else value
    is_float = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_float else value


class _Binding:
    """vision_ops._cuda, as compiled for the emulation; what only tells sizes and choices launches nothing."""

    def __init__(self, module: ModuleType, recorder: Recorder) -> None:
        self._module, self._recorder = module, recorder

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name.startswith("has_") or name.endswith("_workspace"):
            return function

        def call(*args: Any) -> None:
            function(*args)
            lines = self._module.recorded().splitlines()
            host = HOST_US["CUDA C++"] + CALL_US / max(1, len(lines))
            self._recorder.launches += [_of_line(line, host) for line in lines]

        return call


def _of_line(line: str, host_us: float) -> Launch:
    *numbers, text = line.split(" ", 6)
    _, blocks, shared, read, written, multiply_adds = map(int, numbers)
    kernel = text.split("kernel = ")[1].rstrip("]").split("::")[-1]
    convolves = None
    if "march" in kernel:
        convolves = "ours, weights" if "wgrad" in kernel else "ours"
    resident = resident_blocks(kernel, shared)
    return Launch(kernel, "CUDA C++", read, written, multiply_adds, 0, convolves, blocks, resident, host_us)


def _of_triton(function: Any, args: Any, options: Any) -> Launch:
    declared = getattr(function.fn, "moves", None)
    if declared is None:
        raise TypeError(f"{function.fn.__name__} does not declare what it moves (kernels/_moves.py)")
    names = list(inspect.signature(function.fn).parameters)
    given = dict(zip(names, args, strict=False)) | {name: options[name] for name in names if name in options}
    read = written = 0
    for name, value in given.items():
        size = sum(map(numbers_bytes, tensors_in(value)))
        read += size * (name not in declared.written)
        written += size * (name in (*declared.written, *declared.updated))
    products = number_bytes = 0
    if declared.multiply_adds is not None:
        products = declared.multiply_adds(**given)
        number_bytes = next(t for value in given.values() for t in tensors_in(value)).element_size()
    return Launch(function.fn.__name__, "Triton", read, written, products, number_bytes, host_us=HOST_US["Triton"])


def _address(t: Tensor) -> int:
    """Of a tensor without memory: what decides how wide copies are, and that it is there."""
    return (1 << 40) + t.storage_offset() * t.element_size()


@contextlib.contextmanager
def recording(cuda: ModuleType, autocast: bool = True) -> Iterator[Recorder]:
    """Within, ops and networks on meta tensors run what they run on CUDA tensors, under autocast to bfloat16.

    cuda: the binding as compiled for the emulation.
    """
    recorder = Recorder()

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorder.launches.append(_of_triton(function, args, options))

    def direct(op: Any, tensors: Any) -> Any:
        return tuple(map(counted, op.kernels["CUDA"]))

    def counted(kernel: Any) -> Any:
        @functools.wraps(kernel)
        def call(*args: Any) -> Any:
            with recorder.within("ours"):
                return kernel(*args)

        return call

    def cast(op: Any, given: Any, **options: Any) -> Any:
        with recorder.within("casts"):
            return autocast_of_ops(op, given, **options)

    autocast_of_ops = _registration.FusedOp._autocast
    patches = [
        mock.patch.object(_native, "device_kind", lambda t: "cuda"),
        mock.patch.object(_native, "cuda", _Binding(cuda, recorder)),
        mock.patch.object(_native, "target", lambda t: (0, 0)),
        mock.patch.object(_native, "gpu_missing", lambda index: None),
        mock.patch.object(_native, "triton_missing", lambda index: None),
        mock.patch.object(Tensor, "data_ptr", _address),
        mock.patch.object(_registration.FusedOp, "direct", direct),
        mock.patch.object(_registration.FusedOp, "_autocast", cast),
        *(mock.patch.object(function, "run", run) for function in (JITFunction, InterpretedFunction)),
    ]
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(torch.set_autocast_enabled, "cuda", before[0])
        stack.callback(torch.set_autocast_dtype, "cuda", before[1])
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        cuda.record(True)
        stack.callback(cuda.record, False)
        stack.enter_context(_PyTorch(recorder))
        if autocast:
            stack.enter_context(_Autocast(recorder))
        yield recorder
