"""MogaNet's feature decomposition: every pixel's difference from its image's mean, weighted, is added to it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.dwconv import ACTIVATIONS
from ._allocation import allocate, empty, memory_format
from ._autograd import any_requires_grad
from ._checks import check_sigma, check_tensor
from ._devices import device_reasons, on_devices
from ._maps import pixel_dense
from ._pointwise import crew_pays
from ._registration import FusedOp
from .dwconv import ACTIVATION_CODES


class _Arguments(NamedTuple):
    x: Tensor
    sigma: Tensor
    activation: str | None


def _reference(a: _Arguments) -> Tensor:
    return reference.feature_decompose(a.x, a.sigma, activation=a.activation)


def _output(a: _Arguments) -> Tensor:
    return empty(a.x.shape, a.x)


class Decomposition(NamedTuple):
    """The kernels of a device. x is pixel_dense in some memory format, sigma (C,) and contiguous, means (N, C, 1, 1)
    and float32 at least."""

    image_means: Callable[[Tensor, Tensor], None]
    run: Callable[[Tensor, Tensor, Tensor, str | None, Tensor], None]
    run_backward: Callable[..., None]


@functools.cache
def cpu_decomposition() -> Decomposition:
    return Decomposition(_image_means, _decompose, _decompose_backward)


def cuda_decomposition() -> Decomposition:
    from ..kernels import feature_decompose as triton

    return Decomposition(triton.image_means, triton.decompose, triton.decompose_backward)


def image_means(kernels: Decomposition, x: Tensor) -> Tensor:
    means = allocate((*x.shape[:2], 1, 1), x, dtype=torch.promote_types(x.dtype, torch.float32))
    kernels.image_means(x, means)
    return means


def _image_means(x: Tensor, means: Tensor) -> None:
    _native.cpu_kernels().image_means(_native.view(x), _native.view(means))


def _decompose(x: Tensor, means: Tensor, sigma: Tensor, activation: str | None, y: Tensor) -> None:
    """means: of x, from `image_means` or, where they are known before x is, in its form."""
    views = _native.view(x), _native.view(means), _native.channels_view(sigma), _native.view(y)
    _native.cpu_kernels().feature_decompose(*views, ACTIVATION_CODES[activation])


def _decompose_backward(
    grad: Tensor,
    x: Tensor,
    means: Tensor,
    sigma: Tensor,
    activation: str | None,
    dx: Tensor | None,
    dsigma: Tensor | None,
    dx_sums: Tensor | None = None,
) -> None:
    """dx may be grad; dx_sums: of dx, which is there then, over all pixels."""
    inputs = _native.view(grad), _native.view(x), _native.view(means), _native.channels_view(sigma)
    outputs = _native.view(dx), _native.channels_view(dsigma)
    _native.cpu_kernels().feature_decompose_backward(*inputs, *outputs, ACTIVATION_CODES[activation])
    if dx_sums is not None and dx is not None:
        _native.cpu_kernels().channel_sums(_native.view(dx), _native.channels_view(dx_sums))


def flat(sigma: Tensor | None) -> Tensor | None:
    return None if sigma is None else sigma.reshape(-1).contiguous()


def _forward(device: Callable[[], Decomposition], a: _Arguments) -> Tensor:
    kernels, y, x = device(), _output(a), pixel_dense(a.x, memory_format(a.x))
    kernels.run(x, image_means(kernels, x), flat(a.sigma), a.activation, y)
    return y


def _backward(device: Callable[[], Decomposition], grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    given, dsigma = grads
    kernels, wanted = device(), memory_format(a.x)
    x, grad = (pixel_dense(t, wanted) for t in (a.x, grad))
    dx = given if given is None or pixel_dense(given, wanted) is given else empty(x.shape, x)
    kernels.run_backward(grad, x, image_means(kernels, x), flat(a.sigma), a.activation, dx, flat(dsigma))
    if given is not dx:
        given.copy_(dx)


_KERNELS = on_devices(_forward, _backward, cpu=cpu_decomposition, cuda=cuda_decomposition, crew=crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot, x = device_reasons(a.x, _KERNELS, triton=True), a.x
    # A compiled graph must not depend on the size.
    if cannot or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return cannot, []
    trains = torch.is_grad_enabled() and any_requires_grad(a[:2])
    small = _native.device_kind(x) == "cpu" and x.dtype == torch.float32 and trains and x.numel() < 150_000
    return cannot, ["PyTorch is faster to train on few elements"] if small else []  # measured, AVX-512


_op = FusedOp(
    "feature_decompose",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("sigma",),
)


def fused_feature_decompose(
    x: Tensor, sigma: Tensor, *, activation: str | None = "silu", backend: str | None = None
) -> Tensor:
    """act(x + sigma * (x - mean(x over H, W))).

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format and
            dtype.
        sigma: (C,) or (1, C, 1, 1), in the dtype of x, or float32 beside a half x; autocast leaves it as it is.
        activation: None, "gelu" (the erf form) or "silu".
        backend: as in `vision_ops.use_backend`.

    Two passes, one for the means and one for the rest; sums and means are float32 (float64 for float64). Backward keeps
    the arguments only. Gradients come in each argument's own dtype and are bitwise repeatable. Without a kernel for the
    device, and on CPUs to train on few elements, `reference.feature_decompose` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MogaNet (arXiv 2211.03295), feat_decompose of MultiOrderGatedAggregation in models/moganet.py of
    Westlake-AI/MogaNet.
    """
    check_tensor("x", x, "N, C, H, W")
    check_sigma(sigma, x.shape[1], "C", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    return _op(x, sigma, activation, backend=backend)
