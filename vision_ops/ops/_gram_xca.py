"""XCA without q, k and v: with S = xc^T xc, xc = x less its mean over the tokens, the products over the tokens are
q_i . k_j = w_i S w_j^T + N mean(q_i) mean(k_j), and the output is xc M^T + P mean(v) + b, P = W_proj A, M = P W_v.

Centred, because tokens with a common offset would cancel in S. All of it is float32, float64 for float64; but the means
meet the products of each head in float64, as with such an offset their gradients nearly cancel.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._allocation import allocate_contiguous
from ._heads import by_head, sum_tokens, wide
from ._pointwise import linear_tokens, multiplies_tokens, weight_gradient_tokens
from .cross_covariance import Attention, empty_attention, gram_gradient

_CENTRED_ELEMENTS = 1 << 19  # held at a time, or one sample


class _Weights(NamedTuple):
    """In the type of the computation. Products with biases that are not there are left out."""

    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None

    def heads(self, which: int, heads: int, batch: int) -> Tensor:
        """The rows of q (0) or k (1) as (B, heads, d, C)."""
        c = self.proj.shape[0]
        return self.qkv[which * c : (which + 1) * c].unflatten(0, (heads, -1)).expand(batch, -1, -1, -1)

    def proj_heads(self, heads: int, batch: int) -> Tensor:
        return by_head(self.proj.expand(batch, -1, -1), heads)


class _Centred:
    """x less its mean, some samples at a time in one piece of memory: caches hold it, and its pages are not new."""

    def __init__(self, x: Tensor) -> None:
        b, n, c = x.shape
        self._x, dtype = x, wide(x.dtype)
        self._step = min(b, max(1, _CENTRED_ELEMENTS // (n * c)))
        self._memory = allocate_contiguous((self._step, n, c), x, dtype)
        self._held: int | None = None  # the first of the samples in memory
        self._own = multiplies_tokens(x) and x.stride(2) == 1
        self._mean = None if self._own else x.mean(1, dtype=dtype)
        self.mean: Tensor = allocate_contiguous((b, c), x, torch.float64)  # once all parts were there

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        b, n, _ = self._x.shape
        for first in range(0, b, self._step):
            part = slice(first, min(b, first + self._step))
            centred = self._memory[: part.stop - first]
            if self._held != first:
                self._held = first
                x = self._x[part]
                if self._mean is None:
                    torch.div(sum_tokens(x, centred), n, out=self.mean[part])
                else:
                    torch.sub(x, self._mean[part, None], out=centred)
                    # The mean is rounded, and what it misses meets large means in the products.
                    torch.add(self._mean[part], centred.mean(1).double(), out=self.mean[part])
            yield part, centred


class _Again(NamedTuple):
    """What both passes compute."""

    centred: _Centred
    moments: Tensor  # S, (B, C, C)
    means: Tensor  # of q, k and v, (B, 3C), float64
    attention: Attention
    folded: Tensor  # P, (B, C, C)
    matrix: Tensor  # M, (B, C, C)


def _weights(a: Any) -> _Weights:
    dtype = wide(a.x.dtype)
    given = a.qkv_weight, a.qkv_bias, a.proj_weight, a.proj_bias
    return _Weights(*(None if t is None else t.to(dtype) for t in given))


def _compute(a: Any, w: _Weights, kernels: ModuleType) -> _Again:
    (b, n, c), heads = a.x.shape, a.num_heads
    centred = _Centred(a.x)
    moments = allocate_contiguous((b, c, c), w.qkv)
    for part, x in centred.parts():
        weight_gradient_tokens(x, x, moments[part])
    means = centred.mean @ w.qkv.double().t()
    if w.qkv_bias is not None:
        means += w.qkv_bias
    # S is symmetric: with the weights on its right, all samples are one product.
    products = _times(moments, w.qkv[: 2 * c])
    of_q, of_k = (by_head(t, heads) for t in products.split(c, dim=2))
    attention = empty_attention(of_q, a.temperature)
    gram, norms, weights, temperature = attention
    kernels.gram(w.heads(0, heads, b), of_k, gram, norms, of_q, w.heads(1, heads, b))
    q, k, _ = _split(means, heads)
    exact = torch.addcmul(gram.double(), q, k.transpose(2, 3), value=n)
    squares = torch.stack([q, k], 1).squeeze(-1).square_()
    exact_norms = squares.mul_(n).add_(norms)
    kernels.softmax(exact.to(gram.dtype), exact_norms.to(norms.dtype), temperature, weights)
    attention = Attention(exact, exact_norms, weights, temperature)
    folded = allocate_contiguous((b, c, c), moments)
    kernels.apply(weights, w.proj_heads(heads, b), by_head(folded, heads), transposed=True)
    return _Again(centred, moments, means, attention, folded, _times(folded, w.qkv[2 * c :].t()))


def _times(matrices: Tensor, weight: Tensor) -> Tensor:
    """Each of (B, M, K) times the transpose of a weight (N, K), as one product: (B, M, N)."""
    b, m, _ = matrices.shape
    out = allocate_contiguous((b, m, len(weight)), matrices)
    linear_tokens(matrices.flatten(0, 1)[None], weight, None, out.flatten(0, 1)[None])
    return out


def _add_products(constant: Tensor, products: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """out = a row for every sample, the same for all its tokens, plus tokens times the transpose of a matrix."""
    total = out if out.dtype == constant.dtype else allocate_contiguous(out.shape, constant)
    linear_tokens(*products[0], constant, total)
    for x, matrix in products[1:]:
        linear_tokens(x, matrix, None, total, plus=total)
    if total is not out:
        out.copy_(total)


def _split(means: Tensor, heads: int) -> list[Tensor]:
    """Those of q, k and v, each (B, heads, d, 1)."""
    return [t.unflatten(1, (heads, -1)).unsqueeze(-1) for t in means.chunk(3, dim=1)]


def forward(a: Any, y: Tensor, kernels: ModuleType) -> None:
    w = _weights(a)
    centred, _, means, _, folded, matrix = _compute(a, w, kernels)
    constant = torch.bmm(folded, means[:, 2 * y.shape[2] :, None].to(folded.dtype)).squeeze(2)
    if w.proj_bias is not None:
        constant += w.proj_bias
    for part, x in centred.parts():
        _add_products(constant[part], [(x, matrix[part])], y[part])


def backward(grads: list[Tensor | None], grad: Tensor, a: Any, kernels: ModuleType) -> None:
    dx, dqkv, dqkv_bias, dtemperature, dproj, dproj_bias = grads
    (b, n, c), heads, w = a.x.shape, a.num_heads, _weights(a)
    centred, moments, means, attention, folded, matrix = _compute(a, w, kernels)
    mean, grad = centred.mean.to(moments.dtype), grad.to(moments.dtype)
    dsum = sum_tokens(grad).to(mean.dtype) if multiplies_tokens(grad) and grad.stride(2) == 1 else grad.sum(1)
    dmatrix = allocate_contiguous((b, c, c), moments)
    for part, x in centred.parts():
        weight_gradient_tokens(grad[part], x, dmatrix[part])
    if dproj_bias is not None:
        dproj_bias.copy_(dsum.sum(0))

    q, k, _ = _split(means, heads)
    flat_v = means[:, 2 * c :].to(mean.dtype)
    dfolded = _times(dmatrix, w.qkv[2 * c :])
    dfolded.addcmul_(dsum[:, :, None], flat_v[:, None])
    if dproj is not None:
        each = allocate_contiguous((b, c, c), mean)
        kernels.apply(attention.weights, by_head(dfolded, heads), by_head(each, heads))
        dproj.copy_(each.sum(0))
    dweights = allocate_contiguous(attention.weights.shape, mean)
    kernels.gram(w.proj_heads(heads, b), by_head(dfolded, heads), dweights)
    exact = dweights.double()
    exact_q, exact_k = gram_gradient(kernels, exact, Attention(*(t.double() for t in attention)), dtemperature)
    dgram, of_q, of_k = (t.to(mean.dtype) for t in (exact, exact_q, exact_k))

    # With E the gradient of the products' rows, dW = E S and that of S, with its transpose, is W^T E.
    rows, dmeans = allocate_contiguous((2 * c, b, c), mean), allocate_contiguous((b, 3 * c), mean)
    rows_q, rows_k = (t.unflatten(0, (heads, -1)).permute(2, 0, 1, 3) for t in rows.chunk(2))
    dq, dk, _ = _split(dmeans, heads)
    wq, wk = w.heads(0, heads, b), w.heads(1, heads, b)
    kernels.apply(dgram, wk, rows_q, scale=of_q, z=wq)
    kernels.apply(dgram, wq, rows_k, transposed=True, scale=of_k, z=wk)
    dq.copy_((exact @ k).addcmul_(exact_q, q).mul_(n))
    dk.copy_((exact.transpose(2, 3) @ q).addcmul_(exact_k, k).mul_(n))
    torch.bmm(dsum[:, None], folded, out=dmeans[:, None, 2 * c :])

    if dqkv is not None:
        each = allocate_contiguous(w.qkv.shape, w.qkv)
        weight_gradient_tokens(rows.flatten(1).t()[None], moments.flatten(0, 1)[None], each[: 2 * c])
        weight_gradient_tokens(folded.flatten(0, 1)[None], dmatrix.flatten(0, 1)[None], each[2 * c :])
        dqkv.copy_(each.addmm_(dmeans.t(), mean))
    if dqkv_bias is not None:
        dqkv_bias.copy_(dmeans.sum(0))
    if dx is not None:
        symmetric = allocate_contiguous((b, c, c), moments)  # transposed
        linear_tokens(rows.flatten(1).t()[None], w.qkv[: 2 * c].t(), None, symmetric.flatten(0, 1)[None])
        # The mean of the gradient of x, which its centring takes out, comes back with that of the mean itself.
        constant = (dmeans @ w.qkv).sub_(torch.bmm(dsum[:, None], matrix).squeeze(1)).div_(n)
        for part, x in centred.parts():
            products = [(grad[part], matrix[part].transpose(1, 2)), (x, symmetric[part])]
            _add_products(constant[part], products, dx[part])
