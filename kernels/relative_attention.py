"""Attention between the positions of a map, or of its windows, with a bias by relative position.

A program has a block of queries of one head in one window, and goes through the keys. The bias of a query and a key is
one load: its place in the table is a number of the key less one of the query. Logits are in units of log(2), as is
`lse` here. Offsets within a sample have 32 bits. geometry: (height, width, window_height, window_width, scale).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moves import moves
from ._specialize import counted
from ._windows import (
    LOG2_E,
    block_of_window,
    centre_of,
    load_tokens,
    of_head,
    positions_from,
    problems,
    products,
    store_tokens,
    tile,
    with_bias,
)
from .relative_attention_gradients import backward as backward


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
    q_strides,
    k_strides,
    v_strides,
    y_strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    start, sample, first, rows, columns = block_of_window(height, width, window_height, window_width, BLOCK_M)
    there_m, token_m, number_m = positions_from(start, rows, columns, first, width, window_width, BLOCK_M)
    k_ptr, v_ptr = of_head(k_ptr, k_strides, sample, head), of_head(v_ptr, v_strides, sample, head)
    if table_ptr is not None:
        table_ptr = centre_of(table_ptr, head, window_height, window_width)
    q = load_tokens(of_head(q_ptr, q_strides, sample, head), token_m, there_m, d, q_strides, D)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, window_height * window_width, BLOCK_N):
        there_n, token_n, number_n = positions_from(begin, rows, columns, first, width, window_width, BLOCK_N)
        k = load_tokens(k_ptr, token_n, there_n, d, k_strides, D)
        v = load_tokens(v_ptr, token_n, there_n, d, v_strides, D)
        at, there = number_n[None, :] - number_m[:, None], there_m[:, None] & there_n[None, :]
        logits = with_bias(tl.dot(q, tl.trans(k), input_precision="ieee"), table_ptr, scale, at, there)
        before, largest = largest, tl.maximum(largest, tl.max(logits, axis=1))
        # Rows of -inf only so far.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        weights, shrink = tl.exp2(logits - shift[:, None]), tl.exp2(before - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
    y_ptr = of_head(y_ptr, y_strides, sample, head)
    store_tokens(y_ptr, token_m, there_m, d, y_strides, D, y / total[:, None])
    lse_ptr += (sample * heads + head) * height * width
    tl.store(lse_ptr + token_m, largest + tl.log2(total), mask=there_m)


KERNELS = (forward_kernel,)


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
        forward_kernel[(problems(q, geometry) * triton.cdiv(positions, t.BLOCK_M), heads)](
            *(q, k, v, table, y, lse, scale * LOG2_E.value, heads, d, *sizes),
            *(x.stride() for x in (q, k, v, y)),
            **t._asdict(),
        )
