"""MogaNet's gate: the product of two branches through SiLU, each twice through it if DOUBLED.

Tensors that are dense in one order are taken as lines of memory, whatever their layout. The backward pass computes the
activations again. Results may take the place of what they are computed from.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import Tile, load_map, map_tile, pixels_of_block, silu_and_slope, store_map, sum_type, walk
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

MOST_PROGRAMS = 1056  # along the pixels, each with a row of partial sums: eight on every multiprocessor of an H200
LINE_TILE = Tile(1024, 1, num_warps=4)  # a thread has a vector of each half tensor


@triton.jit
def _activated(x, DOUBLED: tl.constexpr):
    y, slope = silu_and_slope(x)
    if DOUBLED:
        y, outer = silu_and_slope(y)
        slope *= outer
    return y, slope


@ByLayout
@moves("y_ptr")
def moga_gate_kernel(
    gate_ptr,
    value_ptr,
    y_ptr,
    pixels,
    channels,
    gate_stride_n,
    gate_stride_c,
    gate_stride_p,
    value_stride_n,
    value_stride_c,
    value_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    DOUBLED: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    gate = load_map(gate_ptr, n, p, c, gate_stride_n, gate_stride_p, gate_stride_c, inside).to(SUM_TYPE)
    value = load_map(value_ptr, n, p, c, value_stride_n, value_stride_p, value_stride_c, inside).to(SUM_TYPE)
    gate, _ = _activated(gate, DOUBLED)
    value, _ = _activated(value, DOUBLED)
    store_map(y_ptr, gate * value, n, p, c, y_stride_n, y_stride_p, y_stride_c, inside)


@ByLayout
@moves("dgate_ptr", "dvalue_ptr", "y_ptr", "sums_ptr")
def moga_gate_bwd_kernel(
    grad_ptr,
    gate_ptr,
    value_ptr,
    dgate_ptr,  # may be None
    dvalue_ptr,  # may be None
    y_ptr,  # what the forward pass gave; may be None
    sums_ptr,  # [program][2][channels]: of dgate and of dvalue; may be None
    blocks,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    gate_stride_n,
    gate_stride_c,
    gate_stride_p,
    value_stride_n,
    value_stride_c,
    value_stride_p,
    dgate_stride_n,
    dgate_stride_c,
    dgate_stride_p,
    dvalue_stride_n,
    dvalue_stride_c,
    dvalue_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    DOUBLED: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    of_gate = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_value = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        grad = load_map(grad_ptr, n, p, c, grad_stride_n, grad_stride_p, grad_stride_c, inside).to(SUM_TYPE)
        gate = load_map(gate_ptr, n, p, c, gate_stride_n, gate_stride_p, gate_stride_c, inside).to(SUM_TYPE)
        value = load_map(value_ptr, n, p, c, value_stride_n, value_stride_p, value_stride_c, inside).to(SUM_TYPE)
        gate, gate_slope = _activated(gate, DOUBLED)
        value, value_slope = _activated(value, DOUBLED)
        if y_ptr is not None:
            store_map(y_ptr, gate * value, n, p, c, y_stride_n, y_stride_p, y_stride_c, inside)
        dgate, dvalue = grad * value * gate_slope, grad * gate * value_slope
        if dgate_ptr is not None:
            store_map(dgate_ptr, dgate, n, p, c, dgate_stride_n, dgate_stride_p, dgate_stride_c, inside)
        if dvalue_ptr is not None:
            store_map(dvalue_ptr, dvalue, n, p, c, dvalue_stride_n, dvalue_stride_p, dvalue_stride_c, inside)
        if sums_ptr is not None:
            of_gate += dgate
            of_value += dvalue
    if sums_ptr is not None:
        own = sums_ptr + program.to(tl.int64) * 2 * channels + channel
        tl.store(own, tl.sum(of_gate, axis=0), mask=channel < channels)
        tl.store(own + channels, tl.sum(of_value, axis=0), mask=channel < channels)


KERNELS = (moga_gate_kernel, moga_gate_bwd_kernel)


def gate(gate: Tensor, value: Tensor, doubled: bool, y: Tensor) -> None:
    """y may be gate or value."""
    if gate.numel() == 0:
        return
    tensors, (images, pixels, strides), tile = _walked([gate, value, y])
    grid = images * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(tensors[0].shape[1], tile.BLOCK_C)
    constants = {"DOUBLED": doubled, "SUM_TYPE": sum_type(gate), **tile._asdict()}
    with torch.cuda.device_of(gate):
        moga_gate_kernel.of(tensors[0].stride(1) == 1)[grid](
            *tensors, pixels, tensors[0].shape[1], *strides, **constants
        )


def gate_backward(
    grad: Tensor,
    gate: Tensor,
    value: Tensor,
    doubled: bool,
    dgate: Tensor | None,
    dvalue: Tensor | None,
    y: Tensor | None = None,
    sums: Sequence[Tensor | None] = (None, None),
) -> None:
    """dgate and dvalue may be gate and value; y as `gate` has it; sums: of dgate and dvalue over the pixels."""
    summed = any(t is not None for t in sums)
    if gate.numel() == 0:
        for t in sums:
            if t is not None:
                t.zero_()
        return
    tensors, (images, pixels, strides), tile = _walked([grad, gate, value, dgate, dvalue, y], lines=not summed)
    channels = tensors[0].shape[1]
    blocks, columns = images * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_C)
    programs, partial = blocks, None
    if summed:
        programs = min(blocks, triton.cdiv(MOST_PROGRAMS, columns))
        partial = scratch((programs, 2, channels), torch.promote_types(gate.dtype, torch.float32), gate.device)
    constants = {"DOUBLED": doubled, "SUM_TYPE": sum_type(gate), **tile._asdict()}
    with torch.cuda.device_of(gate):
        moga_gate_bwd_kernel.of(tensors[0].stride(1) == 1)[(programs, columns)](
            *tensors, partial, blocks, pixels, channels, *strides, **constants
        )
        if partial is not None:
            sum_parts(partial.view(1, programs, -1), sums)


def _walked(tensors: list[Tensor | None], lines: bool = True) -> tuple[list[Any], tuple[int, int, list[int]], Tile]:
    """The tensors to walk, the first of which is there, images, pixels and strides, and the tile."""
    tensors = _lines(tensors) if lines else tensors
    present = [t for t in tensors if t is not None]
    images, pixels, found = walk(present)
    strides = iter(found)
    flat = [stride for t in tensors for stride in (next(strides) if t is not None else (0, 0, 0))]
    tile = LINE_TILE if present[0].shape[1] == 1 else map_tile(present[0])
    return tensors, (images, pixels, flat), tile


def _lines(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Each as one line of pixels, if that gives all of them one order."""
    for form in (torch.contiguous_format, torch.channels_last):
        if all(t is None or t.is_contiguous(memory_format=form) for t in tensors):
            return [None if t is None else t.as_strided((1, 1, 1, t.numel()), (t.numel(),) * 3 + (1,)) for t in tensors]
    return tensors
