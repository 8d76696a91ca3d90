"""Attention between channels: products over the tokens, the softmax between them, products by head.

Heads have 12 to 96 channels. A tile holds several narrow ones, `group`, and computes all their products: those of two
heads are thrown away, which costs less than tiles filled up with zeros. Of a head with more than 64 channels it
computes some rows, as the registers do not hold them all. Tokens have any strides. Sums over the tokens have two stages
of fixed order: a program's own chunk, then the chunks, whose number depends on the shape only. Offsets within a sample
have 32 bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

MOST_CHUNKS, LEAST_TOKENS = 16, 256  # of a sum over the tokens


class Tile(NamedTuple):
    GROUP: int  # heads
    BLOCK_I: int  # rows of their matrices, all or some
    BLOCK_J: int  # columns, all of them: the channels of the heads, side by side
    BLOCK_N: int
    num_warps: int


def tile(heads: int, d: int, dtype: torch.dtype) -> Tile:
    """About 64 channels of whole heads, or some rows of a wider one: what the registers hold without spills."""
    if d > 64:
        rows, tokens = (16, 16) if dtype == torch.float32 else (32, 32)
        return Tile(1, rows, power_of_two(d), tokens, num_warps=8)
    group = min(heads, max(1, 64 // d))
    side = max(16, power_of_two(group * d))
    return Tile(group, side, side, BLOCK_N=32, num_warps=8)


@triton.jit
def _channels(group, first, heads, d, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Head, channel in it, and whether they are there, of the channels of a group of heads from the first on."""
    i = first + tl.arange(0, BLOCK)
    head = group * GROUP + i // d
    return head, i % d, (i < GROUP * d) & (head < heads)


