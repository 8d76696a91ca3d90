"""MogaNet's feature decomposition: the difference from an image's mean, weighted, is added, and all of it activated.

With z = x + sigma * (x - mean) and dz = dy * act'(z): dsigma = the sum of dz * (x - mean), and dx = (1 + sigma) * dz -
sigma * the mean of dz. The backward pass computes dz twice, for the sums and for dx, from what it reads anyway. Sums
have two stages of fixed order: a program's share of an image, then the shares, whose number depends on the shape only.
Means, and all sums, are contiguous and float32 at least.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import (
    activated,
    map_tile,
    pixel_count,
    pixels_of_block,
    share_of_image,
    strides_of,
    sum_type,
)
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

SHARE_PIXELS = 256  # at least, of an image that several programs sum
PROGRAMS = 2112  # that share the sums of a batch: sixteen for every multiprocessor of an H200


@ByLayout
@moves("partial_ptr")
def image_sums_kernel(
    x_ptr,
    partial_ptr,  # [image][share][channels]
    shares,
    pixels,
    channels,
    stride_n,
    stride_c,
    stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        total += tl.load(x_ptr + n * stride_n + p * stride_p + c * stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    to = partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(to, tl.sum(total, axis=0), mask=channel < channels)


@ByLayout
@moves("y_ptr")
def decompose_kernel(
    x_ptr,
    means_ptr,
    sigma_ptr,
    y_ptr,
    pixels,
    channels,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    mean = tl.load(means_ptr + n * channels + c, mask=c < channels, other=0.0)
    sigma = tl.load(sigma_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    y, _ = activated(x + sigma * (x - mean), ACTIVATION)
    tl.store(y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c, y.to(y_ptr.dtype.element_ty), mask=inside)


@ByLayout
@moves("partial_ptr")
def decompose_sums_kernel(
    grad_ptr,
    x_ptr,
    means_ptr,
    sigma_ptr,
    partial_ptr,  # [image][share][2][channels]: of dz and of dz * (x - mean)
    shares,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    mean = tl.load(means_ptr + n * channels + c, mask=c < channels, other=0.0)
    sigma = tl.load(sigma_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    of_dz = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in range(begin, end, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        inside = (p < end) & (c < channels)
        grad = tl.load(grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c, mask=inside, other=0.0)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        _, slope = activated(x + sigma * (x - mean), ACTIVATION)
        dz = grad.to(SUM_TYPE) * slope
        of_dz += dz
        of_product += dz * (x - mean)
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(to, tl.sum(of_dz, axis=0), mask=channel < channels)
    tl.store(to + channels, tl.sum(of_product, axis=0), mask=channel < channels)


@ByLayout
@moves("dx_ptr")
def decompose_bwd_kernel(
    grad_ptr,
    x_ptr,
    means_ptr,
    sigma_ptr,
    sums_ptr,  # [image][2][channels], the first of dz
    dx_ptr,
    pixels,
    channels,
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    dx_stride_n,
    dx_stride_c,
    dx_stride_p,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    grad = tl.load(grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c, mask=inside, other=0.0)
    x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    mean = tl.load(means_ptr + n * channels + c, mask=c < channels, other=0.0)
    sigma = tl.load(sigma_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    mean_dz = tl.load(sums_ptr + n * 2 * channels + c, mask=c < channels, other=0.0) / pixels
    _, slope = activated(x + sigma * (x - mean), ACTIVATION)
    dz = grad.to(SUM_TYPE) * slope
    dx = dz + sigma * (dz - mean_dz)
    to = dx_ptr + n * dx_stride_n + p * dx_stride_p + c * dx_stride_c
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside)


KERNELS = (image_sums_kernel, decompose_kernel, decompose_sums_kernel, decompose_bwd_kernel)


def image_means(x: Tensor, means: Tensor) -> None:
    """means: (N, C, 1, 1)."""
    if x.numel() == 0:
        return
    tile, (n, channels), pixels = map_tile(x), x.shape[:2], pixel_count(x)
    columns = triton.cdiv(channels, tile.BLOCK_C)
    shares = _shares(x, columns)
    partial = scratch((n, shares, channels), means.dtype, x.device)
    with torch.cuda.device_of(x):
        image_sums_kernel.of(x.stride(1) == 1)[(n * shares, columns)](
            x, partial, shares, pixels, channels, *strides_of(x), SUM_TYPE=sum_type(x), **tile._asdict()
        )
        sum_parts(partial, [means], pixels=pixels)


def decompose(x: Tensor, means: Tensor, sigma: Tensor, activation: str | None, y: Tensor) -> None:
    if x.numel() == 0:
        return
    tile, channels, pixels = map_tile(x), x.shape[1], pixel_count(x)
    grid = len(x) * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_C)
    constants = {"ACTIVATION": activation, "SUM_TYPE": sum_type(x), **tile._asdict()}
    with torch.cuda.device_of(x):
        decompose_kernel.of(x.stride(1) == 1)[grid](
            x, means, sigma, y, pixels, channels, *strides_of(x), *strides_of(y), **constants
        )


def decompose_backward(
    grad: Tensor,
    x: Tensor,
    means: Tensor,
    sigma: Tensor,
    activation: str | None,
    dx: Tensor | None,
    dsigma: Tensor | None,
    dx_sums: Tensor | None = None,
) -> None:
    """dx may be grad; dx_sums: over all pixels, which are those of dz."""
    if x.numel() == 0:
        for t in (dsigma, dx_sums):
            if t is not None:
                t.zero_()
        return
    tile, (n, channels), pixels = map_tile(x), x.shape[:2], pixel_count(x)
    columns = triton.cdiv(channels, tile.BLOCK_C)
    shares = _shares(x, columns)
    partial = scratch((n, shares, 2, channels), means.dtype, x.device)
    sums = partial if shares == 1 else scratch((n, 2, channels), means.dtype, x.device)
    strides = *strides_of(grad), *strides_of(x)
    constants = {"ACTIVATION": activation, "SUM_TYPE": sum_type(x), **tile._asdict()}
    with torch.cuda.device_of(x):
        decompose_sums_kernel.of(x.stride(1) == 1)[(n * shares, columns)](
            grad, x, means, sigma, partial, shares, pixels, channels, *strides, **constants
        )
        if shares > 1:
            sum_parts(partial.flatten(2), [sums])
        if dx is not None:
            decompose_bwd_kernel.of(x.stride(1) == 1)[(n * triton.cdiv(pixels, tile.BLOCK_P), columns)](
                grad, x, means, sigma, sums, dx, pixels, channels, *strides, *strides_of(dx), **constants
            )
        if dsigma is not None or dx_sums is not None:
            sum_parts(sums.view(1, n, -1), [dx_sums, dsigma])


def _shares(x: Tensor, columns: int) -> int:
    return max(1, min(pixel_count(x) // SHARE_PIXELS, triton.cdiv(PROGRAMS, len(x) * columns)))
