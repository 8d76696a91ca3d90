"""The ops' CUDA implementations on meta tensors: every launch is recorded, none runs.

Meta tensors have shapes and strides but no values: what asks for one, as `.item()`, `.cpu()`, `nonzero()` and `if t:`
do, raises. On a GPU it would wait for the device, and could not be captured in a CUDA graph.
"""

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import emulation
import interpreter
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key

from vision_ops import _native


@dataclass
class Recorder:
    """launches: names of Triton kernels and functions of the CUDA binding, in order. compiled: what Triton would have
    compiled for them, by kernel and the key of its specialisation."""

    launches: list[str] = field(default_factory=list)
    compiled: set[tuple[str, str]] = field(default_factory=set)


class _Binding:
    """vision_ops._cuda, whose launches are recorded; what only tells sizes and choices is asked of the module."""

    def __init__(self, module: ModuleType, recorder: Recorder) -> None:
        self._module, self._recorder = module, recorder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("has_") or name.endswith("_workspace"):
            return getattr(self._module, name)
        getattr(self._module, name)  # exists
        return lambda *_: self._recorder.launches.append(name)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _conv2d(x: Tensor, weight: Tensor, *rest: Any, convolve: Any = F.conv2d, **options: Any) -> Tensor:
    """With the results of cuDNN's memory formats: on meta tensors they are contiguous."""
    if not any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
        return convolve(x, weight, *rest, **options)
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(_channels_last)
    return _channels_last(convolve(x, weight, *rest, **options))


def install(monkeypatch: pytest.MonkeyPatch, convolves: bool = True) -> Recorder:
    """For a test, public functions run on meta tensors what they run on CUDA tensors. convolves: whether the depthwise
    convolutions of blocks are ours."""
    recorder = Recorder()
    binding = _Binding(_native.cuda or emulation.kernels(), recorder)
    interpreter.redirect(monkeypatch, binding, convolves)
    monkeypatch.setattr(_native, "device_kind", lambda t: "cuda")
    for missing in ("gpu_missing", "triton_missing"):
        monkeypatch.setattr(_native, missing, lambda index: None)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    monkeypatch.setattr(F, "conv2d", _conv2d)
    compilers: dict[Any, tuple[Any, ...]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if self not in compilers:
            compiler = self if isinstance(self, JITFunction) else JITFunction(self.fn, **self.kwargs)
            compilers[self] = compiler.create_binder()
        _, keys, _, _, bind = compilers[self]
        _, specialization, rest = bind(*args, **options)
        assert all(0 < n < limit for n, limit in zip(grid, (2**31, 65536, 65536), strict=False)), (self.fn, grid)
        recorder.launches.append(self.fn.__name__)
        recorder.compiled.add((self.fn.__name__, compute_cache_key(keys, specialization, rest)))

    for function in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(function, "run", record)
    return recorder
