"""The gates of HorNet's recursion, between products that are PyTorch's.

Sums over pixels take two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import (
    LOOP_STAGES,
    MOST_ROWS,
    PROGRAMS,
    blocks_of,
    channels_of_program,
    load_channels,
    load_map,
    map_tile,
    pixels_of_block,
    share_of_blocks,
    store_map,
    store_sums,
    sum_type,
    walk,
)
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts


@ByLayout
@moves("p_ptr")
def gate_kernel(
    u_ptr,
    bias_ptr,  # may be None
    q_ptr,
    p_ptr,
    pixels,
    channels,
    u_strides,
    q_strides,
    p_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    inside = (p < pixels) & (c < channels)
    u = load_map(u_ptr, u_strides, n, p, c, inside).to(SUM_TYPE)
    q = load_map(q_ptr, q_strides, n, p, c, inside).to(SUM_TYPE)
    if bias_ptr is not None:
        u += load_channels(bias_ptr, c, channels).to(SUM_TYPE)
    store_map(p_ptr, p_strides, n, p, c, u * q, inside)


@ByLayout
@moves("du_ptr", "dq_ptr", "sums_ptr")
def gate_bwd_kernel(
    dp_ptr,
    u_ptr,
    bias_ptr,  # may be None
    q_ptr,
    du_ptr,
    dq_ptr,
    sums_ptr,  # [program][channels]: the gradient of the bias; may be None
    blocks,
    pixels,
    channels,
    dp_strides,
    u_strides,
    q_strides,
    du_strides,
    dq_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = channels_of_program(BLOCK_C)
    bias = tl.zeros((1, BLOCK_C), SUM_TYPE)
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, c, channels).to(SUM_TYPE)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    begin, end = share_of_blocks(blocks)
    for block in tl.range(begin, end, num_stages=LOOP_STAGES):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        dp = load_map(dp_ptr, dp_strides, n, p, c, inside).to(SUM_TYPE)
        u = load_map(u_ptr, u_strides, n, p, c, inside).to(SUM_TYPE)
        q = load_map(q_ptr, q_strides, n, p, c, inside).to(SUM_TYPE)
        du = dp * q
        total += du
        store_map(du_ptr, du_strides, n, p, c, du, inside)
        store_map(dq_ptr, dq_strides, n, p, c, dp * (u + bias), inside)
    if sums_ptr is not None:
        store_sums(sums_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


KERNELS = (gate_kernel, gate_bwd_kernel)


def gate(u: Tensor, bias: Tensor | None, q: Tensor, p: Tensor) -> None:
    """p = (u + bias) * q; p may be u."""
    if p.numel() == 0:
        return
    tile, channels = map_tile(u), u.shape[1]
    images, pixels, strides = walk([u, q, p])
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(u):
        gate_kernel.of(u.stride(1) == 1)[blocks_of(images, pixels, channels, tile)](
            u, bias, q, p, pixels, channels, *strides, SUM_TYPE=sum_type(u), **tile._asdict()
        )


def gate_backward(
    dp: Tensor, u: Tensor, bias: Tensor | None, q: Tensor, du: Tensor, dq: Tensor, dbias: Tensor | None
) -> None:
    """du = dp * q, dq = dp * (u + bias), dbias = the sum of du over the pixels; du may be u."""
    if dp.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    tile, channels = map_tile(u), u.shape[1]
    images, pixels, strides = walk([dp, u, q, du, dq])
    blocks, columns = blocks_of(images, pixels, channels, tile)
    programs, sums = blocks, None
    if dbias is not None:
        programs = min(blocks, MOST_ROWS, triton.cdiv(PROGRAMS, columns))
        sums = scratch((programs, channels), torch.promote_types(u.dtype, torch.float32), u.device)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(u):
        gate_bwd_kernel.of(u.stride(1) == 1)[(programs, columns)](
            dp, u, bias, q, du, dq, sums, blocks, pixels, channels, *strides, SUM_TYPE=sum_type(u), **tile._asdict()
        )
    if sums is not None:
        sum_parts(sums[None], [dbias])


def channel_sums(t: Tensor, sums: Tensor | None) -> None:
    """Half types are added in float32, and rounded once."""
    if sums is not None:
        torch.sum(t, (0, 2, 3), dtype=sums.dtype, out=sums)
