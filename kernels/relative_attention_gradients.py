"""The gradients of `relative_attention`, but for the table's, which is another file's.

The logits are computed again: the gradient of the queries in one pass, those of the keys and values in another, or all
in one where a window has at most 64 positions. A program has a block of queries, or of keys, of one head in one window,
and goes through the others. Sums are cut by the shape only, and added in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from ._moves import moves
from ._specialize import counted
from ._windows import (
    LOG2_E,
    block_of_window,
    centre_of,
    load_tokens,
    number_of,
    of_head,
    place,
    positions_from,
    problems,
    products,
    side_of,
    store_tokens,
    tile,
    window_of,
    with_bias,
)
from .relative_attention_table import add_pairs, chunks_of, pair_gradient_kernel, pair_tile

# Launch choices, by what registers hold and by counting: no GPU has measured them.
ONE_TILE, ONE_TILE_CHANNELS = 64, 32  # positions of a window, channels of a head up to which all is one tile
PAIRS = 256  # positions of a window up to which the table's gradient is summed for pairs of them
PROGRAMS, ROW_PROGRAMS = 512, 4096  # of the table's gradient, about; pairs of image rows differ in length


class WindowTile(NamedTuple):
    BLOCK: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def window_tile(positions: int, d: int) -> WindowTile:
    side = side_of(positions)
    return WindowTile(side, side_of(d), num_warps=4 if side < 64 else 8, num_stages=1)


@triton.jit
def _weights_of_keys(
    q,
    dy,
    k_ptr,
    v_ptr,
    table_ptr,
    lse,
    scale,
    number_m,
    there_m,
    start,
    first,
    rows,
    columns,
    D,
    width,
    window_width,
    k_strides,
    v_strides,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a block of keys, from `start` on: these, their weights and the gradients of these."""
    d = tl.arange(0, BLOCK_D)
    there_n, token, number_n = positions_from(start, rows, columns, first, width, window_width, BLOCK_N)
    k = load_tokens(k_ptr, token, there_n, d, k_strides, D)
    v = load_tokens(v_ptr, token, there_n, d, v_strides, D)
    at, there = number_n[None, :] - number_m[:, None], there_m[:, None] & there_n[None, :]
    logits = with_bias(tl.dot(q, tl.trans(k), input_precision="ieee"), table_ptr, scale, at, there)
    return k, tl.exp2(logits - lse[:, None]), tl.dot(dy, tl.trans(v), input_precision="ieee")


