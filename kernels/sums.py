"""The second stage of sums over pixels, tokens and images: the parts of programs, added in a fixed order.

What the kernels of a first stage leave is [sample][part][number]; slices of the numbers go to tensors of any dtype, as
the gradients of several parameters are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._maps import sum_type
from ._moves import moves
from ._specialize import counted


class Tile(NamedTuple):
    BLOCK_S: int
    BLOCK_C: int
    num_warps: int


# Launch choices, by counting: no GPU has measured them.
FEW, MANY = Tile(1, 128, num_warps=4), Tile(32, 32, num_warps=4)  # parts; of many, lines of 128 bytes
MOST_OF_FEW = 16
SAMPLES = 32  # from so many on each has few parts, or not many more: the last batch of an epoch compiles nothing anew
STAGES = tl.constexpr(4)  # of a loop that a thousand parts go through 32 times, which latency would bound


@counted
@moves("outs")
def sum_parts_kernel(
    parts_ptr,
    outs,  # each may be None
    starts,
    lengths,
    count,
    row,
    pixels,  # a mean of so many, or None
    OUTS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for k in tl.static_range(OUTS):
        if tl.program_id(2) == k:
            at = parts_ptr + sample * count * row + starts[k] + c[None, :]
            total = tl.zeros((BLOCK_S, BLOCK_C), SUM_TYPE)
            for first in tl.range(0, count, BLOCK_S, num_stages=STAGES):
                s = first + tl.arange(0, BLOCK_S)
                inside = (s < count)[:, None] & (c < lengths[k])[None, :]
                total += tl.load(at + s.to(tl.int64)[:, None] * row, mask=inside, other=0.0)
            summed = tl.sum(total, axis=0)
            if pixels is not None:
                divisor = tl.zeros_like(summed) + pixels
                # Rounded, not approximated as by Triton's float32 division, so that a constant image is its mean.
                if summed.dtype == tl.float32:
                    summed = tl.div_rn(summed, divisor)
                else:
                    summed = summed / divisor
            if outs[k] is not None:
                to = outs[k] + sample * lengths[k] + c
                tl.store(to, summed.to(outs[k].dtype.element_ty), mask=c < lengths[k])


KERNELS = (sum_parts_kernel,)


def sum_parts(
    parts: Tensor, outs: Sequence[Tensor | None], lengths: Sequence[int] | None = None, pixels: int | None = None
) -> None:
    """outs, contiguous, = the sums over the parts of (samples, parts, numbers). They share the numbers of a sample in
    slices of these lengths, by default equal ones; those of pixels are divided by how many there are."""
    samples, count, row = parts.shape
    lengths = lengths or [row // len(outs)] * len(outs)
    starts = tuple(sum(lengths[:k]) for k in range(len(lengths)))
    tile = FEW if count <= MOST_OF_FEW or samples >= SAMPLES else MANY
    with torch.cuda.device_of(parts):
        sum_parts_kernel[(samples, triton.cdiv(max(lengths), tile.BLOCK_C), len(outs))](
            parts,
            tuple(outs),
            starts,
            tuple(lengths),
            count,
            row,
            pixels,
            OUTS=len(outs),
            SUM_TYPE=sum_type(parts),
            **tile._asdict(),
        )
