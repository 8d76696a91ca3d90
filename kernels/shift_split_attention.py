"""S2-MLPv2's passes over the pixels: what is moved is read where it comes from, in the backward pass too.

A program has some pixels of one image and some channels of one quarter, all of which come from the same neighbour: rows
of adjacent channels, whatever the move. Sums over the pixels have two stages of fixed order: shares of an image, then
the shares, whose number depends on the shape only. Between the passes, for a few numbers per image, there are PyTorch's
ops. The functions have the meaning of `CPUPasses` in ops/shift_split_attention.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._moves import moves
from ._specialize import counted
from .sums import sum_parts

SHARE_PIXELS = 128  # at least, of a share
PROGRAMS = 2112  # that share the sums of a batch: sixteen for every multiprocessor of an H200


class Tile(NamedTuple):
    BLOCK_P: int
    BLOCK_C: int
    ALIGN: int  # elements: where quarters begin and end
    num_warps: int


class SmallTile(NamedTuple):
    BLOCK_C: int
    num_warps: int


class BiasTile(NamedTuple):
    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


SMALL_TILE, BIAS_TILE = SmallTile(128, num_warps=4), BiasTile(32, 32, num_warps=4)


def tile(channels: int, element_size: int) -> Tile:
    """A thread has eight values of each of up to four tensors; half of it in float64."""
    block_c = min(64, power_of_two(-(-channels // 4)))
    align = 16
    while any(channels * q // 4 % align for q in range(1, 5)):
        align //= 2
    return Tile((512 if element_size == 8 else 1024) // block_c, block_c, align, num_warps=4)


@triton.jit
def _quarter(block, channels, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr):
    """Whether its branch 1 moves along the height, which neighbour comes, the channels and which of them exist."""
    blocks = tl.cdiv(tl.cdiv(channels, 4), BLOCK_C)
    q = block // blocks
    begin = tl.multiple_of(channels * q // 4, ALIGN)
    end = tl.multiple_of(channels * (q + 1) // 4, ALIGN)
    c = begin + block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return q < 2, 2 * (q % 2) - 1, c, c < end


@triton.jit
def _at(i, j, stride_h, stride_w):
    """In 64 bits: a batch of large maps has more than 2^31 elements."""
    return i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w


@triton.jit
def _source(i, j, height, width, step, vertical, stride_h, stride_w):
    """Where the pixel comes from; what would come from outside is what was there."""
    rows = tl.where(vertical, step, 0)
    return _at(
        tl.minimum(tl.maximum(i + rows, 0), height - 1),
        tl.minimum(tl.maximum(j + step - rows, 0), width - 1),
        stride_h,
        stride_w,
    )


@counted
@moves("partial_ptr")
def edge_sums_kernel(
    map_ptr,
    partial_ptr,  # [image][share][3][channels]
    shares,
    height,
    width,
    channels,
    stride_n,
    stride_h,
    stride_w,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    n, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = map_ptr + n.to(tl.int64) * stride_n + c[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    vertical = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    horizontal = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    length = tl.cdiv(height * width, shares)
    for first in range(share * length, tl.minimum(share * length + length, height * width), BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        i, j = (p // width)[:, None], (p % width)[:, None]
        inside = (p < tl.minimum(share * length + length, height * width))[:, None] & (c < channels)[None, :]
        x = tl.load(own + _at(i, j, stride_h, stride_w), mask=inside, other=0.0).to(SUM_TYPE)
        total += x
        vertical += tl.where(i == 0, x, 0.0) - tl.where(i == height - 1, x, 0.0)
        horizontal += tl.where(j == 0, x, 0.0) - tl.where(j == width - 1, x, 0.0)
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * channels + c
    tl.store(to, tl.sum(total, axis=0), mask=c < channels)
    tl.store(to + channels, tl.sum(vertical, axis=0), mask=c < channels)
    tl.store(to + 2 * channels, tl.sum(horizontal, axis=0), mask=c < channels)


@triton.jit
def _offset(bias_ptr, w1, w2, w3, channels, c, there, SUM_TYPE: tl.constexpr):
    """What the biases (3, C) of the branches add to the weighed sum."""
    b1 = tl.load(bias_ptr + c, mask=there, other=0.0).to(SUM_TYPE)
    b2 = tl.load(bias_ptr + channels + c, mask=there, other=0.0).to(SUM_TYPE)
    b3 = tl.load(bias_ptr + 2 * channels + c, mask=there, other=0.0).to(SUM_TYPE)
    return w1 * b1 + w2 * b2 + w3 * b3


@counted
@moves("pooled_ptr")
def pool_kernel(
    sums_ptr,
    bias_ptr,  # of the branches, which have pixels of it; may be None
    pooled_ptr,
    pixels,
    channels,
    SUM_TYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    first, step, c, there = _quarter(tl.program_id(1), channels, BLOCK_C, ALIGN)
    total = sums_ptr + n * 9 * channels + c
    along = total + tl.where(first, 3, 6) * channels
    across = total + tl.where(first, 6, 3) * channels + channels
    moved = tl.load(along, mask=there, other=0.0) + tl.load(across, mask=there, other=0.0)
    pooled = tl.load(total, mask=there, other=0.0) + tl.load(total + channels, mask=there, other=0.0)
    pooled += tl.load(total + 2 * channels, mask=there, other=0.0) - moved * step
    if bias_ptr is not None:
        pooled += _offset(bias_ptr, 1.0, 1.0, 1.0, channels, c, there, SUM_TYPE) * pixels
    tl.store(pooled_ptr + n * channels + c, pooled, mask=there)


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
    x_stride_n,
    x_stride_h,
    x_stride_w,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    blocks = tl.cdiv(height * width, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    first, step, c, there = _quarter(tl.program_id(1), channels, BLOCK_C, ALIGN)
    i, j = (p // width)[:, None], (p % width)[:, None]
    inside = (p < height * width)[:, None] & there[None, :]
    x = x_ptr + n * x_stride_n + c[None, :]
    x1 = x + _source(i, j, height, width, step, first, x_stride_h, x_stride_w)
    x2 = x + _source(i, j, height, width, step, first == 0, x_stride_h, x_stride_w) + channels
    x3 = x + _at(i, j, x_stride_h, x_stride_w) + 2 * channels
    w = weights_ptr + n * 3 * channels + c
    w1 = tl.load(w, mask=there, other=0.0)
    w2 = tl.load(w + channels, mask=there, other=0.0)
    w3 = tl.load(w + 2 * channels, mask=there, other=0.0)
    y = tl.load(x1, mask=inside, other=0.0).to(SUM_TYPE) * w1[None, :]
    y += tl.load(x2, mask=inside, other=0.0).to(SUM_TYPE) * w2[None, :]
    y += tl.load(x3, mask=inside, other=0.0).to(SUM_TYPE) * w3[None, :]
    if bias_ptr is not None:
        y += _offset(bias_ptr, w1, w2, w3, channels, c, there, SUM_TYPE)[None, :]
    to = y_ptr + (n * height * width + p[:, None]) * channels + c[None, :]
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
    dy_stride_n,
    dy_stride_h,
    dy_stride_w,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    n, share = (tl.program_id(0) // shares).to(tl.int64), tl.program_id(0) % shares
    first, step, c, there = _quarter(tl.program_id(1), channels, BLOCK_C, ALIGN)
    x, g = x_ptr + n * x_stride_n + c[None, :], dy_ptr + n * dy_stride_n + c[None, :]
    sum1 = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    sum2 = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    sum3 = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    if y_ptr is not None:
        w = weights_ptr + n * 3 * channels + c
        w1 = tl.load(w, mask=there, other=0.0)
        w2 = tl.load(w + channels, mask=there, other=0.0)
        w3 = tl.load(w + 2 * channels, mask=there, other=0.0)
        offset = tl.zeros_like(w1)
        if bias_ptr is not None:
            offset = _offset(bias_ptr, w1, w2, w3, channels, c, there, SUM_TYPE)
    length = tl.cdiv(height * width, shares)
    for begin in range(share * length, tl.minimum(share * length + length, height * width), BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        i, j = (p // width)[:, None], (p % width)[:, None]
        inside = (p < tl.minimum(share * length + length, height * width))[:, None] & there[None, :]
        dy = tl.load(g + _at(i, j, dy_stride_h, dy_stride_w), mask=inside, other=0.0).to(SUM_TYPE)
        at1 = x + _source(i, j, height, width, step, first, x_stride_h, x_stride_w)
        at2 = x + _source(i, j, height, width, step, first == 0, x_stride_h, x_stride_w) + channels
        at3 = x + _at(i, j, x_stride_h, x_stride_w) + 2 * channels
        x1 = tl.load(at1, mask=inside, other=0.0).to(SUM_TYPE)
        x2 = tl.load(at2, mask=inside, other=0.0).to(SUM_TYPE)
        x3 = tl.load(at3, mask=inside, other=0.0).to(SUM_TYPE)
        sum1 += dy * x1
        sum2 += dy * x2
        sum3 += dy * x3
        total += dy
        if y_ptr is not None:
            y = offset[None, :] + w1[None, :] * x1 + w2[None, :] * x2 + w3[None, :] * x3
            to = y_ptr + (n * height * width + p[:, None]) * channels + c[None, :]
            tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)
    to_sums = partial_ptr + tl.program_id(0).to(tl.int64) * 4 * channels + c
    tl.store(to_sums, tl.sum(sum1, axis=0), mask=there)
    tl.store(to_sums + channels, tl.sum(sum2, axis=0), mask=there)
    tl.store(to_sums + 2 * channels, tl.sum(sum3, axis=0), mask=there)
    tl.store(to_sums + 3 * channels, tl.sum(total, axis=0), mask=there)


@triton.jit
def _taken(g, own, i, j, height, width, step, vertical, stride_h, stride_w, inside, SUM_TYPE: tl.constexpr):
    """The gradients of the pixels that took this one, and how many: one, at the border none or two."""
    rows = tl.where(vertical, step, 0)
    to_i, to_j = i - rows, j - (step - rows)
    moved = (to_i >= 0) & (to_i < height) & (to_j >= 0) & (to_j < width)
    position = tl.where(vertical, i, j)
    stayed = position == tl.where(step < 0, 0, tl.where(vertical, height, width) - 1)
    taken = tl.load(g + _at(to_i, to_j, stride_h, stride_w), mask=inside & moved, other=0.0).to(SUM_TYPE)
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
    dy_stride_n,
    dy_stride_h,
    dy_stride_w,
    dx_stride_n,
    dx_stride_h,
    dx_stride_w,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    blocks = tl.cdiv(height * width, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    first, step, c, there = _quarter(tl.program_id(1), channels, BLOCK_C, ALIGN)
    i, j = (p // width)[:, None], (p % width)[:, None]
    inside = (p < height * width)[:, None] & there[None, :]
    g = dy_ptr + n * dy_stride_n + c[None, :]
    own = tl.load(g + _at(i, j, dy_stride_h, dy_stride_w), mask=inside, other=0.0).to(SUM_TYPE)
    g1, count1 = _taken(g, own, i, j, height, width, step, first, dy_stride_h, dy_stride_w, inside, SUM_TYPE)
    g2, count2 = _taken(g, own, i, j, height, width, step, first == 0, dy_stride_h, dy_stride_w, inside, SUM_TYPE)
    dpooled = tl.load(dpooled_ptr + n * channels + c, mask=there, other=0.0)[None, :]
    w = weights_ptr + n * 3 * channels + c
    dx1 = tl.load(w, mask=there, other=0.0)[None, :] * g1 + dpooled * count1
    dx2 = tl.load(w + channels, mask=there, other=0.0)[None, :] * g2 + dpooled * count2
    dx3 = tl.load(w + 2 * channels, mask=there, other=0.0)[None, :] * own + dpooled
    to = dx_ptr + n * dx_stride_n + _at(i, j, dx_stride_h, dx_stride_w) + c[None, :]
    tl.store(to, dx1.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to + channels, dx2.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 2 * channels, dx3.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
@moves("dlogits_ptr")
def softmax_bwd_kernel(
    sums_ptr,  # [image][4][channels]: gradients of the weights, but for the biases' part, and sums of dy
    weights_ptr,
    bias_ptr,  # may be None
    dlogits_ptr,
    channels,
    SUM_TYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of the softmax over the three branches."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    w, grad, to = (
        weights_ptr + n * 3 * channels + c,
        sums_ptr + n * 4 * channels + c,
        dlogits_ptr + n * 3 * channels + c,
    )
    w1 = tl.load(w, mask=there, other=0.0)
    w2 = tl.load(w + channels, mask=there, other=0.0)
    w3 = tl.load(w + 2 * channels, mask=there, other=0.0)
    g1 = tl.load(grad, mask=there, other=0.0)
    g2 = tl.load(grad + channels, mask=there, other=0.0)
    g3 = tl.load(grad + 2 * channels, mask=there, other=0.0)
    if bias_ptr is not None:
        total = tl.load(grad + 3 * channels, mask=there, other=0.0)
        g1 += tl.load(bias_ptr + c, mask=there, other=0.0).to(SUM_TYPE) * total
        g2 += tl.load(bias_ptr + channels + c, mask=there, other=0.0).to(SUM_TYPE) * total
        g3 += tl.load(bias_ptr + 2 * channels + c, mask=there, other=0.0).to(SUM_TYPE) * total
    mean = w1 * g1 + w2 * g2 + w3 * g3
    tl.store(to, w1 * (g1 - mean), mask=there)
    tl.store(to + channels, w2 * (g2 - mean), mask=there)
    tl.store(to + 2 * channels, w3 * (g3 - mean), mask=there)


@counted
@moves("dbias_ptr")
def bias_bwd_kernel(
    sums_ptr,  # as above
    weights_ptr,
    dpooled_ptr,
    dbias_ptr,
    images,
    pixels,
    channels,
    SUM_TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of the biases of the branches: no pixel of dy goes to two pixels of a branch, none is lost."""
    branch = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), SUM_TYPE)
    for first in range(0, images, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        inside = (n < images) & (c < channels)
        weight = tl.load(weights_ptr + (n * 3 + branch) * channels + c, mask=inside, other=0.0)
        dy = tl.load(sums_ptr + (n * 4 + 3) * channels + c, mask=inside, other=0.0)
        total += weight * dy + tl.load(dpooled_ptr + n * channels + c, mask=inside, other=0.0) * pixels
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    summed = tl.sum(total, axis=0).to(dbias_ptr.dtype.element_ty)
    tl.store(dbias_ptr + branch * channels + c, summed, mask=c < channels)


KERNELS = (
    edge_sums_kernel,
    pool_kernel,
    weigh_kernel,
    weigh_backward_weights_kernel,
    weigh_backward_input_kernel,
    softmax_bwd_kernel,
    bias_bwd_kernel,
)


def edge_sums(t: Tensor, sums: Tensor) -> None:
    if t.numel() == 0:
        return
    b, h, w, channels = t.shape
    chosen = tile(channels, t.element_size())
    columns = triton.cdiv(channels, chosen.BLOCK_C)
    shares = _shares(t, columns)
    partial = scratch((b, shares, 3, channels), sums.dtype, t.device)
    constants = {"SUM_TYPE": _sum_type(t), **chosen._asdict()}
    with torch.cuda.device_of(t):
        edge_sums_kernel[(b * shares, columns)](t, partial, shares, h, w, channels, *t.stride()[:3], **constants)
        sum_parts(partial.flatten(2), [sums])


def pool(sums: Tensor, pooled: Tensor, bias: Tensor | None = None, pixels: int = 0) -> None:
    if pooled.numel() == 0:
        return
    chosen = tile(pooled.shape[1], pooled.element_size())
    constants = {"SUM_TYPE": _sum_type(pooled), "BLOCK_C": chosen.BLOCK_C, "ALIGN": chosen.ALIGN}
    with torch.cuda.device_of(sums):
        pool_kernel[(len(pooled), _columns(pooled.shape[1], chosen))](
            sums, bias, pooled, pixels, pooled.shape[1], **constants, num_warps=1
        )


def pool_linear(sums: Tensor, weight: Tensor, bias: Tensor | None, pixels: int, pooled: Tensor) -> None:
    pool(sums @ weight.to(sums.dtype).t(), pooled, bias, pixels)


def offset(weights: Tensor, bias: Tensor | None) -> Tensor | None:
    """The kernels take the bias itself."""
    return bias


def sum_pixels(t: Tensor, sums: Tensor) -> None:
    torch.sum(t.flatten(0, 2), 0, dtype=sums.dtype, out=sums)


def branch_weights(pooled: Tensor, mlp1_weight: Tensor, mlp2_weight: Tensor, hidden: Tensor, weights: Tensor) -> None:
    torch.mm(pooled, mlp1_weight.to(pooled.dtype).t(), out=hidden)
    logits = F.gelu(hidden) @ mlp2_weight.to(pooled.dtype).t()
    torch.softmax(logits.view_as(weights), 1, out=weights)


def branch_weights_backward(
    sums: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    mlps: Sequence[Tensor],
    dmlps: Sequence[Tensor | None],
    dpooled: Tensor,
) -> None:
    mlp1_weight, mlp2_weight = (weight.to(pooled.dtype) for weight in mlps)
    channels, dlogits = pooled.shape[1], scratch((len(sums), 3 * pooled.shape[1]), weights.dtype, weights.device)
    if len(sums):
        grid = len(sums), triton.cdiv(channels, SMALL_TILE.BLOCK_C)
        with torch.cuda.device_of(sums):
            softmax_bwd_kernel[grid](
                sums, weights, bias, dlogits, channels, SUM_TYPE=_sum_type(sums), **SMALL_TILE._asdict()
            )
    dhidden = torch.ops.aten.gelu_backward(dlogits @ mlp2_weight, hidden)
    for dmlp, grad, x in (dmlps[0], dhidden, pooled), (dmlps[1], dlogits, F.gelu(hidden)):
        if dmlp is not None and dmlp.dtype == grad.dtype:
            torch.mm(grad.t(), x, out=dmlp)
        elif dmlp is not None:
            dmlp.copy_(grad.t() @ x)
    torch.mm(dhidden, mlp1_weight, out=dpooled)


def bias_backward(sums: Tensor, weights: Tensor, dpooled: Tensor, pixels: int, dbias: Tensor) -> None:
    """Of the biases (3C,) of the branches."""
    images, channels = dpooled.shape
    with torch.cuda.device_of(sums):
        bias_bwd_kernel[(triton.cdiv(channels, BIAS_TILE.BLOCK_C), 3)](
            sums, weights, dpooled, dbias, images, pixels, channels, SUM_TYPE=_sum_type(sums), **BIAS_TILE._asdict()
        )


def weigh(x: Tensor, weights: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if y.numel() == 0:
        return
    (b, h, w, channels), chosen = y.shape, tile(y.shape[3], y.element_size())
    grid = b * triton.cdiv(h * w, chosen.BLOCK_P), _columns(channels, chosen)
    constants = {"SUM_TYPE": _sum_type(x), **chosen._asdict()}
    with torch.cuda.device_of(x):
        weigh_kernel[grid](x, weights, bias, y, h, w, channels, *x.stride()[:3], **constants)


def weigh_backward_weights(
    dy: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None, sums: Tensor, y: Tensor | None
) -> None:
    if dy.numel() == 0:
        return
    (b, h, w, channels), chosen = dy.shape, tile(dy.shape[3], dy.element_size())
    chosen = chosen._replace(num_warps=8)  # a thread has four sums, too
    columns = _columns(channels, chosen)
    shares = _shares(dy, columns)
    partial = scratch((b, shares, 4, channels), sums.dtype, x.device)
    strides = *dy.stride()[:3], *x.stride()[:3]
    constants = {"SUM_TYPE": _sum_type(x), **chosen._asdict()}
    with torch.cuda.device_of(x):
        weigh_backward_weights_kernel[(b * shares, columns)](
            *(dy, x, weights if y is not None else None, bias, partial, y),
            shares,
            h,
            w,
            channels,
            *strides,
            **constants,
        )
        sum_parts(partial.flatten(2), [sums])


def weigh_backward_input(dy: Tensor, weights: Tensor, dpooled: Tensor, dx: Tensor) -> None:
    if dx.numel() == 0:
        return
    (b, h, w, channels), chosen = dy.shape, tile(dy.shape[3], dy.element_size())
    grid = b * triton.cdiv(h * w, chosen.BLOCK_P), _columns(channels, chosen)
    strides = *dy.stride()[:3], *dx.stride()[:3]
    constants = {"SUM_TYPE": _sum_type(dy), **chosen._asdict()}
    with torch.cuda.device_of(dy):
        weigh_backward_input_kernel[grid](dy, weights, dpooled, dx, h, w, channels, *strides, **constants)


def _columns(channels: int, chosen: Tile) -> int:
    """Programs side by side: blocks of channels of all four quarters."""
    return 4 * triton.cdiv(triton.cdiv(channels, 4), chosen.BLOCK_C)


def _shares(t: Tensor, columns: int) -> int:
    b, h, w, _ = t.shape
    return max(1, min(h * w // SHARE_PIXELS, triton.cdiv(PROGRAMS, b * columns)))


def _sum_type(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32
