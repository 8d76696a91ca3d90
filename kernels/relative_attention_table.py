"""The gradient of the table of `relative_attention`: that of the logits, summed over the windows first, in registers.

For pairs of positions or, in large windows, for pairs of columns of two image rows; a second kernel adds what has the
same relative position, in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moves import moves
from ._specialize import counted
from ._windows import centre_of, load_tokens, number_of, of_head, place, products, side_of, window_of, with_bias


class PairTile(NamedTuple):
    BLOCK: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class TableTile(NamedTuple):
    BLOCK_Q: int
    BLOCK_X: int
    num_warps: int


# Launch choices, by what registers hold without spills: no GPU has measured them.
MOST_PAIRS, MOST_PAIRS_FLOAT32 = 64, 16  # of a side; without tensor cores the operands are in registers, too
TABLE_TILE = TableTile(64, 32, num_warps=4)


def pair_tile(positions: int, d: int, dtype: torch.dtype) -> PairTile:
    most, warps, stages = (MOST_PAIRS_FLOAT32, 2, 1) if dtype == torch.float32 else (MOST_PAIRS, 4, 2)
    side = min(most, side_of(positions))
    return PairTile(side, side_of(d), num_warps=warps if side < 32 else 8, num_stages=stages)


@counted
@moves("sums_ptr", multiply_adds=products(2))
def pair_gradient_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lse_ptr,
    delta_ptr,
    sums_ptr,  # [chunk][head][query][key], or [chunk][head][row of the table][column of the query][column of the key]
    scale,
    heads,
    D,
    height,
    width,
    window_height,
    window_width,
    count,
    shares,
    dy_strides,
    q_strides,
    k_strides,
    v_strides,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of logits, summed over windows; with ROWS over all pairs of image rows of one distance, too."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    side = window_width if ROWS else window_height * window_width
    blocks = tl.cdiv(side, BLOCK)
    m = tl.program_id(2) // blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(2) % blocks * BLOCK + tl.arange(0, BLOCK)
    # With ROWS the first pair of rows; the bias of all is the same.
    distance, first_row, last_row = 0, 0, 1
    if ROWS:
        distance = tl.program_id(1) - (window_height - 1)
        first_row, last_row = tl.maximum(0, -distance), tl.minimum(window_height, window_height - distance)
        inside_m, inside_n = m < window_width, n < window_width
        y_m, x_m = first_row + m * 0, tl.where(inside_m, m, width)
        y_n, x_n = first_row + distance + n * 0, tl.where(inside_n, n, width)
    else:
        inside_m, inside_n = m < side, n < side
        y_m, x_m = m // window_width, m % window_width
        y_n, x_n = n // window_width, n % window_width
    d = tl.arange(0, BLOCK_D)
    number_m, number_n = number_of(y_m, x_m, window_width), number_of(y_n, x_n, window_width)
    table_ptr = centre_of(table_ptr, head, window_height, window_width)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    bias = with_bias(
        sums, table_ptr, scale, number_n[None, :] - number_m[:, None], inside_m[:, None] & inside_n[None, :]
    )
    for problem in range(chunk * shares, tl.minimum(count, chunk * shares + shares)):
        sample, first, rows, columns = window_of(problem, height, width, window_height, window_width)
        of_rows = (sample * heads + head) * height * width
        for row in range(last_row - first_row):
            there_m, token_m = place(y_m + row, x_m, rows, columns, first, width)
            there_n, token_n = place(y_n + row, x_n, rows, columns, first, width)
            q = load_tokens(of_head(q_ptr, q_strides, sample, head), token_m, there_m, d, q_strides, D)
            k = load_tokens(of_head(k_ptr, k_strides, sample, head), token_n, there_n, d, k_strides, D)
            v = load_tokens(of_head(v_ptr, v_strides, sample, head), token_n, there_n, d, v_strides, D)
            dy = load_tokens(of_head(dy_ptr, dy_strides, sample, head), token_m, there_m, d, dy_strides, D)
            lse = tl.load(lse_ptr + of_rows + token_m, mask=there_m, other=0.0)
            delta = tl.load(delta_ptr + of_rows + token_m, mask=there_m, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
            logits = tl.where(there_m[:, None] & there_n[None, :], logits, float("-inf"))
            dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
            sums += tl.exp2(logits - lse[:, None]) * (dweights - delta[:, None])
    part = tl.program_id(0).to(tl.int64)
    if ROWS:
        part = part * (2 * window_height - 1) + tl.program_id(1)
    across = blocks * BLOCK
    tl.store(sums_ptr + part * across * across + m[:, None] * across + n[None, :], sums)


@counted
@moves("dtable_ptr")
def table_gradient_kernel(
    sums_ptr,
    dtable_ptr,
    heads,
    window_height,
    window_width,
    chunks,
    across,  # of a matrix of the sums
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Adds, over the chunks, all pairs of one distance."""
    head, row = tl.program_id(0), tl.program_id(1)
    dy = row - (window_height - 1)
    column = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    dx = column - (window_width - 1)
    queries = window_width if ROWS else window_height * window_width
    total = tl.zeros((BLOCK_X,), tl.float32)
    for chunk in range(chunks):
        part = (chunk * heads + head).to(tl.int64)
        if ROWS:
            part = part * (2 * window_height - 1) + row
        for start in range(0, queries, BLOCK_Q):
            m = start + tl.arange(0, BLOCK_Q)
            x = (m % window_width)[:, None] + dx[None, :]
            inside = (m < queries)[:, None] & (x >= 0) & (x < window_width)
            n = x
            if not ROWS:
                y = m // window_width + dy
                inside = inside & ((y >= 0) & (y < window_height))[:, None]
                n = y[:, None] * window_width + x
            at = part * across * across + m[:, None] * across + n
            total += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0), axis=0)
    to = (head * (2 * window_height - 1) + row) * (2 * window_width - 1) + column
    tl.store(dtable_ptr + to, total, mask=column < 2 * window_width - 1)


KERNELS = (pair_gradient_kernel, table_gradient_kernel)


def chunks_of(count: int, programs: int, most: int) -> tuple[int, int]:
    """Windows to a chunk, and chunks, for at most so many programs; `programs` are those of one chunk."""
    shares = triton.cdiv(count, max(1, min(count, most // programs)))
    return shares, triton.cdiv(count, shares)


def add_pairs(
    sums: Tensor | None, dtable: Tensor, heads: int, height: int, width: int, chunks: int, across: int, *, rows: bool
) -> None:
    grid = heads, 2 * height - 1, triton.cdiv(2 * width - 1, TABLE_TILE.BLOCK_X)
    table_gradient_kernel[grid](sums, dtable, heads, height, width, chunks, across, ROWS=rows, **TABLE_TILE._asdict())
