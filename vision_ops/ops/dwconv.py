"""Depthwise convolution with bias and activation: the engine that the convolutions of all five backbones share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, reference
from ..reference.dwconv import ACTIVATIONS, four_paddings
from ._allocation import allocate_channels_last, channels_dense, empty, memory_format, to_channels_dense, workspace
from ._checks import autocast_enabled, check_integer, check_kernel, check_parameter, check_tensor
from ._devices import device_reasons
from ._registration import FusedOp

_MOST = 2**24  # of stride, dilation and padding: products with sizes stay within 64 bits
ACTIVATION_CODES = {None: 0, "gelu": 1, "silu": 2}


class _Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: list[int]  # top, bottom, left, right
    dilation: int
    activation: str | None


def _reference(a: _Arguments) -> Tensor:
    x, weight, bias, stride, padding, dilation, activation = a
    return reference.dwconv(x, weight, bias, stride=stride, padding=padding, dilation=dilation, activation=activation)


def _output(a: _Arguments) -> Tensor:
    n, c, h, w = a.x.shape
    top, bottom, left, right = a.padding
    reach = a.dilation * (a.weight.shape[-1] - 1) + 1
    return empty((n, c, (h + top + bottom - reach) // a.stride + 1, (w + left + right - reach) // a.stride + 1), a.x)


def _torch_is_faster(a: _Arguments) -> bool:
    """Large channels_last 3x3 convolutions wait for memory, and there oneDNN streams better (measured, AVX-512)."""
    x = a.x
    if a.weight.shape[-1] != 3 or a.stride != 1 or a.dilation != 1:
        return False
    mixed = a.weight.dtype != x.dtype or (a.bias is not None and a.bias.dtype != x.dtype)
    if mixed and not autocast_enabled(x):
        return False
    if _native.device_kind(x) != "cpu" or x.dtype == torch.float64 or memory_format(x) != torch.channels_last:
        return False
    wide = x.shape[2] * x.shape[3] >= 56 * 56
    if x.dtype == torch.float32:
        return wide and (a.activation == "gelu" or x.shape[1] % 16 != 0)
    return wide or x.numel() >= (2_400_000 if a.activation is None else 1_500_000)


def _native_conv(a: _Arguments) -> tuple[int, ...]:
    return a.weight.shape[-1], a.stride, a.dilation, a.padding[0], a.padding[2]


def _forward_cpu(a: _Arguments) -> Tensor:
    y, weight, bias = _output(a), a.weight.contiguous(), None if a.bias is None else a.bias.contiguous()
    views = _native.view(a.x), _native.channels_view(weight), _native.channels_view(bias), _native.view(y)
    _native.cpu_kernels().dwconv(*views, _native_conv(a), ACTIVATION_CODES[a.activation])
    return y


def _backward_cpu(grads: list[Tensor | None], grad: Tensor, a: _Arguments) -> None:
    dx, dweight, dbias = grads
    kernels, conv = _native.cpu_kernels(), _native_conv(a)
    weight, bias = a.weight.contiguous(), None if a.bias is None else a.bias.contiguous()
    x_view, weight_view = _native.view(a.x), _native.channels_view(weight)
    if a.activation is not None:
        # The convolution is computed again, which is cheaper than to keep its output from the forward pass.
        du = empty(grad.shape, grad)
        views = _native.view(grad), x_view, weight_view, _native.channels_view(bias), _native.view(du)
        kernels.dwconv_backward_activation(*views, conv, ACTIVATION_CODES[a.activation])
        grad = du
    grad_view = _native.view(grad)
    if dx is not None:
        kernels.dwconv_backward_input(grad_view, weight_view, _native.view(dx), conv)
    if dweight is not None or dbias is not None:
        sums = _native.channels_view(dweight), _native.channels_view(dbias)
        kernels.dwconv_backward_weight(grad_view, x_view, *sums, conv)


def _marches(a: _Arguments) -> bool:
    """Whether CUDA's march kernels take the convolution; else its plain kernel does."""
    return _native.cuda_kernels().has_march_kernel(_native.DTYPES[a.x.dtype], _native_conv(a))


def _forward_cuda(a: _Arguments) -> Tensor:
    y, weight, bias = _output(a), a.weight.contiguous(), None if a.bias is None else a.bias.contiguous()
    x, out = a.x, y
    if _marches(a):
        x, out = to_channels_dense(x), y if channels_dense(y) else allocate_channels_last(y.shape, y)
    views = _native.view(x), _native.channels_view(weight), _native.channels_view(bias), _native.view(out)
    options = _native_conv(a), ACTIVATION_CODES[a.activation], *_native.target(x)
    _native.cuda_kernels().dwconv(*views, *options)
    return y if out is y else y.copy_(out)


