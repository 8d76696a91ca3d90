"""S2-MLPv2's passes over the pixels: what is moved is read where it comes from, in the backward pass too.

A program has some pixels of one image and some channels of one quarter, all of which come from the same neighbour: rows
of adjacent channels, whatever the move. Sums over the pixels have two stages of fixed order: shares of an image, then
the shares, whose number depends on the shape only. What comes between the passes is in branch_weights.py. The functions
have the meaning of `CPUPasses` in ops/shift_split_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import IMAGE_PROGRAMS, LOOP_STAGES, sum_type
from ._moves import moves
from ._quarters import block_and_column, columns_of, load_branches, offset_of, quarter, tile, undivided_tile
from ._specialize import counted
from .branch_weights import bias_backward as bias_backward
from .branch_weights import branch_weights as branch_weights
from .branch_weights import branch_weights_backward as branch_weights_backward
from .branch_weights import offset as offset
from .branch_weights import pool as pool
from .branch_weights import pool_linear as pool_linear
from .branch_weights import sum_pixels as sum_pixels
from .sums import sum_parts

# Launch choices, by counting: no GPU has measured them.
SHARE_PIXELS = 128  # at least, of a share
SUMMING_WARPS = 8  # where a thread has four sums beside four tensors


@triton.jit
def _pixels(first, end, width, BLOCK_P: tl.constexpr):
    """From the first on: the pixels, their rows and columns, and whether they are there."""
    p = (first + tl.arange(0, BLOCK_P))[:, None]
    return p, p // width, p % width, p < end


@triton.jit
def _at(i, j, strides):
    """In 64 bits: a batch of large maps has more than 2^31 elements."""
    return i.to(tl.int64) * strides[1] + j.to(tl.int64) * strides[2]


@triton.jit
def _source(i, j, height, width, step, vertical, strides):
    """Where the pixel comes from; what would come from outside is what was there."""
    rows = tl.where(vertical, step, 0)
    from_i = tl.minimum(tl.maximum(i + rows, 0), height - 1)
    return _at(from_i, tl.minimum(tl.maximum(j + step - rows, 0), width - 1), strides)


@triton.jit
def _moved(x, i, j, height, width, step, first, channels, strides, inside, SUM_TYPE: tl.constexpr):
    """The three branches, where x begins."""
    at1 = x + _source(i, j, height, width, step, first, strides)
    at2 = x + _source(i, j, height, width, step, first == 0, strides) + channels
    at3 = x + _at(i, j, strides) + 2 * channels
    x1 = tl.load(at1, mask=inside, other=0.0).to(SUM_TYPE)
    x2 = tl.load(at2, mask=inside, other=0.0).to(SUM_TYPE)
    x3 = tl.load(at3, mask=inside, other=0.0).to(SUM_TYPE)
    return x1, x2, x3


@counted
@moves("partial_ptr")
def edge_sums_kernel(
    map_ptr,
    partial_ptr,  # [image][share][3][channels]
    shares,
    height,
    width,
    channels,
    strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, share = (tl.program_id(0) // shares).to(tl.int64), tl.program_id(0) % shares
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = map_ptr + n * strides[0] + c[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    vertical = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    horizontal = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    length = tl.cdiv(height * width, shares)
    end = tl.minimum(share * length + length, height * width)
    for begin in tl.range(share * length, end, BLOCK_P, num_stages=LOOP_STAGES):
        _, i, j, there = _pixels(begin, end, width, BLOCK_P)
        x = tl.load(own + _at(i, j, strides), mask=there & (c < channels)[None, :], other=0.0).to(SUM_TYPE)
        total += x
        vertical += tl.where(i == 0, x, 0.0) - tl.where(i == height - 1, x, 0.0)
        horizontal += tl.where(j == 0, x, 0.0) - tl.where(j == width - 1, x, 0.0)
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * channels + c
    tl.store(to, tl.sum(total, axis=0), mask=c < channels)
    tl.store(to + channels, tl.sum(vertical, axis=0), mask=c < channels)
    tl.store(to + 2 * channels, tl.sum(horizontal, axis=0), mask=c < channels)


@counted
@moves("y_ptr")
def weigh_kernel(
    x_ptr,
    weights_ptr,
    bias_ptr,  # of the branches; may be None
    y_ptr,
    height,
    width,
    channels,
    x_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    block, column = block_and_column()
    blocks = tl.cdiv(height * width, BLOCK_P)
    n = (block // blocks).to(tl.int64)
    p, i, j, there_p = _pixels(block % blocks * BLOCK_P, height * width, width, BLOCK_P)
    first, step, c, there = quarter(column, channels, BLOCK_C, ALIGN)
    inside = there_p & there[None, :]
    x = x_ptr + n * x_strides[0] + c[None, :]
    x1, x2, x3 = _moved(x, i, j, height, width, step, first, channels, x_strides, inside, SUM_TYPE)
    w1, w2, w3 = load_branches(weights_ptr + n * 3 * channels, c, channels, there)
    y = x1 * w1[None, :] + x2 * w2[None, :] + x3 * w3[None, :]
    if bias_ptr is not None:
        y += offset_of(bias_ptr, w1, w2, w3, channels, c, there, SUM_TYPE)[None, :]
    to = y_ptr + (n * height * width + p) * channels + c[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)


@counted
@moves("partial_ptr", "y_ptr")
def weigh_backward_weights_kernel(
    dy_ptr,
    x_ptr,
    weights_ptr,
    bias_ptr,  # of the branches; may be None
    partial_ptr,  # [image][share][4][channels]
    y_ptr,  # may be None
    shares,
    height,
    width,
    channels,
    dy_strides,
    x_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    block, column = block_and_column()
    n, share = (block // shares).to(tl.int64), block % shares
    first, step, c, there = quarter(column, channels, BLOCK_C, ALIGN)
    x, g = x_ptr + n * x_strides[0] + c[None, :], dy_ptr + n * dy_strides[0] + c[None, :]
    sum1 = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    sum2 = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    sum3 = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    if y_ptr is not None:
        w1, w2, w3 = load_branches(weights_ptr + n * 3 * channels, c, channels, there)
        offset = tl.zeros_like(w1)
        if bias_ptr is not None:
            offset = offset_of(bias_ptr, w1, w2, w3, channels, c, there, SUM_TYPE)
    length = tl.cdiv(height * width, shares)
    end = tl.minimum(share * length + length, height * width)
    for begin in tl.range(share * length, end, BLOCK_P, num_stages=LOOP_STAGES):
        p, i, j, there_p = _pixels(begin, end, width, BLOCK_P)
        inside = there_p & there[None, :]
        dy = tl.load(g + _at(i, j, dy_strides), mask=inside, other=0.0).to(SUM_TYPE)
        x1, x2, x3 = _moved(x, i, j, height, width, step, first, channels, x_strides, inside, SUM_TYPE)
        sum1 += dy * x1
        sum2 += dy * x2
        sum3 += dy * x3
        total += dy
        if y_ptr is not None:
            y = offset[None, :] + w1[None, :] * x1 + w2[None, :] * x2 + w3[None, :] * x3
            to = y_ptr + (n * height * width + p) * channels + c[None, :]
            tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)
    to_sums = partial_ptr + block.to(tl.int64) * 4 * channels + c
    tl.store(to_sums, tl.sum(sum1, axis=0), mask=there)
    tl.store(to_sums + channels, tl.sum(sum2, axis=0), mask=there)
    tl.store(to_sums + 2 * channels, tl.sum(sum3, axis=0), mask=there)
    tl.store(to_sums + 3 * channels, tl.sum(total, axis=0), mask=there)


@triton.jit
def _taken(g, own, i, j, height, width, step, vertical, strides, inside, SUM_TYPE: tl.constexpr):
    """The gradients of the pixels that took this one, and how many: one, at the border none or two."""
    rows = tl.where(vertical, step, 0)
    to_i, to_j = i - rows, j - (step - rows)
    moved = (to_i >= 0) & (to_i < height) & (to_j >= 0) & (to_j < width)
    position = tl.where(vertical, i, j)
    stayed = position == tl.where(step < 0, 0, tl.where(vertical, height, width) - 1)
    taken = tl.load(g + _at(to_i, to_j, strides), mask=inside & moved, other=0.0).to(SUM_TYPE)
    return taken + tl.where(stayed, own, 0.0), moved.to(SUM_TYPE) + stayed.to(SUM_TYPE)


@counted
@moves("dx_ptr")
def weigh_backward_input_kernel(
    dy_ptr,
    weights_ptr,
    dpooled_ptr,
    dx_ptr,
    height,
    width,
    channels,
    dy_strides,
    dx_strides,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    block, column = block_and_column()
    blocks = tl.cdiv(height * width, BLOCK_P)
    n = (block // blocks).to(tl.int64)
    _, i, j, there_p = _pixels(block % blocks * BLOCK_P, height * width, width, BLOCK_P)
    first, step, c, there = quarter(column, channels, BLOCK_C, ALIGN)
    inside = there_p & there[None, :]
    g = dy_ptr + n * dy_strides[0] + c[None, :]
    own = tl.load(g + _at(i, j, dy_strides), mask=inside, other=0.0).to(SUM_TYPE)
    g1, count1 = _taken(g, own, i, j, height, width, step, first, dy_strides, inside, SUM_TYPE)
    g2, count2 = _taken(g, own, i, j, height, width, step, first == 0, dy_strides, inside, SUM_TYPE)
    dpooled = tl.load(dpooled_ptr + n * channels + c, mask=there, other=0.0)[None, :]
    w1, w2, w3 = load_branches(weights_ptr + n * 3 * channels, c, channels, there)
    dx1 = w1[None, :] * g1 + dpooled * count1
    dx2 = w2[None, :] * g2 + dpooled * count2
    dx3 = w3[None, :] * own + dpooled
    to = dx_ptr + n * dx_strides[0] + _at(i, j, dx_strides) + c[None, :]
    tl.store(to, dx1.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to + channels, dx2.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 2 * channels, dx3.to(dx_ptr.dtype.element_ty), mask=inside)


KERNELS = (edge_sums_kernel, weigh_kernel, weigh_backward_weights_kernel, weigh_backward_input_kernel)


def edge_sums(t: Tensor, sums: Tensor) -> None:
    if t.numel() == 0:
        return
    b, h, w, channels = t.shape
    chosen = undivided_tile(channels, t.element_size())
    columns = triton.cdiv(channels, chosen.BLOCK_C)
    shares = _shares(t, columns)
    partial = scratch((b, shares, 3, channels), sums.dtype, t.device)
    with torch.cuda.device_of(t):
        edge_sums_kernel[(b * shares, columns)](
            *(t, partial, shares, h, w, channels, t.stride()[:3]), SUM_TYPE=sum_type(t), **chosen._asdict()
        )
        sum_parts(partial.flatten(2), [sums])


def weigh(x: Tensor, weights: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if y.numel() == 0:
        return
    (b, h, w, channels), chosen = y.shape, tile(y.shape[3], y.element_size())
    grid = b * triton.cdiv(h * w, chosen.BLOCK_P), columns_of(channels, chosen)
    constants = {"SUM_TYPE": sum_type(x), **chosen._asdict()}
    with torch.cuda.device_of(x):
        weigh_kernel[grid](x, weights, bias, y, h, w, channels, x.stride()[:3], **constants)


def weigh_backward_weights(
    dy: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None, sums: Tensor, y: Tensor | None
) -> None:
    if dy.numel() == 0:
        return
    (b, h, w, channels), chosen = dy.shape, tile(dy.shape[3], dy.element_size())
    chosen = chosen._replace(num_warps=SUMMING_WARPS)
    columns = columns_of(channels, chosen)
    shares = _shares(dy, columns)
    partial = scratch((b, shares, 4, channels), sums.dtype, x.device)
    constants = {"SUM_TYPE": sum_type(x), **chosen._asdict()}
    with torch.cuda.device_of(x):
        weigh_backward_weights_kernel[(b * shares, columns)](
            *(dy, x, weights if y is not None else None, bias, partial, y),
            *(shares, h, w, channels, dy.stride()[:3], x.stride()[:3]),
            **constants,
        )
        sum_parts(partial.flatten(2), [sums])


def weigh_backward_input(dy: Tensor, weights: Tensor, dpooled: Tensor, dx: Tensor) -> None:
    if dx.numel() == 0:
        return
    (b, h, w, channels), chosen = dy.shape, tile(dy.shape[3], dy.element_size())
    grid = b * triton.cdiv(h * w, chosen.BLOCK_P), columns_of(channels, chosen)
    constants = {"SUM_TYPE": sum_type(dy), **chosen._asdict()}
    with torch.cuda.device_of(dy):
        weigh_backward_input_kernel[grid](
            dy, weights, dpooled, dx, h, w, channels, dy.stride()[:3], dx.stride()[:3], **constants
        )


def _shares(t: Tensor, columns: int) -> int:
    b, h, w, _ = t.shape
    return max(1, min(h * w // SHARE_PIXELS, triton.cdiv(IMAGE_PROGRAMS, b * columns)))
