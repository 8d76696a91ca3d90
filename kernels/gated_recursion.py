"""The gates of HorNet's recursion, and its whole chain where it fits on chip.

Sums over pixels take two stages of fixed order.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two, scratch
from ._maps import map_tile, pixel_count, pixels_of_block, strides_of, sum_type
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts

MOST_PROGRAMS = 528  # along the pixels, each with a row of partial sums: four on every multiprocessor of an H200


class ChainTile(NamedTuple):
    BLOCK_P: int
    num_warps: int


# By the last width, padded to a power of two. Wider chains would hold more than an SM has, as Triton cannot slice a
# tile: they are PyTorch's GEMMs and the gates.
CHAIN_TILES = {
    16: ChainTile(64, num_warps=4),
    32: ChainTile(64, num_warps=4),
    64: ChainTile(64, num_warps=4),
    128: ChainTile(64, num_warps=4),
    256: ChainTile(64, num_warps=8),
}
WIDEST_BACKWARD_TILE = ChainTile(32, num_warps=8)

MOST_OF_CHUNK = 32  # channels, in the backward pass


def chain_tile(widths: Sequence[int], dtype: torch.dtype) -> ChainTile | None:
    """The tile of the chain kernel, or None where PyTorch's GEMMs run: float32 and float64 are left to cuBLAS."""
    if len(widths) == 1 or dtype not in (torch.bfloat16, torch.float16):
        return None
    return CHAIN_TILES.get(max(map(_padded, widths)))


def has_chain(widths: Sequence[int], dtype: torch.dtype) -> bool:
    return chain_tile(widths, dtype) is not None


def _padded(width: int) -> int:
    return max(16, power_of_two(width))  # a side of tl.dot is at least 16


def _products(widths: Sequence[int]) -> int:
    """Multiply-adds of the convolutions, of a pixel."""
    return sum(i * o for i, o in pairwise(widths))