@counted
@moves("delta_ptr", "dq_ptr", multiply_adds=products(3))
def query_gradient_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,  # may be None
    y_ptr,  # may be None
    lse_ptr,
    delta_ptr,
    dq_ptr,  # may be None
    scale,
    unit,  # what the gradient of the logits is multiplied by
    heads,
    D,
    height,
    width,
    window_height,
    window_width,
    dy_strides,
    q_strides,
    k_strides,
    v_strides,
    y_strides,
    dq_strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta, the sum over the keys of weights times their gradients, for the other kernels, and dq."""
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    start, sample, first, rows, columns = block_of_window(height, width, window_height, window_width, BLOCK_M)
    there_m, token_m, number_m = positions_from(start, rows, columns, first, width, window_width, BLOCK_M)
    k_ptr, v_ptr = of_head(k_ptr, k_strides, sample, head), of_head(v_ptr, v_strides, sample, head)
    if table_ptr is not None:
        table_ptr = centre_of(table_ptr, head, window_height, window_width)
    q = load_tokens(of_head(q_ptr, q_strides, sample, head), token_m, there_m, d, q_strides, D)
    dy = load_tokens(of_head(dy_ptr, dy_strides, sample, head), token_m, there_m, d, dy_strides, D)
    of_rows = (sample * heads + head) * height * width
    lse = tl.load(lse_ptr + of_rows + token_m, mask=there_m, other=0.0)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if y_ptr is not None:
        y = load_tokens(of_head(y_ptr, y_strides, sample, head), token_m, there_m, d, y_strides, D)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    else:
        for begin in range(0, window_height * window_width, BLOCK_N):
            _, weights, dweights = _weights_of_keys(
                q, dy, k_ptr, v_ptr, table_ptr, lse, scale, number_m, there_m, begin, first, rows, columns,
                D, width, window_width, k_strides, v_strides, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            delta += tl.sum(weights * dweights, axis=1)
    tl.store(delta_ptr + of_rows + token_m, delta, mask=there_m)
    if dq_ptr is not None:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for begin in range(0, window_height * window_width, BLOCK_N):
            k, weights, dweights = _weights_of_keys(
                q, dy, k_ptr, v_ptr, table_ptr, lse, scale, number_m, there_m, begin, first, rows, columns,
                D, width, window_width, k_strides, v_strides, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dlogits = weights * (dweights - delta[:, None])
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")
        store_tokens(of_head(dq_ptr, dq_strides, sample, head), token_m, there_m, d, dq_strides, D, dq * unit)


@counted
@moves("dk_ptr", "dv_ptr", multiply_adds=products(4))
def key_gradient_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,  # may be None
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    unit,
    heads,
    D,
    height,
    width,
    window_height,
    window_width,
    dy_strides,
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles are [keys][queries]; of the names of tiles, M are the keys here, of which a program has BLOCK_M."""
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    start, sample, first, rows, columns = block_of_window(height, width, window_height, window_width, BLOCK_M)
    there_m, token_m, number_m = positions_from(start, rows, columns, first, width, window_width, BLOCK_M)
    q_ptr, dy_ptr = of_head(q_ptr, q_strides, sample, head), of_head(dy_ptr, dy_strides, sample, head)
    if table_ptr is not None:
        table_ptr = centre_of(table_ptr, head, window_height, window_width)
    of_rows = (sample * heads + head) * height * width
    k = load_tokens(of_head(k_ptr, k_strides, sample, head), token_m, there_m, d, k_strides, D)
    v = load_tokens(of_head(v_ptr, v_strides, sample, head), token_m, there_m, d, v_strides, D)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, window_height * window_width, BLOCK_N):
        there_n, token_n, number_n = positions_from(begin, rows, columns, first, width, window_width, BLOCK_N)
        q = load_tokens(q_ptr, token_n, there_n, d, q_strides, D)
        dy = load_tokens(dy_ptr, token_n, there_n, d, dy_strides, D)
        lse = tl.load(lse_ptr + of_rows + token_n, mask=there_n, other=0.0)
        delta = tl.load(delta_ptr + of_rows + token_n, mask=there_n, other=0.0)
        at, there = number_m[:, None] - number_n[None, :], there_m[:, None] & there_n[None, :]
        logits = with_bias(tl.dot(k, tl.trans(q), input_precision="ieee"), table_ptr, scale, at, there)
        weights = tl.exp2(logits - lse[None, :])
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(dy), input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")
    store_tokens(of_head(dk_ptr, dk_strides, sample, head), token_m, there_m, d, dk_strides, D, dk * unit)
    store_tokens(of_head(dv_ptr, dv_strides, sample, head), token_m, there_m, d, dv_strides, D, dv)


@counted
@moves("dq_ptr", "dk_ptr", "dv_ptr", "sums_ptr", multiply_adds=products(5))
def window_gradient_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,  # may be None
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    sums_ptr,  # [chunk][head][BLOCK][BLOCK]; may be None
    scale,
    unit,
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
    dq_strides,
    dk_strides,
    dv_strides,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of `shares` of the `count` windows, each one tile, for one head."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    m, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    y, x = m // window_width, m % window_width
    bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    if table_ptr is not None:
        table_ptr = centre_of(table_ptr, head, window_height, window_width)
        number, inside = number_of(y, x, window_width), y < window_height
        at = number[None, :] - number[:, None]
        bias = with_bias(bias, table_ptr, scale, at, inside[:, None] & inside[None, :])
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for problem in range(chunk * shares, tl.minimum(count, chunk * shares + shares)):
        sample, first, rows, columns = window_of(problem, height, width, window_height, window_width)
        there_m, token = place(y, x, rows, columns, first, width)
        there = there_m[:, None] & there_m[None, :]
        q = load_tokens(of_head(q_ptr, q_strides, sample, head), token, there_m, d, q_strides, D)
        k = load_tokens(of_head(k_ptr, k_strides, sample, head), token, there_m, d, k_strides, D)
        v = load_tokens(of_head(v_ptr, v_strides, sample, head), token, there_m, d, v_strides, D)
        dy = load_tokens(of_head(dy_ptr, dy_strides, sample, head), token, there_m, d, dy_strides, D)
        lse = tl.load(lse_ptr + (sample * heads + head) * height * width + token, mask=there_m, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
        logits = tl.where(there, logits, float("-inf"))
        weights = tl.exp2(logits - lse[:, None])
        dv = tl.dot(tl.trans(weights.to(dy.dtype)), dy, input_precision="ieee")
        store_tokens(of_head(dv_ptr, dv_strides, sample, head), token, there_m, d, dv_strides, D, dv)
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dlogits = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])
        sums += dlogits
        rounded = dlogits.to(q.dtype)
        dq = tl.dot(rounded, k, input_precision="ieee")
        store_tokens(of_head(dq_ptr, dq_strides, sample, head), token, there_m, d, dq_strides, D, dq * unit)
        dk = tl.dot(tl.trans(rounded), q, input_precision="ieee")
        store_tokens(of_head(dk_ptr, dk_strides, sample, head), token, there_m, d, dk_strides, D, dk * unit)
    if sums_ptr is not None:
        at = (chunk * heads + head).to(tl.int64) * BLOCK * BLOCK + m[:, None] * BLOCK + m[None, :]
        tl.store(sums_ptr + at, sums)


