"""Batch norm with an activation behind it, in passes: y = act(z) * gate, z = scale * x + shift, of every channel.

Moments are those of a tile about its own mean, merged: within a program, then over programs. With dz = (dy * gate +
offset) * act'(z), the sums of the backward pass are those of dz and of dz * (x - mean), and dx = scale * dz + slope *
(x - mean) + constant. Gate and offset are an image's; an offset that comes of the sums of dy * act(z) is not known when
these are taken, and its share of the others is summed apart. A program takes a share of an image; where there are
neither gates nor sums by image, the images of a channels_last batch are one. The order of all sums depends on the shape
only. What is between two passes is in batch_norm_table.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import activated, map_tile, pixel_count, share_of_image, strides_of, sum_type, walk
from ._moves import moves
from ._specialize import ByLayout
from .batch_norm_table import finish
from .batch_norm_table import prepare as make_table
from .sums import sum_parts

PROGRAMS = 2112  # sixteen for every multiprocessor of an H200


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


@ByLayout
@moves("y_ptr", "partial_ptr")
def norm_act_kernel(
    x_ptr,
    table_ptr,
    y_ptr,
    partial_ptr,  # [image][share][channels], of act(z); may be None
    shares,
    pixels,
    channels,
    x_stride_n,
    x_stride_c,
    x_stride_p,
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
    scale = tl.load(table_ptr + c, mask=c < channels, other=0.0)
    shift = tl.load(table_ptr + channels + c, mask=c < channels, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        y, _ = activated(scale * x + shift, ACTIVATION)
        if partial_ptr is not None:
            total += tl.where(inside, y, 0.0)
        to = y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c
        tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(to, tl.sum(total, axis=0), mask=channel < channels)


@ByLayout
@moves("y_ptr", "partial_ptr")
def norm_act_sums_kernel(
    grad_ptr,
    x_ptr,
    table_ptr,
    gate_ptr,  # may be None, as y_ptr; of y, BY_IMAGE only
    y_ptr,
    partial_ptr,  # [image][share][2][channels], or BY_IMAGE [image][share][5][channels]
    shares,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    BY_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    scale = tl.load(table_ptr + c, mask=c < channels, other=0.0)
    shift = tl.load(table_ptr + channels + c, mask=c < channels, other=0.0)
    mean = tl.load(table_ptr + 2 * channels + c, mask=c < channels, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + n * channels + c, mask=c < channels, other=0.0)
    of_dz = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    if BY_IMAGE:
        of_gate = tl.zeros((BLOCK_C,), SUM_TYPE)
        of_slope = tl.zeros((BLOCK_C,), SUM_TYPE)
        of_slope_product = tl.zeros((BLOCK_C,), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        at = grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c
        dz = tl.load(at, mask=inside, other=0.0).to(SUM_TYPE)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        y, of_z = activated(scale * x + shift, ACTIVATION)
        if BY_IMAGE:
            of_one = tl.where(inside, of_z, 0.0)
            of_gate += tl.sum(tl.where(inside, dz * y, 0.0), axis=0)
            of_slope += tl.sum(of_one, axis=0)
            of_slope_product += tl.sum(of_one * (x - mean), axis=0)
        dz = tl.where(inside, dz * of_z, 0.0)
        of_dz += dz
        of_product += dz * (x - mean)
        if y_ptr is not None:
            if gate_ptr is not None:
                y = y * gate
            to = y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c
            tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)
    of_channel = channel < channels
    if BY_IMAGE:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * 5 * channels + channel
        tl.store(to, of_gate, mask=of_channel)
        tl.store(to + channels, tl.sum(of_dz, axis=0), mask=of_channel)
        tl.store(to + 2 * channels, of_slope, mask=of_channel)
        tl.store(to + 3 * channels, tl.sum(of_product, axis=0), mask=of_channel)
        tl.store(to + 4 * channels, of_slope_product, mask=of_channel)
    else:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(to, tl.sum(of_dz, axis=0), mask=of_channel)
        tl.store(to + channels, tl.sum(of_product, axis=0), mask=of_channel)


@ByLayout
@moves("dx_ptr", "partial_ptr")
def norm_act_bwd_kernel(
    grad_ptr,  # may be None: dx without its term
    x_ptr,
    table_ptr,
    gate_ptr,  # may be None, as all that follow up to dx_ptr
    offset_ptr,
    line_ptr,  # slope and constant, [2][channels]
    plus_ptr,
    dx_ptr,
    partial_ptr,  # [image][share][channels], of dx as it is stored; may be None
    shares,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    plus_stride_n,
    plus_stride_c,
    plus_stride_p,
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
    scale = tl.load(table_ptr + c, mask=c < channels, other=0.0)
    shift = tl.load(table_ptr + channels + c, mask=c < channels, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + n * channels + c, mask=c < channels, other=0.0)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + n * channels + c, mask=c < channels, other=0.0)
    if line_ptr is not None:
        mean = tl.load(table_ptr + 2 * channels + c, mask=c < channels, other=0.0)
        slope = tl.load(line_ptr + c, mask=c < channels, other=0.0)
        constant = tl.load(line_ptr + channels + c, mask=c < channels, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        dx = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
        if grad_ptr is not None:
            at = grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c
            dz = tl.load(at, mask=inside, other=0.0).to(SUM_TYPE)
            if gate_ptr is not None:
                dz *= gate
            if offset_ptr is not None:
                dz += offset
            _, of_z = activated(scale * x + shift, ACTIVATION)
            dx = scale * (dz * of_z)
        if line_ptr is not None:
            dx += slope * (x - mean) + constant
        if plus_ptr is not None:
            at = plus_ptr + n * plus_stride_n + p * plus_stride_p + c * plus_stride_c
            dx += tl.load(at, mask=inside, other=0.0).to(SUM_TYPE)
        to = dx_ptr + n * dx_stride_n + p * dx_stride_p + c * dx_stride_c
        stored = dx.to(dx_ptr.dtype.element_ty)
        tl.store(to, stored, mask=inside)
        if partial_ptr is not None:
            total += tl.where(inside, stored.to(SUM_TYPE), 0.0)
    if partial_ptr is not None:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(to, tl.sum(total, axis=0), mask=channel < channels)


KERNELS = (moments_kernel, norm_act_kernel, norm_act_sums_kernel, norm_act_bwd_kernel)
_NO_STRIDES = 0, 0, 0

__all__ = ["backward_images", "backward_input", "backward_sums", "finish", "forward", "prepare"]


def prepare(
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    table: Tensor,
    eps: float,
) -> None:
    """By the moments of x, or by mean and variance."""
    if x is None:
        return make_table(None, (mean, variance), weight, bias, table, (1, 1, 1), eps)
    images, pixels, (strides,) = walk([x])
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = scratch((grid[0], 2, channels), table.dtype, x.device)
    with torch.cuda.device_of(x):
        moments_kernel.of(x.stride(1) == 1)[grid](x, partial, shares, pixels, channels, *strides, **tile)
    make_table(partial, (None, None), weight, bias, table, (shares, pixels, tile["BLOCK_P"]), eps)


def forward(x: Tensor, c: Any, activation: str | None, y: Tensor, means: Tensor | None = None) -> None:
    """c: `Coefficients` of ops/_batch_norm.py. y may be x. means: (N, C), of act(z)."""
    if x.numel() == 0:
        if means is not None:
            means.zero_()
        return
    images, pixels, strides = _images([x, y], apart=means is not None)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = None if means is None else scratch((images, shares, channels), means.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_kernel.of(x.stride(1) == 1)[grid](
            *(x, c.table, y, partial, shares, pixels, channels, *strides), ACTIVATION=activation, **tile
        )
    if partial is not None:
        sum_parts(partial, [means], pixels=pixels)


def backward_sums(grad: Tensor, x: Tensor, c: Any, activation: str | None, ends: Any, y: Tensor | None = None) -> None:
    """Without gates and offsets: the sums of dz and of dz * (x - mean), for their ends, and y = act(z)."""
    parts = _sums(grad, x, c, activation, y, 2) if x.numel() else torch.zeros_like(c.table[None, :2])
    finish(parts, c, ends)


def backward_images(
    grad: Tensor, x: Tensor, c: Any, activation: str | None, sums: Tensor, y: Tensor | None = None
) -> None:
    """sums: (N, 5, C), as in csrc/include/batch_norm_act.h; y = act(z) * gate."""
    if x.numel():
        parts = _sums(grad, x, c, activation, y, 5)
        sum_parts(parts.view(len(x), -1, 5 * x.shape[1]), [sums])


def _sums(grad: Tensor, x: Tensor, c: Any, activation: str | None, y: Tensor | None, count: int) -> Tensor:
    images, pixels, strides = _images([grad, x, y], apart=count == 5)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = scratch((grid[0], count, channels), c.table.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_sums_kernel.of(x.stride(1) == 1)[grid](
            *(grad, x, c.table, c.gate, y, partial, shares, pixels, channels, *strides),
            BY_IMAGE=count == 5,
            ACTIVATION=activation,
            **tile,
        )
    return partial


def backward_input(
    grad: Tensor | None,
    x: Tensor,
    c: Any,
    activation: str | None,
    line: Tensor | None,
    dx: Tensor,
    plus: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """dx may be grad or plus. sums: (C,), of dx as it is stored."""
    if x.numel() == 0:
        if sums is not None:
            sums.zero_()
        return
    images, pixels, strides = _images([grad, x, plus, dx], apart=c.gate is not None or c.offset is not None)
    grid, shares, tile = _grid(x, images, pixels)
    partial = None if sums is None else scratch((grid[0], x.shape[1]), sums.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_bwd_kernel.of(x.stride(1) == 1)[grid](
            *(grad, x, c.table, c.gate, c.offset, line, plus, dx, partial, shares, pixels, x.shape[1], *strides),
            ACTIVATION=activation,
            **tile,
        )
    if partial is not None:
        sum_parts(partial[None], [sums])


def _images(tensors: list[Tensor | None], apart: bool) -> tuple[int, int, list[int]]:
    """As `walk`, with the strides of all in one list, 0 where there is no tensor; apart: images that have gates or sums
    of their own stay images."""
    given = [t for t in tensors if t is not None]
    if apart:
        images, pixels, strides = len(given[0]), pixel_count(given[0]), [strides_of(t) for t in given]
    else:
        images, pixels, strides = walk(given)
    found = iter(strides)
    return images, pixels, [stride for t in tensors for stride in (_NO_STRIDES if t is None else next(found))]


def _grid(x: Tensor, images: int, pixels: int) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """And the shares of an image, and the constants of a kernel."""
    tile, channels = map_tile(x), x.shape[1]
    columns = triton.cdiv(channels, tile.BLOCK_C)
    shares = max(1, min(triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(PROGRAMS, images * columns)))
    return (images * shares, columns), shares, {"SUM_TYPE": sum_type(x), **tile._asdict()}
