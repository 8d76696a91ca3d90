"""The whole chain of HorNet's recursion, where it fits on chip.

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
from ._maps import load_map, pixels_of_block, share_of_blocks, store_map, walk
from ._moves import moves
from ._specialize import ByLayout
from .sums import sum_parts


class Tile(NamedTuple):
    BLOCK_P: int
    num_warps: int


# Launch choices: the largest tiles that registers and shared memory hold without spills, compiled for sm_80, 90 and
# 100; no GPU has measured them. By the last width, padded to a power of two. Wider chains would hold more than an SM
# has, as Triton cannot slice a tile: they are PyTorch's GEMMs and the gates.
TILES = {
    16: Tile(64, num_warps=4),
    32: Tile(64, num_warps=4),
    64: Tile(64, num_warps=4),
    128: Tile(64, num_warps=4),
    256: Tile(64, num_warps=8),
}
WIDEST_BACKWARD_TILE = Tile(32, num_warps=8)
PROGRAMS = 528  # with a row of sums each: four on every multiprocessor of an H200
MOST_OF_CHUNK = 32  # channels, in the backward pass


def tile(widths: Sequence[int], dtype: torch.dtype) -> Tile | None:
    """Of the kernel, or None where PyTorch's GEMMs run: float32 and float64 are left to cuBLAS."""
    if len(widths) == 1 or dtype not in (torch.bfloat16, torch.float16):
        return None
    return TILES.get(max(map(_padded, widths)))


def has_chain(widths: Sequence[int], dtype: torch.dtype) -> bool:
    return tile(widths, dtype) is not None


def _padded(width: int) -> int:
    return max(16, power_of_two(width))  # a side of tl.dot is at least 16


def _products(widths: Sequence[int]) -> int:
    """Multiply-adds of the convolutions, of a pixel."""
    return sum(i * o for i, o in pairwise(widths))


