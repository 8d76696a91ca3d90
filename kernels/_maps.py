"""What the kernels on feature maps share: the walk over (N, C, H, W) tensors of any strides, and activations.

Tensors have one stride through the pixels of an image. Tiles are [pixels][channels]; Triton puts neighbouring threads
along the axis whose stride is 1, so one kernel serves channels_last and contiguous tensors and slices of them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two

Strides = tuple[int, int, int]  # from image to image, channel to channel and pixel to pixel


class Tile(NamedTuple):
    BLOCK_P: int
    BLOCK_C: int
    num_warps: int


# Launch choices, by counting: no GPU has measured them. An H200 has 132 multiprocessors, each of which must have about
# 22 KB under way to hide the latency of its memory.
PROGRAMS = 1056  # that leave a row of sums each, all channels counted: eight to a multiprocessor
MOST_ROWS = 528  # of the same channels, which a second kernel adds: four to one, with two stages 32 KB and more
IMAGE_PROGRAMS = 2112  # that sum a share of an image each: twice as many, as images are cut into whole shares
# Of a loop over tiles: the loads of the next are under way. Unasked, Triton does so only for operands of products.
LOOP_STAGES = tl.constexpr(2)
CHANNELS_LAST_VALUES = 16  # of a thread, of every tensor: one or two vectors
CONTIGUOUS_VALUES = 8  # loads of their own, if planes are not aligned
MOST_CHANNELS = 64  # of a tile: in half types a line of L2
ROW_BYTES = 64  # of a tile at least, if its pixels have more: what memory gives at a time
LANES = 0.9  # of a tile that should have something to do, before it becomes narrower


def map_tile(t: Tensor) -> Tile:
    """In float64 a thread has half as many values."""
    halved = 2 if t.dtype == torch.float64 else 1
    if t.stride(1) == 1:
        block_c = channels_of_tile(t.shape[1], t.element_size())
        return Tile(128 * CHANNELS_LAST_VALUES // halved // block_c, block_c, num_warps=4)
    block_p = min(128, max(32, power_of_two(pixel_count(t))))
    return Tile(block_p // halved, 128 * CONTIGUOUS_VALUES // block_p, num_warps=4)


@functools.cache
def channels_of_tile(channels: int, element_size: int, row_bytes: int = ROW_BYTES) -> int:
    """The widest tile with few idle lanes, or that with the fewest: 32 for 96 channels, as 64 would idle a quarter."""
    widths = [MOST_CHANNELS >> k for k in range(7)]
    widths = [w for w in widths if w * element_size >= row_bytes or w == power_of_two(channels)]
    used = {w: channels / (triton.cdiv(channels, w) * w) for w in widths}
    return next((w for w in widths if used[w] >= LANES), max(widths, key=lambda w: used[w]))


def sum_type(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def pixel_count(t: Tensor) -> int:
    _, _, height, width = t.shape
    return height * width


def strides_of(t: Tensor) -> Strides:
    image, channel, row, pixel = t.stride()
    return image, channel, pixel if t.shape[3] > 1 else row


def walk(tensors: Sequence[Tensor | None], apart: bool = False) -> tuple[int, int, list[Strides | None]]:
    """Images, pixels of each, and the strides of all tensors, the first of which is there.

    Where the images follow each other like pixels in all tensors, as in channels_last ones, they are one image, if they
    need not stay apart.
    """
    n, pixels = len(tensors[0]), pixel_count(tensors[0])
    strides = [None if t is None else strides_of(t) for t in tensors]
    if apart or any(s[0] != pixels * s[2] for s in strides if s):
        return n, pixels, strides
    return 1, n * pixels, [s and (0, s[1], s[2]) for s in strides]


def blocks_of(images: int, pixels: int, channels: int, tile: Tile) -> tuple[int, int]:
    """Along the pixels of all images, and side by side."""
    return images * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_C)


@triton.jit
def pixels_of_block(block, pixels, BLOCK_P: tl.constexpr):
    """Image and pixels of a block, in 64 bits: a batch of large maps has more than 2^31 elements."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    p = (block % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    return (block // blocks).to(tl.int64), p[:, None]


@triton.jit
def channels_of_program(BLOCK_C: tl.constexpr):
    return (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]


@triton.jit
def share_of_blocks(blocks):
    """Of a program: the first block and the end."""
    share = tl.cdiv(blocks, tl.num_programs(0))
    begin = tl.program_id(0) * share
    return begin, tl.minimum(begin + share, blocks)


@triton.jit
def share_of_image(pixels, shares, BLOCK_P: tl.constexpr):
    """Image, first pixel and end of a program: whole blocks, but for the last one of an image."""
    length = tl.cdiv(tl.cdiv(pixels, shares), BLOCK_P) * BLOCK_P
    begin = tl.program_id(0) % shares * length
    return (tl.program_id(0) // shares).to(tl.int64), begin, tl.minimum(begin + length, pixels)


@triton.jit
def pixels_from(first, end, BLOCK_P: tl.constexpr):
    """Those of a tile of a share, and whether they are there."""
    p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
    return p, p < end


@triton.jit
def load_map(ptr, strides, n, p, c, inside):
    """Pixels p and channels c of image n."""
    return tl.load(ptr + n * strides[0] + p * strides[2] + c * strides[1], mask=inside, other=0.0)


@triton.jit
def store_map(ptr, strides, n, p, c, values, inside):
    """values, rounded to the dtype of the tensor."""
    tl.store(ptr + n * strides[0] + p * strides[2] + c * strides[1], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(ptr, c, channels):
    """What a channel has one of."""
    return tl.load(ptr + c, mask=c < channels, other=0.0)


@triton.jit
def store_sums(ptr, total, c, channels):
    """Those over the pixels of a tile."""
    tl.store(ptr + c, tl.sum(total, axis=0)[None, :], mask=c < channels)


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
def hardswish_and_slope(x):
    y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    return y, tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """And the slope, of which nothing remains where nobody uses it."""
    if ACTIVATION == "silu":
        y, slope = silu_and_slope(z)
    elif ACTIVATION == "gelu":
        y, slope = gelu_and_slope(z)
    elif ACTIVATION == "hardswish":
        y, slope = hardswish_and_slope(z)
    else:
        y, slope = z, tl.zeros_like(z) + 1.0
    return y, slope
