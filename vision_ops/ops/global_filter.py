"""The global filter of GFNet and HorNet: a circular convolution as large as the image, learnt in frequency space."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference._resize import resize_backward
from ..reference.global_filter import resize_filter
from ._allocation import empty, workspace
from ._checks import check_parameter, check_tensor
from ._devices import device_reasons, without_autocast
from ._registration import FusedOp


class _Arguments(NamedTuple):
    x: Tensor
    complex_weight: Tensor


def _reference(a: _Arguments) -> Tensor:
    return reference.global_filter(a.x, a.complex_weight)


def _output(a: _Arguments) -> Tensor:
    return empty(a.x.shape, a.x)


def _resized(a: _Arguments) -> Tensor:
    """The weight in the precision of the sums, for the size of x: (C, H, W // 2 + 1, 2)."""
    wide = torch.promote_types(a.x.dtype, torch.float32)
    return resize_filter(a.complex_weight.to(wide), a.x.shape[2], a.x.shape[3] // 2 + 1).contiguous()


def _planes(weight: Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else _native.view(weight.flatten(2)[None])


@without_autocast
def _forward_cpu(a: _Arguments) -> Tensor:
    y, weight = _output(a), _resized(a)
    _native.cpu_kernels().global_filter(_native.view(a.x), _planes(weight), _native.view(y))
    return y


def _run_backward_cpu(grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> None:
    views = _native.view(grad), _native.view(x), _planes(weight), _native.view(dx), _planes(dweight)
    _native.cpu_kernels().global_filter_backward(*views)


def _has_cuda_kernel(x: Tensor) -> bool:
    return _native.cuda_kernels().has_filter_kernel(_native.DTYPES[x.dtype], *x.shape[2:])


@without_autocast
def _forward_cuda(a: _Arguments) -> Tensor:
    y = _output(a)
    if not _has_cuda_kernel(a.x):
        return y.copy_(_reference(a))
    weight = _resized(a)
    views = _native.view(a.x), _planes(weight), _native.view(y)
    _native.cuda_kernels().global_filter(*views, *_native.target(a.x))
    return y


def _run_backward_cuda(grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> None:
    if not _has_cuda_kernel(x):
        _run_backward_fft(grad, x, weight, dx, dweight)
        return
    kernels, grad_view = _native.cuda_kernels(), _native.view(grad)
    room = workspace(kernels.global_filter_backward_workspace(grad_view) if dweight is not None else 0, weight)
    views = grad_view, _native.view(x), _planes(weight), _native.view(dx), _planes(dweight)
    kernels.global_filter_backward(*views, room.data_ptr(), *_native.target(x))


def _run_backward_fft(grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> None:
    """Where there is no kernel: a compiled graph has the op for every size."""
    if len(x) == 0:  # an FFT refuses empty batches
        if dweight is not None:
            dweight.zero_()
        return
    spectrum = torch.fft.rfft2(grad.to(weight.dtype), norm="ortho")
    if dx is not None:
        filtered = spectrum * torch.complex(*weight.unbind(-1)).conj()
        dx.copy_(torch.fft.irfft2(filtered, s=x.shape[2:], norm="ortho"))
    if dweight is not None:
        product = (torch.fft.rfft2(x.to(weight.dtype), norm="ortho").conj() * spectrum).sum(0)
        product[..., 1 : (x.shape[3] + 1) // 2] *= 2  # for the mirror images, which rfft2 leaves out
        dweight.copy_(torch.view_as_real(product))


@without_autocast
def _backward(run: Callable[..., None], grads: list[Tensor | None], grad: Tensor, a: _Arguments) -> None:
    dx, dweight = grads
    weight = _resized(a)
    found = None if dweight is None else empty(weight.shape, weight)
    run(grad, a.x, weight, dx, found)
    if dweight is None or found is None:
        return
    if weight.shape != dweight.shape:
        found = resize_backward(found.permute(3, 0, 1, 2), dweight.shape[1:3], align_corners=True).permute(1, 2, 3, 0)
    dweight.copy_(found)


_KERNELS = {
    "CPU": (_forward_cpu, functools.partial(_backward, _run_backward_cpu)),
    "CUDA": (_forward_cuda, functools.partial(_backward, _run_backward_cuda)),
}


# Longer sides are an FFT's: the products with matrices of sines and cosines grow with the side (measured, AVX-512).
_LONGEST_SIDE = 30


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS)
    # A compiled graph must not depend on the size.
    if cannot or torch.compiler.is_compiling():
        return cannot, []
    height, width = a.x.shape[2:]
    if _native.device_kind(a.x) == "cpu":
        if max(height, width) <= _LONGEST_SIDE:
            return [], []
        return [], [f"an FFT is faster for sides longer than {_LONGEST_SIDE}, x has {height} x {width}"]
    if _has_cuda_kernel(a.x):
        return [], []
    return [], [f"there is no CUDA kernel for {height} x {width} in {str(a.x.dtype).removeprefix('torch.')}"]


def _parts(a: _Arguments) -> dict[str, str]:
    device = _native.device_kind(a.x)
    fft = device != "cpu" and not _has_cuda_kernel(a.x)
    return {"global_filter": "PyTorch's FFT" if fft else _native.kernel_name(device)}


_op = FusedOp(
    "global_filter",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    autocast=False,
    parts=_parts,
)


def fused_global_filter(x: Tensor, complex_weight: Tensor, *, backend: str | None = None) -> Tensor:
    """irfft2(rfft2(x) * W): a circular convolution of every channel with a kernel as large as the image.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format and
            dtype.
        complex_weight: W as (C, h, w, 2), real and imaginary parts, in the dtype of x, or float32 beside a half x.
            Sizes other than (H, W // 2 + 1) are interpolated, bilinear with align_corners=True, as the
            official code does it in every forward pass.
        backend: as in `vision_ops.use_backend`.

    Half types are computed in float32 and rounded once; autocast leaves both tensors as they are. The transforms are
    our own and need no complex numbers: on CPUs up to 30 x 30, on GPUs for maps of 7, 12, 14 and 24 squared, those of
    the published networks, but not in float64. Elsewhere `reference.global_filter` runs, whose FFT is then faster; told
    to be fused, or in a compiled graph, which does not know the size, the op on GPUs takes PyTorch's FFT itself.
    Backward keeps the arguments only; gradients are bitwise repeatable.

    Raises:
        TypeError, ValueError: an argument is not as above.

    GFNet (arXiv 2107.00645) and HorNet (2207.14284), GlobalLocalFilter in hornet.py of raoyongming/HorNet.
    """
    check_tensor("x", x, "N, C, H, W")
    given = tuple(complex_weight.shape) if isinstance(complex_weight, Tensor) and complex_weight.ndim == 4 else (1,) * 4
    if 0 in given[1:3]:
        raise ValueError(f"complex_weight must have frequencies, got shape {given}")
    check_parameter("complex_weight", complex_weight, (x.shape[1], *given[1:3], 2), "C, h, w, 2", x)
    return _op(x, complex_weight, backend=backend)