@ByLayout
@moves("sums_ptr", "norms_ptr", multiply_adds=lambda a_ptr, d, **_: a_ptr.numel() * d)
def gram_kernel(
    a_ptr,
    b_ptr,
    u_ptr,  # None for a itself, and v_ptr for b
    v_ptr,
    sums_ptr,  # [sample][chunk][head][d][d], rows of chunks that are sums_row apart
    norms_ptr,  # [sample][chunk][2][head][d], likewise; may be None
    heads,
    d,
    tokens,
    share,
    chunks,
    sums_row,
    norms_row,
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
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    head_j, j, there_j = _channels(tl.program_id(1), 0, heads, d, GROUP, BLOCK_J)
    head_i, i, there_i = head_j, j, there_j
    if BLOCK_I < BLOCK_J:
        head_i, i, there_i = _channels(tl.program_id(1), tl.program_id(2) * BLOCK_I, heads, d, GROUP, BLOCK_I)
    a_ptr += sample * a_b
    b_ptr += sample * b_b
    gram = tl.zeros((BLOCK_I, BLOCK_J), SUM_TYPE)
    of_a = tl.zeros((BLOCK_I,), SUM_TYPE)
    of_b = tl.zeros((BLOCK_J,), SUM_TYPE)
    end = tl.minimum(tokens, chunk * share + share)
    for first in range(chunk * share, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_a, in_b = (n < end)[:, None] & there_i[None, :], (n < end)[:, None] & there_j[None, :]
        a = tl.load(a_ptr + (head_i * a_h + i * a_d)[None, :] + (n * a_n)[:, None], mask=in_a, other=0.0)
        b = tl.load(b_ptr + (head_j * b_h + j * b_d)[None, :] + (n * b_n)[:, None], mask=in_b, other=0.0)
        gram += tl.dot(tl.trans(a.to(DOT_TYPE)), b.to(DOT_TYPE), out_dtype=SUM_TYPE, input_precision="ieee")
        if norms_ptr is not None:
            wide_a, wide_b = a.to(SUM_TYPE), b.to(SUM_TYPE)
            if u_ptr is None:
                of_a += tl.sum(wide_a * wide_a, axis=0)
                of_b += tl.sum(wide_b * wide_b, axis=0)
            else:
                u_at = u_ptr + sample * u_b + (head_i * u_h + i * u_d)[None, :] + (n * u_n)[:, None]
                v_at = v_ptr + sample * v_b + (head_j * v_h + j * v_d)[None, :] + (n * v_n)[:, None]
                of_a += tl.sum(wide_a * tl.load(u_at, mask=in_a, other=0.0).to(SUM_TYPE), axis=0)
                of_b += tl.sum(wide_b * tl.load(v_at, mask=in_b, other=0.0).to(SUM_TYPE), axis=0)
    part = sample * chunks + chunk
    own = (head_i[:, None] == head_j[None, :]) & there_i[:, None] & there_j[None, :]
    to = sums_ptr + part * sums_row + ((head_i * d + i) * d)[:, None] + j[None, :]
    tl.store(to, gram, mask=own)
    if norms_ptr is not None:
        norms_ptr += part * norms_row
        tl.store(norms_ptr + head_i * d + i, of_a, mask=there_i)
        if tl.program_id(2) == 0:
            tl.store(norms_ptr + heads * d + head_j * d + j, of_b, mask=there_j)


@triton.jit
def _norms(norms_ptr, sample, side, head, heads, d, i, there):
    """The squared norms, and what F.normalize divides by."""
    squares = tl.load(norms_ptr + ((sample * 2 + side) * heads + head) * d + i, mask=there, other=1.0)
    norms = tl.sqrt(tl.where(squares < 0.0, 0.0, squares))
    return squares, tl.where(norms < 1e-12, 1e-12, norms)


@triton.jit
@moves("weights_ptr")
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
@moves("scales_ptr", "dtemperature_ptr", updated=("grad_ptr",))
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


@ByLayout
@moves("y_ptr", multiply_adds=lambda x_ptr, d, **_: x_ptr.numel() * d)
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
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_N)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    head_i, i, there_i = _channels(tl.program_id(1), tl.program_id(2) * BLOCK_I, heads, d, GROUP, BLOCK_I)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_y = (n < tokens)[:, None] & there_i[None, :]
    matrix_ptr += sample * heads * d * d
    x_ptr += sample * x_b
    y = tl.zeros((BLOCK_N, BLOCK_I), SUM_TYPE)
    for first in range(0, BLOCK_J, BLOCK_K):
        head_j, j, there_j = _channels(tl.program_id(1), first, heads, d, GROUP, BLOCK_K)
        own = (head_j[:, None] == head_i[None, :]) & there_j[:, None] & there_i[None, :]
        # Transposed, [j][i]: tokens are the rows.
        at = (head_i * d * d + i * matrix_i)[None, :] + (j * matrix_j)[:, None]
        matrix = tl.load(matrix_ptr + at, mask=own, other=0.0)
        if tl.float16 == DOT_TYPE:  # which does not hold gradients of rows of almost nothing; there is one step for it
            size = tl.max(tl.abs(matrix), axis=0)
            size = tl.where(size == 0.0, 1.0, size)[None, :]
            matrix /= size
        in_x = (n < tokens)[:, None] & there_j[None, :]
        x_at = x_ptr + (head_j * x_h + j * x_d)[None, :] + (n * x_n)[:, None]
        x = tl.load(x_at, mask=in_x, other=0.0).to(DOT_TYPE)
        y = tl.dot(x, matrix.to(DOT_TYPE), y, out_dtype=SUM_TYPE, input_precision="ieee")
        if tl.float16 == DOT_TYPE:
            y *= size
    if z_ptr is not None:
        scale = tl.load(scale_ptr + sample * scale_b + head_i * scale_h + i * scale_d, mask=there_i, other=0.0)
        z_at = z_ptr + sample * z_b + (head_i * z_h + i * z_d)[None, :] + (n * z_n)[:, None]
        y += scale[None, :] * tl.load(z_at, mask=in_y, other=0.0).to(SUM_TYPE)
    y_at = y_ptr + sample * y_b + (head_i * y_h + i * y_d)[None, :] + (n * y_n)[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_y)


KERNELS = (gram_kernel, cosine_softmax_kernel, cosine_softmax_bwd_kernel, apply_kernel)


def _grid(first: int, heads: int, d: int, t: Tile) -> tuple[int, int, int]:
    return first, triton.cdiv(heads, t.GROUP), triton.cdiv(d, t.BLOCK_I) if t.BLOCK_I < t.BLOCK_J else 1


def gram(
    a: Tensor, b: Tensor, out: Tensor, norms: Tensor | None = None, u: Tensor | None = None, v: Tensor | None = None
) -> None:
    batch, heads, d, tokens = a.shape
    if u is a and v is b:
        u = v = None
    t = tile(heads, d, a.dtype)
    if a.dtype == torch.float32:
        t = t._replace(BLOCK_N=16)  # without tensor cores the operands of a whole tile are in registers
    share = triton.cdiv(triton.cdiv(tokens, min(max(1, tokens // LEAST_TOKENS), MOST_CHUNKS)), t.BLOCK_N) * t.BLOCK_N
    chunks = triton.cdiv(tokens, share)
    lengths = [heads * d * d] if norms is None else [heads * d * d, 2 * heads * d]
    sums, sums_of_norms, rows = out, norms, (lengths[0], lengths[-1])
    if chunks > 1:
        partial = scratch((batch, chunks, sum(lengths)), out.dtype, out.device)
        sums, sums_of_norms = partial, None if norms is None else partial[:, :, lengths[0] :]
        rows = (sum(lengths),) * 2
    with torch.cuda.device_of(a):
        gram_kernel.of(a.stride(2) == b.stride(2) == 1)[_grid(batch * chunks, heads, d, t)](
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
            *rows,
            *a.stride(),
            *b.stride(),
            *(a if u is None else u).stride(),
            *(b if v is None else v).stride(),
            SUM_TYPE=_SUM_TYPES[out.dtype],
            DOT_TYPE=_dot_type(a, b),
            **t._asdict(),
        )
        if chunks > 1:
            sum_parts(partial, [out] if norms is None else [out, norms], lengths)


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
    t = tile(heads, d, x.dtype)
    with torch.cuda.device_of(x):
        apply_kernel.of(x.stride(2) == y.stride(2) == 1)[_grid(batch * triton.cdiv(tokens, t.BLOCK_N), heads, d, t)](
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
            BLOCK_K=16 if x.dtype == torch.float32 else t.BLOCK_J,  # as in `gram`
            **t._asdict(),
        )


_SUM_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_DOT_TYPES = {**_SUM_TYPES, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class RowsTile(NamedTuple):
    BLOCK_I: int
    BLOCK_J: int
    num_warps: int


def rows_tile(d: int) -> RowsTile:
    """A thread has up to eight values of each matrix, of more than 64 channels four."""
    block_i, warps = (16, 4) if d <= 64 else (8, 8)
    return RowsTile(block_i, max(16, power_of_two(d)), warps)


def _dot_type(*tensors: Tensor) -> tl.dtype:
    """Half types on tensor cores, unless a float32 operand would be rounded: weights beside half tokens are."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return _DOT_TYPES[dtype]
