"""What the kernels on feature maps share: the walk over (N, C, H, W) tensors of any strides, and activations.

Tensors have one stride through the pixels of an image. Tiles are [pixels][channels]; Triton puts neighbouring threads
along the axis whose stride is 1, so one kernel serves channels_last and contiguous tensors and slices of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    BLOCK_P: int
    BLOCK_C: int
    num_warps: int


def map_tile(t: Tensor) -> Tile:
    """A thread has 16 values of a channels_last tensor, 8 of a contiguous one; half of it in float64."""
    block_p, block_c = (32, 64) if t.stride(1) == 1 else (128, 8)
    return Tile(block_p // (2 if t.dtype == torch.float64 else 1), block_c, num_warps=4)


def sum_type(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def pixel_count(t: Tensor) -> int:
    return t.shape[2] * t.shape[3]


def strides_of(t: Tensor) -> tuple[int, int, int]:
    """From image to image, channel to channel and pixel to pixel."""
    return t.stride(0), t.stride(1), t.stride(3) if t.shape[3] > 1 else t.stride(2)


def walk(tensors: Sequence[Tensor]) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Images, pixels of each, and the strides of all tensors.

    Where the images follow each other like pixels in all tensors, as in channels_last ones, they are one image.
    """
    n, pixels = len(tensors[0]), pixel_count(tensors[0])
    strides = [strides_of(t) for t in tensors]
    if all(image == pixels * pixel for image, _, pixel in strides):
        return 1, n * pixels, [(0, channel, pixel) for _, channel, pixel in strides]
    return n, pixels, strides


@triton.jit
def pixels_of_block(block, pixels, BLOCK_P: tl.constexpr):
    """Image and pixels of a block, in 64 bits: a batch of large maps has more than 2^31 elements."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    p = (block % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    return (block // blocks).to(tl.int64), p[:, None]


@triton.jit
def load_map(ptr, n, p, c, stride_n, stride_p, stride_c, inside):
    """Pixels p and channels c of image n."""
    return tl.load(ptr + n * stride_n + p * stride_p + c * stride_c, mask=inside, other=0.0)


@triton.jit
def store_map(ptr, values, n, p, c, stride_n, stride_p, stride_c, inside):
    """values, rounded to the dtype of the tensor."""
    tl.store(ptr + n * stride_n + p * stride_p + c * stride_c, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_and_slope(x):
    s = tl.sigmoid(x)
    y = x * s
    return y, s + y * (1.0 - s)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_and_slope(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """And the slope, of which nothing remains where nobody uses it."""
    if ACTIVATION == "silu":
        y, slope = silu_and_slope(z)
    elif ACTIVATION == "gelu":
        y, slope = gelu_and_slope(z)
    else:
        y, slope = z, tl.zeros_like(z) + 1.0
    return y, slope


@triton.jit
def share_of_image(pixels, shares, BLOCK_P: tl.constexpr):
    """Image, first pixel and end of a program: whole blocks, but for the last one of an image."""
    length = tl.cdiv(tl.cdiv(pixels, shares), BLOCK_P) * BLOCK_P
    begin = tl.program_id(0) % shares * length
    return (tl.program_id(0) // shares).to(tl.int64), begin, tl.minimum(begin + length, pixels)
