"""Depthwise convolution and LayerNorm over the channels, as the blocks of ConvNeXt and its heirs begin."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import allocate, allocate_channels_last, channels_dense, to_channels_dense
from ._checks import check_eps, check_kernel, check_parameter, check_tensor
from ._devices import device_reasons
from ._registration import FusedOp
from .dwconv import convolve_backward_cuda, convolve_cuda
from .layer_norm_2d import MOST_CHANNELS


class _Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    ln_weight: Tensor
    ln_bias: Tensor
    eps: float
    keep: bool  # what only the backward pass reads


def _reference(a: _Arguments) -> Tensor:
    return reference.dwconv_layer_norm(a.x, a.weight, a.bias, a.ln_weight, a.ln_bias, eps=a.eps)


def _output(a: _Arguments) -> tuple[Tensor, Tensor]:
    return _allocate(a, _native.device_kind(a.x) == "cuda")


def _allocate(a: _Arguments, gpu: bool) -> tuple[Tensor, Tensor]:
    """y and what the backward pass reads: on a GPU the output u of the convolution as (N, H, W, C), on a CPU, which
    computes it again, all means, then all 1 / deviations of its pixels."""
    n, c, h, w = a.x.shape
    y = allocate((n, h, w, c), a.x)
    if not a.keep:
        return y, a.x.new_empty(0)
    if gpu:
        return y, allocate((n, h, w, c), a.x)
    return y, allocate((2, n, h, w), a.x, dtype=torch.promote_types(a.x.dtype, torch.float32))


def _channels_first(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def _native_conv(a: _Arguments) -> tuple[int, ...]:
    size = a.weight.shape[-1]
    return size, 1, 1, size // 2, size // 2


def _forward_cpu(a: _Arguments) -> tuple[Tensor, Tensor]:
    y, statistics = _allocate(a, gpu=False)
    kept = _native.view(statistics) if a.keep else None
    parameters = [None if t is None else t.contiguous() for t in a[1:5]]
    views = _native.view(a.x), *map(_native.channels_view, parameters), _native.view(_channels_first(y))
    _native.cpu_kernels().dwconv_layer_norm(*views, kept, _native_conv(a), a.eps)
    return y, statistics


def _backward_cpu(grads: list[Tensor | None], grad: Tensor, a: _Arguments, statistics: Tensor) -> None:
    if not a.keep:
        _, statistics = _forward_cpu(a._replace(keep=True))
    dx, *dparameters = grads
    grad = grad.contiguous()
    parameters = [None if t is None else t.contiguous() for t in a[1:4]]
    inputs = _native.view(_channels_first(grad)), _native.view(a.x), *map(_native.channels_view, parameters)
    outputs = _native.view(dx), *map(_native.channels_view, dparameters)
    _native.cpu_kernels().dwconv_layer_norm_backward(*inputs, _native.view(statistics), *outputs, _native_conv(a))


def _forward_cuda(a: _Arguments) -> tuple[Tensor, Tensor]:
    from ..kernels import layer_norm_2d

    y, u = _allocate(a, gpu=True)
    convolved = _channels_first(u) if a.keep else allocate_channels_last(a.x.shape, a.x)
    weight, bias = a.weight.contiguous(), None if a.bias is None else a.bias.contiguous()
    convolve_cuda(to_channels_dense(a.x), weight, bias, convolved)
    layer_norm_2d.forward(convolved, a.ln_weight, a.ln_bias, _channels_first(y), a.eps)
    return y, u


def _backward_cuda(grads: list[Tensor | None], grad: Tensor, a: _Arguments, u: Tensor) -> None:
    from ..kernels import layer_norm_2d

    if not a.keep:
        _, u = _forward_cuda(a._replace(keep=True))
    dx, dweight, dbias, dln_weight, dln_bias = grads
    of_conv = any(t is not None for t in (dx, dweight, dbias))
    du = allocate_channels_last(a.x.shape, a.x) if of_conv else None
    layer_norm_2d.backward(_channels_first(grad), _channels_first(u), a.ln_weight, du, dln_weight, dln_bias, a.eps)
    if du is None:
        return
    out = dx if dx is not None and channels_dense(dx) else allocate_channels_last(a.x.shape, a.x)
    convolve_backward_cuda(du, to_channels_dense(a.x), a.weight.contiguous(), out, dweight, dbias)
    if dx is not None and out is not dx:
        dx.copy_(out)


_KERNELS = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS)
    if _native.device_kind(a.x) == "cuda":
        cannot += device_reasons(a.x, _KERNELS, triton=True)
        if a.x.shape[1] > MOST_CHANNELS:
            cannot.append(f"the Triton kernel takes at most {MOST_CHANNELS} channels, x has {a.x.shape[1]}")
    return cannot, []


def _parts(a: _Arguments) -> dict[str, str]:
    kernel = _native.kernel_name(_native.device_kind(a.x))
    if _native.device_kind(a.x) == "cuda":
        return {"depthwise convolution": kernel, "layer norm": "Triton kernel"}
    return {"dwconv_layer_norm": kernel}


_op = FusedOp(
    "dwconv_layer_norm",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    wide=("weight", "bias"),
    saved=(Tensor.contiguous,),
    parts=_parts,
    uncast=("ln_weight", "ln_bias"),
)


def fused_dwconv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """u = conv2d(x, weight, bias, groups=C), padded to keep the size; (u - mean) / sqrt(variance + eps) * ln_weight +
    ln_bias, mean and biased variance over the C channels of every pixel of u.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64.
        weight: (C, 1, K, K), K odd: 7 in ConvNeXt, 3, 5, 7 and 9 in EdgeNeXt.
        bias: (C,) or None.
        ln_weight, ln_bias: (C,).
        eps: 0 or more.
        backend: as in `vision_ops.use_backend`.

    Returns (N, H, W, C), contiguous, in the dtype of x. Parameters have the dtype of x, or float32 beside a half x;
    under autocast those of the norm stay as they are. Sums and statistics are float32 (float64 for float64), and u is
    not rounded before the norm. Where a gradient is needed, two numbers a pixel are kept for the backward pass besides
    the arguments, and u is computed again; on a GPU, where the convolution and the norm are two kernels, u is rounded
    and alone is kept. Gradients are bitwise repeatable and come in each argument's own dtype. Without a kernel for the
    device, `reference.dwconv_layer_norm` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    ConvNeXt (arXiv 2201.03545); EdgeNeXt (arXiv 2206.10589), ConvEncoder in models/conv_encoder.py of
    mmaaz60/EdgeNeXt.
    """
    check_tensor("x", x, "N, C, H, W")
    channels, kernel_size = x.shape[1], check_kernel("weight", weight)
    check_parameter("weight", weight, (channels, 1, kernel_size, kernel_size), "C, 1, K, K", x)
    if bias is not None:
        check_parameter("bias", bias, (channels,), "C", x)
    check_parameter("ln_weight", ln_weight, (channels,), "C", x)
    check_parameter("ln_bias", ln_bias, (channels,), "C", x)
    check_eps(eps)
    tensors = x, weight, bias, ln_weight, ln_bias
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _op(*tensors, float(eps), keep, backend=backend)
