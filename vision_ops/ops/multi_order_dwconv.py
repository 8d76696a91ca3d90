"""MogaNet's multi-order depthwise convolution: one convolution, then two dilated ones on slices of its output."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.multi_order_dwconv import split_channels
from ._allocation import allocate_channels_last, channels_dense, empty, to_channels_dense, workspace
from ._checks import check_integer, check_kernel, check_parameter, check_sequence, check_tensor
from ._devices import device_reasons
from ._registration import FusedOp
from .dwconv import convolve_backward_torch, convolve_torch


class _Arguments(NamedTuple):
    x: Tensor
    w0: Tensor
    w1: Tensor
    w2: Tensor
    b0: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    dilations: list[int]


def _reference(a: _Arguments) -> Tensor:
    split = (a.x.shape[1] - a.w1.shape[0] - a.w2.shape[0], a.w1.shape[0], a.w2.shape[0])
    weights, biases = (a.w0, a.w1, a.w2), (a.b0, a.b1, a.b2)
    return reference.multi_order_dwconv(a.x, weights, biases, dilations=a.dilations, split=split)


def _output(a: _Arguments) -> Tensor:
    return empty(a.x.shape, a.x)


def _convs(a: _Arguments) -> tuple[tuple[int, ...], ...]:
    sizes = [(w.shape[-1], d) for w, d in zip((a.w0, a.w1, a.w2), a.dilations, strict=True)]
    return tuple((k, 1, d, d * (k - 1) // 2, d * (k - 1) // 2) for k, d in sizes)


class _Parameters:
    """Weights, biases and convolutions as the binding takes them; keeps the tensors alive."""

    def __init__(self, a: _Arguments) -> None:
        self._weights = [w.contiguous() for w in (a.w0, a.w1, a.w2)]
        self._biases = [None if b is None else b.contiguous() for b in (a.b0, a.b1, a.b2)]
        self.weights = tuple(map(_native.channels_view, self._weights))
        self.biases = tuple(map(_native.channels_view, self._biases))
        self.convs = _convs(a)


def _forward_cpu(a: _Arguments) -> Tensor:
    y, p = _output(a), _Parameters(a)
    _native.cpu_kernels().multi_order_dwconv(_native.view(a.x), p.weights, p.biases, _native.view(y), p.convs)
    return y


def _backward_cpu(grads: list[Tensor | None], grad: Tensor, a: _Arguments) -> None:
    p = _Parameters(a)
    dx, *dparameters = grads
    parameter_views = tuple(map(_native.channels_view, dparameters))
    inputs = _native.view(grad), _native.view(a.x), p.weights, p.biases
    outputs = _native.view(dx), parameter_views[:3], parameter_views[3:]
    _native.cpu_kernels().multi_order_dwconv_backward(*inputs, *outputs, p.convs)


def multi_order(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dilations: list[int], y: Tensor
) -> None:
    """Into y, for the ops that contain the convolution."""
    p = _Parameters(_Arguments._make([x, *weights, *biases, dilations]))
    _native.cpu_kernels().multi_order_dwconv(_native.view(x), p.weights, p.biases, _native.view(y), p.convs)


def multi_order_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: list[int],
    dx: Tensor,
    dweights: Sequence[Tensor | None],
    dbiases: Sequence[Tensor | None],
) -> None:
    """The gradients of `multi_order`."""
    _backward_cpu([dx, *dweights, *dbiases], grad, _Arguments._make([x, *weights, *biases, dilations]))


def _marches(a: _Arguments) -> bool:
    """Whether CUDA's march kernels take a convolution; else its plain kernel takes all, and layouts do not matter."""
    dtype, kernels = _native.DTYPES[a.x.dtype], _native.cuda_kernels()
    return any(kernels.has_march_kernel(dtype, conv) for conv in _convs(a))


def _rest(a: _Arguments) -> Tensor:
    """Room for the channels of x0 that have a second convolution, or for their gradient."""
    n, _, h, w = a.x.shape
    return allocate_channels_last((n, a.w1.shape[0] + a.w2.shape[0], h, w), a.x)


