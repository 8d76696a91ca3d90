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
from ._maps import Tile, sum_type, walk
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

MOST_PROGRAMS = 528  # of the backward pass, each with a row of partial sums: four on every multiprocessor of an H200


def tile(channels: int, channels_last: bool, element_size: int, backward: bool) -> Tile:
    """A thread holds 32 values going forward and 16 going back, which takes four such tiles; half of it in float64.

    Half of it in contiguous tensors, too: there every value has an address of its own. Their tiles are as wide as a
    sector of 32 bytes in every plane, as long as the registers hold that.
    """
    block_c = power_of_two(channels)
    values = 32 >> (int(backward) + int(not channels_last) + int(element_size == 8))
    most_warps = 8 if backward else 16
    block_p = max(1, 128 * values // block_c)
    if not channels_last:
        block_p = max(block_p, min(32 // element_size, 32 * most_warps * values // block_c))
    return Tile(block_p, block_c, num_warps=min(most_warps, max(4, block_p * block_c // (32 * values))))


@triton.jit
def _pixels_and_channels(block, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, pixels and channels of a block, in 64 bits: a batch of large maps has more than 2^31 elements."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    image = (block // blocks).to(tl.int64)
    p = (block % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    return image, p[:, None], c[None, :], (p < pixels)[:, None] & (c < channels)[None, :]


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
    x_stride_n,
    x_stride_c,
    x_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    EPS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p, c, inside = _pixels_and_channels(tl.program_id(0), pixels, channels, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    d = _distance_from_mean(x, inside, channels)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / channels + EPS)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    y = d * rstd[:, None] * weight + bias
    tl.store(y_ptr + n * y_stride_n + p * y_stride_p + c * y_stride_c, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    grad_stride_n,
    grad_stride_c,
    grad_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    plus_stride_n,
    plus_stride_c,
    plus_stride_p,
    dx_stride_n,
    dx_stride_c,
    dx_stride_p,
    EPS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    channel = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(SUM_TYPE)[None, :]
    dweight = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    dbias = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, p, c, inside = _pixels_and_channels(block, pixels, channels, BLOCK_P, BLOCK_C)
        x = tl.load(x_ptr + n * x_stride_n + p * x_stride_p + c * x_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        grad = tl.load(grad_ptr + n * grad_stride_n + p * grad_stride_p + c * grad_stride_c, mask=inside, other=0.0)
        grad = grad.to(SUM_TYPE)
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
                plus_at = plus_ptr + n * plus_stride_n + p * plus_stride_p + c * plus_stride_c
                dx += tl.load(plus_at, mask=inside, other=0.0).to(SUM_TYPE)
            dx_at = dx_ptr + n * dx_stride_n + p * dx_stride_p + c * dx_stride_c
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        own = sums_ptr + program.to(tl.int64) * 2 * channels + channel
        tl.store(own, tl.sum(dweight, axis=0), mask=channel < channels)
        tl.store(own + channels, tl.sum(dbias, axis=0), mask=channel < channels)


KERNELS = (layer_norm_2d_fwd_kernel, layer_norm_2d_bwd_kernel)


def forward(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float) -> None:
    if y.numel() == 0:
        return
    last = _channels_last(y)
    x = _walkable(x, last)
    images, pixels, (x_strides, y_strides) = walk([x, y])
    t = tile(x.shape[1], last, x.element_size(), backward=False)
    with torch.cuda.device_of(x):
        layer_norm_2d_fwd_kernel.of(last)[(images * triton.cdiv(pixels, t.BLOCK_P),)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            y,
            pixels,
            x.shape[1],
            *x_strides,
            *y_strides,
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
    images, pixels, strides = walk([grad, x, x if plus is None else plus, x if dx is None else dx])
    channels = x.shape[1]
    t = tile(channels, last, x.element_size(), backward=True)
    blocks = images * triton.cdiv(pixels, t.BLOCK_P)
    programs = min(MOST_PROGRAMS, blocks)
    sums = None
    if dweight is not None or dbias is not None:
        sums = scratch((programs, 2, channels), torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
    with torch.cuda.device_of(x):
        layer_norm_2d_bwd_kernel.of(last)[(programs,)](
            grad,
            x,
            weight.contiguous(),
            plus,
            dx,
            sums,
            blocks,
            pixels,
            channels,
            *(stride for of_tensor in strides for stride in of_tensor),
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
