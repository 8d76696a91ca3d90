"""The passes of batch norms on a device, for all ops that have one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _internals, _native
from ._allocation import allocate
from .dwconv import ACTIVATION_CODES

MEAN, VARIANCE = 2, 4  # of a batch, in its table


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def empty_table(x: Tensor, channels: int) -> Tensor:
    """Scale, shift, mean, inverse deviation and unbiased variance of every channel."""
    return allocate((5, channels), x, dtype=wide(x))


class Coefficients(NamedTuple):
    """z = scale * x + shift by the table of a norm; gate and offset, (N, C), if there are, are of every image's."""

    table: Tensor
    gate: Tensor | None = None
    offset: Tensor | None = None


class Ends(NamedTuple):
    """What sums over so many pixels are wanted for: the slope and constant, (2, C), of the part of dx that comes by way
    of a batch's statistics, and the gradients of weight and bias."""

    line: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    pixels: int

    def wanted(self) -> bool:
        return any(t is not None for t in self[:3])


class BatchNorm(NamedTuple):
    """As in csrc/include/batch_norm_act.h. Maps are all in one format, pixel_dense. On GPUs backward_input has
    `sums`, too, (C,), of dx as it is stored: on CPUs they come with the products of dx."""

    # x or None, weight, bias, mean and variance or None, table, eps
    prepare: Callable[[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, float], None]
    run: Callable[..., None]
    backward_sums: Callable[..., None]
    backward_images: Callable[..., None]
    finish: Callable[[Tensor, Coefficients, Ends], None]
    backward_input: Callable[..., None]


def _prepare(
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    table: Tensor,
    eps: float,
) -> None:
    vectors = map(_native.vectors_view, (weight, bias, mean, variance, table))
    _native.cpu_kernels().batch_norm_prepare(_native.view(x), *vectors, eps)


def _views(c: Coefficients) -> list[Any]:
    return [*map(_native.vectors_view, c)]


def _run(x: Tensor, c: Coefficients, activation: str | None, y: Tensor | None, means: Tensor | None = None) -> None:
    given = _native.view(x), _views(c), _native.view(y), _native.vectors_view(means)
    _native.cpu_kernels().batch_norm_act(*given, ACTIVATION_CODES[activation])


def _backward_sums(
    grad: Tensor, x: Tensor, c: Coefficients, activation: str | None, ends: Ends, y: Tensor | None = None
) -> None:
    given = _native.view(grad), _native.view(x), _views(c), _native.view(y)
    _native.cpu_kernels().batch_norm_act_backward_sums(*given, *_end_views(ends), ACTIVATION_CODES[activation])


def _end_views(ends: Ends) -> tuple[list[Any], int]:
    return [*map(_native.vectors_view, ends[:3])], ends.pixels


def _backward_images(
    grad: Tensor, x: Tensor, c: Coefficients, activation: str | None, sums: Tensor, y: Tensor | None = None
) -> None:
    given = _native.view(grad), _native.view(x), _views(c), _native.view(y), _native.vectors_view(sums.flatten(1))
    _native.cpu_kernels().batch_norm_act_backward_images(*given, ACTIVATION_CODES[activation])


def _finish(sums: Tensor, c: Coefficients, ends: Ends) -> None:
    """sums: (N, 5, C), or (1, 2, C) without gate and offset."""
    _native.cpu_kernels().batch_norm_finish(_native.vectors_view(sums.flatten(1)), _views(c), *_end_views(ends))


def _backward_input(
    grad: Tensor | None,
    x: Tensor,
    c: Coefficients,
    activation: str | None,
    line: Tensor | None,
    dx: Tensor,
    plus: Tensor | None = None,
) -> None:
    given = _native.view(grad), _native.view(x), _views(c), _native.vectors_view(line)
    end = _native.view(plus), _native.view(dx), ACTIVATION_CODES[activation]
    _native.cpu_kernels().batch_norm_act_backward_input(*given, *end)


@functools.cache
def cpu_batch_norm() -> BatchNorm:
    return BatchNorm(_prepare, _run, _backward_sums, _backward_images, _finish, _backward_input)


def cuda_batch_norm() -> BatchNorm:
    from ..kernels import batch_norm_act as triton

    passes = triton.forward, triton.backward_sums, triton.backward_images, triton.finish, triton.backward_input
    return BatchNorm(triton.prepare, *passes)


def prepare(device: BatchNorm, x: Tensor, parameters: Sequence[Tensor | None], table: Tensor, eps: float) -> None:
    """The table of a norm; parameters: weight and bias, then mean and variance, without which they are those of x. Of
    an empty batch they are those that change nothing."""
    weight, bias, *known = parameters
    assert weight is not None and bias is not None
    mean, variance = known or (None, None)
    if mean is None and x.numel() == 0:
        mean = variance = torch.zeros_like(weight)
    device.prepare(x if mean is None else None, weight, bias, mean, variance, table, eps)


def track(running: Sequence[Tensor | None], tables: Sequence[Tensor], counts: Sequence[int], momentum: float) -> None:
    """Moves running means and variances, those of one norm after another's, towards those of the tables; those of an
    empty batch change nothing."""
    moving, batch = [], []
    for k, t in enumerate(running):
        if t is not None and counts[k // 2] > 0:
            moving.append(t)
            batch.append(tables[k // 2][VARIANCE if k % 2 else MEAN])
    with torch.no_grad():
        if moving and all(t.dtype == value.dtype for t, value in zip(moving, batch, strict=True)):
            return _internals.lerp_all(moving, batch, momentum)
        for t, value in zip(moving, batch, strict=True):
            t.copy_(t.to(value.dtype).lerp_(value, momentum))