def _backward_cuda(grads: list[Tensor | None], grad: Tensor, a: _Arguments) -> None:
    dx, dweight, dbias = grads
    kernels, conv, target, x = _native.cuda_kernels(), _native_conv(a), _native.target(a.x), a.x
    weight, bias = a.weight.contiguous(), None if a.bias is None else a.bias.contiguous()
    weight_view, marches = _native.channels_view(weight), _marches(a)
    if marches:
        grad = to_channels_dense(grad)
    if marches and (a.activation is not None or dweight is not None):
        x = to_channels_dense(x)
    x_view = _native.view(x)
    if a.activation is not None:
        du = allocate_channels_last(grad.shape, grad)
        views = _native.view(grad), x_view, weight_view, _native.channels_view(bias), _native.view(du)
        kernels.dwconv_backward_activation(*views, conv, ACTIVATION_CODES[a.activation], *target)
        grad = du
    grad_view = _native.view(grad)
    if dx is not None:
        out = dx if channels_dense(dx) or not marches else allocate_channels_last(dx.shape, dx)
        kernels.dwconv_backward_input(grad_view, weight_view, _native.view(out), conv, *target)
        if out is not dx:
            dx.copy_(out)
    if dweight is not None or dbias is not None:
        room = workspace(kernels.dwconv_backward_weight_workspace(grad_view, conv), grad)
        sums = _native.channels_view(dweight), _native.channels_view(dbias)
        kernels.dwconv_backward_weight(grad_view, x_view, *sums, conv, 1.0, room.data_ptr(), *target)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str | None = None,
    *,
    conv: tuple[int, ...] | None = None,
) -> None:
    """y = the convolution, for the ops that contain one; it keeps the size unless conv says what the kernels are to do.
    Parameters are contiguous."""
    views = _native.view(x), _native.channels_view(weight), _native.channels_view(bias), _native.view(y)
    _native.cpu_kernels().dwconv(*views, conv or _same_size(weight), ACTIVATION_CODES[activation])


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    conv: tuple[int, ...] | None = None,
) -> None:
    """The gradients of `convolve`, into tensors of any strides; dweight may be weight."""
    kernels, conv, grad_view = _native.cpu_kernels(), conv or _same_size(weight), _native.view(grad)
    if dx is not None:
        kernels.dwconv_backward_input(grad_view, _native.channels_view(weight), _native.view(dx), conv)
    if dweight is not None or dbias is not None:
        sums = _native.channels_view(dweight), _native.channels_view(dbias)
        kernels.dwconv_backward_weight(grad_view, _native.view(x), *sums, conv)


def _same_size(weight: Tensor) -> tuple[int, ...]:
    size = weight.shape[-1]
    return size, 1, 1, size // 2, size // 2


def convolve_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str | None = None,
    *,
    conv: tuple[int, ...] | None = None,
) -> None:
    """The same on a GPU, of channels_dense tensors."""
    views = _native.view(x), _native.channels_view(weight), _native.channels_view(bias), _native.view(y)
    options = conv or _same_size(weight), ACTIVATION_CODES[activation], *_native.target(x)
    _native.cuda_kernels().dwconv(*views, *options)


def convolve_backward_cuda(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    conv: tuple[int, ...] | None = None,
    scale: float = 1.0,
) -> None:
    """scale: of dweight and dbias, where weight has it already."""
    kernels, conv, target = _native.cuda_kernels(), conv or _same_size(weight), _native.target(x)
    grad_view = _native.view(grad)
    if dx is not None:
        kernels.dwconv_backward_input(grad_view, _native.channels_view(weight), _native.view(dx), conv, *target)
    if dweight is not None or dbias is not None:
        room = workspace(kernels.dwconv_backward_weight_workspace(grad_view, conv), grad)
        sums = _native.channels_view(dweight), _native.channels_view(dbias)
        kernels.dwconv_backward_weight(grad_view, _native.view(x), *sums, conv, scale, room.data_ptr(), *target)


def convolves_cuda(x: Tensor) -> bool:
    """Whether the compiled CUDA kernels run on the device of x; else PyTorch convolves there."""
    return _native.device_kind(x) == "cuda" and not device_reasons(x, _KERNELS)


def convolution_name(x: Tensor) -> str:
    """What convolves x in the ops whose own kernels are Triton's on a GPU."""
    device = _native.device_kind(x)
    return "PyTorch" if device == "cuda" and not convolves_cuda(x) else _native.kernel_name(device)


def convolve_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> None:
    bias, padding = None if bias is None else bias.to(x.dtype), _torch_padding(weight, padding, dilation)
    u = F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, len(weight))
    y.copy_(ACTIVATIONS[activation](u))


