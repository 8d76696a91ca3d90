"""Layer scale as a part of a branch's last weight, so that no branch is kept for its gradient."""

import torch
from torch import Tensor

from ._allocation import allocate
from .scaled_residual import Tail


class FoldedWeight:
    """The last weight of a branch, (C, I), with gamma folded into it, and what becomes of its gradient.

    The gradient of gamma is the sum, over a row, of the folded weight's gradient times the weight itself. float16 never
    folds: gammas of 1e-6, which layer scale begins with, would leave nothing of the weight.
    """

    def __init__(self, tail: Tail, weight: Tensor, bias: Tensor | None, gamma: Tensor) -> None:
        self.tail, self.given, self.bias, self.gamma = tail, weight.contiguous(), bias, gamma

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The folded one: float64, or that of `given`, or half of a float32 one."""
        weight = allocate(self.given.shape, self.given, dtype=dtype)
        given = _rows(self.given)
        self.tail.run_backward(given, given, self.gamma, None, _rows(weight), None)
        return weight

    def empty_gradients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Of the folded weight and bias, for products of this dtype: not rounded to half types."""
        weight = allocate(self.given.shape, self.given, dtype=torch.promote_types(dtype, torch.float32))
        return weight, None if self.bias is None else allocate((len(weight),), weight)

    def gradients(
        self,
        folded: Tensor,
        folded_bias: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        dgamma: Tensor | None,
    ) -> None:
        """Those of weight, bias and gamma from those of the folded ones."""
        if dweight is not None and dweight.ndim > 2:
            dweight = dweight.flatten(1)  # of ones at the end: a view
        found = dweight if dweight is None or dweight.is_contiguous() else torch.empty_like(self.given)
        sums = None if dgamma is None else _or_allocate(dgamma, folded)
        into = None if found is None else _rows(found)
        self.tail.run_backward(_rows(folded), _rows(self.given), self.gamma, None, into, sums)
        if found is not None and dweight is not None and found is not dweight:
            dweight.copy_(found)
        if folded_bias is not None and self.bias is not None:
            if sums is not None:
                sums.addcmul_(folded_bias, self.bias.to(folded_bias.dtype))
            if dbias is not None:
                products = _or_allocate(dbias, folded_bias)
                torch.mul(folded_bias, self.gamma, out=products)
                if products is not dbias:
                    dbias.copy_(products)
        if dgamma is not None and sums is not None and sums is not dgamma:
            dgamma.copy_(sums)


def _or_allocate(t: Tensor, like: Tensor) -> Tensor:
    """t if it is a vector of this dtype, without gaps, else a new one."""
    return t if t.dtype == like.dtype and t.ndim == 1 and t.is_contiguous() else allocate((t.numel(),), like)


def _rows(weight: Tensor) -> Tensor:
    """A matrix as a map, whose channels are its rows."""
    return weight[None, :, :, None]
