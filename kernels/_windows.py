"""Positions of a map, or of its windows, and the logits of their attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import power_of_two

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    BLOCK_D: int
    num_warps: int


def tile(positions: int, d: int, dtype: torch.dtype) -> Tile:
    """What the registers hold without spills; those of float32 hold the operands, too, without tensor cores."""
    most, warps = (32, 8) if dtype == torch.float32 else (64, 4)
    side = min(most, max(16, power_of_two(positions)))
    return Tile(side, min(side, 32), max(16, power_of_two(d)), warps)


def products(count: int) -> Callable[..., int]:
    """The multiply-adds of so many products between the positions of every window."""
    return lambda q_ptr, window_height, window_width, **_: count * q_ptr.numel() * window_height * window_width


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
def place(y, x, rows, columns, first, width):
    """Of positions in a window: whether they are there, and their tokens."""
    there = (y < rows) & (x < columns) & (y >= 0)
    return there, tl.where(there, first + y * width + x, 0)


@triton.jit
def load_tokens(ptr, token, there, d, step_n, step_d, D):
    at = ptr + (token * step_n)[:, None] + (d * step_d)[None, :]
    return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tokens(ptr, token, there, d, step_n, step_d, D, values):
    at = ptr + (token * step_n)[:, None] + (d * step_d)[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=there[:, None] & (d < D)[None, :])


@triton.jit
def with_bias(products, table_ptr, scale, y_q, x_q, y_k, x_k, there, window_height, window_width):
    """Logits [..][..], of which those of keys or queries that are not there are -inf."""
    logits = products * scale
    if table_ptr is not None:
        across = 2 * window_width - 1
        at = (y_k + window_height - 1) * across + x_k + window_width - 1 - (y_q * across + x_q)
        logits += tl.load(table_ptr + at, mask=there, other=0.0) * LOG2_E
    return tl.where(there, logits, float("-inf"))
