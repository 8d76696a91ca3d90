"""The softmax of attention between channels, of cosines: its matrices are small, (d, d) for every head of a sample."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import power_of_two
from ._moves import moves

SUM_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tile(NamedTuple):
    BLOCK_I: int  # rows
    BLOCK_J: int
    num_warps: int


def tile(d: int) -> Tile:
    """A thread has up to eight values of each matrix, of more than 64 channels four; no GPU has measured it."""
    block_i, warps = (16, 4) if d <= 64 else (8, 8)
    return Tile(block_i, max(16, power_of_two(d)), warps)


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


KERNELS = (cosine_softmax_kernel, cosine_softmax_bwd_kernel)


def softmax(gram: Tensor, norms: Tensor, temperature: Tensor, weights: Tensor) -> None:
    batch, heads, d, _ = gram.shape
    t = tile(d)
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
            SUM_TYPE=SUM_TYPES[gram.dtype],
            **tile(d)._asdict(),
        )
