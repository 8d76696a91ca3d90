"""What an MLP has between its products: the activation, and in the backward pass its slope.

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
    activated,
    blocks_of,
    channels_of_program,
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
@moves("a_ptr")
def activate_kernel(
    u_ptr,
    a_ptr,
    pixels,
    channels,
    u_strides,
    a_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    inside = (p < pixels) & (c < channels)
    a, _ = activated(load_map(u_ptr, u_strides, n, p, c, inside).to(SUM_TYPE), ACTIVATION)
    store_map(a_ptr, a_strides, n, p, c, a, inside)


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
    da_strides,
    u_strides,
    du_strides,
    a_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = channels_of_program(BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    begin, end = share_of_blocks(blocks)
    for block in tl.range(begin, end, num_stages=LOOP_STAGES):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        da = load_map(da_ptr, da_strides, n, p, c, inside).to(SUM_TYPE)
        u = load_map(u_ptr, u_strides, n, p, c, inside).to(SUM_TYPE)
        a, slope = activated(u, ACTIVATION)
        du = da * slope
        total += du
        store_map(du_ptr, du_strides, n, p, c, du, inside)
        if a_ptr is not None:
            store_map(a_ptr, a_strides, n, p, c, a, inside)
    if sums_ptr is not None:
        store_sums(sums_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


KERNELS = (activate_kernel, activate_bwd_kernel)


def activate(u: Tensor, a: Tensor, activation: str) -> None:
    """a may be u."""
    if u.numel() == 0:
        return
    tile, channels = map_tile(u), u.shape[1]
    images, pixels, strides = walk([u, a])
    constants = {"ACTIVATION": activation, "SUM_TYPE": sum_type(u), **tile._asdict()}
    with torch.cuda.device_of(u):
        activate_kernel.of(u.stride(1) == 1)[blocks_of(images, pixels, channels, tile)](
            u, a, pixels, channels, *strides, **constants
        )


def activate_backward(
    da: Tensor, u: Tensor, du: Tensor, a: Tensor | None, dbias: Tensor | None, activation: str
) -> None:
    """du = da * act'(u), a = act(u), dbias = the sum of du over the pixels. du may be da."""
    if u.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    tile, channels = map_tile(u), u.shape[1]
    images, pixels, strides = walk([da, u, du, a])
    blocks, columns = blocks_of(images, pixels, channels, tile)
    programs, sums = blocks, None
    if dbias is not None:
        programs = min(blocks, MOST_ROWS, triton.cdiv(PROGRAMS, columns))
        sums = scratch((programs, channels), torch.promote_types(u.dtype, torch.float32), u.device)
    constants = {"ACTIVATION": activation, "SUM_TYPE": sum_type(u), **tile._asdict()}
    with torch.cuda.device_of(u):
        activate_bwd_kernel.of(u.stride(1) == 1)[(programs, columns)](
            da, u, du, a, sums, blocks, pixels, channels, *strides, **constants
        )
    if dbias is not None and sums is not None:
        sum_parts(sums[None], [dbias])
