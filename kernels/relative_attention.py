"""Attention between the positions of a map, or of its windows, with a bias by relative position.

A program has a block of queries, or of keys, of one head in one window, and goes through the others. The bias of a
query and a key is one load: its place in the table is a number of the key less one of the query. Logits are in units of
log(2), as is `lse` here. Backward computes them again: the gradient of the queries in one pass, those of the keys and
values in another, or all in one where a window has at most 64 positions. The table's gradient is another file's.
Sums are cut by the shape only, and added in order.
Offsets within a sample have 32 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._moves import moves
from ._specialize import counted
from ._windows import LOG2_E, load_tokens, place, products, store_tokens, tile, window_of, with_bias
from .relative_attention_table import add_pairs, chunks_of, pair_gradient_kernel, table_side

ONE_TILE = 64  # positions of a window whose logits are one tile
PAIRS = 256  # positions of a window up to which the table's gradient is summed for pairs of them
PROGRAMS = 512  # of the table's gradient, about; of pairs of image rows, which differ in length, more


@counted
@moves("y_ptr", "lse_ptr", multiply_adds=products(2))
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,  # may be None
    y_ptr,
    lse_ptr,
    scale,
    heads,
    D,
    height,
    width,
    window_height,
    window_width,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    y_b,
    y_h,
    y_n,
    y_d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    positions, head = window_height * window_width, tl.program_id(1)
    blocks = tl.cdiv(positions, BLOCK_M)
    sample, first, rows, columns = window_of(tl.program_id(0) // blocks, height, width, window_height, window_width)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    y_m, x_m = m // window_width, m % window_width
    there_m, token_m = place(y_m, x_m, rows, columns, first, width)
    d = tl.arange(0, BLOCK_D)
    k_ptr += sample * k_b + head * k_h
    v_ptr += sample * v_b + head * v_h
    if table_ptr is not None:
        table_ptr += head * (2 * window_height - 1) * (2 * window_width - 1)
    q = load_tokens(q_ptr + sample * q_b + head * q_h, token_m, there_m, d, q_n, q_d, D)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, positions, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y_n_, x_n_ = n // window_width, n % window_width
        there_n, token_n = place(y_n_, x_n_, rows, columns, first, width)
        k = load_tokens(k_ptr, token_n, there_n, d, k_n, k_d, D)
        v = load_tokens(v_ptr, token_n, there_n, d, v_n, v_d, D)
        there = there_m[:, None] & there_n[None, :]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = with_bias(
            products, table_ptr, scale, y_m[:, None], x_m[:, None], y_n_[None, :], x_n_[None, :], there,
            window_height, window_width,
        )  # fmt: skip
        before, largest = largest, tl.maximum(largest, tl.max(logits, axis=1))
        # Rows of -inf only so far.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        weights, shrink = tl.exp2(logits - shift[:, None]), tl.exp2(before - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
    store_tokens(y_ptr + sample * y_b + head * y_h, token_m, there_m, d, y_n, y_d, D, y / total[:, None])
    lse_ptr += (sample * heads + head) * height * width
    tl.store(lse_ptr + token_m, largest + tl.log2(total), mask=there_m)


@triton.jit
def _weights_of_keys(
    q,
    dy,
    k_ptr,
    v_ptr,
    table_ptr,
    lse,
    scale,
    y_m,
    x_m,
    there_m,
    start,
    first,
    rows,
    columns,
    D,
    width,
    window_height,
    window_width,
    k_n,
    k_d,
    v_n,
    v_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a block of keys, from `start` on: these, their weights and the gradients of these."""
    n, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    y, x = n // window_width, n % window_width
    there, token = place(y, x, rows, columns, first, width)
    k = load_tokens(k_ptr, token, there, d, k_n, k_d, D)
    v = load_tokens(v_ptr, token, there, d, v_n, v_d, D)
    logits = with_bias(
        tl.dot(q, tl.trans(k), input_precision="ieee"), table_ptr, scale, y_m[:, None], x_m[:, None],
        y[None, :], x[None, :], there_m[:, None] & there[None, :], window_height, window_width,
    )  # fmt: skip
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
    dy_b,
    dy_h,
    dy_n,
    dy_d,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    y_b,
    y_h,
    y_n,
    y_d,
    dq_b,
    dq_h,
    dq_n,
    dq_d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta, the sum over the keys of weights times their gradients, for the other kernels, and dq."""
    positions, head = window_height * window_width, tl.program_id(1)
    blocks = tl.cdiv(positions, BLOCK_M)
    sample, first, rows, columns = window_of(tl.program_id(0) // blocks, height, width, window_height, window_width)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    y_m, x_m = m // window_width, m % window_width
    there_m, token_m = place(y_m, x_m, rows, columns, first, width)
    d = tl.arange(0, BLOCK_D)
    k_ptr += sample * k_b + head * k_h
    v_ptr += sample * v_b + head * v_h
    if table_ptr is not None:
        table_ptr += head * (2 * window_height - 1) * (2 * window_width - 1)
    q = load_tokens(q_ptr + sample * q_b + head * q_h, token_m, there_m, d, q_n, q_d, D)
    dy = load_tokens(dy_ptr + sample * dy_b + head * dy_h, token_m, there_m, d, dy_n, dy_d, D)
    of_rows = (sample * heads + head) * height * width
    lse = tl.load(lse_ptr + of_rows + token_m, mask=there_m, other=0.0)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if y_ptr is not None:
        y = load_tokens(y_ptr + sample * y_b + head * y_h, token_m, there_m, d, y_n, y_d, D)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    else:
        for start in range(0, positions, BLOCK_N):
            _, weights, dweights = _weights_of_keys(
                q, dy, k_ptr, v_ptr, table_ptr, lse, scale, y_m, x_m, there_m, start, first, rows, columns,
                D, width, window_height, window_width, k_n, k_d, v_n, v_d, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            delta += tl.sum(weights * dweights, axis=1)
    tl.store(delta_ptr + of_rows + token_m, delta, mask=there_m)
    if dq_ptr is not None:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, positions, BLOCK_N):
            k, weights, dweights = _weights_of_keys(
                q, dy, k_ptr, v_ptr, table_ptr, lse, scale, y_m, x_m, there_m, start, first, rows, columns,
                D, width, window_height, window_width, k_n, k_d, v_n, v_d, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dlogits = weights * (dweights - delta[:, None])
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")
        store_tokens(dq_ptr + sample * dq_b + head * dq_h, token_m, there_m, d, dq_n, dq_d, D, dq * unit)


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
    dy_b,
    dy_h,
    dy_n,
    dy_d,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    dk_b,
    dk_h,
    dk_n,
    dk_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles are [keys][queries]; of the names of tiles, M are the keys here, of which a program has BLOCK_M."""
    positions, head = window_height * window_width, tl.program_id(1)
    blocks = tl.cdiv(positions, BLOCK_M)
    sample, first, rows, columns = window_of(tl.program_id(0) // blocks, height, width, window_height, window_width)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    y_m, x_m = m // window_width, m % window_width
    there_m, token_m = place(y_m, x_m, rows, columns, first, width)
    d = tl.arange(0, BLOCK_D)
    q_ptr += sample * q_b + head * q_h
    dy_ptr += sample * dy_b + head * dy_h
    if table_ptr is not None:
        table_ptr += head * (2 * window_height - 1) * (2 * window_width - 1)
    of_rows = (sample * heads + head) * height * width
    k = load_tokens(k_ptr + sample * k_b + head * k_h, token_m, there_m, d, k_n, k_d, D)
    v = load_tokens(v_ptr + sample * v_b + head * v_h, token_m, there_m, d, v_n, v_d, D)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, positions, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y_n_, x_n_ = n // window_width, n % window_width
        there_n, token_n = place(y_n_, x_n_, rows, columns, first, width)
        q = load_tokens(q_ptr, token_n, there_n, d, q_n, q_d, D)
        dy = load_tokens(dy_ptr, token_n, there_n, d, dy_n, dy_d, D)
        lse = tl.load(lse_ptr + of_rows + token_n, mask=there_n, other=0.0)
        delta = tl.load(delta_ptr + of_rows + token_n, mask=there_n, other=0.0)
        there = there_m[:, None] & there_n[None, :]
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        logits = with_bias(
            products, table_ptr, scale, y_n_[None, :], x_n_[None, :], y_m[:, None], x_m[:, None], there,
            window_height, window_width,
        )  # fmt: skip
        weights = tl.exp2(logits - lse[None, :])
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(dy), input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")
    store_tokens(dk_ptr + sample * dk_b + head * dk_h, token_m, there_m, d, dk_n, dk_d, D, dk * unit)
    store_tokens(dv_ptr + sample * dv_b + head * dv_h, token_m, there_m, d, dv_n, dv_d, D, dv)


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
    dy_b,
    dy_h,
    dy_n,
    dy_d,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    dq_b,
    dq_h,
    dq_n,
    dq_d,
    dk_b,
    dk_h,
    dk_n,
    dk_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of `shares` of the `count` windows, each one tile, for one head."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    m, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    y, x = m // window_width, m % window_width
    bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    if table_ptr is not None:
        table_ptr += head * (2 * window_height - 1) * (2 * window_width - 1)
        inside = (y < window_height)[:, None] & (y < window_height)[None, :]
        bias = with_bias(
            bias, table_ptr, scale, y[:, None], x[:, None], y[None, :], x[None, :], inside, window_height, window_width
        )  # fmt: skip
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for problem in range(chunk * shares, tl.minimum(count, chunk * shares + shares)):
        sample, first, rows, columns = window_of(problem, height, width, window_height, window_width)
        there_m, token = place(y, x, rows, columns, first, width)
        there = there_m[:, None] & there_m[None, :]
        q = load_tokens(q_ptr + sample * q_b + head * q_h, token, there_m, d, q_n, q_d, D)
        k = load_tokens(k_ptr + sample * k_b + head * k_h, token, there_m, d, k_n, k_d, D)
        v = load_tokens(v_ptr + sample * v_b + head * v_h, token, there_m, d, v_n, v_d, D)
        dy = load_tokens(dy_ptr + sample * dy_b + head * dy_h, token, there_m, d, dy_n, dy_d, D)
        lse = tl.load(lse_ptr + (sample * heads + head) * height * width + token, mask=there_m, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
        logits = tl.where(there, logits, float("-inf"))
        weights = tl.exp2(logits - lse[:, None])
        dv = tl.dot(tl.trans(weights.to(dy.dtype)), dy, input_precision="ieee")
        store_tokens(dv_ptr + sample * dv_b + head * dv_h, token, there_m, d, dv_n, dv_d, D, dv)
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dlogits = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])
        sums += dlogits
        rounded = dlogits.to(q.dtype)
        dq = tl.dot(rounded, k, input_precision="ieee")
        store_tokens(dq_ptr + sample * dq_b + head * dq_h, token, there_m, d, dq_n, dq_d, D, dq * unit)
        dk = tl.dot(tl.trans(rounded), q, input_precision="ieee")
        store_tokens(dk_ptr + sample * dk_b + head * dk_h, token, there_m, d, dk_n, dk_d, D, dk * unit)
    if sums_ptr is not None:
        at = (chunk * heads + head).to(tl.int64) * BLOCK * BLOCK + m[:, None] * BLOCK + m[None, :]
        tl.store(sums_ptr + at, sums)


