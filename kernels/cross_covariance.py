"""Attention between channels: products over the tokens, and products by head.

Heads have 12 to 96 channels. A tile holds several narrow ones, `group`, and computes all their products: those of two
heads are thrown away, which costs less than tiles filled up with zeros. Of a head with more than 64 channels it
computes some rows, as the registers do not hold them all. Tokens have any strides. Sums over the tokens have two stages
of fixed order: a program's own chunk, then the chunks, whose number depends on the shape only. Offsets within a sample
have 32 bits.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._moves import moves
from ._specialize import ByLayout
from .cosine_softmax import SUM_TYPES
from .cosine_softmax import softmax as softmax
from .cosine_softmax import softmax_backward as softmax_backward
from .sums import sum_parts


class Tile(NamedTuple):
    GROUP: int  # heads
    BLOCK_I: int  # rows of their matrices, all or some
    BLOCK_J: int  # columns, all of them: the channels of the heads, side by side
    BLOCK_N: int  # tokens
    num_warps: int


# Launch choices: what the registers hold without spills, compiled for sm_80, 90 and 100; no GPU has measured them.
WIDEST = 64  # channels of whole heads side by side
WIDE = Tile(GROUP=1, BLOCK_I=32, BLOCK_J=128, BLOCK_N=32, num_warps=8)  # of heads with more
WIDE_FLOAT32 = WIDE._replace(BLOCK_I=16, BLOCK_N=16)
NARROW_TOKENS = 32
FLOAT32_BLOCK = 16  # of what is summed over: without tensor cores the operands of a whole tile are in registers
MOST_CHUNKS, LEAST_TOKENS = 16, 256  # of a sum over the tokens


def tile(heads: int, d: int, dtype: torch.dtype) -> Tile:
    """Whole heads, equally many in every tile, or some rows of a wider one."""
    if d > WIDEST:
        return WIDE_FLOAT32 if dtype == torch.float32 else WIDE
    group = triton.cdiv(heads, triton.cdiv(heads, WIDEST // d))
    side = max(16, power_of_two(group * d))
    return Tile(group, side, side, NARROW_TOKENS, num_warps=8)


@triton.jit
def _channels(group, first, heads, d, GROUP: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Of a group of heads from the first on: channels, counted through all heads, heads, and whether they are there."""
    begin = tl.multiple_of(group * GROUP * d, ALIGN)
    end = tl.multiple_of(tl.minimum(group * GROUP + GROUP, heads) * d, ALIGN)
    channel = begin + first + tl.arange(0, BLOCK)
    return channel, channel // d, channel < end


@triton.jit
def _at(channel, head, d, strides, ADJACENT: tl.constexpr):
    """ADJACENT: one stride leads through the channels of all heads, so that Triton sees how wide loads can be."""
    if ADJACENT:
        return channel * strides[2]
    else:
        return head * strides[1] + (channel - head * d) * strides[2]


