"""The tail of half-blocks, y = x + path_scale[n] * gamma[c] * branch.

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


@triton.jit
def _factor(gamma_ptr, path_scale_ptr, n, c, channels, SUM_TYPE: tl.constexpr):
    """path_scale * gamma, [1][channels]."""
    factor = tl.full(c.shape, 1.0, SUM_TYPE)
    if gamma_ptr is not None:
        factor = load_channels(gamma_ptr, c, channels).to(SUM_TYPE)
    if path_scale_ptr is not None:
        factor *= tl.load(path_scale_ptr + n).to(SUM_TYPE)
    return factor


@ByLayout
@moves("y_ptr")
def scaled_residual_kernel(
    x_ptr,
    branch_ptr,
    gamma_ptr,  # may be None
    path_scale_ptr,  # may be None
    y_ptr,
    pixels,
    channels,
    x_strides,
    branch_strides,
    y_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    inside = (p < pixels) & (c < channels)
    x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
    branch = load_map(branch_ptr, branch_strides, n, p, c, inside).to(SUM_TYPE)
    y = x + _factor(gamma_ptr, path_scale_ptr, n, c, channels, SUM_TYPE) * branch
    store_map(y_ptr, y_strides, n, p, c, y, inside)


@ByLayout
@moves("dbranch_ptr", "sums_ptr")
def scaled_residual_bwd_kernel(
    grad_ptr,
    branch_ptr,  # None where sums_ptr is
    gamma_ptr,  # may be None
    path_scale_ptr,  # may be None
    dbranch_ptr,  # may be None
    sums_ptr,  # [program][channels]: the gradient of gamma; may be None
    blocks,
    pixels,
    channels,
    grad_strides,
    branch_strides,
    dbranch_strides,
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
        grad = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
        if dbranch_ptr is not None:
            dbranch = grad * _factor(gamma_ptr, path_scale_ptr, n, c, channels, SUM_TYPE)
            store_map(dbranch_ptr, dbranch_strides, n, p, c, dbranch, inside)
        if sums_ptr is not None:
            branch = load_map(branch_ptr, branch_strides, n, p, c, inside).to(SUM_TYPE)
            if path_scale_ptr is not None:
                grad *= tl.load(path_scale_ptr + n).to(SUM_TYPE)
            total += grad * branch
    if sums_ptr is not None:
        store_sums(sums_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


KERNELS = (scaled_residual_kernel, scaled_residual_bwd_kernel)


def forward(x: Tensor, branch: Tensor, gamma: Tensor | None, path_scale: Tensor | None, y: Tensor) -> None:
    """y may be x or branch."""
    if y.numel() == 0:
        return
    tile, channels = map_tile(y), y.shape[1]
    images, pixels, strides = walk([x, branch, y], apart=path_scale is not None)
    vectors = _dense(gamma), _dense(path_scale)
    with torch.cuda.device_of(y):
        scaled_residual_kernel.of(y.stride(1) == 1)[blocks_of(images, pixels, channels, tile)](
            *(x, branch, *vectors, y, pixels, channels, *strides), SUM_TYPE=sum_type(y), **tile._asdict()
        )


def backward(
    grad: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    dbranch: Tensor | None,
    dgamma: Tensor | None,
) -> None:
    """branch is read for dgamma only."""
    if grad.numel() == 0 or (dbranch is None and dgamma is None):
        if dgamma is not None:
            dgamma.zero_()
        return
    tile, channels, read = map_tile(grad), grad.shape[1], None if dgamma is None else branch
    images, pixels, strides = walk([grad, read, dbranch], apart=path_scale is not None)
    blocks, columns = blocks_of(images, pixels, channels, tile)
    programs, sums = blocks, None
    if dgamma is not None:
        programs = min(blocks, MOST_ROWS, triton.cdiv(PROGRAMS, columns))
        sums = scratch((programs, channels), torch.promote_types(grad.dtype, torch.float32), grad.device)
    given = grad, read, _dense(gamma), _dense(path_scale), dbranch, sums
    with torch.cuda.device_of(grad):
        scaled_residual_bwd_kernel.of(grad.stride(1) == 1)[(programs, columns)](
            *given, blocks, pixels, channels, *strides, SUM_TYPE=sum_type(grad), **tile._asdict()
        )
    if dgamma is not None and sums is not None:
        sum_parts(sums[None], [dgamma])


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
