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

from ._heads import by_head, wide
from ._registration import allocate_contiguous
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


class _Again(NamedTuple):
    """What both passes compute."""

    mean: Tensor  # of x over the tokens, (B, C)
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
    mean = a.x.mean(1, dtype=wide(a.x.dtype))
    moments = allocate_contiguous((b, c, c), mean)
    rest = torch.empty_like(mean)
    for part, x in _centred(a.x, mean):
        torch.bmm(x.transpose(1, 2), x, out=moments[part])
        torch.mean(x, 1, out=rest[part])
    # The mean is rounded, and what it misses meets large means in the products.
    means = (mean.double() + rest.double()) @ w.qkv.double().t()
    if w.qkv_bias is not None:
        means += w.qkv_bias
    # S is symmetric: with the weights on its right, all samples are one product.
    products = torch.mm(moments.flatten(0, 1), w.qkv[: 2 * c].t()).view(b, c, 2 * c)
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
    folded = allocate_contiguous((b, c, c), mean)
    kernels.apply(weights, w.proj_heads(heads, b), by_head(folded, heads), transposed=True)
    matrix = torch.mm(folded.flatten(0, 1), w.qkv[2 * c :]).view(b, c, c)
    return _Again(mean, moments, means, attention, folded, matrix)


def _centred(x: Tensor, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x less its mean, some samples at a time in one piece of memory: caches hold it, and its pages are not new."""
    b, n, c = x.shape
    samples = min(b, max(1, _CENTRED_ELEMENTS // (n * c)))
    memory = allocate_contiguous((samples, n, c), mean)
    for first in range(0, b, samples):
        part = slice(first, min(b, first + samples))
        yield part, torch.sub(x[part], mean[part, None], out=memory[: part.stop - first])


def _add_products(constant: Tensor, products: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """out = a row for every sample, the same for all its tokens, plus the products."""
    total = out if out.dtype == constant.dtype else allocate_contiguous(out.shape, constant)
    torch.baddbmm(constant[:, None], *products[0], out=total)
    for a, b in products[1:]:
        total.baddbmm_(a, b)
    if total is not out:
        out.copy_(total)


def _split(means: Tensor, heads: int) -> list[Tensor]:
    """Those of q, k and v, each (B, heads, d, 1)."""
    return [t.unflatten(1, (heads, -1)).unsqueeze(-1) for t in means.chunk(3, dim=1)]


def forward(a: Any, y: Tensor, kernels: ModuleType) -> None:
    w = _weights(a)
    mean, _, means, _, folded, matrix = _compute(a, w, kernels)
    constant = torch.bmm(folded, means[:, 2 * y.shape[2] :, None].to(mean.dtype)).squeeze(2)
    if w.proj_bias is not None:
        constant += w.proj_bias
    for part, x in _centred(a.x, mean):
        _add_products(constant[part], [(x, matrix[part].transpose(1, 2))], y[part])


def backward(grads: list[Tensor | None], grad: Tensor, a: Any, kernels: ModuleType) -> None:
    dx, dqkv, dqkv_bias, dtemperature, dproj, dproj_bias = grads
    (b, n, c), heads, w = a.x.shape, a.num_heads, _weights(a)
    mean, moments, means, attention, folded, matrix = _compute(a, w, kernels)
    grad = grad.to(mean.dtype)
    dmatrix, dsum = allocate_contiguous((b, c, c), mean), grad.sum(1)
    for part, x in _centred(a.x, mean):
        torch.bmm(grad[part].transpose(1, 2), x, out=dmatrix[part])
    if dproj_bias is not None:
        dproj_bias.copy_(dsum.sum(0))

    q, k, _ = _split(means, heads)
    flat_v = means[:, 2 * c :].to(mean.dtype)
    dfolded = torch.mm(dmatrix.flatten(0, 1), w.qkv[2 * c :].t()).view(b, c, c)
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
        each = torch.empty_like(w.qkv)
        torch.mm(rows.flatten(1), moments.flatten(0, 1), out=each[: 2 * c])
        torch.mm(folded.flatten(0, 1).t(), dmatrix.flatten(0, 1), out=each[2 * c :])
        dqkv.copy_(each.addmm_(dmeans.t(), mean))
    if dqkv_bias is not None:
        dqkv_bias.copy_(dmeans.sum(0))
    if dx is not None:
        symmetric = torch.mm(w.qkv[: 2 * c].t(), rows.flatten(1)).view(c, b, c).transpose(0, 1)
        # The mean of the gradient of x, which its centring takes out, comes back with that of the mean itself.
        constant = (dmeans @ w.qkv).sub_(torch.bmm(dsum[:, None], matrix).squeeze(1)).div_(n)
        for part, x in _centred(a.x, mean):
            _add_products(constant[part], [(grad[part], matrix[part]), (x, symmetric[part])], dx[part])
