"""MogaNet's channel aggregation between the depthwise convolution and fc2, on channels_last tensors.

Forward: the score of every pixel is a product with all of its channels, d its GELU. Backward: GELU and its slope, both
of u, the output of the convolution, and the gradients that meet in it. d goes behind the channels of h: rounded, then
what the rounding took off, then zeros, as many as fc2's matrix has columns for. Sums over the channels are of one
program; those over the pixels have two stages of fixed order. Where csrc/cuda has kernels that do this in the
convolution, only the gradient of the scores and fc2's matrix are computed here.
"""

from typing import NamedTuple

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
@moves("d_ptr", "scores_ptr")
def scores_kernel(
    h_ptr,
    d_ptr,
    weight_ptr,
    bias_ptr,  # may be None
    scores_ptr,
    pixels,
    channels,
    columns,
    h_stride_n,
    h_stride_p,
    d_stride_n,
    d_stride_p,
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
    _store_d(gelu(score), d_ptr + n * d_stride_n + p * d_stride_p, p < pixels, columns, COLUMNS)


@counted
@moves("d_ptr", "dscores_ptr")
def scores_bwd_kernel(
    grad_ptr,
    weight_ptr,
    scores_ptr,
    dscores_ptr,
    d_ptr,
    pixels,
    channels,
    columns,
    grad_stride_n,
    grad_stride_p,
    d_stride_n,
    d_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of d, a product of that of y with all of its channels, and so that of the score; d once more."""
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    matrix = grad_ptr + n * grad_stride_n + p * grad_stride_p
    dd = _dots(matrix, weight_ptr, p, pixels, channels, SUM_TYPE, BLOCK_P, BLOCK_C)
    d, slope = gelu_and_slope(tl.load(scores_ptr + n * pixels + p, mask=p < pixels, other=0.0))
    tl.store(dscores_ptr + n * pixels + p, dd * slope, mask=p < pixels)
    _store_d(d, d_ptr + n * d_stride_n + p * d_stride_p, p < pixels, columns, COLUMNS)


@counted
@moves("sums_ptr", updated=("u_ptr", "dh_ptr"))
def gelu_bwd_kernel(
    u_ptr,  # becomes h
    dh_ptr,  # becomes du
    weight_ptr,
    dscores_ptr,
    sums_ptr,  # [program][channels + 1]: the gradients of the weight and of the bias
    blocks,
    pixels,
    channels,
    u_stride_n,
    u_stride_p,
    dh_stride_n,
    dh_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_bias = tl.zeros((BLOCK_P, 1), SUM_TYPE)
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)[None, :]
        u_at = u_ptr + n * u_stride_n + p * u_stride_p
        dh_at = dh_ptr + n * dh_stride_n + p * dh_stride_p + c[None, :]
        h, slope = gelu_and_slope(tl.load(u_at + c[None, :], mask=inside, other=0.0).to(SUM_TYPE))
        dscore = tl.load(dscores_ptr + n * pixels + p, mask=p < pixels, other=0.0)
        total += dscore * h
        of_bias += dscore
        du = (tl.load(dh_at, mask=inside, other=0.0).to(SUM_TYPE) + dscore * weight) * slope
        tl.store(u_at + c[None, :], h.to(u_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_at, du.to(dh_ptr.dtype.element_ty), mask=inside)
    own = sums_ptr + program.to(tl.int64) * (channels + 1)
    tl.store(own + c, tl.sum(total, axis=0), mask=c < channels)
    if tl.program_id(1) == 0:
        tl.store(own + channels, tl.sum(tl.sum(of_bias, axis=0), axis=0))


@triton.jit
@moves("matrix_ptr", "of_d_ptr")
def fold_kernel(
    weight_ptr,
    sigma_ptr,
    matrix_ptr,
    of_d_ptr,
    rows,
    hidden,
    end,
    columns,
    SUM_TYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """fc2's matrix of [h | d]: behind the channels, up to end, what d is multiplied with, then zeros."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
    for first in range(0, hidden, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = (r < rows) & (c < hidden)
        weight = tl.load(weight_ptr + r * hidden + c, mask=inside, other=0.0).to(SUM_TYPE)
        sigma = tl.load(sigma_ptr + c, mask=c < hidden, other=0.0).to(SUM_TYPE)
        total += weight * sigma
        folded = weight * (1.0 + sigma)
        tl.store(matrix_ptr + r * columns + c, folded.to(matrix_ptr.dtype.element_ty), mask=inside)
    of_d = -tl.sum(total, axis=1)[:, None]
    tl.store(of_d_ptr + r, of_d, mask=r < rows)
    c = hidden + tl.arange(0, COLUMNS)[None, :]
    behind = tl.where(c < end, of_d, tl.zeros_like(of_d)).to(matrix_ptr.dtype.element_ty)
    tl.store(matrix_ptr + r * columns + c, behind, mask=(r < rows) & (c < columns))


@triton.jit
@moves("dweight_ptr", "dsigma_ptr")
def unfold_kernel(
    product_ptr,  # the gradient of fc2's matrix, float32 at least
    weight_ptr,
    sigma_ptr,
    dweight_ptr,  # may be None
    dsigma_ptr,  # may be None
    rows,
    hidden,
    columns,
    SUM_TYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    behind = hidden + tl.arange(0, COLUMNS)[None, :]
    sigma = tl.load(sigma_ptr + c, mask=c < hidden, other=0.0).to(SUM_TYPE)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)[:, None]
        inside = (r < rows) & (c < hidden)[None, :]
        of_h = tl.load(product_ptr + r * columns + c[None, :], mask=inside, other=0.0)
        of_d = tl.load(product_ptr + r * columns + behind, mask=(r < rows) & (behind < columns), other=0.0)
        difference = tl.where(inside, of_h - tl.sum(of_d, axis=1)[:, None], 0.0)
        if dweight_ptr is not None:
            dweight = (of_h + difference * sigma).to(dweight_ptr.dtype.element_ty)
            tl.store(dweight_ptr + r * hidden + c[None, :], dweight, mask=inside)
        total += difference * tl.load(weight_ptr + r * hidden + c[None, :], mask=inside, other=0.0).to(SUM_TYPE)
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + c, tl.sum(total, axis=0).to(dsigma_ptr.dtype.element_ty), mask=c < hidden)


KERNELS = (scores_kernel, scores_bwd_kernel, gelu_bwd_kernel, fold_kernel, unfold_kernel)


class FoldTile(NamedTuple):
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


FOLD_TILE, UNFOLD_TILE = FoldTile(4, 256, num_warps=4), FoldTile(32, 32, num_warps=4)


def fold(weight: Tensor, sigma: Tensor, end: int, matrix: Tensor, of_d: Tensor) -> None:
    """matrix (rows, columns) = [weight (1 + sigma) | of_d up to the column end | 0], of_d = -weight sigma."""
    (rows, hidden), columns = weight.shape, matrix.shape[1]
    with torch.cuda.device_of(weight):
        fold_kernel[(triton.cdiv(rows, FOLD_TILE.BLOCK_R),)](
            *(weight, sigma, matrix, of_d, rows, hidden, end, columns),
            SUM_TYPE=sum_type(of_d),
            COLUMNS=power_of_two(columns - hidden),
            **FOLD_TILE._asdict(),
        )


def unfold(product: Tensor, weight: Tensor, sigma: Tensor, dweight: Tensor | None, dsigma: Tensor | None) -> None:
    """The gradients of weight and sigma from that of the matrix."""
    (rows, hidden), columns = weight.shape, product.shape[1]
    with torch.cuda.device_of(weight):
        unfold_kernel[(triton.cdiv(hidden, UNFOLD_TILE.BLOCK_C),)](
            *(product, weight, sigma, dweight, dsigma, rows, hidden, columns),
            SUM_TYPE=sum_type(product),
            COLUMNS=power_of_two(columns - hidden),
            **UNFOLD_TILE._asdict(),
        )


def scores(h: Tensor, d: Tensor, weight: Tensor, bias: Tensor | None, scores: Tensor) -> None:
    """scores = weight h + bias. d: columns of its own."""
    if h.numel() == 0:
        return
    images, pixels, ((h_n, _, h_p), (d_n, _, d_p), _) = walk([h, d, scores])
    chosen = tile(h)
    with torch.cuda.device_of(h):
        scores_kernel[(images * triton.cdiv(pixels, chosen.BLOCK_P),)](
            h,
            d,
            weight,
            bias,
            scores,
            pixels,
            h.shape[1],
            d.shape[1],
            h_n,
            h_p,
            d_n,
            d_p,
            COLUMNS=power_of_two(d.shape[1]),
            SUM_TYPE=sum_type(h),
            **chosen._asdict(),
        )


def scores_backward(grad: Tensor, weight: Tensor, scores: Tensor, dscores: Tensor, d: Tensor) -> None:
    """weight: of d in every channel of y. dscores as scores, d as above."""
    if grad.numel() == 0:
        return
    images, pixels, ((grad_n, _, grad_p), (d_n, _, d_p), _) = walk([grad, d, scores])
    chosen = tile(grad)
    with torch.cuda.device_of(grad):
        scores_bwd_kernel[(images * triton.cdiv(pixels, chosen.BLOCK_P),)](
            grad,
            weight,
            scores,
            dscores,
            d,
            pixels,
            grad.shape[1],
            d.shape[1],
            grad_n,
            grad_p,
            d_n,
            d_p,
            COLUMNS=power_of_two(d.shape[1]),
            SUM_TYPE=sum_type(grad),
            **chosen._asdict(),
        )


def gelu_backward(
    u: Tensor,
    dh: Tensor,
    weight: Tensor,
    dscores: Tensor,
    dweight: Tensor,
    dbias: Tensor | None = None,
) -> None:
    """u becomes h = GELU(u); dh becomes du = (dh + dscores * weight) * GELU'(u); dweight =
    the sum of dscores * h over the pixels, dbias that of dscores."""
    if u.numel() == 0:
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        return
    images, pixels, ((u_n, _, u_p), (dh_n, _, dh_p), _) = walk([u, dh, dscores])
    channels = u.shape[1]
    chosen = tile(u)
    blocks, bundles = images * triton.cdiv(pixels, chosen.BLOCK_P), triton.cdiv(channels, chosen.BLOCK_C)
    programs = min(blocks, triton.cdiv(MOST_PROGRAMS, bundles))
    sums = scratch((programs, channels + 1), dscores.dtype, u.device)
    with torch.cuda.device_of(u):
        gelu_bwd_kernel[(programs, bundles)](
            u,
            dh,
            weight,
            dscores,
            sums,
            blocks,
            pixels,
            channels,
            u_n,
            u_p,
            dh_n,
            dh_p,
            SUM_TYPE=sum_type(u),
            **chosen._asdict(),
        )
    sum_parts(sums[None], [dweight, dbias], [channels, 1])
