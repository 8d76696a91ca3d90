"""The tail of half-blocks, y = x + path_scale[n] * gamma[c] * branch.

Sums over pixels take two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import map_tile, pixel_count, pixels_of_block, strides_of, sum_type
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

MOST_PROGRAMS = 528  # along the pixels, each with a row of partial sums


@triton.jit
def _factor(gamma_ptr, path_scale_ptr, n, c, channels, SUM_TYPE: tl.constexpr):
    """path_scale * gamma, [1][channels]."""
    factor = tl.full(c.shape, 1.0, SUM_TYPE)
    if gamma_ptr is not None:
        factor = tl.load(gamma_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
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
    x_stride_n,
    x_stride_c,
    x_stride_p,
    branch_stride_n,
    branch_stride_c,
    branch_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    from_branch = branch_ptr + n * branch_stride_n + p * branch_stride_p + c * branch_stride_c
    branch = tl.load(from_branch, mask=inside, other=0.0).to(SUM_TYPE)
    y = x + _factor(gamma_ptr, path_scale_ptr, n, c, channels, SUM_TYPE) * branch
    tl.store(y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    branch_stride_n,
    branch_stride_c,
    branch_stride_p,
    dbranch_stride_n,
    dbranch_stride_c,
    dbranch_stride_p,
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
        from_grad = grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c
        grad = tl.load(from_grad, mask=inside, other=0.0).to(SUM_TYPE)
        if dbranch_ptr is not None:
            dbranch = grad * _factor(gamma_ptr, path_scale_ptr, n, c, channels, SUM_TYPE)
            to = dbranch_ptr + n * dbranch_stride_n + p * dbranch_stride_p + c * dbranch_stride_c
            tl.store(to, dbranch.to(dbranch_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            from_branch = branch_ptr + n * branch_stride_n + p * branch_stride_p + c * branch_stride_c
            branch = tl.load(from_branch, mask=inside, other=0.0).to(SUM_TYPE)
            if path_scale_ptr is not None:
                grad *= tl.load(path_scale_ptr + n).to(SUM_TYPE)
            total += grad * branch
    if sums_ptr is not None:
        own = sums_ptr + program.to(tl.int64) * channels + channel
        tl.store(own, tl.sum(total, axis=0), mask=channel < channels)


KERNELS = (scaled_residual_kernel, scaled_residual_bwd_kernel)


def forward(x: Tensor, branch: Tensor, gamma: Tensor | None, path_scale: Tensor | None, y: Tensor) -> None:
    """y may be x or branch."""
    if y.numel() == 0:
        return
    tile, pixels, channels = map_tile(y), pixel_count(y), y.shape[1]
    grid = len(y) * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_C)
    strides = [stride for t in (x, branch, y) for stride in strides_of(t)]
    with torch.cuda.device_of(y):
        scaled_residual_kernel.of(y.stride(1) == 1)[grid](
            x,
            branch,
            _dense(gamma),
            _dense(path_scale),
            y,
            pixels,
            channels,
            *strides,
            SUM_TYPE=sum_type(y),
            **tile._asdict(),
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
    tile, pixels, channels = map_tile(grad), pixel_count(grad), grad.shape[1]
    blocks = len(grad) * triton.cdiv(pixels, tile.BLOCK_P)
    grid = min(MOST_PROGRAMS, blocks), triton.cdiv(channels, tile.BLOCK_C)
    sums = None
    if dgamma is not None:
        sums = scratch((grid[0], channels), torch.promote_types(grad.dtype, torch.float32), grad.device)
    given = grad, None if sums is None else branch, dbranch
    strides = [stride for t in given for stride in ((0, 0, 0) if t is None else strides_of(t))]
    with torch.cuda.device_of(grad):
        scaled_residual_bwd_kernel.of(grad.stride(1) == 1)[grid](
            *given[:2],
            _dense(gamma),
            _dense(path_scale),
            dbranch,
            sums,
            blocks,
            pixels,
            channels,
            *strides,
            SUM_TYPE=sum_type(grad),
            **tile._asdict(),
        )
    if dgamma is not None and sums is not None:
        sum_parts(sums[None], [dgamma])


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
