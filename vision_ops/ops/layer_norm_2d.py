"""LayerNorm over the channels of every pixel, as stems, downsampling and blocks of HorNet and EdgeNeXt have it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import empty, memory_format
from ._autograd import any_requires_grad
from ._checks import check_eps, check_parameter, check_tensor
from ._devices import device_reasons, on_devices
from ._registration import FusedOp
from .scaled_residual import add, cpu_tail

MOST_CHANNELS = 2048  # that the registers of a Triton program hold


class _Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def _reference(a: _Arguments) -> Tensor:
    return reference.layer_norm_2d(a.x, a.weight, a.bias, eps=a.eps)


def _output(a: _Arguments) -> Tensor:
    return empty(a.x.shape, a.x)


class Norm(NamedTuple):
    """The kernels of a device, for all ops that begin so. Maps have any strides; beside a float32 x, y and grad may be
    of a half type, in which products take them."""

    run: Callable[[Tensor, Tensor, Tensor, Tensor, float], None]
    run_backward: Callable[..., None]  # plus, which is added to dx, and dx are pixel_dense in one memory format


@functools.cache
def cpu_norm() -> Norm:
    return Norm(_norm, _norm_backward)


def cuda_norm() -> Norm:
    from ..kernels import layer_norm_2d as triton

    return Norm(triton.forward, triton.backward)


def _beside(x: Tensor, t: Tensor) -> bool:
    """Whether the kernels read or write t beside x."""
    return t.dtype == x.dtype or (x.dtype == torch.float32 and t.dtype.itemsize == 2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float) -> None:
    like_x = y if _beside(x, y) else empty(x.shape, x)
    _native.run("layer_norm_2d", x, weight, bias, like_x, eps)
    if like_x is not y:
        y.copy_(like_x)


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    eps: float,
    plus: Tensor | None = None,
) -> None:
    grad = grad if _beside(x, grad) else grad.to(x.dtype)
    _native.run("layer_norm_2d_backward", grad, x, weight, dx, dweight, dbias, eps)
    if plus is not None and dx is not None:
        add(cpu_tail(), plus, dx)


def _forward(device: Callable[[], Norm], a: _Arguments) -> Tensor:
    y = _output(a)
    device().run(a.x, a.weight, a.bias, y, a.eps)
    return y


def _backward(device: Callable[[], Norm], grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    dx, dweight, dbias = grads
    device().run_backward(grad, a.x, a.weight, dx, dweight, dbias, a.eps)


_KERNELS = on_devices(_forward, _backward, cpu=cpu_norm, cuda=cuda_norm)


def _torch_is_faster(a: _Arguments) -> bool:
    """Of channels_last tensors PyTorch's own layer norm takes less time where they are small, and without AVX-512 in
    training, where it keeps the statistics (measured, AVX-512 and AVX2)."""
    x = a.x
    if _native.device_kind(x) != "cpu" or x.dtype == torch.float64 or memory_format(x) != torch.channels_last:
        return False
    count, channels, single = x.numel(), x.shape[1], x.dtype == torch.float32
    wide = _native.cpu_kernels().isa == "avx512"
    if not torch.is_grad_enabled() or not any_requires_grad(a[:3]):
        return count < (10_000 if wide else 300_000)
    if not wide:
        return single
    return (count < 180_000 and (single or channels >= 128)) or (count < 320_000 and single and channels >= 128)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS, triton=True)
    if _native.device_kind(a.x) == "cuda" and a.x.shape[1] > MOST_CHANNELS:
        cannot.append(f"the Triton kernel takes at most {MOST_CHANNELS} channels, x has {a.x.shape[1]}")
    # A compiled graph must not depend on the size.
    if cannot or torch.compiler.is_compiling() or not _torch_is_faster(a):
        return cannot, []
    return cannot, ["PyTorch's layer norm is faster for this channels_last tensor"]


_op = FusedOp(
    "layer_norm_2d",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    autocast=False,
)


def fused_layer_norm_2d(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, mean and biased variance over the C channels of every pixel.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its memory format and dtype,
            under autocast too.
        weight: (C,), in the dtype of x, or float32 beside a half x.
        bias: (C,), as weight.
        eps: 0 or more; 1e-6 in HorNet and EdgeNeXt.
        backend: as in `vision_ops.use_backend`.

    Statistics are float32 (float64 for float64), the variance is that of x - mean. Gradients are bitwise repeatable and
    come in each argument's own dtype; backward keeps the arguments only and computes the statistics again. Without a
    kernel for the device, `reference.layer_norm_2d` runs; so it does on CPUs where PyTorch's own is faster: for small
    channels_last tensors, and for float32 ones without AVX-512 in training (`explain` tells).

    Raises:
        TypeError, ValueError: an argument is not as above.

    Layer normalization (arXiv 1607.06450), the channels_first LayerNorm in hornet.py of raoyongming/HorNet.
    """
    check_tensor("x", x, "N, C, H, W")
    check_parameter("weight", weight, (x.shape[1],), "C", x)
    check_parameter("bias", bias, (x.shape[1],), "C", x)
    check_eps(eps)
    return _op(x, weight, bias, float(eps), backend=backend)
