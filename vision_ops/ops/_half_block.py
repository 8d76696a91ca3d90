"""Ops as half-blocks: residual + path_scale[n] * gamma[c] * op(LN(x)), one node of autograd.

The op's own kernels run in the middle. Backward computes the norm again and keeps, besides what the op keeps, x in the
place of the normed map, and no branch: gamma is folded into the op's last weight where there is one (`FoldedWeight`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor

from .. import _native
from ..reference.layer_norm_2d import layer_norm_2d, layer_norm_pixels
from ..reference.scaled_residual import scaled
from ._allocation import allocate, empty, gradient_like, memory_format
from ._checks import autocast_dtype, check_beside, check_eps, check_parameter, check_path_scale, check_vector
from ._devices import Kernels
from ._folded_weight import FoldedWeight
from ._maps import as_map, as_tokens, empty_tokens, pixel_dense
from ._registration import FusedOp
from .layer_norm_2d import MOST_CHANNELS, cpu_norm, cuda_norm
from .scaled_residual import cpu_tail, cuda_tail, sum_dtype

_PASSES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "CPU": (cpu_norm, cpu_tail),
    "CUDA": (cuda_norm, cuda_tail),
}


class HalfBlock:
    """A FusedOp with a norm in front and a residual behind.

    last: the fields of its last weight, (C, I) or (C, I, 1, 1), and bias; None where gamma cannot be folded into them.
    maps: whether x is (N, C, H, W), or else (N, ..., C).
    """

    def __init__(self, op: FusedOp, *, last: tuple[str, str] | None, norm: bool, maps: bool) -> None:
        self.op, self.last, self.norm, self.maps = op, last, norm, maps
        fields = list(get_type_hints(op.arguments).items())
        tensors, options = fields[: op._tensors], fields[op._tensors :]
        more = [(name, Tensor | None) for name in ("norm_weight", "norm_bias", "gamma", "residual", "path_scale")]
        flags = [("eps", float), ("adds_x", bool), ("keep_branch", bool), ("computes", str | None)]
        arguments = NamedTuple(f"_{op.name}_half_block", [*tensors, *more, *options, *flags])  # type: ignore[misc]
        self.half = FusedOp(
            f"{op.name}_half_block",
            cast(type[NamedTuple], arguments),
            output=self._output,
            kernels={key: self._on(key, kernels) for key, kernels in op.kernels.items()},
            reference=self._reference,
            predicate=self._predicate,
            autocast=op._autocasts,
            uncast=(
                *op._uncast,
                *(["x"] if norm else []),
                "norm_weight",
                "norm_bias",
                "gamma",
                "residual",
                "path_scale",
            ),
            wide=op._wide,
            saved=(*op._layouts, lambda branch: branch),
            passes="residual",
            constants=("path_scale",),
            unread=lambda a, needs: ("residual",),
            parts=self._parts,
            dims=op.dims,
            public=False,
        )

    def __call__(
        self,
        given: Sequence[Any],
        *options: Any,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float = 0.0,
        gamma: Tensor | None,
        residual: Tensor | None,
        path_scale: Tensor | None,
        backend: str | None,
    ) -> Tensor:
        """The op of checked arguments, tensors and options, or the half-block if there is more than it takes."""
        x = given[0]
        if norm_weight is None and norm_bias is None and gamma is None and residual is None and path_scale is None:
            return cast(Tensor, self.op(*given, *options, backend=backend))
        channels = x.shape[1 if self.maps else -1]
        if (norm_weight is None) != (norm_bias is None):
            raise ValueError("norm_weight and norm_bias must both be given, or none")
        if norm_weight is not None:
            check_parameter("norm_weight", norm_weight, (channels,), "C", x)
            check_parameter("norm_bias", norm_bias, (channels,), "C", x)
            check_eps(eps)
        if residual is None and (gamma is not None or path_scale is not None):
            raise ValueError("gamma and path_scale scale what is added to a residual: it must be given")
        check_vector("gamma", gamma, channels, "C", x)
        check_path_scale(path_scale, x)
        adds_x = residual is x and norm_weight is not None
        if residual is not None and residual is not x:
            check_beside("residual", residual, x, self.op.dims)
        scales = gamma, None if adds_x else residual, path_scale
        keep_branch = torch.is_grad_enabled() and gamma is not None and gamma.requires_grad
        # Autocast leaves an x alone that a norm takes, and weights that the kernels convert.
        flags = float(eps), adds_x, keep_branch, autocast_dtype(x)
        return cast(Tensor, self.half(*given, norm_weight, norm_bias, *scales, *options, *flags, backend=backend))

    def _inner(self, a: Any, x: Tensor, **others: Any) -> Any:
        """The op's own arguments."""
        fields = {name: getattr(a, name) for name in self.op.arguments._fields}
        return self.op.arguments(**{**fields, "x": x, **others})  # type: ignore[call-overload]

    def _folds(self, a: Any, dtype: torch.dtype) -> bool:
        return a.gamma is not None and self.last is not None and dtype != torch.float16

    def _map(self, t: Tensor) -> Tensor:
        return t if self.maps else as_map(t)

    def _dtype(self, a: Any) -> torch.dtype:
        """Of the op, if autocast's is another than that of x."""
        return a.x.dtype if a.computes is None else cast(torch.dtype, getattr(torch, a.computes))

    def _reference(self, a: Any) -> Tensor:
        x = a.x
        if a.norm_weight is not None:
            norm = functools.partial(layer_norm_2d, eps=a.eps) if self.maps else layer_norm_pixels
            x = norm(x, a.norm_weight, a.norm_bias, **({} if self.maps else {"eps": a.eps}))
        y = self.op.reference(self._inner(a, x.to(self._dtype(a))))
        if self.maps:
            y = scaled(y.permute(0, 2, 3, 1), a.gamma, a.path_scale).permute(0, 3, 1, 2)
        else:
            y = scaled(y, a.gamma, a.path_scale)
        residual = a.x if a.adds_x else a.residual
        return y if residual is None else residual + y

    def _output(self, a: Any) -> tuple[Tensor, ...]:
        dtype = self._dtype(a)
        found = self.op.output(self._inner(a, _in(a.x, dtype)))
        branch, *saved = found if self.op._saved else (found,)
        return self._empty(a, branch), *saved, branch if self._keeps(a, dtype) else branch.new_empty(0)

    def _keeps(self, a: Any, dtype: torch.dtype) -> bool:
        return a.keep_branch and not self._folds(a, dtype)

    def _empty(self, a: Any, branch: Tensor) -> Tensor:
        residual = a.x if a.adds_x else a.residual
        dtype = sum_dtype(residual, branch.dtype, a.gamma)
        return (
            allocate(branch.shape, branch, memory_format(branch), dtype) if self.maps else empty_tokens(branch, dtype)
        )

    def _predicate(self, a: Any) -> tuple[list[str], list[str]]:
        x = a.x
        cannot, slower = self.op.predicate(self._inner(a, _in(x, self._dtype(a))))
        channels = x.shape[1 if self.maps else -1]
        if _native.device_kind(x) == "cuda" and a.norm_weight is not None and channels > MOST_CHANNELS:
            cannot = [
                *cannot,
                f"the Triton kernel of the norm takes at most {MOST_CHANNELS} channels, x has {channels}",
            ]
        return cannot, slower

    def _parts(self, a: Any) -> dict[str, str]:
        device = _native.device_kind(a.x)
        passes = "Triton kernel" if device == "cuda" else _native.kernel_name(device)
        inner = self._inner(a, a.x)
        return {**(self.op._parts(inner) if self.op._parts else {self.op.name: passes}), "norm and residual": passes}

    def _on(self, key: str, kernels: Kernels) -> Kernels:
        norm, tail = _PASSES[key]
        return (
            functools.partial(self._forward, kernels[0], norm, tail),
            functools.partial(self._backward, kernels[1], norm, tail),
        )

    def _normed(self, a: Any, norm: Callable[[], Any]) -> Tensor:
        if a.norm_weight is None:
            return cast(Tensor, a.x)
        x = self._map(a.x)
        y = allocate(x.shape, x, memory_format(x), self._dtype(a))
        norm().run(x, a.norm_weight, a.norm_bias, y, a.eps)
        return y if self.maps else as_tokens(y, a.x)

    def _inner_folded(self, a: Any, norm: Callable[[], Any], tail: Any) -> tuple[Any, FoldedWeight | None]:
        x = self._normed(a, norm)
        if not self._folds(a, x.dtype) or self.last is None:
            return self._inner(a, x), None
        weight, bias = (getattr(a, name) for name in self.last)
        folded = FoldedWeight(tail, weight.flatten(1), bias, a.gamma)
        scaled_bias = None if bias is None else bias * a.gamma.to(bias.dtype)
        return self._inner(
            a, x, **{self.last[0]: folded.weight(weight.dtype).view(weight.shape), self.last[1]: scaled_bias}
        ), folded

    def _forward(self, run: Any, norm: Callable[[], Any], tail: Callable[[], Any], a: Any) -> tuple[Tensor, ...]:
        inner, folded = self._inner_folded(a, norm, tail())
        result = run(inner)
        branch, *saved = result if self.op._saved else (result,)
        kept = branch if self._keeps(a, inner.x.dtype) else branch.new_empty(0)
        residual = a.x if a.adds_x else a.residual
        if residual is None:
            return branch, *saved, kept
        y = self._empty(a, branch)
        into = self._map(y)
        form = memory_format(into)
        given = pixel_dense(self._map(residual).to(y.dtype), form), pixel_dense(self._map(branch), form)
        tail().run(*given, None if folded else a.gamma, a.path_scale, into)
        return y, *saved, kept

    def _backward(
        self,
        run: Any,
        norm: Callable[[], Any],
        tail: Callable[[], Any],
        grads: list[Any],
        grad: Tensor,
        a: Any,
        *kept: Any,
    ) -> None:
        count = self.op._tensors
        dx, (dnorm, dnorm_bias, dgamma) = grads[0], grads[count : count + 3]
        *saved, branch = kept
        inner, folded = self._inner_folded(a, norm, tail())
        grad = self._map(grad)
        gamma = None if folded else a.gamma
        dbranch = self._branch_gradient(tail(), grad, gamma, a.path_scale, branch, dgamma, inner.x)
        found = list(grads[:count])
        normed = a.norm_weight is not None
        through = any(t is not None for t in (dx, dnorm, dnorm_bias))
        if through and (normed or dx.dtype != inner.x.dtype):
            found[0] = gradient_like(inner.x, inner.x)
        if folded is None or self.last is None:
            run(found, dbranch, inner, *saved)
        else:
            weight, bias = (self.op.arguments._fields.index(name) for name in self.last)
            needed = dgamma is not None or grads[weight] is not None or grads[bias] is not None
            dweight, dbias = folded.empty_gradients(inner.x.dtype) if needed else (None, None)
            found[weight], found[bias] = None if dweight is None else dweight.view(inner[weight].shape), dbias
            run(found, dbranch, inner, *saved)
            if dweight is not None:
                folded.gradients(dweight, dbias, grads[weight], grads[bias], dgamma)
        if normed and through:
            self._norm_backward(norm(), a, found[0], grad, dx, dnorm, dnorm_bias)
        elif dx is not None and found[0] is not dx:
            dx.copy_(found[0])

    def _norm_backward(
        self,
        norm: Any,
        a: Any,
        dnormed: Tensor,
        grad: Tensor,
        dx: Tensor | None,
        dnorm: Tensor | None,
        dnorm_bias: Tensor | None,
    ) -> None:
        x = self._map(a.x)
        into = found = None if dx is None else self._map(dx)
        if into is not None and pixel_dense(into, memory_format(x)) is not into:
            found = empty(x.shape, x)
        plus = pixel_dense(grad, memory_format(x)) if a.adds_x else None
        norm.run_backward(self._map(dnormed), x, a.norm_weight, found, dnorm, dnorm_bias, a.eps, plus)
        if into is not None and found is not None and found is not into:
            into.copy_(found)

    def _branch_gradient(
        self,
        tail: Any,
        grad: Tensor,
        gamma: Tensor | None,
        path_scale: Tensor | None,
        branch: Tensor,
        dgamma: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        """path_scale * gamma * grad, in the dtype and shape of the op's result; dgamma, where gamma is not folded."""
        if gamma is None and path_scale is None:
            found = grad.to(x.dtype)
            return found if self.maps else as_tokens(found, x)
        form = memory_format(self._map(x))
        grad, found = pixel_dense(grad, form), allocate(grad.shape, grad, form, x.dtype)
        sums = dgamma if gamma is not None else None
        given = found if sums is None else pixel_dense(self._map(branch), form)
        tail.run_backward(grad, given, gamma, path_scale, found, sums)
        return found if self.maps else as_tokens(found, x)


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or in its place an empty tensor of this dtype with its shape and strides."""
    return x if x.dtype == dtype else allocate(x.shape, x, dtype=dtype, strides=x.stride())
