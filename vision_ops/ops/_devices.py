"""What an op runs on each device: its kernels, what surrounds them, and why they cannot run."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _internals, _native

# forward(arguments) -> y, or (y, *what the op saves); backward(grads, grad_y, arguments, *saved), which writes into
# grads: one for each tensor argument, a list for a list, None where none is needed.
Kernels = tuple[Callable[[Any], Any], Callable[..., None]]


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For kernels that call PyTorch's GEMMs: FusedOp has cast what is to be cast."""

    disabled = _internals.DisableAutocast

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        with disabled() if disabled else torch.autocast(_arguments_in(args)[0].device.type, enabled=False):
            return kernel(*args)

    return run


def _arguments_in(args: Sequence[Any]) -> Any:
    """The NamedTuple among what a kernel takes."""
    for a in args:
        if isinstance(a, tuple):
            return a
    raise TypeError("a kernel takes the arguments of its op")


# Multiply-adds of a pass from which it runs on several threads: kSerialWork in csrc/cpu/runtime.cpp. So much pays for a
# crew (measured on two threads).
CREW_WORK = 1 << 19


def with_crew(kernel: Callable[..., Any], pays: Callable[[Tensor], bool]) -> Callable[..., Any]:
    """For CPU kernels of several passes: the threads are woken once. PyTorch's ops run on one thread meanwhile.

    pays: whether that is faster, given the first of the op's arguments, which are a NamedTuple.
    """

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        return _native.cpu_kernels().with_crew(kernel, *args) if pays(_arguments_in(args)[0]) else kernel(*args)

    return run


def on_devices(
    forward: Callable[..., Any],
    backward: Callable[..., None],
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    crew: Callable[[Tensor], bool] | None = None,
) -> dict[str, Kernels]:
    """The kernels of an op whose forward and backward take what gives the passes of a device. crew: see `with_crew`;
    it is for CPUs."""
    on_cpu: Kernels = functools.partial(forward, cpu), functools.partial(backward, cpu)
    if crew is not None:
        on_cpu = with_crew(on_cpu[0], crew), with_crew(on_cpu[1], crew)
    return {"CPU": on_cpu, "CUDA": (functools.partial(forward, cuda), functools.partial(backward, cuda))}


def device_reasons(x: Tensor, kernels: Mapping[str, Kernels], *, triton: bool = False) -> list[str]:
    """Why the kernels cannot run on the device of x. triton: its kernels serve CUDA."""
    kind = _native.device_kind(x)
    if kind == "cpu":
        return [_native.cpu_missing] if _native.cpu_missing else []
    if kind == "cuda":
        missing = _native.triton_missing(x.device.index) if triton else _native.gpu_missing(x.device.index)
        return [missing] if missing else []
    return [] if kind.upper() in kernels else [f"there is no kernel for device {kind!r}"]
