"""The weights of S2-MLPv2's branches, a few numbers per image, and their way back: between the passes over the pixels.

The functions have the meaning of `CPUPasses` in ops/shift_split_attention.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._maps import sum_type
from ._moves import moves
from ._quarters import columns_of, load_branches, offset_of, quarter, tile
from ._specialize import counted


class Tile(NamedTuple):
    BLOCK_C: int
    num_warps: int


class BiasTile(NamedTuple):
    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


# Launch choices: what is as small as this takes as long as a launch.
SOFTMAX_TILE, BIAS_TILE = Tile(128, num_warps=4), BiasTile(32, 32, num_warps=4)


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
    first, step, c, there = quarter(tl.program_id(1), channels, BLOCK_C, ALIGN)
    total = sums_ptr + n * 9 * channels + c
    along = total + tl.where(first, 3, 6) * channels
    across = total + tl.where(first, 6, 3) * channels + channels
    moved = tl.load(along, mask=there, other=0.0) + tl.load(across, mask=there, other=0.0)
    pooled = tl.load(total, mask=there, other=0.0) + tl.load(total + channels, mask=there, other=0.0)
    pooled += tl.load(total + 2 * channels, mask=there, other=0.0) - moved * step
    if bias_ptr is not None:
        pooled += offset_of(bias_ptr, 1.0, 1.0, 1.0, channels, c, there, SUM_TYPE) * pixels
    tl.store(pooled_ptr + n * channels + c, pooled, mask=there)


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
    w1, w2, w3 = load_branches(weights_ptr + n * 3 * channels, c, channels, there)
    g1, g2, g3 = load_branches(sums_ptr + n * 4 * channels, c, channels, there)
    if bias_ptr is not None:
        total = tl.load(sums_ptr + n * 4 * channels + 3 * channels + c, mask=there, other=0.0)
        b1, b2, b3 = load_branches(bias_ptr, c, channels, there)
        g1 += b1.to(SUM_TYPE) * total
        g2 += b2.to(SUM_TYPE) * total
        g3 += b3.to(SUM_TYPE) * total
    to = dlogits_ptr + n * 3 * channels + c
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


KERNELS = (pool_kernel, softmax_bwd_kernel, bias_bwd_kernel)


def pool(sums: Tensor, pooled: Tensor, bias: Tensor | None = None, pixels: int = 0) -> None:
    if pooled.numel() == 0:
        return
    chosen = tile(pooled.shape[1], pooled.element_size())
    constants = {"SUM_TYPE": sum_type(pooled), "BLOCK_C": chosen.BLOCK_C, "ALIGN": chosen.ALIGN}
    with torch.cuda.device_of(sums):
        pool_kernel[(len(pooled), columns_of(pooled.shape[1], chosen))](
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
        grid = len(sums), triton.cdiv(channels, SOFTMAX_TILE.BLOCK_C)
        with torch.cuda.device_of(sums):
            softmax_bwd_kernel[grid](
                sums, weights, bias, dlogits, channels, SUM_TYPE=sum_type(sums), **SOFTMAX_TILE._asdict()
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
            sums, weights, dpooled, dbias, images, pixels, channels, SUM_TYPE=sum_type(sums), **BIAS_TILE._asdict()
        )
