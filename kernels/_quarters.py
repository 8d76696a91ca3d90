"""What the kernels of S2-MLPv2 share: the quarters of the channels, of which each moves its own way."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ._maps import Tile as MapTile
from ._maps import channels_of_tile

# Launch choices, by counting: no GPU has measured them.
VALUES = 8  # of a thread, of each of up to four tensors
ROW_BYTES = 32  # of a tile at least: programs of neighbouring channels run together, so that L2 has the rest of a line


class Tile(NamedTuple):
    BLOCK_P: int
    BLOCK_C: int
    ALIGN: int  # elements: where quarters begin and end
    num_warps: int


def tile(channels: int, element_size: int) -> Tile:
    """In float64 a thread has half as many values."""
    block_c = channels_of_tile(triton.cdiv(channels, 4), element_size, ROW_BYTES)
    align = math.gcd(16, *(channels * q // 4 for q in range(1, 5)))
    return Tile(_values(element_size) // block_c, block_c, align, num_warps=4)


def undivided_tile(channels: int, element_size: int) -> MapTile:
    """Where quarters do not matter."""
    block_c = channels_of_tile(channels, element_size)
    return MapTile(_values(element_size) // block_c, block_c, num_warps=4)


def _values(element_size: int) -> int:
    return 128 * VALUES // (2 if element_size == 8 else 1)


def columns_of(channels: int, chosen: Tile) -> int:
    """Programs side by side: blocks of channels of all four quarters."""
    return 4 * triton.cdiv(triton.cdiv(channels, 4), chosen.BLOCK_C)


@triton.jit
def block_and_column():
    """Of a program, of a grid of two axes: those of the same pixels follow each other."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    return program // tl.num_programs(1), program % tl.num_programs(1)


@triton.jit
def quarter(block, channels, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr):
    """Whether its branch 1 moves along the height, which neighbour comes, the channels and which of them exist."""
    blocks = tl.cdiv(tl.cdiv(channels, 4), BLOCK_C)
    q = block // blocks
    begin = tl.multiple_of(channels * q // 4, ALIGN)
    end = tl.multiple_of(channels * (q + 1) // 4, ALIGN)
    c = begin + block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return q < 2, 2 * (q % 2) - 1, c, c < end


@triton.jit
def load_branches(ptr, c, channels, there):
    """What each of the three branches has of a channel."""
    one = tl.load(ptr + c, mask=there, other=0.0)
    two = tl.load(ptr + channels + c, mask=there, other=0.0)
    three = tl.load(ptr + 2 * channels + c, mask=there, other=0.0)
    return one, two, three


@triton.jit
def offset_of(bias_ptr, w1, w2, w3, channels, c, there, SUM_TYPE: tl.constexpr):
    """What the biases (3, C) of the branches add to the weighed sum."""
    b1, b2, b3 = load_branches(bias_ptr, c, channels, there)
    return w1 * b1.to(SUM_TYPE) + w2 * b2.to(SUM_TYPE) + w3 * b3.to(SUM_TYPE)