@ByLayout
@moves("p_ptr")
def gate_kernel(
    u_ptr,
    bias_ptr,  # may be None
    q_ptr,
    p_ptr,
    pixels,
    channels,
    u_stride_n,
    u_stride_c,
    u_stride_p,
    q_stride_n,
    q_stride_c,
    q_stride_p,
    p_stride_n,
    p_stride_c,
    p_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, p = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    inside = (p < pixels) & (c < channels)
    u = tl.load(u_ptr + n * u_stride_n + p * u_stride_p + c * u_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    q = tl.load(q_ptr + n * q_stride_n + p * q_stride_p + c * q_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    to = p_ptr + n * p_stride_n + p * p_stride_p + c * p_stride_c
    tl.store(to, (u * q).to(p_ptr.dtype.element_ty), mask=inside)


@ByLayout
@moves("du_ptr", "dq_ptr", "sums_ptr")
def gate_bwd_kernel(
    dp_ptr,
    u_ptr,
    bias_ptr,  # may be None
    q_ptr,
    du_ptr,
    dq_ptr,
    sums_ptr,  # [program][channels]: the gradient of the bias; may be None
    blocks,
    pixels,
    channels,
    dp_stride_n,
    dp_stride_c,
    dp_stride_p,
    u_stride_n,
    u_stride_c,
    u_stride_p,
    q_stride_n,
    q_stride_c,
    q_stride_p,
    du_stride_n,
    du_stride_c,
    du_stride_p,
    dq_stride_n,
    dq_stride_c,
    dq_stride_p,
    SUM_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel.to(tl.int64)[None, :]
    bias = tl.zeros((1, BLOCK_C), SUM_TYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(SUM_TYPE)
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM_TYPE)
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, p = pixels_of_block(block, pixels, BLOCK_P)
        inside = (p < pixels) & (c < channels)
        dp = tl.load(dp_ptr + n * dp_stride_n + p * dp_stride_p + c * dp_stride_c, mask=inside, other=0.0)
        u = tl.load(u_ptr + n * u_stride_n + p * u_stride_p + c * u_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        q = tl.load(q_ptr + n * q_stride_n + p * q_stride_p + c * q_stride_c, mask=inside, other=0.0).to(SUM_TYPE)
        dp = dp.to(SUM_TYPE)
        du = dp * q
        total += du
        dq = dp * (u + bias)
        tl.store(
            du_ptr + n * du_stride_n + p * du_stride_p + c * du_stride_c,
            du.to(du_ptr.dtype.element_ty),
            mask=inside,
        )
        tl.store(
            dq_ptr + n * dq_stride_n + p * dq_stride_p + c * dq_stride_c,
            dq.to(dq_ptr.dtype.element_ty),
            mask=inside,
        )
    if sums_ptr is not None:
        own = sums_ptr + program.to(tl.int64) * channels + channel
        tl.store(own, tl.sum(total, axis=0), mask=channel < channels)


@ByLayout
@moves("out_ptr", multiply_adds=lambda pwa_ptr, WIDTHS, **_: _products(WIDTHS) * pwa_ptr[:, :1].numel())
def chain_kernel(
    pwa_ptr,
    dw_ptr,
    weights,  # of the ORDER - 1 convolutions, (out, in)
    biases,
    out_ptr,
    pixels,
    pwa_stride_n,
    pwa_stride_c,
    pwa_stride_p,
    dw_stride_n,
    dw_stride_c,
    dw_stride_p,
    out_stride_n,
    out_stride_c,
    out_stride_p,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """p of a tile of pixels stays on chip from the first gate to the last."""
    n, pixel = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = tl.arange(0, PADDED[0])[None, :]
    inside = (pixel < pixels) & (c < WIDTHS[0])
    pwa_at = pwa_ptr + n * pwa_stride_n + pixel * pwa_stride_p
    q_at = dw_ptr + n * dw_stride_n + pixel * dw_stride_p
    p = tl.load(pwa_at + c * pwa_stride_c, mask=inside, other=0.0).to(tl.float32)
    p *= tl.load(q_at + c * dw_stride_c, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(1, ORDER):
        q_at += WIDTHS[k - 1] * dw_stride_c
        row = tl.arange(0, PADDED[k - 1])[:, None]
        c = tl.arange(0, PADDED[k])[None, :]
        valid = (row < WIDTHS[k - 1]) & (c < WIDTHS[k])
        weight = tl.load(weights[k - 1] + c * WIDTHS[k - 1] + row, mask=valid, other=0.0)
        u = tl.dot(p.to(weight.dtype), weight)
        if biases[k - 1] is not None:
            u += tl.load(biases[k - 1] + c, mask=c < WIDTHS[k], other=0.0).to(tl.float32)
        inside = (pixel < pixels) & (c < WIDTHS[k])
        p = u * tl.load(q_at + c * dw_stride_c, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + n * out_stride_n + pixel * out_stride_p + c * out_stride_c
    tl.store(to, p.to(out_ptr.dtype.element_ty), mask=inside)


@ByLayout
@moves(
    *("p_ptr", "dpwa_ptr", "ddw_ptr", "du_ptr", "sums_ptr"),
    multiply_adds=lambda pwa_ptr, WIDTHS, **_: 3 * _products(WIDTHS) * pwa_ptr[:, :1].numel(),
)
def chain_bwd_kernel(
    pwa_ptr,
    dw_ptr,
    weights,  # as of chain_kernel
    biases,
    dp_ptr,
    p_ptr,  # every p_k, in the layout of ddw
    dpwa_ptr,
    ddw_ptr,
    du_ptr,  # the gradients of all weight p, the first of the second width
    sums_ptr,  # [program][channels]: over the pixels of dpwa and du; of the pixels of a program so far, meanwhile
    blocks,
    pixels,
    pwa_stride_n,
    pwa_stride_c,
    pwa_stride_p,
    dw_stride_n,
    dw_stride_c,
    dw_stride_p,
    dp_stride_n,
    dp_stride_c,
    dp_stride_p,
    dpwa_stride_n,
    dpwa_stride_c,
    dpwa_stride_p,
    ddw_stride_n,
    ddw_stride_c,
    ddw_stride_p,
    du_stride_n,
    du_stride_c,
    du_stride_p,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    STARTS: tl.constexpr,  # of the widths side by side
    CHUNKS: tl.constexpr,  # of channels of a width that are computed at a time: whole tiles do not fit into registers
    ORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Every p_k goes to memory on the way up, for the gradient of its weight, and is read again on the way down; so is
    the gradient of p_k, in the place of that of weight p_k. Barriers are in between, as other threads read it."""
    program = tl.program_id(0)
    share = tl.cdiv(blocks, tl.num_programs(0))
    own = sums_ptr + program.to(tl.int64) * (STARTS[ORDER - 1] + WIDTHS[ORDER - 1])
    first = tl.arange(0, PADDED[0])
    for block in range(program * share, tl.minimum(program * share + share, blocks)):
        n, pixel = pixels_of_block(block, pixels, BLOCK_P)
        q_at = dw_ptr + n * dw_stride_n + pixel * dw_stride_p
        p_at = p_ptr + n * ddw_stride_n + pixel * ddw_stride_p
        dq_at = ddw_ptr + n * ddw_stride_n + pixel * ddw_stride_p
        du_at = du_ptr + n * du_stride_n + pixel * du_stride_p
        inside = (pixel < pixels) & (first < WIDTHS[0])[None, :]
        pwa_at = pwa_ptr + n * pwa_stride_n + pixel * pwa_stride_p + first[None, :] * pwa_stride_c
        pwa = tl.load(pwa_at, mask=inside, other=0.0).to(tl.float32)
        pwa *= tl.load(q_at + first[None, :] * dw_stride_c, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_at + first[None, :] * ddw_stride_c, pwa.to(p_ptr.dtype.element_ty), mask=inside)
        for k in tl.static_range(1, ORDER - 1):
            tl.debug_barrier()
            row = tl.arange(0, PADDED[k - 1])[None, :]
            of_before = (pixel < pixels) & (row < WIDTHS[k - 1])
            p = tl.load(p_at + (STARTS[k - 1] + row) * ddw_stride_c, mask=of_before, other=0.0)
            for begin in range(0, WIDTHS[k], CHUNKS[k]):
                c = begin + tl.arange(0, CHUNKS[k])
                weight = _weight(weights[k - 1], c, WIDTHS[k], WIDTHS[k - 1], PADDED[k - 1])
                u = _linear(p, weight, biases[k - 1], c, WIDTHS[k])
                there = (pixel < pixels) & (c < WIDTHS[k])[None, :]
                at = STARTS[k] + c[None, :]
                u *= tl.load(q_at + at * dw_stride_c, mask=there, other=0.0).to(tl.float32)
                tl.store(p_at + at * ddw_stride_c, u.to(p_ptr.dtype.element_ty), mask=there)
        for k in tl.static_range(ORDER - 1, 0, -1):
            tl.debug_barrier()
            row = tl.arange(0, PADDED[k - 1])[None, :]
            of_before = (pixel < pixels) & (row < WIDTHS[k - 1])
            p = tl.load(p_at + (STARTS[k - 1] + row) * ddw_stride_c, mask=of_before, other=0.0)
            before = tl.zeros_like(p).to(tl.float32)
            for begin in range(0, WIDTHS[k], CHUNKS[k]):
                c = begin + tl.arange(0, CHUNKS[k])
                weight = _weight(weights[k - 1], c, WIDTHS[k], WIDTHS[k - 1], PADDED[k - 1])
                u = _linear(p, weight, biases[k - 1], c, WIDTHS[k])
                there = (pixel < pixels) & (c < WIDTHS[k])[None, :]
                at, to = STARTS[k] + c[None, :], du_at + (STARTS[k] - WIDTHS[0] + c[None, :]) * du_stride_c
                if k == ORDER - 1:
                    from_above = dp_ptr + n * dp_stride_n + pixel * dp_stride_p + c[None, :] * dp_stride_c
                    dp = tl.load(from_above, mask=there, other=0.0).to(tl.float32)
                else:
                    dp = tl.load(to, mask=there, other=0.0).to(tl.float32)
                tl.store(dq_at + at * ddw_stride_c, (dp * u).to(ddw_ptr.dtype.element_ty), mask=there)
                q = tl.load(q_at + at * dw_stride_c, mask=there, other=0.0).to(tl.float32)
                if k == ORDER - 1:
                    tl.store(p_at + at * ddw_stride_c, (u * q).to(p_ptr.dtype.element_ty), mask=there)
                du = dp * q
                _add_up(own + STARTS[k] + c, tl.sum(du, axis=0), c < WIDTHS[k], block > program * share)
                rounded = du.to(weight.dtype)
                before = tl.dot(rounded, tl.trans(weight), before)
                tl.store(to, rounded.to(du_ptr.dtype.element_ty), mask=there)
            if k > 1:
                place = du_at + (STARTS[k - 1] - WIDTHS[0] + row) * du_stride_c
                tl.store(place, before.to(du_ptr.dtype.element_ty), mask=of_before)
            else:
                pwa = tl.load(pwa_at, mask=of_before, other=0.0).to(tl.float32)
                place = dq_at + row * ddw_stride_c
                tl.store(place, (before * pwa).to(ddw_ptr.dtype.element_ty), mask=of_before)
                before *= tl.load(q_at + row * dw_stride_c, mask=of_before, other=0.0).to(tl.float32)
                place = dpwa_ptr + n * dpwa_stride_n + pixel * dpwa_stride_p + row * dpwa_stride_c
                tl.store(place, before.to(dpwa_ptr.dtype.element_ty), mask=of_before)
                _add_up(own + first, tl.sum(before, axis=0), first < WIDTHS[0], block > program * share)


@triton.jit
def _weight(weight_ptr, c, width, inputs: tl.constexpr, PADDED: tl.constexpr):
    """Of the outputs c, (inputs, outputs)."""
    row = tl.arange(0, PADDED)[:, None]
    valid = (row < inputs) & (c < width)[None, :]
    return tl.load(weight_ptr + c[None, :] * inputs + row, mask=valid, other=0.0)


@triton.jit
def _linear(p, weight, bias_ptr, c, width):
    u = tl.dot(p.to(weight.dtype), weight)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def _add_up(at, values, inside, more):
    """To what the threads themselves have stored there, if there is more than values."""
    before = tl.load(at, mask=inside & more, other=0.0)
    tl.store(at, before + values, mask=inside)


KERNELS = (gate_kernel, gate_bwd_kernel, chain_kernel, chain_bwd_kernel)


def gate(u: Tensor, bias: Tensor | None, q: Tensor, p: Tensor) -> None:
    """p = (u + bias) * q; p may be u."""
    if p.numel() == 0:
        return
    tile, pixels = map_tile(u), pixel_count(u)
    grid = len(u) * triton.cdiv(pixels, tile.BLOCK_P), triton.cdiv(u.shape[1], tile.BLOCK_C)
    strides = [stride for t in (u, q, p) for stride in strides_of(t)]
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(u):
        gate_kernel.of(u.stride(1) == 1)[grid](
            u, bias, q, p, pixels, u.shape[1], *strides, SUM_TYPE=sum_type(u), **tile._asdict()
        )


def gate_backward(
    dp: Tensor, u: Tensor, bias: Tensor | None, q: Tensor, du: Tensor, dq: Tensor, dbias: Tensor | None
) -> None:
    """du = dp * q, dq = dp * (u + bias), dbias = the sum of du over the pixels; du may be u."""
    if dp.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    tile, pixels, channels = map_tile(u), pixel_count(u), u.shape[1]
    blocks = len(u) * triton.cdiv(pixels, tile.BLOCK_P)
    grid = min(MOST_PROGRAMS, blocks), triton.cdiv(channels, tile.BLOCK_C)
    sums = None
    if dbias is not None:
        wide = torch.promote_types(u.dtype, torch.float32)
        sums = scratch((grid[0], channels), wide, u.device)
    strides = [stride for t in (dp, u, q, du, dq) for stride in strides_of(t)]
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(u):
        gate_bwd_kernel.of(u.stride(1) == 1)[grid](
            dp, u, bias, q, du, dq, sums, blocks, pixels, channels, *strides, SUM_TYPE=sum_type(u), **tile._asdict()
        )
    if sums is not None:
        sum_parts(sums[None], [dbias])


def channel_sums(t: Tensor, sums: Tensor | None) -> None:
    """Half types are added in float32, and rounded once."""
    if sums is not None:
        torch.sum(t, (0, 2, 3), dtype=sums.dtype, out=sums)


def chain(pwa: Tensor, dw: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor) -> bool:
    """The whole recursion in one kernel; False, and nothing done, where chain_tile has none."""
    widths = [pwa.shape[1], *(w.shape[0] for w in weights)]
    tile = chain_tile(widths, pwa.dtype)
    if tile is None:
        return False
    if out.numel() == 0:
        return True
    pixels = pixel_count(pwa)
    strides = [stride for t in (pwa, dw, out) for stride in strides_of(t)]
    with torch.cuda.device_of(pwa):
        chain_kernel.of(pwa.stride(1) == 1)[(len(pwa) * triton.cdiv(pixels, tile.BLOCK_P),)](
            pwa,
            dw,
            tuple(w.to(pwa.dtype).contiguous() for w in weights),
            tuple(None if b is None else b.contiguous() for b in biases),
            out,
            pixels,
            *strides,
            WIDTHS=tuple(widths),
            PADDED=tuple(map(_padded, widths)),
            ORDER=len(widths),
            **tile._asdict(),
        )
    return True


def chain_backward(
    pwa: Tensor,
    dw: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dp: Tensor,
    p: Tensor,
    dpwa: Tensor,
    ddw: Tensor,
    du: Tensor,
    sums: Sequence[Tensor | None],
) -> None:
    """Of `chain`, where has_chain. All p_k go into p, laid out as ddw, the gradients of weight p_k
    into du, and their sums over the pixels, that of dpwa first, into sums."""
    widths = [pwa.shape[1], *(w.shape[0] for w in weights)]
    if dp.numel() == 0:
        for t in sums:
            if t is not None:
                t.zero_()
        return
    tile = WIDEST_BACKWARD_TILE if max(widths) > 128 else chain_tile(widths, pwa.dtype)
    pixels = pixel_count(pwa)
    blocks = len(pwa) * triton.cdiv(pixels, tile.BLOCK_P)
    partial = scratch((min(MOST_PROGRAMS, blocks), sum(widths)), torch.float32, pwa.device)
    strides = [stride for t in (pwa, dw, dp, dpwa, ddw, du) for stride in strides_of(t)]
    with torch.cuda.device_of(pwa):
        chain_bwd_kernel.of(pwa.stride(1) == 1)[(len(partial),)](
            pwa,
            dw,
            tuple(w.to(pwa.dtype).contiguous() for w in weights),
            tuple(None if b is None else b.contiguous() for b in biases),
            *(dp, p, dpwa, ddw, du, partial),
            blocks,
            pixels,
            *strides,
            WIDTHS=tuple(widths),
            PADDED=tuple(map(_padded, widths)),
            STARTS=tuple(sum(widths[:k]) for k in range(len(widths))),
            CHUNKS=tuple(min(MOST_OF_CHUNK, _padded(width)) for width in widths),
            ORDER=len(widths),
            **tile._asdict(),
        )
        if any(t is not None for t in sums):
            sum_parts(partial[None], sums, widths)
