"""What a batch norm has of every channel: its table, by the moments of parts of a batch, and what becomes of sums.

A table is [scale, shift, mean, inverse deviation, unbiased variance][channels], in the type of the sums. All orders of
sums depend on shapes only.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._maps import sum_type
from ._moves import moves
from ._specialize import counted


class Tile(NamedTuple):
    BLOCK_R: int  # parts
    BLOCK_C: int
    num_warps: int


# By counting: no GPU has measured it. 16 values of a thread, lines of 128 bytes; with gates and offsets a quarter.
TILE, IMAGE_TILE = Tile(64, 32, num_warps=4), Tile(16, 32, num_warps=4)


@counted
@moves("table_ptr")
def prepare_kernel(
    partial_ptr,  # [part][mean, squares][channels]; None where mean and variance are known
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    count,  # of parts
    shares,  # of an image
    pixels,
    channels,
    EPS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,  # of the kernel of the parts
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    of_channel = c < channels
    if partial_ptr is not None:
        length = tl.cdiv(tl.cdiv(pixels, shares), BLOCK_P) * BLOCK_P
        total = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
        values = tl.zeros((BLOCK_R, 1), SUM_TYPE)
        for first in range(0, count, BLOCK_R):
            part = (first + tl.arange(0, BLOCK_R))[:, None]
            share = tl.where(part < count, tl.minimum(tl.maximum(pixels - part % shares * length, 0), length), 0)
            at = partial_ptr + part.to(tl.int64) * 2 * channels + c
            total += share.to(SUM_TYPE) * tl.load(at, mask=(part < count) & of_channel, other=0.0)
            values += share.to(SUM_TYPE)
        number = tl.sum(values, axis=0)[None, :]
        mean = tl.sum(total, axis=0)[None, :] / number
        squares = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
        for first in range(0, count, BLOCK_R):
            part = (first + tl.arange(0, BLOCK_R))[:, None]
            share = tl.where(part < count, tl.minimum(tl.maximum(pixels - part % shares * length, 0), length), 0)
            at, inside = partial_ptr + part.to(tl.int64) * 2 * channels + c, (part < count) & of_channel
            difference = tl.load(at, mask=inside, other=0.0) - mean
            own = tl.load(at + channels, mask=inside, other=0.0)
            squares += own + share.to(SUM_TYPE) * difference * difference
        summed = tl.sum(squares, axis=0)[None, :]
        variance = summed / number
        unbiased = summed / tl.maximum(number - 1, 1)
    else:
        mean = tl.load(mean_ptr + c, mask=of_channel, other=0.0).to(SUM_TYPE)
        variance = tl.load(variance_ptr + c, mask=of_channel, other=0.0).to(SUM_TYPE)
        unbiased = variance
    inverse = 1.0 / tl.sqrt(variance + EPS)
    scale = tl.load(weight_ptr + c, mask=of_channel, other=0.0).to(SUM_TYPE) * inverse
    shift = tl.load(bias_ptr + c, mask=of_channel, other=0.0).to(SUM_TYPE) - scale * mean
    tl.store(table_ptr + c, scale, mask=of_channel)
    tl.store(table_ptr + channels + c, shift, mask=of_channel)
    tl.store(table_ptr + 2 * channels + c, mean, mask=of_channel)
    tl.store(table_ptr + 3 * channels + c, inverse, mask=of_channel)
    tl.store(table_ptr + 4 * channels + c, unbiased, mask=of_channel)


@counted
@moves("line_ptr", "dweight_ptr", "dbias_ptr")
def finish_kernel(
    parts_ptr,  # [part][2][channels], of dz and of dz * (x - mean); or, with an offset, [image][5][channels]
    table_ptr,
    gate_ptr,
    offset_ptr,
    line_ptr,  # may be None, as both that follow
    dweight_ptr,
    dbias_ptr,
    count,  # of parts
    pixels,  # of all images
    channels,
    SUM_TYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c, of_channel = channel[None, :], channel < channels
    of_dz = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
    of_product = tl.zeros((BLOCK_R, BLOCK_C), SUM_TYPE)
    for first in range(0, count, BLOCK_R):
        part = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        inside = (part < count) & (c < channels)
        if offset_ptr is None:
            at = parts_ptr + part * 2 * channels + c
            of_dz += tl.load(at, mask=inside, other=0.0)
            of_product += tl.load(at + channels, mask=inside, other=0.0)
        else:
            gate = tl.load(gate_ptr + part * channels + c, mask=inside, other=0.0)
            offset = tl.load(offset_ptr + part * channels + c, mask=inside, other=0.0)
            at = parts_ptr + (part * 5 + 1) * channels + c
            of_dz += gate * tl.load(at, mask=inside, other=0.0)
            of_dz += offset * tl.load(at + channels, mask=inside, other=0.0)
            of_product += gate * tl.load(at + 2 * channels, mask=inside, other=0.0)
            of_product += offset * tl.load(at + 3 * channels, mask=inside, other=0.0)
    sum_dz, sum_product = tl.sum(of_dz, axis=0), tl.sum(of_product, axis=0)
    inverse = tl.load(table_ptr + 3 * channels + channel, mask=of_channel, other=0.0)
    if line_ptr is not None:
        factor = -tl.load(table_ptr + channel, mask=of_channel, other=0.0) / pixels
        tl.store(line_ptr + channel, sum_product * factor * inverse * inverse, mask=of_channel)
        tl.store(line_ptr + channels + channel, sum_dz * factor, mask=of_channel)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, (sum_product * inverse).to(dweight_ptr.dtype.element_ty), mask=of_channel)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, sum_dz.to(dbias_ptr.dtype.element_ty), mask=of_channel)


KERNELS = (prepare_kernel, finish_kernel)


def prepare(
    partial: Tensor | None,
    known: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor,
    table: Tensor,
    cut: tuple[int, int, int],
    eps: float,
) -> None:
    """partial: (parts, 2, C), of programs that cut images into so many shares, of so many pixels, in blocks of so
    many; None: `known` are mean and variance."""
    shares, pixels, block = cut
    given = *known, weight, bias
    with torch.cuda.device_of(table):
        prepare_kernel[_grid(table)](
            partial,
            *(None if t is None else t.contiguous() for t in given),
            table,
            0 if partial is None else len(partial),
            shares,
            pixels,
            table.shape[1],
            EPS=eps,
            SUM_TYPE=sum_type(table),
            BLOCK_P=block,
            **TILE._asdict(),
        )


def finish(parts: Tensor, c: Any, ends: Any) -> None:
    """c and ends: `Coefficients` and `Ends` of ops/_batch_norm.py. parts: (parts, 2, C), or (N, 5, C) where c has gates
    and offsets."""
    with torch.cuda.device_of(parts):
        finish_kernel[_grid(c.table)](
            *(parts, c.table, *((None, None) if c.offset is None else (c.gate, c.offset)), *ends[:3]),
            *(len(parts), max(1, ends.pixels), c.table.shape[1]),
            SUM_TYPE=sum_type(parts),
            **(TILE if c.offset is None else IMAGE_TILE)._asdict(),
        )


def _grid(table: Tensor) -> tuple[int]:
    return (triton.cdiv(table.shape[1], TILE.BLOCK_C),)
