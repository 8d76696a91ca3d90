"""S2-MLPv2's operator, whole: a linear layer to three branches, shifts and split attention, a linear layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ._checks import check_parameter, check_tensor
from ._half_block import HalfBlock
from ._pointwise import (
    crew_pays_for_tokens,
    linear_tokens,
    multiplies_tokens,
    products_of_tokens,
    weight_gradient_tokens,
)
from ._registration import FusedOp, Kernels, _any_requires_grad, allocate, device_reasons, with_crew, without_autocast
from .shift_split_attention import (
    CPUPasses,
    check_split_mlps,
    parts,
    small,
    sum_dtype,
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


def _branch_biases(a: _Arguments) -> Tensor:
    """(3, C). The branches are computed without, which saves a pass over them."""
    bias, c = a.mlp1_bias, a.x.shape[3]
    dtype = sum_dtype(a.x)
    return a.x.new_zeros((3, c), dtype=dtype) if bias is None else bias.to(dtype).unflatten(0, (3, c))


def _forward(a: _Arguments, passes: Any, at_a_time: int) -> tuple[Tensor, ...]:
    x, biases, (_, h, w, c) = a.x.contiguous(), _branch_biases(a), a.x.shape
    # Sums over pixels go through a linear layer as pixels do: those of x take a third of the reads.
    sums, pooled = small(x, 3, c), small(x, c)
    passes.edge_sums(x, sums)
    passes.pool_linear(sums, a.mlp1_weight, biases, h * w, pooled)
    weights, hidden = small(x, 3, c), small(x, len(a.split_mlp1_weight))
    passes.branch_weights(pooled, a.split_mlp1_weight, a.split_mlp2_weight, hidden, weights)
    offset = (weights * biases).sum(1)

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
    x: Tensor, a: _Arguments, weights: Tensor, offset: Tensor, branches: Tensor, weighed: Tensor, y: Tensor, passes: Any
) -> None:
    at_a_time = len(weighed)
    for first in range(0, len(x), at_a_time):
        images = slice(first, first + at_a_time)
        count = len(x[images])
        some, mixed = branches[images] if a.keep else branches[:count], weighed[:count]
        linear_tokens(x[images].flatten(1, 2), a.mlp1_weight, None, some.flatten(1, 2))
        passes.weigh(some, weights[images], offset[images], mixed)
        linear_tokens(mixed.flatten(1, 2), a.mlp2_weight, a.mlp2_bias, y[images].flatten(1, 2))


def _backward(grads: list[Any], grad: Tensor, a: _Arguments, passes: Any, *saved: Tensor) -> None:
    (dx, dmlp1, dmlp1_bias, dmlp2, dmlp2_bias, *dsplit), (branches, pooled, hidden, weights) = grads, saved
    x, grad, biases, (_, h, w, c) = a.x.contiguous(), grad.contiguous(), _branch_biases(a), a.x.shape
    if not a.keep:
        branches = allocate((len(x), h, w, 3 * c), x)
        linear_tokens(x.flatten(1, 2), a.mlp1_weight, None, branches.flatten(1, 2))
    if dmlp2_bias is not None:
        sums = small(x, 3, c)
        passes.edge_sums(grad, sums)
        dmlp2_bias.copy_(sums[:, 0].sum(0))

    dweighed, sums = allocate(x.shape, x), small(x, 4, c)
    linear_tokens(grad.flatten(1, 2), a.mlp2_weight.t(), None, dweighed.flatten(1, 2))
    weighed = None if dmlp2 is None else allocate(x.shape, x)
    passes.weigh_backward_weights(dweighed, branches, weights, (weights * biases).sum(1), sums, weighed)
    if weighed is not None:
        weight_gradient_tokens(grad.flatten(1, 2), weighed.flatten(1, 2), dmlp2)
    total, mlps = sums[:, 3:], (a.split_mlp1_weight, a.split_mlp2_weight)
    dweights, dpooled = sums[:, :3] + biases * total, small(x, c)
    passes.branch_weights_backward(dweights, weights, hidden, pooled, mlps, dsplit, dpooled)
    if dmlp1_bias is not None:
        # No pixel of dweighed goes to two pixels of a branch, none is lost.
        dmlp1_bias.copy_((weights * total).add_(dpooled[:, None], alpha=h * w).sum(0).flatten())
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
    return _half(given, torch.is_grad_enabled() and _any_requires_grad(given), **norm, **tail)