KERNELS = (query_gradient_kernel, key_gradient_kernel, window_gradient_kernel)


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    geometry: tuple[int, int, int, int, float],
    y: Tensor | None,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dtable: Tensor | None,
) -> None:
    *sizes, scale = geometry
    (b, heads, n, d), positions = q.shape, sizes[2] * sizes[3]
    t, count, units = tile(positions, d, q.dtype), problems(q, geometry), (scale * LOG2_E.value, scale)
    one_tile = positions <= ONE_TILE and q.dtype != torch.float32 and d <= ONE_TILE_CHANNELS
    if one_tile or dk is not None or dv is not None:
        dk, dv = _there(dk, k), _there(dv, v)
    if one_tile:
        dq = _there(dq, q)
    strides = [x.stride() for x in (dy, q, k, v)]
    with torch.cuda.device_of(q):
        if one_tile:
            chosen = window_tile(positions, d)
            shares, chunks = chunks_of(count, heads, PROGRAMS)
            sums = None
            if dtable is not None:
                sums = scratch((chunks, heads, chosen.BLOCK, chosen.BLOCK), torch.float32, q.device)
            window_gradient_kernel[(chunks, heads)](
                *(dy, q, k, v, table, lse, dq, dk, dv, sums, *units, heads, d, *sizes, count, shares, *strides),
                *(x.stride() for x in (dq, dk, dv)),
                **chosen._asdict(),
            )
            if dtable is not None:
                add_pairs(sums, dtable, heads, *sizes[2:], chunks, chosen.BLOCK, rows=False)
            return
        delta = scratch((b, heads, n), torch.float32, q.device)
        grid = count * triton.cdiv(positions, t.BLOCK_M), heads
        query_gradient_kernel[grid](
            *(dy, q, k, v, table, y, lse, delta, dq, *units, heads, d, *sizes, *strides),
            *(None if x is None else x.stride() for x in (y, dq)),
            **t._asdict(),
        )
        if dk is not None and dv is not None:
            key_gradient_kernel[grid](
                *(dy, q, k, v, table, lse, delta, dk, dv, *units, heads, d, *sizes, *strides, dk.stride(), dv.stride()),
                **t._asdict(),
            )
        if dtable is not None:
            rows = positions > PAIRS
            side = sizes[3] if rows else positions
            chosen = pair_tile(side, d, q.dtype)
            blocks = triton.cdiv(side, chosen.BLOCK)
            distances = 2 * sizes[2] - 1 if rows else 1
            shares, chunks = chunks_of(count, heads * distances * blocks**2, ROW_PROGRAMS if rows else PROGRAMS)
            across = blocks * chosen.BLOCK
            sums = scratch((chunks, heads, distances, across, across), torch.float32, q.device)
            pair_gradient_kernel[(chunks * heads, distances, blocks**2)](
                *(dy, q, k, v, table, lse, delta, sums, units[0], heads, d, *sizes, count, shares, *strides),
                ROWS=rows,
                **chosen._asdict(),
            )
            add_pairs(sums, dtable, heads, *sizes[2:], chunks, across, rows=rows)


def _there(grad: Tensor | None, t: Tensor) -> Tensor:
    """Where the kernels store it, wanted or not."""
    return scratch(t.shape, t.dtype, t.device) if grad is None else grad
