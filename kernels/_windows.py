"""Positions of a map, or of its windows, and the logits of their attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    BLOCK_D: int
    num_warps: int


# Launch choices: what the registers hold without spills, compiled for sm_80, 90 and 100; no GPU has measured them.
WIDEST = Tile(64, 32, 64, num_warps=4)
WIDEST_FLOAT32 = Tile(32, 32, 64, num_warps=8)  # without tensor cores the operands are in registers, too


def tile(positions: int, d: int, dtype: torch.dtype) -> Tile:
    widest = WIDEST_FLOAT32 if dtype == torch.float32 else WIDEST
    side = min(widest.BLOCK_M, side_of(positions))
    return widest._replace(BLOCK_M=side, BLOCK_N=min(side, widest.BLOCK_N), BLOCK_D=side_of(d))


def side_of(count: int) -> int:
    return max(16, power_of_two(count))  # a side of tl.dot is at least 16


def products(count: int) -> Callable[..., int]:
    """The multiply-adds of so many products between the positions of every window."""
    return lambda q_ptr, window_height, window_width, **_: count * q_ptr.numel() * window_height * window_width


def problems(q: Tensor, geometry: tuple[int, int, int, int, float]) -> int:
    """Windows of all samples."""
    height, width, window_height, window_width, _ = geometry
    return len(q) * triton.cdiv(height, window_height) * triton.cdiv(width, window_width)


@triton.jit
def window_of(problem, height, width, window_height, window_width):
    """The sample, and of the window the first token and its rows and columns."""
    across = tl.cdiv(width, window_width)
    windows = across * tl.cdiv(height, window_height)
    window = problem % windows
    top, left = window // across * window_height, window % across * window_width
    rows, columns = tl.minimum(window_height, height - top), tl.minimum(window_width, width - left)
    return (problem // windows).to(tl.int64), top * width + left, rows, columns


@triton.jit
def block_of_window(height, width, window_height, window_width, BLOCK: tl.constexpr):
    """Of a program: the first of its positions, and what window_of says of their window."""
    blocks = tl.cdiv(window_height * window_width, BLOCK)
    start = tl.program_id(0) % blocks * BLOCK
    sample, first, rows, columns = window_of(tl.program_id(0) // blocks, height, width, window_height, window_width)
    return start, sample, first, rows, columns


@triton.jit
def place(y, x, rows, columns, first, width):
    """Of positions in a window: whether they are there, and their tokens."""
    there = (y < rows) & (x < columns) & (y >= 0)
    return there, tl.where(there, first + y * width + x, 0)


@triton.jit
def positions_from(start, rows, columns, first, width, window_width, BLOCK: tl.constexpr):
    """Of a window, from the start on: whether they are there, their tokens, and their numbers in the table."""
    m = start + tl.arange(0, BLOCK)
    y, x = m // window_width, m % window_width
    there, token = place(y, x, rows, columns, first, width)
    return there, token, number_of(y, x, window_width)


@triton.jit
def number_of(y, x, window_width):
    """That of a key less that of a query is where their bias is, from the centre of the table on."""
    return y * (2 * window_width - 1) + x


@triton.jit
def centre_of(table_ptr, head, window_height, window_width):
    across = 2 * window_width - 1
    return table_ptr + head * (2 * window_height - 1) * across + (window_height - 1) * across + window_width - 1


@triton.jit
def load_tokens(ptr, token, there, d, strides, D):
    at = ptr + (token * strides[2])[:, None] + (d * strides[3])[None, :]
    return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tokens(ptr, token, there, d, strides, D, values):
    at = ptr + (token * strides[2])[:, None] + (d * strides[3])[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=there[:, None] & (d < D)[None, :])


@triton.jit
def of_head(ptr, strides, sample, head):
    return ptr + sample * strides[0] + head * strides[1]


@triton.jit
def with_bias(products, table_ptr, scale, at, there):
    """Logits [..][..], of which those of keys or queries that are not there are -inf; at: from the table's centre."""
    logits = products * scale
    if table_ptr is not None:
        logits += tl.load(table_ptr + at, mask=there, other=0.0) * LOG2_E
    return tl.where(there, logits, float("-inf"))
