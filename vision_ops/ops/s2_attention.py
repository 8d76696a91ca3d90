"""S2-MLPv2's operator, whole: a linear layer to three branches, shifts and split attention, a linear layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ._allocation import allocate
from ._autograd import any_requires_grad
from ._checks import check_parameter, check_tensor
from ._devices import Kernels, device_reasons, with_crew, without_autocast
from ._half_block import HalfBlock
from ._parameters import convert, convert_cuda, converted
from ._pointwise import (
    crew_pays_for_tokens,
    linear_tokens,
    multiplies_tokens,
    products_of_tokens,
    weight_gradient_tokens,
)
from ._registration import FusedOp
from .shift_split_attention import (
    CPUPasses,
    check_split_mlps,
    parts,
    small,
    triton_passes,
)

# On CPUs as many images are computed at a time as make this many pixels: enough for a GEMM, few enough for a cache.
_PIXELS_AT_A_TIME = 256


class _Arguments(NamedTuple):
    x: Tensor
    mlp1_weight: Tensor
    mlp1_bias: Tensor | None
    mlp2_weight: Tensor
    mlp2_bias: Tensor | None
    split_mlp1_weight: Tensor
    split_mlp2_weight: Tensor
    keep: bool  # the branches for the backward pass


def _reference(a: _Arguments) -> Tensor:
    return reference.s2_attention(*a[:7])


def _output(a: _Arguments) -> tuple[Tensor, ...]:
    """y, the branches without their bias, and per image what `shift_split_attention` saves."""
    b, h, w, c = a.x.shape
    branches = allocate((b if a.keep else 0, h, w, 3 * c), a.x)
    hidden = small(a.x, a.split_mlp1_weight.shape[0])
    return allocate(a.x.shape, a.x), branches, small(a.x, c), hidden, small(a.x, 3, c)


def _converted(a: _Arguments, passes: Any, backward: bool) -> _Arguments:
    """With mlp1's and mlp2's parameters as products take them, but the bias of mlp1: the branches are computed without
    it, which saves a pass over them."""
    run = convert if passes is CPUPasses else convert_cuda
    bias = None if backward else a.mlp2_bias
    mlp1, mlp2, bias = converted(run, (a.mlp1_weight, a.mlp2_weight, bias), a.x.dtype)
    return a._replace(mlp1_weight=mlp1, mlp2_weight=mlp2, mlp2_bias=bias)


def _forward(a: _Arguments, passes: Any, at_a_time: int) -> tuple[Tensor, ...]:
    x, bias, (_, h, w, c) = a.x.contiguous(), _contiguous(a.mlp1_bias), a.x.shape
    # Sums over pixels go through a linear layer as pixels do: those of x take a third of the reads.
    sums, pooled = small(x, 3, c), small(x, c)
    passes.edge_sums(x, sums)
    passes.pool_linear(sums, a.mlp1_weight, bias, h * w, pooled)
    weights, hidden = small(x, 3, c), small(x, len(a.split_mlp1_weight))
    passes.branch_weights(pooled, a.split_mlp1_weight, a.split_mlp2_weight, hidden, weights)
    offset, a = passes.offset(weights, bias), _converted(a, passes, backward=False)

    at_a_time = min(at_a_time, len(x)) or 1
    y, weighed = allocate(x.shape, x), allocate((at_a_time, h, w, c), x)
    branches = allocate((len(x) if a.keep else at_a_time, h, w, 3 * c), x)
    if passes is CPUPasses and multiplies_tokens(x):
        mlps = a.mlp1_weight, a.mlp2_weight, a.mlp2_bias
        passes.linear_weigh_linear(x, *mlps, weights, offset, branches, weighed, y)
    else:
        _linear_weigh_linear(x, a, weights, offset, branches, weighed, y, passes)
    return y, branches if a.keep else branches.new_empty((0, h, w, 3 * c)), pooled, hidden, weights


def _linear_weigh_linear(
    x: Tensor,
    a: _Arguments,
    weights: Tensor,
    offset: Tensor | None,
    branches: Tensor,
    weighed: Tensor,
    y: Tensor,
    passes: Any,
) -> None:
    at_a_time, whole = len(weighed), len(weighed) == len(x)
    for first in range(0, len(x), at_a_time):
        images = slice(first, first + at_a_time)
        count = len(x[images])
        some, mixed = branches[images] if a.keep else branches[:count], weighed[:count]
        linear_tokens(x[images].flatten(1, 2), a.mlp1_weight, None, some.flatten(1, 2))
        passes.weigh(some, weights[images], offset if offset is None or whole else offset[images], mixed)
        linear_tokens(mixed.flatten(1, 2), a.mlp2_weight, a.mlp2_bias, y[images].flatten(1, 2))


def _backward(grads: list[Any], grad: Tensor, a: _Arguments, passes: Any, *saved: Tensor) -> None:
    (dx, dmlp1, dmlp1_bias, dmlp2, dmlp2_bias, *dsplit), (branches, pooled, hidden, weights) = grads, saved
    x, grad, bias, (_, h, w, c) = a.x.contiguous(), grad.contiguous(), _contiguous(a.mlp1_bias), a.x.shape
    a = _converted(a, passes, backward=True)
    if not a.keep:
        branches = allocate((len(x), h, w, 3 * c), x)
        linear_tokens(x.flatten(1, 2), a.mlp1_weight, None, branches.flatten(1, 2))
    if dmlp2_bias is not None:
        passes.sum_pixels(grad, dmlp2_bias)

    dweighed, sums = allocate(x.shape, x), small(x, 4, c)
    linear_tokens(grad.flatten(1, 2), a.mlp2_weight.t(), None, dweighed.flatten(1, 2))
    weighed = None if dmlp2 is None else allocate(x.shape, x)
    passes.weigh_backward_weights(dweighed, branches, weights, passes.offset(weights, bias), sums, weighed)
    if weighed is not None:
        weight_gradient_tokens(grad.flatten(1, 2), weighed.flatten(1, 2), dmlp2)
    mlps, dpooled = (a.split_mlp1_weight, a.split_mlp2_weight), small(x, c)
    passes.branch_weights_backward(sums, bias, weights, hidden, pooled, mlps, dsplit, dpooled)
    if dmlp1_bias is not None:
        passes.bias_backward(sums, weights, dpooled, h * w, dmlp1_bias)
    if dx is None and dmlp1 is None:
        return
    dbranches = allocate(branches.shape, x)
    passes.weigh_backward_input(dweighed, weights, dpooled, dbranches)
    if dmlp1 is not None:
        weight_gradient_tokens(dbranches.flatten(1, 2), x.flatten(1, 2), dmlp1)
    if dx is not None:
        found = dx if dx.is_contiguous() else dweighed
        linear_tokens(dbranches.flatten(1, 2), a.mlp1_weight.t(), None, found.flatten(1, 2))
        if found is not dx:
            dx.copy_(found)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _images_at_a_time(x: Tensor) -> int:
    return -(-_PIXELS_AT_A_TIME // (x.shape[1] * x.shape[2]))


_forward_in_crew, _backward_in_crew = (with_crew(run, crew_pays_for_tokens) for run in (_forward, _backward))


# PyTorch's own copies are parallel outside of a crew only.
@without_autocast
def _forward_cpu(a: _Arguments) -> tuple[Tensor, ...]:
    return _forward_in_crew(a._replace(x=a.x.contiguous()), CPUPasses, _images_at_a_time(a.x))


@without_autocast
def _backward_cpu(grads: list[Any], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward_in_crew(grads, grad.contiguous(), a._replace(x=a.x.contiguous()), CPUPasses, *saved)


@without_autocast
def _forward_cuda(a: _Arguments) -> tuple[Tensor, ...]:
    return _forward(a, triton_passes(), len(a.x))


@without_autocast
def _backward_cuda(grads: list[Any], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward(grads, grad, a, triton_passes(), *saved)


_KERNELS: dict[str, Kernels] = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


_op = FusedOp(
    "s2_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    wide=_Arguments._fields[1:7],
    saved=(Tensor.contiguous,) * 4,
    parts=lambda a: parts(a.x) | {"mlp1 and mlp2": products_of_tokens(a.x)},
    dims="B, H, W, C",
)
_half = HalfBlock(_op, last=("mlp2_weight", "mlp2_bias"), norm=True, maps=False)


def fused_s2_attention(
    x: Tensor,
    mlp1_weight: Tensor,
    mlp1_bias: Tensor | None,
    mlp2_weight: Tensor,
    mlp2_bias: Tensor | None,
    split_mlp1_weight: Tensor,
    split_mlp2_weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """mlp2(shift_split_attention(mlp1(x))), see `fused_shift_split_attention`; its shifts are clean, too.

    Args:
        x: (B, H, W, C), any strides, none of H, W and C empty; float32, bfloat16, float16 or float64.
        mlp1_weight, mlp1_bias: (3C, C), and (3C,) or None.
        mlp2_weight, mlp2_bias: (C, C), and (C,) or None.
        split_mlp1_weight, split_mlp2_weight: (hidden, C) and (3C, hidden), any hidden width.
        norm_weight, norm_bias, eps: of a layer norm over C in front, (C,) each, both or none.
        gamma, residual, path_scale: of residual + path_scale * gamma * (the above), as in `fused_mlp`; residual is as
            x in its shape, and is given with the others.
        backend: as in `vision_ops.use_backend`.

    Returns (B, H, W, C), contiguous, in the dtype of x; parameters have that dtype, or float32 beside a half x. The
    products of mlp1 and mlp2 are PyTorch's GEMMs, but with 512 pixels or more in float32 on CPUs with AVX2 or AVX-512;
    `explain` tells. Where a gradient is needed, the output of mlp1, 3C numbers a
    pixel, is kept with x: computing it again would cost more time than the fusion saves. Where none is, CPUs have it
    for some images at a time. Gradients come in each argument's own dtype and are bitwise repeatable with the same
    number of threads. Without a kernel for the device, `reference.s2_attention` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    S2-MLPv2 (arXiv 2108.01072); after s2_mlp_v2.py of liuruiyang98/Jittor-MLP, its authors published no code.
    """
    check_tensor("x", x, "B, H, W, C")
    c = x.shape[3]
    check_parameter("mlp1_weight", mlp1_weight, (3 * c, c), "3C, C", x)
    if mlp1_bias is not None:
        check_parameter("mlp1_bias", mlp1_bias, (3 * c,), "3C", x)
    check_parameter("mlp2_weight", mlp2_weight, (c, c), "C, C", x)
    if mlp2_bias is not None:
        check_parameter("mlp2_bias", mlp2_bias, (c,), "C", x)
    check_split_mlps(c, split_mlp1_weight, split_mlp2_weight, x)
    given = x, mlp1_weight, mlp1_bias, mlp2_weight, mlp2_bias, split_mlp1_weight, split_mlp2_weight
    tail: dict[str, Any] = {"gamma": gamma, "residual": residual, "path_scale": path_scale, "backend": backend}
    norm: dict[str, Any] = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    return _half(given, torch.is_grad_enabled() and any_requires_grad(given), **norm, **tail)
