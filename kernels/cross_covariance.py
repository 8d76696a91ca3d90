"""Attention between channels: products over the tokens, the softmax between them, products by head.

Heads have 12 to 96 channels, so a tile holds several narrow ones, `group`, and computes all their products: those of
two heads are thrown away, which costs less than tiles filled up with zeros. Tokens have any strides. Sums over the
tokens have two stages of fixed order: a program's own chunk, then the chunks, whose number depends on the shape only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch

MOST_CHUNKS, LEAST_TOKENS = 16, 256  # of a sum over the tokens


class Tile(NamedTuple):
    GROUP: int  # heads
    BLOCK_D: int  # their channels, side by side
    BLOCK_N: int
    num_warps: int


def tile(heads: int, d: int, wide: bool) -> Tile:
    """About 64 channels of whole heads. wide: float32, whose products are exact and take no tensor cores."""
    group = min(heads, max(1, 64 // d))
    block_d = max(16, power_of_two(group * d))
    return Tile(group, block_d, BLOCK_N=32 if wide or block_d > 64 else 64, num_warps=8 if block_d > 64 else 4)


@triton.jit
def _channels(group, heads, d, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Head, channel in it, and whether they are there, of the channels of a group of heads."""
    i = tl.arange(0, BLOCK_D)
    head = group * GROUP + i // d
    return head, i % d, (i < GROUP * d) & (head < heads)