KERNELS = (forward_kernel, query_gradient_kernel, key_gradient_kernel, window_gradient_kernel)


# --- Launchers. geometry: (height, width, window_height, window_width, scale).


def _problems(q: Tensor, geometry: tuple[int, int, int, int, float]) -> int:
    height, width, window_height, window_width, _ = geometry
    return len(q) * triton.cdiv(height, window_height) * triton.cdiv(width, window_width)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    geometry: tuple[int, int, int, int, float],
    y: Tensor,
    lse: Tensor,
) -> None:
    *sizes, scale = geometry
    heads, d, positions = q.shape[1], q.shape[3], sizes[2] * sizes[3]
    t = tile(positions, d, q.dtype)
    with torch.cuda.device_of(q):
        forward_kernel[(_problems(q, geometry) * triton.cdiv(positions, t.BLOCK_M), heads)](
            q,
            k,
            v,
            table,
            y,
            lse,
            scale * LOG2_E.value,
            heads,
            d,
            *sizes,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *y.stride(),
            **t._asdict(),
        )


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
    t, count, units = tile(positions, d, q.dtype), _problems(q, geometry), (scale * LOG2_E.value, scale)
    if dk is not None or dv is not None:
        dk, dv = (scratch(t.shape, t.dtype, t.device) if grad is None else grad for t, grad in ((k, dk), (v, dv)))
    strides = *dy.stride(), *q.stride(), *k.stride(), *v.stride()
    with torch.cuda.device_of(q):
        if positions <= ONE_TILE and q.dtype != torch.float32 and d <= 32:
            dq, dk, dv = (
                scratch(t.shape, t.dtype, t.device) if g is None else g for t, g in ((q, dq), (k, dk), (v, dv))
            )
            side = max(16, power_of_two(positions))
            shares, chunks = chunks_of(count, heads, PROGRAMS)
            sums = None if dtable is None else scratch((chunks, heads, side, side), torch.float32, q.device)
            grads = *dq.stride(), *dk.stride(), *dv.stride()
            window_gradient_kernel[(chunks, heads)](
                dy, q, k, v, table, lse, dq, dk, dv, sums, *units, heads, d, *sizes, count, shares, *strides, *grads,
                BLOCK=side, BLOCK_D=t.BLOCK_D, num_warps=4 if side < 64 else 8, num_stages=1,
            )  # fmt: skip
            if dtable is not None:
                add_pairs(sums, dtable, heads, *sizes[2:], chunks, side, rows=False)
            return
        delta = scratch((b, heads, n), torch.float32, q.device)
        grid = count * triton.cdiv(positions, t.BLOCK_M), heads
        of_y, of_dq = (q if given is None else given for given in (y, dq))
        query_gradient_kernel[grid](
            dy, q, k, v, table, y, lse, delta, dq, *units, heads, d, *sizes, *strides, *of_y.stride(), *of_dq.stride(),
            **t._asdict(),
        )  # fmt: skip
        if dk is not None and dv is not None:
            key_gradient_kernel[grid](
                dy, q, k, v, table, lse, delta, dk, dv, *units, heads, d, *sizes, *strides, *dk.stride(), *dv.stride(),
                **t._asdict(),
            )  # fmt: skip
        if dtable is not None:
            rows = positions > PAIRS
            side = table_side(sizes[3] if rows else positions, q.dtype)
            blocks = triton.cdiv(sizes[3] if rows else positions, side)
            distances = 2 * sizes[2] - 1 if rows else 1
            shares, chunks = chunks_of(count, heads * distances * blocks**2, 8 * PROGRAMS if rows else PROGRAMS)
            stages = 1 if q.dtype == torch.float32 else 2
            shape = (chunks, heads, distances, blocks * side, blocks * side)
            sums = scratch(shape, torch.float32, q.device)
            pair_gradient_kernel[(chunks * heads, distances, blocks**2)](
                dy, q, k, v, table, lse, delta, sums, units[0], heads, d, *sizes, count, shares, *strides,
                ROWS=rows, BLOCK=side, BLOCK_D=t.BLOCK_D, num_warps=4 if side < 32 else 8, num_stages=stages,
            )  # fmt: skip
            add_pairs(sums, dtable, heads, *sizes[2:], chunks, blocks * side, rows=rows)
