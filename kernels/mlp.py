"""What an MLP has between its products: the activation, and in the backward pass its slope.

Sums over pixels take two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import gelu_and_slope, map_tile, pixel_count, pixels_of_block, silu_and_slope, strides_of, sum_type
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

MOST_PROGRAMS = 528  # along the pixels, each with a row of partial sums


@triton.jit
def _hardswish_and_slope(x):
    y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    return y, tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x)."""
    if ACTIVATION == "gelu":
        return gelu_and_slope(x)
    elif ACTIVATION == "silu":
        return silu_and_slope(x)
    else:
        return _hardswish_and_slope(x)


@ByLayout
@moves("a_ptr")
def activate_kernel(
    u_ptr,
    a_ptr,
    pixels,
    channels,
    u_stride_n,
    u_stride_c,
    u_stride_p,
    a_stride_n,
    a_stride_c,
    a_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    u = tl.load(u_ptr + n * u_stride_n + p * u_stride_p + c * u_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    a, _ = _activated(u, ACTIVATION)
    tl.store(a_ptr + n * a_stride_n + p * a_stride_p + c * a_stride_c, a.to(a_ptr.dtype.element_ty), mask=inside)


@ByLayout
@moves("du_ptr", "a_ptr", "sums_ptr")
def activate_bwd_kernel(
    da_ptr,
    u_ptr,
    du_ptr,
    a_ptr,  # may be None
    sums_ptr,  # [program][channels]: of du; may be None
    blocks,
    pixels,
    channels,
    da_stride_n,
    da_stride_c,
    da_stride_p,
    u_stride_n,
    u_stride_c,
    u_stride_p,
    du_stride_n,
    du_stride_c,
    du_stride_p,
    a_stride_n,
    a_stride_c,
    a_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        da = tl.load(da_ptr + n * da_stride_n + p * da_stride_p + c * da_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        u = tl.load(u_ptr + n * u_stride_n + p * u_stride_p + c * u_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        a, slope = _activated(u, ACTIVATION)
        du = da * slope
        total += du
        to = du_ptr + n * du_stride_n + p * du_stride_p + c * du_stride_c
        tl.store(to, du.to(du_ptr.dtype.element_ty), mask=inside)
        if a_ptr is not None:
            to = a_ptr + n * a_stride_n + p * a_stride_p + c * a_stride_c
            tl.store(to, a.to(a_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        own = sums_ptr + program.to(tl.int64) * channels + channel
        tl.store(own, tl.sum(total, axis=0), mask=channel < channels)


KERNELS = (activate_kernel, activate_bwd_kernel)


def activate(u: Tensor, a: Tensor, activation: str) -> None:
    """a may be u."""
    if u.numel() == 0:
        return
    tile, pixels, channels = map_tile(u), pixel_count(u), u.shape[1]
    grid = len(u) * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_C)
    with torch.cuda.device_of(u):
        activate_kernel.of(u.stride(1) == 1)[grid](
            u,
            a,
            pixels,
            channels,
            *strides_of(u),
            *strides_of(a),
            ACTIVATION=activation,
            SUM_TYPE=sum_type(u),
            **tile._asdict(),
        )


def activate_backward(
    da: Tensor, u: Tensor, du: Tensor, a: Tensor | None, dbias: Tensor | None, activation: str
) -> None:
    """du = da * act'(u), a = act(u), dbias = the sum of du over the pixels. du may be da."""
    if u.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    tile, pixels, channels = map_tile(u), pixel_count(u), u.shape[1]
    blocks = len(u) * triton.cdiv(pixels, tile.BLOCK_P)
    grid = min(MOST_PROGRAMS, blocks), triton.cdiv(channels, tile.BLOCK_C)
    sums = None
    if dbias is not None:
        sums = scratch((grid[0], channels), torch.promote_types(u.dtype, torch.float32), u.device)
    strides = [stride for t in (da, u, du, a) for stride in ((0, 0, 0) if t is None else strides_of(t))]
    with torch.cuda.device_of(u):
        activate_bwd_kernel.of(u.stride(1) == 1)[grid](
            da,
            u,
            du,
            a,
            sums,
            blocks,
            pixels,
            channels,
            *strides,
            ACTIVATION=activation,
            SUM_TYPE=sum_type(u),
            **tile._asdict(),
        )
    if dbias is not None and sums is not None:
        sum_parts(sums[None], [dbias])
