"""MogaNet's channel aggregation between the depthwise convolution and fc2, on channels_last tensors.

Forward: the score of every pixel is a product with all of its channels, d its GELU. Backward: GELU and its slope, both
of u, the output of the convolution, and the gradients that meet in it. d goes behind the channels of h: rounded, then
what the rounding took off, then zeros, as many as fc2's matrix has columns for. Sums over the channels are of one
program; those over the pixels have two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._maps import Tile, gelu, gelu_and_slope, pixels_of_block, sum_type, walk
from ._moves import moves
from ._specialize import counted
from .sums import sum_parts

MOST_PROGRAMS = 1056  # along the pixels, each with a row of partial sums: eight on every multiprocessor of an H200


def tile(t: Tensor) -> Tile:
    """Hidden widths of the published networks are multiples of 128. A thread has 16 values; half of it in float64."""
    block_c = min(128, power_of_two(t.shape[1]))
    return Tile((1024 if t.dtype == torch.float64 else 2048) // block_c, block_c, num_warps=4)


@triton.jit
def _dots(
    matrix, weight_ptr, p, pixels, channels, SUM_TYPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of all channels of some pixels with a weight; matrix: where the pixels begin."""
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        values = tl.load(matrix + c, mask=(p < pixels) & (c < channels), other=0.0).to(SUM_TYPE)
        total += values * tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def _store_d(d, to, inside, columns, COLUMNS: tl.constexpr):
    """Into the columns behind the channels."""
    k = tl.arange(0, COLUMNS)[None, :]
    rounded = d.to(to.dtype.element_ty)
    rest = (d - rounded.to(d.dtype)).to(to.dtype.element_ty)
    values = tl.where(k == 0, rounded, tl.where(k == 1, rest, tl.zeros_like(rest)))
    tl.store(to + k, values, mask=inside & (k < columns))


@counted
@moves("scores_ptr", partly=("h_ptr",))
def scores_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,  # may be None
    scores_ptr,
    pixels,
    channels,
    columns,
    h_stride_n,
    h_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    matrix = h_ptr + n * h_stride_n + p * h_stride_p
    score = _dots(matrix, weight_ptr, p, pixels, channels, SUM_TYPE, BLOCK_P, BLOCK_C)
    if bias_ptr is not None:
        score += tl.load(bias_ptr).to(SUM_TYPE)
    tl.store(scores_ptr + n * pixels + p, score, mask=p < pixels)
    _store_d(gelu(score), matrix + channels, p < pixels, columns, COLUMNS)


@counted
@moves("dscores_ptr")
def scores_bwd_kernel(
    grad_ptr,
    weight_ptr,
    scores_ptr,
    dscores_ptr,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of d, a product of that of y with all of its channels, and so that of the score."""
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    matrix = grad_ptr + n * grad_stride_n + p * grad_stride_p
    dd = _dots(matrix, weight_ptr, p, pixels, channels, SUM_TYPE, BLOCK_P, BLOCK_C)
    _, slope = gelu_and_slope(tl.load(scores_ptr + n * pixels + p, mask=p < pixels, other=0.0))
    tl.store(dscores_ptr + n * pixels + p, dd * slope, mask=p < pixels)


@counted
@moves("sums_ptr", updated=("u_ptr", "dh_ptr"))
def gelu_bwd_kernel(
    u_ptr,  # becomes h
    dh_ptr,  # becomes du
    weight_ptr,
    scores_ptr,
    dscores_ptr,
    sums_ptr,  # [program][channels]: the gradient of the weight
    blocks,
    pixels,
    channels,
    columns,
    u_stride_n,
    u_stride_p,
    dh_stride_n,
    dh_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)[None, :]
        u_at = u_ptr + n * u_stride_n + p * u_stride_p
        dh_at = dh_ptr + n * dh_stride_n + p * dh_stride_p + c[None, :]
        h, slope = gelu_and_slope(tl.load(u_at + c[None, :], mask=inside, other=0.0).to(SUM_TYPE))
        dscore = tl.load(dscores_ptr + n * pixels + p, mask=p < pixels, other=0.0)
        total += dscore * h
        du = (tl.load(dh_at, mask=inside, other=0.0).to(SUM_TYPE) + dscore * weight) * slope
        tl.store(u_at + c[None, :], h.to(u_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_at, du.to(dh_ptr.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            d = gelu(tl.load(scores_ptr + n * pixels + p, mask=p < pixels, other=0.0))
            _store_d(d, u_at + channels, p < pixels, columns, COLUMNS)
    tl.store(sums_ptr + program.to(tl.int64) * channels + c, tl.sum(total, axis=0), mask=c < channels)


KERNELS = (scores_kernel, scores_bwd_kernel, gelu_bwd_kernel)


def scores(h: Tensor, columns: int, weight: Tensor, bias: Tensor | None, scores: Tensor) -> None:
    """scores = weight h + bias, and d into the columns behind the channels of h, which are part of its memory."""
    if h.numel() == 0:
        return
    images, pixels, ((h_n, _, h_p), _) = walk([h, scores])
    chosen = tile(h)
    with torch.cuda.device_of(h):
        scores_kernel[(images * triton.cdiv(pixels, chosen.BLOCK_P),)](
            h,
            weight,
            bias,
            scores,
            pixels,
            h.shape[1],
            columns,
            h_n,
            h_p,
            COLUMNS=power_of_two(columns),
            SUM_TYPE=sum_type(h),
            **chosen._asdict(),
        )


def scores_backward(grad: Tensor, weight: Tensor, scores: Tensor, dscores: Tensor) -> None:
    """weight: of d in every channel of y. dscores as scores."""
    if grad.numel() == 0:
        return
    images, pixels, ((grad_n, _, grad_p), _) = walk([grad, scores])
    chosen = tile(grad)
    with torch.cuda.device_of(grad):
        scores_bwd_kernel[(images * triton.cdiv(pixels, chosen.BLOCK_P),)](
            grad,
            weight,
            scores,
            dscores,
            pixels,
            grad.shape[1],
            grad_n,
            grad_p,
            SUM_TYPE=sum_type(grad),
            **chosen._asdict(),
        )


def gelu_backward(
    u: Tensor, dh: Tensor, columns: int, weight: Tensor, scores: Tensor, dscores: Tensor, dweight: Tensor
) -> None:
    """u becomes h = GELU(u), with d behind its channels; dh becomes du = (dh + dscores * weight) * GELU'(u); dweight =
    the sum of dscores * h over the pixels."""
    if u.numel() == 0:
        dweight.zero_()
        return
    images, pixels, ((u_n, _, u_p), (dh_n, _, dh_p), _) = walk([u, dh, scores])
    channels = u.shape[1]
    chosen = tile(u)
    blocks, bundles = images * triton.cdiv(pixels, chosen.BLOCK_P), triton.cdiv(channels, chosen.BLOCK_C)
    programs = min(blocks, triton.cdiv(MOST_PROGRAMS, bundles))
    sums = scratch((programs, channels), dweight.dtype, u.device)
    with torch.cuda.device_of(u):
        gelu_bwd_kernel[(programs, bundles)](
            u,
            dh,
            weight,
            scores,
            dscores,
            sums,
            blocks,
            pixels,
            channels,
            columns,
            u_n,
            u_p,
            dh_n,
            dh_p,
            COLUMNS=power_of_two(columns),
            SUM_TYPE=sum_type(u),
            **chosen._asdict(),
        )
    sum_parts(sums[None], [dweight])
