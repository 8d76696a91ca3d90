"""The C++ kernels of attention between channels, with the signatures of the Triton ones in kernels/cross_covariance.py.

Tokens are (B, heads, d, N) with any strides. What belongs to a head is contiguous and float32, float64 for float64:
matrices (B, heads, d, d), and vectors of both operands, (B, 2, heads, d).
"""

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._allocation import allocate_contiguous


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def by_head(t: Tensor, heads: int) -> Tensor:
    """(B, N, C) as (B, heads, d, N), a view."""
    b, n, c = t.shape
    return t.view(b, n, heads, c // heads).permute(0, 2, 3, 1)


def gram(
    a: Tensor, b: Tensor, out: Tensor, norms: Tensor | None = None, u: Tensor | None = None, v: Tensor | None = None
) -> None:
    """out = a b^T; norms = the diagonals of a u^T and b v^T, for u = a and v = b the squared norms."""
    views = map(_native.view, (a, b, u, v, out, norms))
    _native.cpu_kernels().gram(*views)


def softmax(gram: Tensor, norms: Tensor, temperature: Tensor, weights: Tensor) -> None:
    """weights = softmax(temperature * gram / |a| / |b|), each norm 1e-12 at least."""
    _native.cpu_kernels().cosine_softmax(
        _native.view(gram), _native.view(norms), _native.channels_view(temperature), _native.view(weights)
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
    """In place, the gradient of the weights becomes that of the gram. scales = twice those of the squared norms;
    dtemperature is (B, heads, 1, 1), not yet summed over the batch."""
    inputs = (*map(_native.view, (grad, weights, gram, norms)), _native.channels_view(temperature))
    _native.cpu_kernels().cosine_softmax_backward(*inputs, _native.view(scales), _native.view(dtemperature))


def apply(
    matrix: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    transposed: bool = False,
    scale: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """y = matrix x, or its transpose times x, plus scale * z, if they are given; scale is (B, heads, d, 1)."""
    rest: list[Any] = [_native.view(t) for t in (x, scale, z, y)]
    _native.cpu_kernels().apply_by_head(_native.view(matrix), transposed, *rest)


def sum_tokens(x: Tensor, centred: Tensor | None = None) -> Tensor:
    """(B, C) in float64; centred = x less its mean. Both are float32 (B, N, C) with neighbouring channels."""
    b, _, c = x.shape
    sums = allocate_contiguous((b, c), x, torch.float64)
    _native.cpu_kernels().sum_tokens(_native.tokens_view(x), _native.vectors_view(sums), _native.tokens_view(centred))
    return sums
