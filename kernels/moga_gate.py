"""MogaNet's gate: the product of two branches through SiLU, each twice through it if DOUBLED.

Tensors that are dense in one order are taken as lines of memory, whatever their layout. The backward pass computes the
activations again. Results may take the place of what they are computed from.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._maps import Tile, map_tile, pixels_of_block, silu_and_slope, sum_type, walk
from ._moves import moves
from ._specialize import ByLayout

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
    gate_at = gate_ptr + n * gate_stride_n + p * gate_stride_p + c * gate_stride_c
    value_at = value_ptr + n * value_stride_n + p * value_stride_p + c * value_stride_c
    gate, _ = _activated(tl.load(gate_at, mask=inside, other=0.0).to(SUM_TYPE), DOUBLED)
    value, _ = _activated(tl.load(value_at, mask=inside, other=0.0).to(SUM_TYPE), DOUBLED)
    to = y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c
    tl.store(to, (gate * value).to(y_ptr.dtype.element_ty), mask=inside)


@ByLayout
@moves("dgate_ptr", "dvalue_ptr")
def moga_gate_bwd_kernel(
    grad_ptr,
    gate_ptr,
    value_ptr,
    dgate_ptr,  # may be None
    dvalue_ptr,  # may be None
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
    DOUBLED: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    grad_at = grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c
    gate_at = gate_ptr + n * gate_stride_n + p * gate_stride_p + c * gate_stride_c
    value_at = value_ptr + n * value_stride_n + p * value_stride_p + c * value_stride_c
    grad = tl.load(grad_at, mask=inside, other=0.0).to(SUM_TYPE)
    gate, gate_slope = _activated(tl.load(gate_at, mask=inside, other=0.0).to(SUM_TYPE), DOUBLED)
    value, value_slope = _activated(tl.load(value_at, mask=inside, other=0.0).to(SUM_TYPE), DOUBLED)
    if dgate_ptr is not None:
        to = dgate_ptr + n * dgate_stride_n + p * dgate_stride_p + c * dgate_stride_c
        tl.store(to, (grad * value * gate_slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    if dvalue_ptr is not None:
        to = dvalue_ptr + n * dvalue_stride_n + p * dvalue_stride_p + c * dvalue_stride_c
        tl.store(to, (grad * gate * value_slope).to(dvalue_ptr.dtype.element_ty), mask=inside)


KERNELS = (moga_gate_kernel, moga_gate_bwd_kernel)


def gate(gate: Tensor, value: Tensor, doubled: bool, y: Tensor) -> None:
    """y may be gate or value."""
    _launch(moga_gate_kernel, [gate, value, y], doubled)


def gate_backward(
    grad: Tensor, gate: Tensor, value: Tensor, doubled: bool, dgate: Tensor | None, dvalue: Tensor | None
) -> None:
    """dgate and dvalue may be gate and value."""
    _launch(moga_gate_bwd_kernel, [grad, gate, value, dgate, dvalue], doubled)


def _launch(kernel: ByLayout, tensors: list[Tensor | None], doubled: bool) -> None:
    first = tensors[0]
    if first is None or first.numel() == 0:
        return
    tensors = _lines(tensors)
    present = [t for t in tensors if t is not None]
    (images, pixels, strides), channels = walk(present), present[0].shape[1]
    tile = LINE_TILE if channels == 1 else map_tile(present[0])
    grid = images * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_C)
    found = iter(strides)
    flat = [stride for t in tensors for stride in (next(found) if t is not None else (0, 0, 0))]
    with torch.cuda.device_of(first):
        kernel.of(present[0].stride(1) == 1)[grid](
            *tensors, pixels, channels, *flat, DOUBLED=doubled, SUM_TYPE=sum_type(first), **tile._asdict()
        )


def _lines(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Each as one line of pixels, if that gives all of them one order."""
    for form in (torch.contiguous_format, torch.channels_last):
        if all(t is None or t.is_contiguous(memory_format=form) for t in tensors):
            return [None if t is None else t.as_strided((1, 1, 1, t.numel()), (t.numel(),) * 3 + (1,)) for t in tensors]
    return tensors