def _forward_cuda(a: _Arguments) -> Tensor:
    y = _output(a)
    multi_order_cuda(a.x, (a.w0, a.w1, a.w2), (a.b0, a.b1, a.b2), a.dilations, y)
    return y


def multi_order_cuda(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dilations: list[int], y: Tensor
) -> None:
    """`multi_order` on a GPU."""
    a, out = _Arguments._make([x, *weights, *biases, dilations]), y
    p, x0 = _Parameters(a), _rest(a)
    if _marches(a):
        x, out = to_channels_dense(x), y if channels_dense(y) else allocate_channels_last(y.shape, y)
    views = _native.view(x), p.weights, p.biases, _native.view(out), p.convs, _native.view(x0)
    _native.cuda_kernels().multi_order_dwconv(*views, *_native.target(x))
    if out is not y:
        y.copy_(out)


def _backward_cuda(grads: list[Tensor | None], grad: Tensor, a: _Arguments) -> None:
    p, kernels, x0, dx0 = _Parameters(a), _native.cuda_kernels(), _rest(a), _rest(a)
    dx, *dparameters = grads
    x, out = a.x, dx
    if _marches(a):
        x, grad = to_channels_dense(x), to_channels_dense(grad)
        out = dx if dx is None or channels_dense(dx) else allocate_channels_last(dx.shape, dx)
    parameter_views, grad_view = tuple(map(_native.channels_view, dparameters)), _native.view(grad)
    size = kernels.multi_order_dwconv_backward_workspace(grad_view, p.weights, p.biases, p.convs)
    room = workspace(size, grad)
    inputs = grad_view, _native.view(x), p.weights, p.biases
    outputs = _native.view(out), parameter_views[:3], parameter_views[3:]
    rooms = _native.view(x0), _native.view(dx0), room.data_ptr()
    kernels.multi_order_dwconv_backward(*inputs, *outputs, p.convs, *rooms, *_native.target(x))
    if dx is not None and out is not dx:
        dx.copy_(out)


def multi_order_backward_cuda(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: list[int],
    dx: Tensor,
    dweights: Sequence[Tensor | None],
    dbiases: Sequence[Tensor | None],
) -> None:
    _backward_cuda([dx, *dweights, *dbiases], grad, _Arguments._make([x, *weights, *biases, dilations]))


def _branches(t: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    _, c1, c2 = (len(w) for w in weights)
    return t.split_with_sizes([t.shape[1] - c1 - c2, c1, c2], dim=1)


def multi_order_torch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dilations: list[int], y: Tensor
) -> None:
    """The same by PyTorch's convolutions, of channels_last tensors."""
    x0 = allocate_channels_last(x.shape, x)
    convolve_torch(x, weights[0], biases[0], x0, dilation=dilations[0])
    (first, *rest), (to_first, *to) = _branches(x0, weights), _branches(y, weights)
    to_first.copy_(first)
    for i, (part, to_part) in enumerate(zip(rest, to, strict=True), start=1):
        convolve_torch(part, weights[i], biases[i], to_part, dilation=dilations[i])


def multi_order_backward_torch(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: list[int],
    dx: Tensor,
    dweights: Sequence[Tensor | None],
    dbiases: Sequence[Tensor | None],
) -> None:
    x0, dx0 = allocate_channels_last(x.shape, x), allocate_channels_last(x.shape, x)
    convolve_torch(x, weights[0], biases[0], x0, dilation=dilations[0])
    dx0_parts, grad_parts, x0_parts = (_branches(t, weights) for t in (dx0, grad, x0))
    dx0_parts[0].copy_(grad_parts[0])
    for i in (1, 2):
        given = grad_parts[i], x0_parts[i], weights[i], dx0_parts[i], dweights[i], dbiases[i]
        convolve_backward_torch(*given, dilation=dilations[i])
    convolve_backward_torch(dx0, x, weights[0], dx, dweights[0], dbiases[0], dilation=dilations[0])


