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
from ._maps import (
    IMAGE_PROGRAMS,
    Tile,
    activated,
    blocks_of,
    channels_of_program,
    load_channels,
    load_map,
    map_tile,
    pixels_from,
    share_of_image,
    store_map,
    store_sums,
    sum_type,
    walk,
)
from ._moves import moves
from ._specialize import ByLayout
from .batch_norm_table import finish
from .batch_norm_table import prepare as make_table
from .sums import sum_parts

# By counting: no GPU has measured it. With two, registers for a third fewer programs at a time (64 to 94 on sm_90).
ACTIVATING_STAGES = tl.constexpr(1)


@ByLayout
@moves("partial_ptr")
def moments_kernel(
    x_ptr,
    partial_ptr,  # [image][share][2][channels]
    shares,
    pixels,
    channels,
    x_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    mean = tl.zeros((1, BLOCK_C), SUM_TYPE)
    squares = tl.zeros((1, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        more = tl.minimum(end - first, BLOCK_P).to(SUM_TYPE)
        of_tile = tl.sum(x, axis=0)[None, :] / more
        difference = tl.where(inside, x - of_tile, 0.0)
        share = more / (first - begin + more)
        moved = of_tile - mean
        squares += tl.sum(difference * difference, axis=0)[None, :] + moved * moved * share * (first - begin)
        mean += moved * share
    own = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(own, mean, mask=c < channels)
    tl.store(own + channels, squares, mask=c < channels)


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
    x_strides,
    y_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    scale, shift = load_channels(table_ptr, c, channels), load_channels(table_ptr + channels, c, channels)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=ACTIVATING_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        y, _ = activated(scale * x + shift, ACTIVATION)
        if partial_ptr is not None:
            total += tl.where(inside, y, 0.0)
        store_map(y_ptr, y_strides, n, p, c, y, inside)
    if partial_ptr is not None:
        store_sums(partial_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


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
    grad_strides,
    x_strides,
    y_strides,
    BY_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    scale, shift = load_channels(table_ptr, c, channels), load_channels(table_ptr + channels, c, channels)
    mean = load_channels(table_ptr + 2 * channels, c, channels)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + n * channels, c, channels)
    of_dz = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    if BY_IMAGE:
        of_gate = tl.zeros((1, BLOCK_C), SUM_TYPE)
        of_slope = tl.zeros((1, BLOCK_C), SUM_TYPE)
        of_slope_product = tl.zeros((1, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=ACTIVATING_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        dz = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        y, of_z = activated(scale * x + shift, ACTIVATION)
        if BY_IMAGE:
            of_one = tl.where(inside, of_z, 0.0)
            of_gate += tl.sum(tl.where(inside, dz * y, 0.0), axis=0)[None, :]
            of_slope += tl.sum(of_one, axis=0)[None, :]
            of_slope_product += tl.sum(of_one * (x - mean), axis=0)[None, :]
        dz = tl.where(inside, dz * of_z, 0.0)
        of_dz += dz
        of_product += dz * (x - mean)
        if y_ptr is not None:
            if gate_ptr is not None:
                y = y * gate
            store_map(y_ptr, y_strides, n, p, c, y, inside)
    if BY_IMAGE:
        own = partial_ptr + tl.program_id(0).to(tl.int64) * 5 * channels
        tl.store(own + c, of_gate, mask=c < channels)
        store_sums(own + channels, of_dz, c, channels)
        tl.store(own + 2 * channels + c, of_slope, mask=c < channels)
        store_sums(own + 3 * channels, of_product, c, channels)
        tl.store(own + 4 * channels + c, of_slope_product, mask=c < channels)
    else:
        own = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels
        store_sums(own, of_dz, c, channels)
        store_sums(own + channels, of_product, c, channels)


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
    x_strides,
    grad_strides,
    plus_strides,
    dx_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    scale, shift = load_channels(table_ptr, c, channels), load_channels(table_ptr + channels, c, channels)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + n * channels, c, channels)
    if offset_ptr is not None:
        offset = load_channels(offset_ptr + n * channels, c, channels)
    if line_ptr is not None:
        mean = load_channels(table_ptr + 2 * channels, c, channels)
        slope, constant = load_channels(line_ptr, c, channels), load_channels(line_ptr + channels, c, channels)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=ACTIVATING_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        dx = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
        if grad_ptr is not None:
            dz = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
            if gate_ptr is not None:
                dz *= gate
            if offset_ptr is not None:
                dz += offset
            _, of_z = activated(scale * x + shift, ACTIVATION)
            dx = scale * (dz * of_z)
        if line_ptr is not None:
            dx += slope * (x - mean) + constant
        if plus_ptr is not None:
            dx += load_map(plus_ptr, plus_strides, n, p, c, inside).to(SUM_TYPE)
        store_map(dx_ptr, dx_strides, n, p, c, dx, inside)
        if partial_ptr is not None:
            total += tl.where(inside, dx.to(dx_ptr.dtype.element_ty).to(SUM_TYPE), 0.0)
    if partial_ptr is not None:
        store_sums(partial_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


KERNELS = (moments_kernel, norm_act_kernel, norm_act_sums_kernel, norm_act_bwd_kernel)

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
    images, pixels, strides = walk([x])
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = scratch((grid[0], 2, channels), table.dtype, x.device)
    with torch.cuda.device_of(x):
        moments_kernel.of(x.stride(1) == 1)[grid](
            x, partial, shares, pixels, channels, *strides, SUM_TYPE=sum_type(x), **tile._asdict()
        )
    make_table(partial, (None, None), weight, bias, table, (shares, pixels, tile.BLOCK_P), eps)


def forward(x: Tensor, c: Any, activation: str | None, y: Tensor, means: Tensor | None = None) -> None:
    """c: `Coefficients` of ops/_batch_norm.py. y may be x. means: (N, C), of act(z)."""
    if x.numel() == 0:
        if means is not None:
            means.zero_()
        return
    images, pixels, strides = walk([x, y], apart=means is not None)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = None if means is None else scratch((images, shares, channels), means.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_kernel.of(x.stride(1) == 1)[grid](
            *(x, c.table, y, partial, shares, pixels, channels, *strides),
            ACTIVATION=activation,
            SUM_TYPE=sum_type(x),
            **tile._asdict(),
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
    images, pixels, strides = walk([grad, x, y], apart=count == 5)
    # Five sums of 16 values would take registers for half as many programs at a time.
    grid, shares, tile = _grid(x, images, pixels, fewer=2 if count == 5 else 1)
    channels = x.shape[1]
    partial = scratch((grid[0], count, channels), c.table.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_sums_kernel.of(x.stride(1) == 1)[grid](
            *(grad, x, c.table, c.gate, y, partial, shares, pixels, channels, *strides),
            BY_IMAGE=count == 5,
            ACTIVATION=activation,
            SUM_TYPE=sum_type(x),
            **tile._asdict(),
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
    images, pixels, (own, *strides) = walk([x, grad, plus, dx], apart=c.gate is not None or c.offset is not None)
    grid, shares, tile = _grid(x, images, pixels)
    partial = None if sums is None else scratch((grid[0], x.shape[1]), sums.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_bwd_kernel.of(x.stride(1) == 1)[grid](
            *(grad, x, c.table, c.gate, c.offset, line, plus, dx, partial, shares, pixels, x.shape[1], own, *strides),
            ACTIVATION=activation,
            SUM_TYPE=sum_type(x),
            **tile._asdict(),
        )
    if partial is not None:
        sum_parts(partial[None], [sums])


def _grid(x: Tensor, images: int, pixels: int, fewer: int = 1) -> tuple[tuple[int, int], int, Tile]:
    """And the shares of an image, and the tile, which has so many times fewer values."""
    tile = map_tile(x)
    tile = tile._replace(BLOCK_P=max(1, tile.BLOCK_P // fewer))
    blocks, columns = blocks_of(images, pixels, x.shape[1], tile)
    shares = max(1, min(blocks // images, triton.cdiv(IMAGE_PROGRAMS, images * columns)))
    return (images * shares, columns), shares, tile
