"""What PyTorch's own operators launch on CUDA, by their names; counted where they are called on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.ledger.constants import HOST_US
from benchmarks.ledger.launches import Launch

NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "resize_",
    "set_",
    "lift_fresh",
    "is_same_size",
}
# Those that are several kernels. Estimates: they change from one version of PyTorch to another.
SEVERAL = {
    "native_layer_norm_backward": 2,
    "native_batch_norm": 2,
    "_native_batch_norm_legit_functional": 2,
    "cudnn_batch_norm": 1,
    "native_batch_norm_backward": 2,
    "native_group_norm": 2,
    "native_group_norm_backward": 3,
    "_fft_r2c": 2,
    "_fft_c2r": 2,
    "_index_put_impl_": 3,
    "index_put": 3,
}
OVERWRITES = {"copy_", "zero_", "fill_"}


def launches_of(func: Any, args: Any, kwargs: Any, result: Any, kind: str) -> Iterator[Launch]:
    """Of a call of an operator of the dispatcher. kind: "PyTorch" or "cast"."""
    name = func._schema.name.removeprefix("aten::")
    if name in NO_LAUNCH or func.is_view or func.namespace != "aten":
        return
    read, written = _moved(func, name, args, kwargs, result)
    depthwise = None
    products = number_bytes = 0
    count = SEVERAL.get(name, 1)
    if name == "convolution":
        x, weight, bias = args[:3]
        groups = args[8]
        products = result.numel() * weight[0].numel()
        number_bytes = 0 if groups > 1 else x.element_size()
        depthwise = "cuDNN" if groups > 1 else None
        if bias is not None:  # in a kernel of its own, behind cuDNN's
            yield Launch("convolution: bias", kind, result.nbytes, result.nbytes, host_us=HOST_US[kind])
    elif name in ("addmm", "baddbmm") and args[0].ndim > 1:  # a bias is added on the way; a matrix is copied before
        yield Launch(f"{name}: copy", kind, numbers_bytes(args[0]), _first(result).nbytes, host_us=0.0)
        read += _first(result).nbytes - numbers_bytes(args[0])
    if name == "convolution_backward":
        yield from _convolution_backward(args, kind)
        return
    if name != "convolution" and func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **_without_options(kwargs), out_val=_first(result))
        products, number_bytes = flops // 2, args[0].element_size()
    if read + written == 0:
        return
    for i in range(count):
        share = read // count, written if i == count - 1 else 0
        yield Launch(name, kind, *share, products, number_bytes, depthwise, host_us=HOST_US["PyTorch"] / count)


def _convolution_backward(args: Any, kind: str) -> Iterator[Launch]:
    grad, x, weight = args[:3]
    groups, mask = args[9], args[10]
    products = grad.numel() * weight[0].numel()
    number_bytes, host = 0 if groups > 1 else x.element_size(), HOST_US["PyTorch"] / sum(mask)
    kinds = ("cuDNN", "cuDNN, weights") if groups > 1 else (None, None)
    if mask[0]:
        read = grad.nbytes + weight.nbytes
        yield Launch("convolution_backward: x", kind, read, x.nbytes, products, number_bytes, kinds[0], host_us=host)
    if mask[1]:
        read = grad.nbytes + x.nbytes
        yield Launch(
            "convolution_backward: weight", kind, read, weight.nbytes, products, number_bytes, kinds[1], host_us=host
        )
    if mask[2]:
        yield Launch("convolution_backward: bias", kind, grad.nbytes, 0, host_us=host)


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """Bytes read and written: of every tensor once, as large as its distinct numbers."""
    reads, writes = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        alias = argument.alias_info
        is_written = alias is not None and alias.is_write
        for t in tensors_in(given.get(argument.name)):
            if is_written:
                writes[t] = None
            if not is_written or not (argument.kwarg_only or name in OVERWRITES):
                reads[t] = None
    for t in tensors_in(result):
        writes[t] = None
    return sum(map(numbers_bytes, reads)), sum(map(numbers_bytes, writes))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def numbers_bytes(t: Tensor) -> int:
    """What an expanded tensor repeats counts once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride != 0 or size == 0 else 1
    return count * t.element_size()


def _without_options(kwargs: Any) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("out", "out_dtype")}


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def laid_out(func: Any, args: Any, result: Any) -> Any:
    """With the memory formats of cuDNN's convolutions: those of meta tensors are contiguous."""
    name = func._schema.name
    if name == "aten::convolution":
        return _channels_last(result) if any(map(_is_channels_last, args[:2])) else result
    if name == "aten::convolution_backward" and any(map(_is_channels_last, args[:3])):
        return (*(t if t is None else _channels_last(t) for t in result[:2]), result[2])
    return result


def _is_channels_last(t: Tensor) -> bool:
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _channels_last(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.channels_last) if t.ndim == 4 else t