@triton.jit
def gram_kernel(
    a_ptr,
    b_ptr,
    u_ptr,  # may be None, with v_ptr: no norms
    v_ptr,
    sums_ptr,  # [sample][chunk][head][d][d]
    norms_ptr,  # [sample][chunk][2][head][d]
    heads,
    d,
    tokens,
    share,
    chunks,
    a_b,
    a_h,
    a_d,
    a_n,
    b_b,
    b_h,
    b_d,
    b_n,
    u_b,
    u_h,
    u_d,
    u_n,
    v_b,
    v_h,
    v_d,
    v_n,
    SUM_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    head, c, there = _channels(tl.program_id(1), heads, d, GROUP, BLOCK_D)
    h64, c64 = head.to(tl.int64), c.to(tl.int64)
    a_at = a_ptr + sample * a_b + h64 * a_h + c64 * a_d
    b_at = b_ptr + sample * b_b + h64 * b_h + c64 * b_d
    gram = tl.zeros((BLOCK_D, BLOCK_D), SUM_TYPE)
    of_a = tl.zeros((BLOCK_D,), SUM_TYPE)
    of_b = tl.zeros((BLOCK_D,), SUM_TYPE)
    for first in range(chunk * share, tl.minimum(tokens, chunk * share + share), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n64 = n.to(tl.int64)[:, None]
        inside = (n < tl.minimum(tokens, chunk * share + share))[:, None] & there[None, :]
        a = tl.load(a_at[None, :] + n64 * a_n, mask=inside, other=0.0)
        b = tl.load(b_at[None, :] + n64 * b_n, mask=inside, other=0.0)
        gram += tl.dot(tl.trans(a.to(DOT_TYPE)), b.to(DOT_TYPE), out_dtype=SUM_TYPE, input_precision="ieee")
        if u_ptr is not None:
            u_at = u_ptr + sample * u_b + h64 * u_h + c64 * u_d
            v_at = v_ptr + sample * v_b + h64 * v_h + c64 * v_d
            u = tl.load(u_at[None, :] + n64 * u_n, mask=inside, other=0.0)
            v = tl.load(v_at[None, :] + n64 * v_n, mask=inside, other=0.0)
            of_a += tl.sum(a.to(SUM_TYPE) * u.to(SUM_TYPE), axis=0)
            of_b += tl.sum(b.to(SUM_TYPE) * v.to(SUM_TYPE), axis=0)
    part = sample * chunks + chunk
    own = (head[:, None] == head[None, :]) & there[:, None] & there[None, :]
    to = sums_ptr + ((part * heads + h64) * d + c64)[:, None] * d + c64[None, :]
    tl.store(to, gram, mask=own)
    if u_ptr is not None:
        to_norms = norms_ptr + (part * 2 * heads + h64) * d + c64
        tl.store(to_norms, of_a, mask=there)
        tl.store(to_norms + heads * d, of_b, mask=there)


@triton.jit
def sum_chunks_kernel(sums_ptr, out_ptr, elements, chunks, SUM_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """[sample][chunk][element] -> [sample][element]."""
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), SUM_TYPE)
    for chunk in range(chunks):
        total += tl.load(sums_ptr + (sample * chunks + chunk) * elements + i, mask=i < elements, other=0.0)
    tl.store(out_ptr + sample * elements + i, total, mask=i < elements)


@triton.jit
def _norms(norms_ptr, sample, side, head, heads, d, i, there):
    """The squared norms, and what F.normalize divides by."""
    squares = tl.load(norms_ptr + ((sample * 2 + side) * heads + head) * d + i, mask=there, other=1.0)
    norms = tl.sqrt(tl.where(squares < 0.0, 0.0, squares))
    return squares, tl.where(norms < 1e-12, 1e-12, norms)


@triton.jit
def cosine_softmax_kernel(
    gram_ptr, norms_ptr, temperature_ptr, weights_ptr, heads, d, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    i, j = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    inside = (i < d)[:, None] & (j < d)[None, :]
    at = ((sample * heads + head) * d + i)[:, None] * d + j[None, :]
    _, of_q = _norms(norms_ptr, sample, 0, head, heads, d, i, i < d)
    _, of_k = _norms(norms_ptr, sample, 1, head, heads, d, j, j < d)
    temperature = tl.load(temperature_ptr + head)
    logits = tl.load(gram_ptr + at, mask=inside, other=0.0) / of_q[:, None] / of_k[None, :] * temperature
    logits = tl.where((j < d)[None, :], logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    tl.store(weights_ptr + at, e / tl.sum(e, axis=1)[:, None], mask=inside)


@triton.jit
def cosine_softmax_bwd_kernel(
    grad_ptr,  # in place
    weights_ptr,
    gram_ptr,
    norms_ptr,
    temperature_ptr,
    scales_ptr,
    dtemperature_ptr,
    heads,
    d,
    SUM_TYPE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program a head; its rows in blocks, so that every sum has one order."""
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    j = tl.arange(0, BLOCK_J)
    squares_k, of_k = _norms(norms_ptr, sample, 1, head, heads, d, j, j < d)
    temperature = tl.load(temperature_ptr + head)
    products_k = tl.zeros((BLOCK_J,), SUM_TYPE)
    scales_q = scales_ptr + (sample * 2 * heads + head) * d
    for first in range(0, d, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        inside = (i < d)[:, None] & (j < d)[None, :]
        at = ((sample * heads + head) * d + i)[:, None] * d + j[None, :]
        squares_q, of_q = _norms(norms_ptr, sample, 0, head, heads, d, i, i < d)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
        gram = tl.load(gram_ptr + at, mask=inside, other=0.0)
        inverse = 1.0 / of_q[:, None] / of_k[None, :]
        logits = weights * (grad - tl.sum(grad * weights, axis=1)[:, None])
        products = logits * (gram * inverse)
        products_k += tl.sum(products, axis=0)
        tl.store(grad_ptr + at, logits * temperature * inverse, mask=inside)
        scale = -temperature * tl.sum(products, axis=1) / of_q / of_q
        tl.store(scales_q + i, tl.where(squares_q < 1e-24, 0.0, scale), mask=i < d)
    scale = -temperature * products_k / of_k / of_k
    tl.store(scales_q + heads * d + j, tl.where(squares_k < 1e-24, 0.0, scale), mask=j < d)
    tl.store(dtemperature_ptr + sample * heads + head, tl.sum(products_k, axis=0))


@triton.jit
def apply_kernel(
    matrix_ptr,
    x_ptr,
    scale_ptr,  # may be None, with z_ptr
    z_ptr,
    y_ptr,
    heads,
    d,
    tokens,
    matrix_i,
    matrix_j,
    x_b,
    x_h,
    x_d,
    x_n,
    scale_b,
    scale_h,
    scale_d,
    z_b,
    z_h,
    z_d,
    z_n,
    y_b,
    y_h,
    y_d,
    y_n,
    SUM_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_N)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    head, c, there = _channels(tl.program_id(1), heads, d, GROUP, BLOCK_D)
    h64, c64 = head.to(tl.int64), c.to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    n64 = n.to(tl.int64)[:, None]
    inside = (n < tokens)[:, None] & there[None, :]
    own = (head[:, None] == head[None, :]) & there[:, None] & there[None, :]
    # Transposed, [j][i]: tokens are the rows.
    from_matrix = matrix_ptr + (sample * heads + h64)[None, :] * d * d
    matrix = tl.load(from_matrix + c64[None, :] * matrix_i + c64[:, None] * matrix_j, mask=own, other=0.0)
    x = tl.load(x_ptr + sample * x_b + (h64 * x_h + c64 * x_d)[None, :] + n64 * x_n, mask=inside, other=0.0)
    y = tl.dot(x.to(DOT_TYPE), matrix.to(DOT_TYPE), out_dtype=SUM_TYPE, input_precision="ieee")
    if z_ptr is not None:
        scale = tl.load(scale_ptr + sample * scale_b + h64 * scale_h + c64 * scale_d, mask=there, other=0.0)
        z = tl.load(z_ptr + sample * z_b + (h64 * z_h + c64 * z_d)[None, :] + n64 * z_n, mask=inside, other=0.0)
        y += scale[None, :] * z.to(SUM_TYPE)
    to = y_ptr + sample * y_b + (h64 * y_h + c64 * y_d)[None, :] + n64 * y_n
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)


KERNELS = (gram_kernel, sum_chunks_kernel, cosine_softmax_kernel, cosine_softmax_bwd_kernel, apply_kernel)


def gram(
    a: Tensor, b: Tensor, out: Tensor, norms: Tensor | None = None, u: Tensor | None = None, v: Tensor | None = None
) -> None:
    batch, heads, d, tokens = a.shape
    t = _tile(a, out)
    share = triton.cdiv(triton.cdiv(tokens, min(max(1, tokens // LEAST_TOKENS), MOST_CHUNKS)), t.BLOCK_N) * t.BLOCK_N
    chunks = triton.cdiv(tokens, share)
    sums, sums_of_norms = out, norms
    if chunks > 1:
        sums = scratch((batch, chunks, heads, d, d), out.dtype, out.device)
        sums_of_norms = None if norms is None else scratch((batch, chunks, 2, heads, d), out.dtype, out.device)
    with torch.cuda.device_of(a):
        gram_kernel[(batch * chunks, triton.cdiv(heads, t.GROUP))](
            a,
            b,
            u,
            v,
            sums,
            sums_of_norms,
            heads,
            d,
            tokens,
            share,
            chunks,
            *a.stride(),
            *b.stride(),
            *(a if u is None else u).stride(),
            *(b if v is None else v).stride(),
            SUM_TYPE=_SUM_TYPES[out.dtype],
            DOT_TYPE=_dot_type(a, b),
            **t._asdict(),
        )
        for parts, total in ((sums, out), (sums_of_norms, norms)):
            if parts is not total:
                elements = total.numel() // batch
                sum_chunks_kernel[(triton.cdiv(elements, SUM_BLOCK), batch)](
                    parts, total, elements, chunks, SUM_TYPE=_SUM_TYPES[out.dtype], BLOCK=SUM_BLOCK
                )


def softmax(gram: Tensor, norms: Tensor, temperature: Tensor, weights: Tensor) -> None:
    batch, heads, d, _ = gram.shape
    t = rows_tile(d)
    with torch.cuda.device_of(gram):
        cosine_softmax_kernel[(batch * heads, triton.cdiv(d, t.BLOCK_I))](
            gram, norms, temperature, weights, heads, d, **t._asdict()
        )


def softmax_backward(
    grad: Tensor,
    weights: Tensor,
    gram: Tensor,
    norms: Tensor,
    temperature: Tensor,
    scales: Tensor,
    dtemperature: Tensor,
) -> None:
    batch, heads, d, _ = gram.shape
    with torch.cuda.device_of(gram):
        cosine_softmax_bwd_kernel[(batch * heads,)](
            grad,
            weights,
            gram,
            norms,
            temperature,
            scales,
            dtemperature,
            heads,
            d,
            SUM_TYPE=_SUM_TYPES[gram.dtype],
            **rows_tile(d)._asdict(),
        )


def apply(
    matrix: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    transposed: bool = False,
    scale: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    batch, heads, d, tokens = x.shape
    t = _tile(x, matrix)
    with torch.cuda.device_of(x):
        apply_kernel[(batch * triton.cdiv(tokens, t.BLOCK_N), triton.cdiv(heads, t.GROUP))](
            matrix,
            x,
            scale,
            z,
            y,
            heads,
            d,
            tokens,
            *((1, d) if transposed else (d, 1)),
            *x.stride(),
            *((0, 0, 0) if scale is None else scale.stride()[:3]),
            *(x if z is None else z).stride(),
            *y.stride(),
            SUM_TYPE=_SUM_TYPES[matrix.dtype],
            DOT_TYPE=_dot_type(x),
            **t._asdict(),
        )


SUM_BLOCK = 256
_SUM_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_DOT_TYPES = {**_SUM_TYPES, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class RowsTile(NamedTuple):
    BLOCK_I: int
    BLOCK_J: int
    num_warps: int


def rows_tile(d: int) -> RowsTile:
    return RowsTile(16, max(16, power_of_two(d)), num_warps=4)


def _tile(x: Tensor, matrix: Tensor) -> Tile:
    return tile(x.shape[1], x.shape[2], wide=x.dtype == matrix.dtype)


def _dot_type(*tensors: Tensor) -> tl.dtype:
    """Half types on tensor cores, unless a float32 operand would be rounded: weights beside half tokens are."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return _DOT_TYPES[dtype]
