"""Batch norm with an activation behind it, in passes: y = act(z) * gate, z = scale * x + shift, of every channel.

Moments are those of a tile about its own mean, merged: within a program, then over programs. With dz = (dy * gate +
offset) * act'(z), the sums of the backward pass are those of dz and of dz * (x - mean), and dx = scale * dz + slope *
(x - mean) + constant. Gate and offset are an image's. A program takes a share of an image; where there are neither
gates nor sums by image, the images of a channels_last batch are one. The order of all sums depends on the shape only.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import (
    IMAGE_PROGRAMS,
    LOOP_STAGES,
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
from ._specialize import ByLayout, counted


class MergeTile(NamedTuple):
    BLOCK_R: int  # parts
    BLOCK_C: int
    num_warps: int


# Launch choices, by counting: no GPU has measured them.
MERGE_TILE = MergeTile(64, 32, num_warps=4)  # 16 values of a thread, lines of 128 bytes
ACTIVATING_STAGES = tl.constexpr(1)  # with two, registers for a third fewer programs at a time (64 to 94 on sm_90)


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
    for first in tl.range(begin, end, BLOCK_P, num_stages=LOOP_STAGES):
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
    x_strides,
    grad_strides,
    y_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    scale, shift = load_channels(scale_ptr, c, channels), load_channels(shift_ptr, c, channels)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + n * channels, c, channels)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=ACTIVATING_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        y, _ = activated(scale * x + shift, ACTIVATION)
        if partial_ptr is not None:
            term = y
            if grad_ptr is not None:
                term = y * load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
            total += tl.where(inside, term, 0.0)
        if y_ptr is not None:
            if gate_ptr is not None:
                y = y * gate
            store_map(y_ptr, y_strides, n, p, c, y, inside)
    if partial_ptr is not None:
        store_sums(partial_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


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
    grad_strides,
    x_strides,
    dx_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    scale, shift = load_channels(scale_ptr, c, channels), load_channels(shift_ptr, c, channels)
    mean = load_channels(mean_ptr, c, channels)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + n * channels, c, channels)
    if offset_ptr is not None:
        offset = load_channels(offset_ptr + n * channels, c, channels)
    if dx_ptr is not None:
        slope, constant = load_channels(line_ptr, c, channels), load_channels(line_ptr + channels, c, channels)
    of_dz = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=ACTIVATING_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        dz = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
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
            store_map(dx_ptr, dx_strides, n, p, c, dx, inside)
    if partial_ptr is not None:
        own = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels
        store_sums(own, of_dz, c, channels)
        store_sums(own + channels, of_product, c, channels)


KERNELS = (moments_kernel, merge_moments_kernel, norm_act_kernel, norm_act_bwd_kernel)


def moments(x: Tensor, mean: Tensor, variance: Tensor) -> None:
    images, pixels, strides = walk([x])
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = scratch((grid[0], 2, channels), mean.dtype, x.device)
    with torch.cuda.device_of(x):
        moments_kernel.of(x.stride(1) == 1)[grid](
            x, partial, shares, pixels, channels, *strides, SUM_TYPE=sum_type(x), **tile._asdict()
        )
        merge_moments_kernel[(triton.cdiv(channels, MERGE_TILE.BLOCK_C),)](
            partial, mean, variance, grid[0], shares, pixels, channels, tile.BLOCK_P, **MERGE_TILE._asdict()
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
    images, pixels, strides = walk([x, grad, y], apart=c.gate is not None or sums is not None)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = None if sums is None else scratch((images, shares, channels), sums.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_kernel.of(x.stride(1) == 1)[grid](
            *(x, grad, c.scale, c.shift, c.gate, y, partial, shares, pixels, channels, *strides),
            ACTIVATION=activation,
            SUM_TYPE=sum_type(x),
            **tile._asdict(),
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
    images, pixels, strides = walk([grad, x, dx], apart=c.gate is not None or c.offset is not None)
    grid, shares, tile = _grid(x, images, pixels)
    channels = x.shape[1]
    partial = None if sums is None else scratch((grid[0], 2, channels), sums.dtype, x.device)
    with torch.cuda.device_of(x):
        norm_act_bwd_kernel.of(x.stride(1) == 1)[grid](
            *(grad, x, c.scale, c.shift, c.mean, c.gate, c.offset, line, dx, partial),
            *(shares, pixels, channels, *strides),
            ACTIVATION=activation,
            SUM_TYPE=sum_type(x),
            **tile._asdict(),
        )
    if partial is not None and sums is not None:
        torch.sum(partial, 0, out=sums)


def _grid(x: Tensor, images: int, pixels: int) -> tuple[tuple[int, int], int, Tile]:
    """And the shares of an image, and the tile."""
    tile = map_tile(x)
    blocks, columns = blocks_of(images, pixels, x.shape[1], tile)
    shares = max(1, min(blocks // images, triton.cdiv(IMAGE_PROGRAMS, images * columns)))
    return (images * shares, columns), shares, tile
