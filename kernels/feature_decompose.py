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
    IMAGE_PROGRAMS,
    LOOP_STAGES,
    activated,
    blocks_of,
    channels_of_program,
    load_channels,
    load_map,
    map_tile,
    pixels_from,
    pixels_of_block,
    share_of_image,
    store_map,
    store_sums,
    sum_type,
    walk,
)
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

SHARE_PIXELS = 256  # at least, of an image that several programs sum: eight tiles of 64 channels; not measured


@ByLayout
@moves("partial_ptr")
def image_sums_kernel(
    x_ptr,
    partial_ptr,  # [image][share][channels]
    shares,
    pixels,
    channels,
    x_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=LOOP_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        total += load_map(x_ptr, x_strides, n, p, c, there & (c < channels)).to(SUM_TYPE)
    store_sums(partial_ptr + tl.program_id(0).to(tl.int64) * channels, total, c, channels)


@ByLayout
@moves("y_ptr")
def decompose_kernel(
    x_ptr,
    means_ptr,
    sigma_ptr,
    y_ptr,
    pixels,
    channels,
    x_strides,
    y_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    inside = (p < pixels) & (c < channels)
    x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
    mean = load_channels(means_ptr + n * channels, c, channels)
    sigma = load_channels(sigma_ptr, c, channels).to(SUM_TYPE)
    y, _ = activated(x + sigma * (x - mean), ACTIVATION)
    store_map(y_ptr, y_strides, n, p, c, y, inside)


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
    grad_strides,
    x_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, begin, end = share_of_image(pixels, shares, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    mean = load_channels(means_ptr + n * channels, c, channels)
    sigma = load_channels(sigma_ptr, c, channels).to(SUM_TYPE)
    of_dz = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for first in tl.range(begin, end, BLOCK_P, num_stages=LOOP_STAGES):
        p, there = pixels_from(first, end, BLOCK_P)
        inside = there & (c < channels)
        grad = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        _, slope = activated(x + sigma * (x - mean), ACTIVATION)
        dz = grad * slope
        of_dz += dz
        of_product += dz * (x - mean)
    own = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels
    store_sums(own, of_dz, c, channels)
    store_sums(own + channels, of_product, c, channels)


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
    grad_strides,
    x_strides,
    dx_strides,
    ACTIVATION: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = channels_of_program(BLOCK_C)
    inside = (p < pixels) & (c < channels)
    grad = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
    x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
    mean = load_channels(means_ptr + n * channels, c, channels)
    sigma = load_channels(sigma_ptr, c, channels).to(SUM_TYPE)
    mean_dz = load_channels(sums_ptr + n * 2 * channels, c, channels) / pixels
    _, slope = activated(x + sigma * (x - mean), ACTIVATION)
    dz = grad * slope
    store_map(dx_ptr, dx_strides, n, p, c, dz + sigma * (dz - mean_dz), inside)


KERNELS = (image_sums_kernel, decompose_kernel, decompose_sums_kernel, decompose_bwd_kernel)


def image_means(x: Tensor, means: Tensor) -> None:
    """means: (N, C, 1, 1)."""
    if x.numel() == 0:
        return
    tile, channels = map_tile(x), x.shape[1]
    n, pixels, strides = walk([x], apart=True)
    _, columns = blocks_of(n, pixels, channels, tile)
    shares = _shares(n, pixels, columns)
    partial = scratch((n, shares, channels), means.dtype, x.device)
    with torch.cuda.device_of(x):
        image_sums_kernel.of(x.stride(1) == 1)[(n * shares, columns)](
            x, partial, shares, pixels, channels, *strides, SUM_TYPE=sum_type(x), **tile._asdict()
        )
        sum_parts(partial, [means], pixels=pixels)


def decompose(x: Tensor, means: Tensor, sigma: Tensor, activation: str | None, y: Tensor) -> None:
    if x.numel() == 0:
        return
    tile, channels = map_tile(x), x.shape[1]
    n, pixels, strides = walk([x, y], apart=True)
    constants = {"ACTIVATION": activation, "SUM_TYPE": sum_type(x), **tile._asdict()}
    with torch.cuda.device_of(x):
        decompose_kernel.of(x.stride(1) == 1)[blocks_of(n, pixels, channels, tile)](
            x, means, sigma, y, pixels, channels, *strides, **constants
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
    tile, channels = map_tile(x), x.shape[1]
    n, pixels, strides = walk([grad, x, dx], apart=True)
    blocks, columns = blocks_of(n, pixels, channels, tile)
    shares = _shares(n, pixels, columns)
    partial = scratch((n, shares, 2, channels), means.dtype, x.device)
    sums = partial if shares == 1 else scratch((n, 2, channels), means.dtype, x.device)
    constants = {"ACTIVATION": activation, "SUM_TYPE": sum_type(x), **tile._asdict()}
    with torch.cuda.device_of(x):
        decompose_sums_kernel.of(x.stride(1) == 1)[(n * shares, columns)](
            grad, x, means, sigma, partial, shares, pixels, channels, *strides[:2], **constants
        )
        if shares > 1:
            sum_parts(partial.flatten(2), [sums])
        if dx is not None:
            decompose_bwd_kernel.of(x.stride(1) == 1)[(blocks, columns)](
                grad, x, means, sigma, sums, dx, pixels, channels, *strides, **constants
            )
        if dsigma is not None or dx_sums is not None:
            sum_parts(sums.view(1, n, -1), [dx_sums, dsigma])


def _shares(images: int, pixels: int, columns: int) -> int:
    return max(1, min(pixels // SHARE_PIXELS, triton.cdiv(IMAGE_PROGRAMS, images * columns)))