_KERNELS = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS)
    if cannot or a.w0 is None or torch.compiler.is_compiling() or _native.device_kind(a.x) != "cuda" or _marches(a):
        return cannot, []
    return [], ["only untuned kernels take this dtype and these kernel sizes"]


def _parts(a: _Arguments) -> dict[str, str]:
    kernel = _native.kernel_name(_native.device_kind(a.x))
    if _native.device_kind(a.x) != "cpu" and a.w0 is not None:
        if not _marches(a):
            kernel += "s (untuned)"
        else:
            kernel += "s" if channels_dense(a.x) else "s, on channels_last copies"
    return {"multi_order_dwconv": kernel}


_op = FusedOp(
    "multi_order_dwconv",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    wide=("w0", "w1", "w2", "b0", "b1", "b2"),
    parts=_parts,
)


def fused_multi_order_dwconv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dilations: Sequence[int] = (1, 2, 3),
    split: Sequence[int] = (1, 3, 4),
    backend: str | None = None,
) -> Tensor:
    """x0 = dw0(x); cat(x0[:c0], dw1(x0[c0 : c0 + c1]), dw2(x0[c0 + c1 :])), without the cat, on CPUs without x0.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format and
            dtype.
        weights: (C, 1, K0, K0), (c1, 1, K1, K1), (c2, 1, K2, K2), all K odd, in the dtype of x or float32 beside a half
            x; the published networks have K = 5, 5, 7. Every convolution keeps the size.
        biases: (C,), (c1,), (c2,); each or all may be None.
        dilations: of the three convolutions, 1 to 3.
        split: the ratio c0 : c1 : c2; its sum divides C.
        backend: as in `vision_ops.use_backend`.

    x0 is zero outside the image, as the padding of dw1 and dw2 wants, not dw0 of the padding. Sums are float32 (float64
    for float64); on CPUs x0 is not rounded in between, on GPUs to the dtype of x. Backward keeps the arguments only and
    computes x0 again; gradients are bitwise repeatable and come in each argument's own dtype. Without a kernel for the
    device, `reference.multi_order_dwconv` runs. The pointwise convolution that follows is in `nn.MultiOrderDWConv`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MogaNet (arXiv 2211.03295), MultiOrderDWConv in models/moganet.py of Westlake-AI/MogaNet.
    """
    check_tensor("x", x, "N, C, H, W")
    biases = (None, None, None) if biases is None else biases
    check_branches("weights", weights, "biases", biases, dilations, split, x)
    return _op(x, *weights, *biases, list(dilations), backend=backend)


def check_branches(
    name: str,
    weights: Sequence[Tensor],
    bias_name: str,
    biases: Sequence[Tensor | None],
    dilations: Sequence[int],
    split: Sequence[int],
    x: Tensor,
) -> None:
    check_sequence(name, weights, 3)
    check_sequence(bias_name, biases, 3)
    widths = check_multi_order(x.shape[1], dilations, split)
    for i, (weight, bias, width) in enumerate(zip(weights, biases, (x.shape[1], *widths[1:]), strict=True)):
        kernel_size = check_kernel(f"{name}[{i}]", weight)
        why = f"{'C' if i == 0 else f'c{i}'}, 1, K, K"
        check_parameter(f"{name}[{i}]", weight, (width, 1, kernel_size, kernel_size), why, x)
        if bias is not None:
            check_parameter(f"{bias_name}[{i}]", bias, (width,), "one number a channel", x)


def check_multi_order(channels: int, dilations: Sequence[int], split: Sequence[int]) -> tuple[int, int, int]:
    """Refuses what the official class refuses; returns the widths of the three branches."""
    check_sequence("dilations", dilations, 3)
    check_sequence("split", split, 3)
    for i, d in enumerate(dilations):
        check_integer(f"dilations[{i}]", d, 1, 3)
    for i, part in enumerate(split):
        check_integer(f"split[{i}]", part, 0 if i == 0 else 1)
    if channels % sum(split) != 0:
        raise ValueError(f"split {tuple(split)} adds up to {sum(split)}, which must divide the {channels} channels")
    return split_channels(channels, split)