@triton.jit
def _load(ptr, at, n, strides, inside):
    """[tokens][channels]."""
    return tl.load(ptr + at[None, :] + (n * strides[3])[:, None], mask=inside, other=0.0)


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
    a_strides,
    b_strides,
    u_strides,
    v_strides,
    SUM_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    D_ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    d = d // D_ALIGN * D_ALIGN  # as it is, but Triton knows
    sample, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    j, head_j, there_j = _channels(tl.program_id(1), 0, heads, d, GROUP, BLOCK_J, ALIGN)
    i, head_i, there_i = j, head_j, there_j
    if BLOCK_I < BLOCK_J:
        i, head_i, there_i = _channels(tl.program_id(1), tl.program_id(2) * BLOCK_I, heads, d, GROUP, BLOCK_I, ALIGN)
    a_ptr += sample * a_strides[0]
    b_ptr += sample * b_strides[0]
    a_at, b_at = _at(i, head_i, d, a_strides, ADJACENT), _at(j, head_j, d, b_strides, ADJACENT)
    if u_ptr is not None:
        u_ptr += sample * u_strides[0]
        v_ptr += sample * v_strides[0]
        u_at, v_at = _at(i, head_i, d, u_strides, ADJACENT), _at(j, head_j, d, v_strides, ADJACENT)
    gram = tl.zeros((BLOCK_I, BLOCK_J), SUM_TYPE)
    of_a = tl.zeros((BLOCK_I,), SUM_TYPE)
    of_b = tl.zeros((BLOCK_J,), SUM_TYPE)
    end = tl.minimum(tokens, chunk * share + share)
    for first in range(chunk * share, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_a, in_b = (n < end)[:, None] & there_i[None, :], (n < end)[:, None] & there_j[None, :]
        a, b = _load(a_ptr, a_at, n, a_strides, in_a), _load(b_ptr, b_at, n, b_strides, in_b)
        gram += tl.dot(tl.trans(a.to(DOT_TYPE)), b.to(DOT_TYPE), out_dtype=SUM_TYPE, input_precision="ieee")
        if norms_ptr is not None:
            wide_a, wide_b = a.to(SUM_TYPE), b.to(SUM_TYPE)
            if u_ptr is None:
                of_a += tl.sum(wide_a * wide_a, axis=0)
                of_b += tl.sum(wide_b * wide_b, axis=0)
            else:
                of_a += tl.sum(wide_a * _load(u_ptr, u_at, n, u_strides, in_a).to(SUM_TYPE), axis=0)
                of_b += tl.sum(wide_b * _load(v_ptr, v_at, n, v_strides, in_b).to(SUM_TYPE), axis=0)
    part = sample * chunks + chunk
    own = (head_i[:, None] == head_j[None, :]) & there_i[:, None] & there_j[None, :]
    to = sums_ptr + part * sums_row + ((i - head_i) * d)[:, None] + j[None, :]
    tl.store(to, gram, mask=own)
    if norms_ptr is not None:
        norms_ptr += part * norms_row
        tl.store(norms_ptr + i, of_a, mask=there_i)
        if tl.program_id(2) == 0:
            tl.store(norms_ptr + heads * d + j, of_b, mask=there_j)


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
    x_strides,
    scale_strides,
    z_strides,
    y_strides,
    TRANSPOSED: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    D_ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = d // D_ALIGN * D_ALIGN  # as it is, but Triton knows
    blocks = tl.cdiv(tokens, BLOCK_N)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i, head_i, there_i = _channels(tl.program_id(1), tl.program_id(2) * BLOCK_I, heads, d, GROUP, BLOCK_I, ALIGN)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_y = (n < tokens)[:, None] & there_i[None, :]
    matrix_ptr += sample * heads * d * d
    x_ptr += sample * x_strides[0]
    y = tl.zeros((BLOCK_N, BLOCK_I), SUM_TYPE)
    for first in range(0, BLOCK_J, BLOCK_K):
        j, head_j, there_j = _channels(tl.program_id(1), first, heads, d, GROUP, BLOCK_K, ALIGN)
        own = (head_j[:, None] == head_i[None, :]) & there_j[:, None] & there_i[None, :]
        # [j][i], as tokens are the rows of the product.
        if TRANSPOSED:
            at = (head_i * d * d + i - head_i * d)[None, :] + ((j - head_j * d) * d)[:, None]
        else:
            at = (i * d)[None, :] + (j - head_j * d)[:, None]
        matrix = tl.load(matrix_ptr + at, mask=own, other=0.0)
        if tl.float16 == DOT_TYPE:  # which does not hold gradients of rows of almost nothing; there is one step for it
            size = tl.max(tl.abs(matrix), axis=0)
            size = tl.where(size == 0.0, 1.0, size)[None, :]
            matrix /= size
        in_x = (n < tokens)[:, None] & there_j[None, :]
        x = _load(x_ptr, _at(j, head_j, d, x_strides, ADJACENT), n, x_strides, in_x).to(DOT_TYPE)
        y = tl.dot(x, matrix.to(DOT_TYPE), y, out_dtype=SUM_TYPE, input_precision="ieee")
        if tl.float16 == DOT_TYPE:
            y *= size
    if z_ptr is not None:
        at = scale_ptr + sample * scale_strides[0] + head_i * scale_strides[1] + (i - head_i * d) * scale_strides[2]
        scale = tl.load(at, mask=there_i, other=0.0)
        z_at = _at(i, head_i, d, z_strides, ADJACENT)
        y += scale[None, :] * _load(z_ptr + sample * z_strides[0], z_at, n, z_strides, in_y).to(SUM_TYPE)
    to = y_ptr + sample * y_strides[0] + _at(i, head_i, d, y_strides, ADJACENT)[None, :]
    tl.store(to + (n * y_strides[3])[:, None], y.to(y_ptr.dtype.element_ty), mask=in_y)


KERNELS = (gram_kernel, apply_kernel)


def _grid(first: int, heads: int, d: int, t: Tile) -> tuple[int, int, int]:
    return first, triton.cdiv(heads, t.GROUP), triton.cdiv(d, t.BLOCK_I) if t.BLOCK_I < t.BLOCK_J else 1


def _constants(t: Tile, tokens: list[Tensor | None], out: Tensor, dot: tuple[Tensor, ...]) -> dict[str, object]:
    """Of the kernels: what tokens, all of one shape, have in common; sums are of the type of out."""
    (_, heads, d, _), present = tokens[0].shape, [x for x in tokens if x is not None]
    return {
        "SUM_TYPE": SUM_TYPES[out.dtype],
        "DOT_TYPE": _dot_type(*dot),
        "ADJACENT": all(x.stride(1) == d * x.stride(2) for x in present),
        "ALIGN": math.gcd(t.GROUP * d, heads * d, 16),
        "D_ALIGN": math.gcd(d, 16),
        **t._asdict(),
    }


def gram(
    a: Tensor, b: Tensor, out: Tensor, norms: Tensor | None = None, u: Tensor | None = None, v: Tensor | None = None
) -> None:
    batch, heads, d, tokens = a.shape
    if u is a and v is b:
        u = v = None
    t = tile(heads, d, a.dtype)
    if a.dtype == torch.float32:
        t = t._replace(BLOCK_N=FLOAT32_BLOCK)
    share = triton.cdiv(triton.cdiv(tokens, min(max(1, tokens // LEAST_TOKENS), MOST_CHUNKS)), t.BLOCK_N) * t.BLOCK_N
    chunks = triton.cdiv(tokens, share)
    lengths = [heads * d * d] if norms is None else [heads * d * d, 2 * heads * d]
    sums, sums_of_norms, rows = out, norms, (lengths[0], lengths[-1])
    if chunks > 1:
        partial = scratch((batch, chunks, sum(lengths)), out.dtype, out.device)
        sums, sums_of_norms = partial, None if norms is None else partial[:, :, lengths[0] :]
        rows = (sum(lengths),) * 2
    given = [a, b, u, v]
    with torch.cuda.device_of(a):
        gram_kernel.of(a.stride(2) == b.stride(2) == 1)[_grid(batch * chunks, heads, d, t)](
            *(*given, sums, sums_of_norms, heads, d, tokens, share, chunks, *rows, *map(_strides, given)),
            **_constants(t, given, out, (a, b)),
        )
        if chunks > 1:
            sum_parts(partial, [out] if norms is None else [out, norms], lengths)


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
            *(matrix, x, scale, z, y, heads, d, tokens, *map(_strides, (x, scale, z, y))),
            TRANSPOSED=transposed,
            BLOCK_K=FLOAT32_BLOCK if x.dtype == torch.float32 else t.BLOCK_J,
            **_constants(t, [x, z, y], matrix, (x,)),
        )


_DOT_TYPES = {**SUM_TYPES, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


def _dot_type(*tensors: Tensor) -> tl.dtype:
    """Half types on tensor cores, unless a float32 operand would be rounded: weights beside half tokens are."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return _DOT_TYPES[dtype]
