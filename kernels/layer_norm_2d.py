"""LayerNorm over the channels of every pixel. A program holds all channels of some pixels in registers.

The tile is [pixels][channels] over any strides; Triton puts neighbouring threads along the axis whose stride is 1, so
one kernel serves channels_last and contiguous tensors. The backward pass computes the statistics again from the values
that it has to read anyway. Gradients of weight and bias are summed in two stages of fixed order: a program's own
pixels, then the programs, whose number depends on the shape only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._maps import (
    LOOP_STAGES,
    Tile,
    load_channels,
    load_map,
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

# Launch choices, by counting: no GPU has measured them.
PROGRAMS = 528  # that share the sums: four on every multiprocessor of an H200, as large as their tiles are
FORWARD_VALUES, MOST_FORWARD_WARPS = 32, 16  # of a thread, of a program
BACKWARD_VALUES, MOST_BACKWARD_WARPS = 16, 8  # four such tiles are in registers
SECTOR_BYTES = 32  # of every plane at least that a tile of contiguous tensors has, as long as the registers hold that


def tile(channels: int, channels_last: bool, element_size: int, backward: bool) -> Tile:
    """A thread has half as many values in float64, and in contiguous tensors, where every value has its own address."""
    block_c = power_of_two(channels)
    values, most_warps = (BACKWARD_VALUES, MOST_BACKWARD_WARPS) if backward else (FORWARD_VALUES, MOST_FORWARD_WARPS)
    values >>= int(not channels_last) + int(element_size == 8)
    block_p = max(1, 128 * values // block_c)
    if not channels_last:
        block_p = max(block_p, min(SECTOR_BYTES // element_size, 32 * most_warps * values // block_c))
    return Tile(block_p, block_c, num_warps=min(most_warps, max(4, block_p * block_c // (32 * values))))


@triton.jit
def _distance_from_mean(x, inside, channels):
    """The mean is rounded, not approximated as by Triton's float32 division: a constant pixel is at no distance."""
    sums = tl.sum(x, axis=1)
    count = tl.zeros_like(sums) + channels
    if sums.dtype == tl.float32:
        mean = tl.div_rn(sums, count)
    else:
        mean = sums / count
    return tl.where(inside, x - mean[:, None], 0.0)


@ByLayout
@moves("y_ptr")
def layer_norm_2d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    channels,
    x_strides,
    y_strides,
    EPS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
    d = _distance_from_mean(x, inside, channels)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / channels + EPS)
    weight = load_channels(weight_ptr, c, channels).to(SUM_TYPE)
    bias = load_channels(bias_ptr, c, channels).to(SUM_TYPE)
    store_map(y_ptr, y_strides, n, p, c, d * rstd[:, None] * weight + bias, inside)


@ByLayout
@moves("dx_ptr", "sums_ptr")
def layer_norm_2d_bwd_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    plus_ptr,  # may be None: what is added to dx
    dx_ptr,  # may be None
    sums_ptr,  # [program][2][channels]: the gradients of weight and bias; may be None
    blocks,
    pixels,
    channels,
    grad_strides,
    x_strides,
    plus_strides,
    dx_strides,
    EPS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    weight = load_channels(weight_ptr, c, channels).to(SUM_TYPE)
    dweight = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    dbias = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    begin, end = share_of_blocks(blocks)
    for block in tl.range(begin, end, num_stages=LOOP_STAGES):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        x = load_map(x_ptr, x_strides, n, p, c, inside).to(SUM_TYPE)
        grad = load_map(grad_ptr, grad_strides, n, p, c, inside).to(SUM_TYPE)
        d = _distance_from_mean(x, inside, channels)
        rstd = (1.0 / tl.sqrt(tl.sum(d * d, axis=1) / channels + EPS))[:, None]
        # Pixels past the end have no variance: without EPS their rstd would be infinite, and NaN in the sums.
        normalized = tl.where(inside, d * rstd, 0.0)
        if sums_ptr is not None:
            dweight += grad * normalized
            dbias += grad
        if dx_ptr is not None:
            g = grad * weight
            mean_g = (tl.sum(g, axis=1) / channels)[:, None]
            mean_gn = (tl.sum(g * normalized, axis=1) / channels)[:, None]
            dx = (g - mean_g - normalized * mean_gn) * rstd
            if plus_ptr is not None:
                dx += load_map(plus_ptr, plus_strides, n, p, c, inside).to(SUM_TYPE)
            store_map(dx_ptr, dx_strides, n, p, c, dx, inside)
    if sums_ptr is not None:
        own = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * channels
        store_sums(own, dweight, c, channels)
        store_sums(own + channels, dbias, c, channels)


KERNELS = (layer_norm_2d_fwd_kernel, layer_norm_2d_bwd_kernel)


def forward(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float) -> None:
    if y.numel() == 0:
        return
    last = _channels_last(y)
    x = _walkable(x, last)
    images, pixels, strides = walk([x, y])
    t = tile(x.shape[1], last, x.element_size(), backward=False)
    with torch.cuda.device_of(x):
        layer_norm_2d_fwd_kernel.of(last)[(images * triton.cdiv(pixels, t.BLOCK_P),)](
            *(x, weight.contiguous(), bias.contiguous(), y, pixels, x.shape[1], *strides),
            EPS=eps,
            SUM_TYPE=sum_type(x),
            **t._asdict(),
        )


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    eps: float,
    plus: Tensor | None = None,
) -> None:
    """plus is added to dx."""
    if x.numel() == 0:
        for sums in (dweight, dbias):
            if sums is not None:
                sums.zero_()
        return
    last = _channels_last(x)
    grad, x = _walkable(grad, last), _walkable(x, last)
    plus = None if plus is None else _walkable(plus, last)
    images, pixels, strides = walk([grad, x, plus, dx])
    channels = x.shape[1]
    t = tile(channels, last, x.element_size(), backward=True)
    blocks = images * triton.cdiv(pixels, t.BLOCK_P)
    programs = min(PROGRAMS, blocks)
    sums = None
    if dweight is not None or dbias is not None:
        sums = scratch((programs, 2, channels), torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
    with torch.cuda.device_of(x):
        layer_norm_2d_bwd_kernel.of(last)[(programs,)](
            *(grad, x, weight.contiguous(), plus, dx, sums, blocks, pixels, channels, *strides),
            EPS=eps,
            SUM_TYPE=sum_type(x),
            **t._asdict(),
        )
        if sums is not None:
            sum_parts(sums.view(1, programs, -1), [dweight, dbias])


def _channels_last(t: Tensor) -> bool:
    return t.stride(1) == 1 and not t.is_contiguous()


def _walkable(t: Tensor, channels_last: bool) -> Tensor:
    """t if one stride leads through all pixels of an image and values are neighbours where y has them, else a copy."""
    (_, _, h, w), (_, channel, row, pixel) = t.shape, t.stride()
    gapless = h == 1 or w == 1 or row == w * pixel
    adjacent = channel if channels_last else row if w == 1 else pixel
    if gapless and (adjacent <= 1 or (h * w == 1 and not channels_last)):
        return t
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
