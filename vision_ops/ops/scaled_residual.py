"""What half-blocks end in: a residual, with layer scale and stochastic depth."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import allocate, memory_format
from ._checks import check_beside, check_path_scale, check_tensor, check_vector
from ._devices import device_reasons, on_devices
from ._maps import pixel_dense
from ._registration import FusedOp


class _Arguments(NamedTuple):
    x: Tensor
    branch: Tensor
    gamma: Tensor | None
    path_scale: Tensor | None


def _reference(a: _Arguments) -> Tensor:
    return reference.scaled_residual(*a)


def _output(a: _Arguments) -> Tensor:
    return allocate(a.x.shape, a.x, memory_format(a.x), sum_dtype(a.x, a.branch.dtype, a.gamma))


def sum_dtype(x: Tensor | None, dtype: torch.dtype, gamma: Tensor | None) -> torch.dtype:
    """Of x + gamma * branch, for a branch of this dtype."""
    for t in (x, gamma):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


class Tail(NamedTuple):
    """The kernels of a device, for all ops that end so. Maps are pixel_dense in one memory format; of x, y and grad all
    have one dtype."""

    run: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor], None]
    run_backward: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], None]


@functools.cache
def cpu_tail() -> Tail:
    return Tail(_tail, _tail_backward)


def cuda_tail() -> Tail:
    from ..kernels import scaled_residual as triton

    return Tail(triton.forward, triton.backward)


def _tail(x: Tensor, branch: Tensor, gamma: Tensor | None, path_scale: Tensor | None, y: Tensor) -> None:
    """y = x + path_scale * gamma * branch; y may be x or branch."""
    _native.run("scaled_residual", x, branch, _as_wide(gamma, y), _as_wide(path_scale, y), y)


def _tail_backward(
    grad: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    dbranch: Tensor | None,
    dgamma: Tensor | None,
) -> None:
    """branch is read for dgamma only."""
    sums = _as_wide(dgamma, grad)
    _native.run(
        "scaled_residual_backward", grad, branch, _as_wide(gamma, grad), _as_wide(path_scale, grad), dbranch, sums
    )
    if dgamma is not None and sums is not None and sums is not dgamma:
        dgamma.copy_(sums)


def _as_wide(t: Tensor | None, like: Tensor) -> Tensor | None:
    """The kernels read float64 beside float64 maps, and beside them only."""
    if t is None or (t.dtype == torch.float64) == (like.dtype == torch.float64):
        return t
    return t.to(like.dtype)


def add(tail: Tail, t: Tensor, to: Tensor) -> None:
    """to += t; both pixel_dense in one memory format."""
    if t.dtype == to.dtype:
        tail.run(to, t, None, None, to)
    else:
        to.add_(t)


def _forward(device: Callable[[], Tail], a: _Arguments) -> Tensor:
    y = _output(a)
    wanted = memory_format(y)
    x, branch = pixel_dense(a.x.to(y.dtype), wanted), pixel_dense(_mixed(a.branch, y.dtype), wanted)
    device().run(x, branch, a.gamma, a.path_scale, y)
    return y


def _backward(device: Callable[[], Tail], grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    _, dbranch, dgamma, _ = grads
    wanted = memory_format(grad if dbranch is None else dbranch)
    grad = pixel_dense(grad, wanted)
    found = None if dbranch is None else pixel_dense(_mixed(dbranch, grad.dtype), wanted)
    branch = grad if dgamma is None else pixel_dense(_mixed(a.branch, grad.dtype), wanted)
    device().run_backward(grad, branch, a.gamma, a.path_scale, found, dgamma)
    if found is not dbranch and dbranch is not None:
        dbranch.copy_(found)


def _mixed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels take half types beside float32, and else one dtype."""
    return t if t.dtype == dtype or dtype == torch.float32 else t.to(dtype)


_KERNELS = on_devices(_forward, _backward, cpu=cpu_tail, cuda=cuda_tail)


def _torch_is_faster(a: _Arguments) -> bool:
    """Alone, an addition is nothing to fuse; small tensors cost more around the kernel than in it."""
    return _native.device_kind(a.x) == "cpu" and (
        (a.gamma is None and a.path_scale is None) or a.x.numel() < _FEW_ELEMENTS
    )


_FEW_ELEMENTS = 60_000


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS, triton=True)
    # A compiled graph must not depend on the size.
    if cannot or torch.compiler.is_compiling() or not _torch_is_faster(a):
        return cannot, []
    return cannot, ["PyTorch is faster for few elements, and for a plain addition"]


def _unread(a: _Arguments, needs: _Arguments) -> tuple[str, ...]:
    return ("x",) if needs.gamma else ("x", "branch")


_op = FusedOp(
    "scaled_residual",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    autocast=False,
    passes="x",
    constants=("path_scale",),
    unread=_unread,
)


def fused_scaled_residual(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x + path_scale[n] * gamma[c] * branch, one pass.

    Args:
        x: the residual, (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its memory
            format, and the dtype that PyTorch gives x + gamma * branch: with a float32 x or gamma it is float32, under
            autocast too.
        branch: as x, in any of these dtypes.
        gamma: layer scale, (C,).
        path_scale: stochastic depth, (N,), 0 or 1 / keep_prob as a rule; it has no gradient.
        backend: as in `vision_ops.use_backend`.

    The gradient of x is that of the output, which is handed on. Backward keeps branch where gamma needs a gradient, and
    no other map. Without a kernel for the device, and on CPUs for few elements or a plain addition,
    `reference.scaled_residual` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Stochastic depth (arXiv 1603.09382), layer scale (arXiv 2103.17239).
    """
    check_tensor("x", x, "N, C, H, W")
    check_beside("branch", branch, x, "N, C, H, W")
    check_vector("gamma", gamma, x.shape[1], "C", x)
    check_path_scale(path_scale, x)
    return _op(x, branch, gamma, path_scale, backend=backend)
