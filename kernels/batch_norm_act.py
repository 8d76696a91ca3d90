"""Batch norm with an activation behind it, in passes: y = act(z) * gate, z = scale * x + shift, of every channel.

Moments are those of a tile about its own mean, merged: within a program, then over programs. With dz = (dy * gate +
offset) * act'(z), the sums of the backward pass are those of dz and of dz * (x - mean), and dx = scale * dz + slope *
(x - mean) + constant. Gate and offset are an image's. A program takes a share of an image; where there are neither
gates nor sums by image, the images of a channels_last batch are one. The order of all sums depends on the shape only.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import activated, map_tile, share_of_image, strides_of, sum_type, walk
from ._moves import moves
from ._specialize import ByLayout, counted

PROGRAMS = 2112  # sixteen for every multiprocessor of an H200
MERGE_TILE = {"BLOCK_R": 64, "BLOCK_C": 32, "num_warps": 4}


@ByLayout
@moves("partial_ptr")
def moments_kernel(
    x_ptr,
    partial_ptr,  # [image][share][2][channels]
    shares,
    pixels,
    channels,
    stride_n,
    stride_c,
    stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    mean = tl.zeros((BLOCK_C,), SUM_TYPE)
    squares = tl.zeros((BLOCK_C,), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        x = tl.load(x_ptr + n * stride_n + p * stride_p + c * stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        more = tl.minimum(end - first, BLOCK_P).to(SUM_TYPE)
        of_tile = tl.sum(x, axis=0) / more
        difference = tl.where(inside, x - of_tile[None, :], 0.0)
        share = more / (first - begin + more)
        moved = of_tile - mean
        squares += tl.sum(difference * difference, axis=0) + moved * moved * share * (first - begin)
        mean += moved * share
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(to, mean, mask=channel < channels)
    tl.store(to + channels, squares, mask=channel < channels)


@counted
@moves("mean_ptr", "variance_ptr")
def merge_moments_kernel(
    partial_ptr,
    mean_ptr,
    variance_ptr,
    count,  # of parts
    shares,
    pixels,
    channels,
    BLOCK_P: tl.constexpr,  # of the kernel above
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    SUM_TYPE: tl.constexpr = mean_ptr.dtype.element_ty
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    length = tl.cdiv(tl.cdiv(pixels, shares), BLOCK_P) * BLOCK_P
    total = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
    values = tl.zeros((BLOCK_R, 1), SUM_TYPE)
    for first in range(0, count, BLOCK_R):
        part = (first + tl.arange(0, BLOCK_R))[:, None]
        weight = tl.where(part < count, tl.minimum(tl.maximum(pixels - part % shares * length, 0), length), 0)
        at = partial_ptr + part.to(tl.int64) * 2 * channels + c
        total += weight.to(SUM_TYPE) * tl.load(at, mask=(part < count) & (c < channels), other=0.0)
        values += weight.to(SUM_TYPE)
    number = tl.sum(values, axis=0)[None, :]
    mean = tl.sum(total, axis=0)[None, :] / number
    squares = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
    for first in range(0, count, BLOCK_R):
        part = (first + tl.arange(0, BLOCK_R))[:, None]
        weight = tl.where(part < count, tl.minimum(tl.maximum(pixels - part % shares * length, 0), length), 0)
        at, inside = partial_ptr + part.to(tl.int64) * 2 * channels + c, (part < count) & (c < channels)
        difference = tl.load(at, mask=inside, other=0.0) - mean
        own = tl.load(at + channels, mask=inside, other=0.0)
        squares += own + weight.to(SUM_TYPE) * difference * difference
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(variance_ptr + c, tl.sum(squares, axis=0)[None, :] / number, mask=c < channels)


@ByLayout
@moves("y_ptr", "partial_ptr")
def norm_act_kernel(
    x_ptr,
    grad_ptr,  # may be None: a factor of what is summed
    scale_ptr,
    shift_ptr,
    gate_ptr,  # may be None, as all that follow
    y_ptr,
    partial_ptr,  # [image][share][channels]
    shares,
    pixels,
    channels,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    scale = tl.load(scale_ptr + c, mask=c < channels, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < channels, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + n * channels + c, mask=c < channels, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        y, _ = activated(scale * x + shift, ACTIVATION)
        if partial_ptr is not None:
            term = y
            if grad_ptr is not None:
                at = grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c
                term = y * tl.load(at, mask=inside, other=0.0).to(SUM_TYPE)
            total += tl.where(inside, term, 0.0)
        if y_ptr is not None:
            if gate_ptr is not None:
                y = y * gate
            to = y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c
            tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(to, tl.sum(total, axis=0), mask=channel < channels)


@ByLayout
@moves("dx_ptr", "partial_ptr")
def norm_act_bwd_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    gate_ptr,  # may be None, as all that follow
    offset_ptr,
    line_ptr,  # slope and constant, [2][channels]
    dx_ptr,
    partial_ptr,  # [image][share][2][channels]
    shares,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    dx_stride_n,
    dx_stride_c,
    dx_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    scale = tl.load(scale_ptr + c, mask=c < channels, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < channels, other=0.0)
    mean = tl.load(mean_ptr + c, mask=c < channels, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + n * channels + c, mask=c < channels, other=0.0)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + n * channels + c, mask=c < channels, other=0.0)
    if dx_ptr is not None:
        slope = tl.load(line_ptr + c, mask=c < channels, other=0.0)
        constant = tl.load(line_ptr + channels + c, mask=c < channels, other=0.0)
    of_dz = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        at = grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c
        dz = tl.load(at, mask=inside, other=0.0).to(SUM_TYPE)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        if gate_ptr is not None:
            dz *= gate
        if offset_ptr is not None:
            dz += offset
        _, of_z = activated(scale * x + shift, ACTIVATION)
        dz = tl.where(inside, dz * of_z, 0.0)
        if partial_ptr is not None:
            of_dz += dz
            of_product += dz * (x - mean)
        if dx_ptr is not None:
            dx = scale * dz + slope * (x - mean) + constant
            to = dx_ptr + n * dx_stride_n + p * dx_stride_p + c * dx_stride_c
            tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(to, tl.sum(of_dz, axis=0), mask=channel < channels)
        tl.store(to + channels, tl.sum(of_product, axis=0), mask=channel < channels)


KERNELS = (moments_kernel, merge_moments_kernel, norm_act_kernel, norm_act_bwd_kernel)
_NO_STRIDES = 0, 0, 0


def moments(x: Tensor, mean: Tensor, variance: Tensor) -> None:
    images, pixels, (strides,) = walk([x])
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = scratch((grid[0], 2, channels), mean.dtype, x.device)
    with torch.cuda.device_of(x):
        moments_kernel.of(x.stride(1) == 1)[grid](x, partial, shares, pixels, channels, *strides, **tile)
        merge_moments_kernel[(triton.cdiv(channels, MERGE_TILE["BLOCK_C"]),)](
            partial, mean, variance, grid[0], shares, pixels, channels, tile["BLOCK_P"], **MERGE_TILE
        )


def forward(x: Tensor, c: Any, activation: str | None, y: Tensor | None, sums: Tensor | None = None) -> None:
    """c: `Coefficients` of ops/batch_norm_act.py. y may be x. sums: (N, C), of act(z)."""
    _run(x, None, c, activation, y, sums)


def backward_gate(grad: Tensor, x: Tensor, c: Any, activation: str | None, sums: Tensor) -> None:
    """sums: (N, C), of grad * act(z)."""
    _run(x, grad, c, activation, None, sums)


def _run(x: Tensor, grad: Tensor | None, c: Any, activation: str | None, y: Tensor | None, sums: Tensor | None) -> None:
    if x.numel() == 0:
        if sums is not None:
            sums.zero_()
        return
    given = [t for t in (x, grad, y) if t is not None]
    images, pixels, strides = _images(given, apart=c.gate is not None or sums is not None)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = None if sums is None else scratch((images, shares, channels), sums.dtype, x.device)
    found = iter(strides)
    flat = [stride for t in (x, grad, y) for stride in (_NO_STRIDES if t is None else next(found))]
    with torch.cuda.device_of(x):
        norm_act_kernel.of(x.stride(1) == 1)[grid](
            *(x, grad, c.scale, c.shift, c.gate, y, partial, shares, pixels, channels, *flat),
            ACTIVATION=activation,
            **tile,
        )
    if partial is not None and sums is not None:
        torch.sum(partial, 1, out=sums)


def backward_sums(grad: Tensor, x: Tensor, c: Any, activation: str | None, sums: Tensor) -> None:
    """sums: (2, C), of dz and of dz * (x - mean)."""
    if x.numel() == 0:
        sums.zero_()
        return
    _run_backward(grad, x, c, activation, None, None, sums)


def backward_input(grad: Tensor, x: Tensor, c: Any, activation: str | None, line: Tensor, dx: Tensor) -> None:
    """dx may be grad."""
    if x.numel():
        _run_backward(grad, x, c, activation, line, dx, None)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    c: Any,
    activation: str | None,
    line: Tensor | None,
    dx: Tensor | None,
    sums: Tensor | None,
) -> None:
    given = [t for t in (grad, x, dx) if t is not None]
    images, pixels, strides = _images(given, apart=c.gate is not None or c.offset is not None)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = None if sums is None else scratch((grid[0], 2, channels), sums.dtype, x.device)
    flat = [stride for of_tensor in (*strides, *([_NO_STRIDES] if dx is None else [])) for stride in of_tensor]
    with torch.cuda.device_of(x):
        norm_act_bwd_kernel.of(x.stride(1) == 1)[grid](
            *(grad, x, c.scale, c.shift, c.mean, c.gate, c.offset, line, dx, partial),
            *(shares, pixels, channels, *flat),
            ACTIVATION=activation,
            **tile,
        )
    if partial is not None and sums is not None:
        torch.sum(partial, 0, out=sums)


def _images(tensors: list[Tensor], apart: bool) -> tuple[int, int, list[tuple[int, int, int]]]:
    """As `walk`; apart: images that have gates or sums of their own stay images."""
    if not apart:
        return walk(tensors)
    n, _, h, w = tensors[0].shape
    return n, h * w, [strides_of(t) for t in tensors]


def _grid(x: Tensor, images: int, pixels: int) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """And the shares of an image, and the constants of a kernel."""
    tile, channels = map_tile(x), x.shape[1]
    columns = triton.cdiv(channels, tile.BLOCK_C)
    shares = max(1, min(triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(PROGRAMS, images * columns)))
    return (images * shares, columns), shares, {"SUM_TYPE": sum_type(x), **tile._asdict()}