def convolve_backward_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> None:
    geometry = [stride] * 2, [_torch_padding(weight, padding, dilation)] * 2, [dilation] * 2, False, [0, 0], len(weight)
    needs = [dx is not None, dweight is not None, dbias is not None]
    found = torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), [len(weight)], *geometry, needs)
    for given, t in zip((dx, dweight, dbias), found, strict=True):
        if given is not None:
            given.copy_(t)


def _torch_padding(weight: Tensor, padding: int | None, dilation: int) -> int:
    return dilation * (weight.shape[-1] // 2) if padding is None else padding


_KERNELS = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS)
    # A compiled graph must not depend on the size. In training without activation our backward pass makes up for it.
    if a.weight is None or torch.compiler.is_compiling() or cannot:
        return cannot, []
    if _native.device_kind(a.x) == "cuda":
        return [], [] if _marches(a) else ["only an untuned kernel takes this dtype, kernel size, stride and dilation"]
    trains = torch.is_grad_enabled() and (a.x.requires_grad or a.weight.requires_grad)
    if (a.activation is None and trains) or not _torch_is_faster(a):
        return [], []
    return [], ["oneDNN is faster for channels_last 3x3 of this size"]


def _parts(a: _Arguments) -> dict[str, str]:
    kernel = _native.kernel_name(_native.device_kind(a.x))
    if _native.device_kind(a.x) != "cpu" and a.weight is not None:
        if not _marches(a):
            kernel += " (untuned)"
        elif not channels_dense(a.x):
            kernel += ", on channels_last copies"
    return {"dwconv": kernel}


_op = FusedOp(
    "dwconv",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    wide=("weight", "bias"),
    parts=_parts,
)


def fused_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] | None = None,
    dilation: int = 1,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(conv2d(x, weight, bias, stride, padding, dilation, groups=C)), one pass.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its memory format and dtype.
        weight: (C, 1, K, K), K odd, in the dtype of x, or float32 beside a half x. Fast for K = 3, 5, 7, 9.
        bias: (C,), as weight.
        stride: 1 or more; fast for 1 and 2, on GPUs at 2 for K = 3.
        padding: None for dilation * (K - 1) / 2 on every side at any stride; an int; (height, width); or (top, bottom,
            left, right): TensorFlow's "SAME" at stride 2 is (0, 1, 0, 1) on even sizes.
        dilation: 1 or more.
        activation: None, "gelu" (the erf form) or "silu".
        backend: as in `vision_ops.use_backend`.

    Sums are float32 (float64 for float64). Gradients are bitwise repeatable and come in each argument's own dtype;
    backward keeps the arguments only. Without a kernel for the device, `reference.dwconv` runs; so it does where oneDNN
    is faster, for some large channels_last 3x3 convolutions, and on GPUs for float64, other kernel sizes and strides,
    and at stride 2 for K above 3 or even dilation (`explain` tells). On GPUs a contiguous x is converted to
    channels_last and y back.

    Raises:
        TypeError, ValueError: an argument is not as above, or the output would be empty for want of rows or columns.

    The depthwise convolutions of MogaNet (arXiv 2211.03295), HorNet (2207.14284), EdgeNeXt (2206.10589) and MOAT
    (2210.01820).
    """
    check_tensor("x", x, "N, C, H, W")
    channels, kernel_size = x.shape[1], check_kernel("weight", weight)
    check_parameter("weight", weight, (channels, 1, kernel_size, kernel_size), "C, 1, K, K", x)
    if bias is not None:
        check_parameter("bias", bias, (channels,), "C", x)
    check_integer("stride", stride, 1, _MOST)
    check_integer("dilation", dilation, 1, _MOST)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    four = _checked_padding(padding, kernel_size, dilation)
    reach = dilation * (kernel_size - 1) + 1
    if x.shape[2] + four[0] + four[1] < reach or x.shape[3] + four[2] + four[3] < reach:
        raise ValueError(
            f"x of shape {tuple(x.shape)} with padding {four} is smaller than the kernel, which spans {reach}"
        )
    return _op(x, weight, bias, stride, four, dilation, activation, backend=backend)


def _checked_padding(padding: int | Sequence[int] | None, kernel_size: int, dilation: int) -> tuple[int, ...]:
    if isinstance(padding, Sequence) and not isinstance(padding, str) and len(padding) in (2, 4):
        for i, p in enumerate(padding):
            check_integer(f"padding[{i}]", p, 0, _MOST)
    elif padding is not None:
        if not isinstance(padding, int):
            raise ValueError(
                f"padding must be None, an int, (height, width) or (top, bottom, left, right), got {padding!r}"
            )
        check_integer("padding", padding, 0, _MOST)
    return four_paddings(padding, kernel_size, dilation)