@ByLayout
@moves("out_ptr", multiply_adds=lambda pwa_ptr, WIDTHS, **_: _products(WIDTHS) * pwa_ptr[:, :1].numel())
def chain_kernel(
    pwa_ptr,
    dw_ptr,
    weights,  # of the ORDER - 1 convolutions, (out, in)
    biases,
    out_ptr,
    pixels,
    pwa_strides,
    dw_strides,
    out_strides,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    STARTS: tl.constexpr,  # of the widths side by side
    ORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """p of a tile of pixels stays on chip from the first gate to the last."""
    n, pixel = pixels_of_block(tl.program_id(0), pixels, BLOCK_P)
    c = tl.arange(0, PADDED[0])[None, :]
    inside = (pixel < pixels) & (c < WIDTHS[0])
    p = load_map(pwa_ptr, pwa_strides, n, pixel, c, inside).to(tl.float32)
    p *= load_map(dw_ptr, dw_strides, n, pixel, c, inside).to(tl.float32)
    for k in tl.static_range(1, ORDER):
        c = tl.arange(0, PADDED[k])
        weight = _weight(weights[k - 1], c, WIDTHS[k], WIDTHS[k - 1], PADDED[k - 1])
        u = _linear(p, weight, biases[k - 1], c, WIDTHS[k])
        c = c[None, :]
        inside = (pixel < pixels) & (c < WIDTHS[k])
        p = u * load_map(dw_ptr, dw_strides, n, pixel, STARTS[k] + c, inside).to(tl.float32)
    store_map(out_ptr, out_strides, n, pixel, c, p, inside)


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
    pwa_strides,
    dw_strides,
    dp_strides,
    dpwa_strides,
    ddw_strides,
    du_strides,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    STARTS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of channels of a width that are computed at a time: whole tiles do not fit into registers
    ORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Every p_k goes to memory on the way up, for the gradient of its weight, and is read again on the way down; so is
    the gradient of p_k, in the place of that of weight p_k. Barriers are in between, as other threads read it."""
    own = sums_ptr + tl.program_id(0).to(tl.int64) * (STARTS[ORDER - 1] + WIDTHS[ORDER - 1])
    first = tl.arange(0, PADDED[0])
    begin, end = share_of_blocks(blocks)
    for block in range(begin, end):
        n, pixel = pixels_of_block(block, pixels, BLOCK_P)
        inside = (pixel < pixels) & (first < WIDTHS[0])[None, :]
        p = load_map(pwa_ptr, pwa_strides, n, pixel, first[None, :], inside).to(tl.float32)
        p *= load_map(dw_ptr, dw_strides, n, pixel, first[None, :], inside).to(tl.float32)
        store_map(p_ptr, ddw_strides, n, pixel, first[None, :], p, inside)
        for k in tl.static_range(1, ORDER - 1):
            tl.debug_barrier()
            row = tl.arange(0, PADDED[k - 1])[None, :]
            of_before = (pixel < pixels) & (row < WIDTHS[k - 1])
            p = load_map(p_ptr, ddw_strides, n, pixel, STARTS[k - 1] + row, of_before)
            for start in range(0, WIDTHS[k], CHUNKS[k]):
                c = start + tl.arange(0, CHUNKS[k])
                weight = _weight(weights[k - 1], c, WIDTHS[k], WIDTHS[k - 1], PADDED[k - 1])
                u = _linear(p, weight, biases[k - 1], c, WIDTHS[k])
                there = (pixel < pixels) & (c < WIDTHS[k])[None, :]
                at = STARTS[k] + c[None, :]
                u *= load_map(dw_ptr, dw_strides, n, pixel, at, there).to(tl.float32)
                store_map(p_ptr, ddw_strides, n, pixel, at, u, there)
        for k in tl.static_range(ORDER - 1, 0, -1):
            tl.debug_barrier()
            row = tl.arange(0, PADDED[k - 1])[None, :]
            of_before = (pixel < pixels) & (row < WIDTHS[k - 1])
            p = load_map(p_ptr, ddw_strides, n, pixel, STARTS[k - 1] + row, of_before)
            before = tl.zeros_like(p).to(tl.float32)
            for start in range(0, WIDTHS[k], CHUNKS[k]):
                c = start + tl.arange(0, CHUNKS[k])
                weight = _weight(weights[k - 1], c, WIDTHS[k], WIDTHS[k - 1], PADDED[k - 1])
                u = _linear(p, weight, biases[k - 1], c, WIDTHS[k])
                there = (pixel < pixels) & (c < WIDTHS[k])[None, :]
                at, of_du = STARTS[k] + c[None, :], STARTS[k] - WIDTHS[0] + c[None, :]
                if k == ORDER - 1:
                    dp = load_map(dp_ptr, dp_strides, n, pixel, c[None, :], there).to(tl.float32)
                else:
                    dp = load_map(du_ptr, du_strides, n, pixel, of_du, there).to(tl.float32)
                store_map(ddw_ptr, ddw_strides, n, pixel, at, dp * u, there)
                q = load_map(dw_ptr, dw_strides, n, pixel, at, there).to(tl.float32)
                if k == ORDER - 1:
                    store_map(p_ptr, ddw_strides, n, pixel, at, u * q, there)
                du = dp * q
                _add_up(own + STARTS[k] + c, tl.sum(du, axis=0), c < WIDTHS[k], block - begin)
                rounded = du.to(weight.dtype)
                before = tl.dot(rounded, tl.trans(weight), before)
                store_map(du_ptr, du_strides, n, pixel, of_du, rounded, there)
            if k > 1:
                store_map(du_ptr, du_strides, n, pixel, STARTS[k - 1] - WIDTHS[0] + row, before, of_before)
            else:
                pwa = load_map(pwa_ptr, pwa_strides, n, pixel, row, of_before).to(tl.float32)
                store_map(ddw_ptr, ddw_strides, n, pixel, row, before * pwa, of_before)
                before *= load_map(dw_ptr, dw_strides, n, pixel, row, of_before).to(tl.float32)
                store_map(dpwa_ptr, dpwa_strides, n, pixel, row, before, of_before)
                _add_up(own + first, tl.sum(before, axis=0), first < WIDTHS[0], block - begin)


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
def _add_up(at, values, inside, blocks):
    """To what the threads themselves have stored there, if there were blocks before."""
    # A comparison of scalars is no mask in the interpreter of Triton 3.9.
    before = tl.load(at, mask=inside & (tl.zeros_like(values).to(tl.int32) + blocks > 0), other=0.0)
    tl.store(at, before + values, mask=inside)


KERNELS = (chain_kernel, chain_bwd_kernel)


def chain(pwa: Tensor, dw: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor) -> bool:
    """The whole recursion in one kernel; False, and nothing done, where there is no tile for it."""
    widths = [pwa.shape[1], *(w.shape[0] for w in weights)]
    chosen = tile(widths, pwa.dtype)
    if chosen is None:
        return False
    if out.numel() == 0:
        return True
    images, pixels, strides = walk([pwa, dw, out])
    with torch.cuda.device_of(pwa):
        chain_kernel.of(pwa.stride(1) == 1)[(images * triton.cdiv(pixels, chosen.BLOCK_P),)](
            *(pwa, dw, *_parameters(weights, biases, pwa.dtype), out, pixels, *strides),
            **_widths(widths),
            **chosen._asdict(),
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
    chosen = WIDEST_BACKWARD_TILE if max(widths) > 128 else tile(widths, pwa.dtype)
    images, pixels, strides = walk([pwa, dw, dp, dpwa, ddw, du])
    blocks = images * triton.cdiv(pixels, chosen.BLOCK_P)
    partial = scratch((min(PROGRAMS, blocks), sum(widths)), torch.float32, pwa.device)
    with torch.cuda.device_of(pwa):
        chain_bwd_kernel.of(pwa.stride(1) == 1)[(len(partial),)](
            *(pwa, dw, *_parameters(weights, biases, pwa.dtype), dp, p, dpwa, ddw, du, partial),
            *(blocks, pixels, *strides),
            CHUNKS=tuple(min(MOST_OF_CHUNK, _padded(width)) for width in widths),
            **_widths(widths),
            **chosen._asdict(),
        )
        if any(t is not None for t in sums):
            sum_parts(partial[None], sums, widths)


def _parameters(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    return (
        tuple(w.to(dtype).contiguous() for w in weights),
        tuple(None if b is None else b.contiguous() for b in biases),
    )


def _widths(widths: Sequence[int]) -> dict[str, object]:
    return {
        "WIDTHS": tuple(widths),
        "PADDED": tuple(map(_padded, widths)),
        "STARTS": tuple(sum(widths[:k]) for k in range(len(widths))),
        "ORDER": len(widths),
    }
