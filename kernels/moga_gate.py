"""MogaNet's gate: the product of two branches through SiLU, each twice through it if DOUBLED.

Tensors that are dense in one order are taken as lines of memory, whatever their layout. The backward pass computes the
activations again. Results may take the place of what they are computed from.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import (
    LOOP_STAGES,
    MOST_ROWS,
    PROGRAMS,
    Tile,
    blocks_of,
    channels_of_program,
    load_map,
    map_tile,
    pixels_of_block,
    share_of_blocks,
    silu_and_slope,
    store_map,
    store_sums,
    sum_type,
    walk,
)
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

LINE_TILE = Tile(1024, 1, num_warps=4)  # a thread has a vector of each half tensor; not measured


@triton.jit
def _silu(x, DOUBLED: tl.constexpr):
    """Once or twice, and the slope."""
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
    gate_strides,
    value_strides,
    y_strides,
    DOUBLED: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    inside = (p < pixels) & (c < channels)
    gate, _ = _silu(load_map(gate_ptr, gate_strides, n, p, c, inside).to(SUM_TYPE), DOUBLED)
    value, _ = _silu(load_map(value_ptr, value_strides, n, p, c, inside).to(SUM_TYPE), DOUBLED)
    store_map(y_ptr, y_strides, n, p, c, gate * value, inside)


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
    grad_strides,
    gate_strides,
    value_strides,
    dgate_strides,
    dvalue_strides,
    y_strides,
    DOUBLED: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = channels_of_program(BLOCK_C)
    of_gate = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_value = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    begin, end = share_of_blocks(blocks)
    for block in tl.range(begin, end, num_stages=LOOP_STAGES):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        grad = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
        gate, gate_slope = _silu(load_map(gate_ptr, gate_strides, n, p, c, inside).to(SUM_TYPE), DOUBLED)
        value, value_slope = _silu(load_map(value_ptr, value_strides, n, p, c, inside).to(SUM_TYPE), DOUBLED)
        if y_ptr is not None:
            store_map(y_ptr, y_strides, n, p, c, gate * value, inside)
        dgate, dvalue = grad * value * gate_slope, grad * gate * value_slope
        if dgate_ptr is not None:
            store_map(dgate_ptr, dgate_strides, n, p, c, dgate, inside)
        if dvalue_ptr is not None:
            store_map(dvalue_ptr, dvalue_strides, n, p, c, dvalue, inside)
        if sums_ptr is not None:
            of_gate += dgate
            of_value += dvalue
    if sums_ptr is not None:
        own = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * channels
        store_sums(own, of_gate, c, channels)
        store_sums(own + channels, of_value, c, channels)


KERNELS = (moga_gate_kernel, moga_gate_bwd_kernel)


def gate(gate: Tensor, value: Tensor, doubled: bool, y: Tensor) -> None:
    """y may be gate or value."""
    if gate.numel() == 0:
        return
    tensors = _lines([gate, value, y])
    images, pixels, strides = walk(tensors)
    first = tensors[0]
    tile, channels = _tile(first), first.shape[1]
    constants = {"DOUBLED": doubled, "SUM_TYPE": sum_type(gate), **tile._asdict()}
    with torch.cuda.device_of(gate):
        moga_gate_kernel.of(first.stride(1) == 1)[blocks_of(images, pixels, channels, tile)](
            *tensors, pixels, channels, *strides, **constants
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
    given = [grad, gate, value, dgate, dvalue, y]
    tensors = given if summed else _lines(given)
    images, pixels, strides = walk(tensors)
    first = tensors[0]
    tile, channels = _tile(first), first.shape[1]
    constants = {"DOUBLED": doubled, "SUM_TYPE": sum_type(gate), **tile._asdict()}
    blocks, columns = blocks_of(images, pixels, channels, tile)
    programs, partial = blocks, None
    if summed:
        programs = min(blocks, MOST_ROWS, triton.cdiv(PROGRAMS, columns))
        partial = scratch((programs, 2, channels), torch.promote_types(gate.dtype, torch.float32), gate.device)
    with torch.cuda.device_of(gate):
        moga_gate_bwd_kernel.of(first.stride(1) == 1)[(programs, columns)](
            *tensors, partial, blocks, pixels, channels, *strides, **constants
        )
        if partial is not None:
            sum_parts(partial.view(1, programs, -1), sums)


def _tile(t: Tensor) -> Tile:
    return LINE_TILE if t.shape[1] == 1 else map_tile(t)


def _lines(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Each as one line of pixels, if that gives all of them one order."""
    for form in (torch.contiguous_format, torch.channels_last):
        if all(t is None or t.is_contiguous(memory_format=form) for t in tensors):
            return [None if t is None else t.as_strided((1, 1, 1, t.numel()), (t.numel(),) * 3 + (1,)) for t in tensors]
    return tensors
