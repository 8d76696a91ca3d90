"""MBConv's backward passes, from the last layer to the first."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.mbconv import pad_same, same_padding
from ._allocation import allocate, empty, memory_format
from ._batch_norm import Coefficients, Ends
from ._devices import without_autocast
from ._maps import pixel_dense
from ._mbconv import Arguments, Block, Device, hidden
from ._pointwise import linear, linear_to, operand, weight_gradient


class _Grads(NamedTuple):
    x: Tensor | None
    pre_norm: list[Tensor | None]
    expand_weight: Tensor | None
    expand_norm: list[Tensor | None]
    dw_weight: Tensor | None
    depthwise_norm: list[Tensor | None]
    se: list[Tensor | None]
    shrink_weight: Tensor | None
    shrink_bias: Tensor | None
    shortcut_weight: Tensor | None
    shortcut_bias: Tensor | None
    path_scale: Tensor | None


@without_autocast
def backward(
    on: Callable[[Tensor], Device],
    grads: list[Any],
    grad: Tensor,
    a: Arguments,
    expanded: Tensor,
    convolved: Tensor,
    *rest: Tensor,
) -> None:
    to, (*tables, means) = _Grads(*grads), rest
    b = Block(on(a.x), a, tables)
    for t in (*to.pre_norm[2:], *to.expand_norm[2:], *to.depthwise_norm[2:]):
        if t is not None:  # of a constant
            t.zero_()
    given = operand(pixel_dense(grad, b.form))
    dconvolved = _shrink_backward(b, to, given, convolved, means)
    dexpanded, sums = _depthwise_backward(b, to, dconvolved, expanded)
    del dconvolved
    _expand_backward(b, to, dexpanded, sums, _shortcut_backward(b, to, given))


def _ends(b: Block, i: int, to: list[Tensor | None], x: Tensor, through: bool = True) -> Ends:
    """through: whether a gradient of x is wanted."""
    line = allocate((2, x.shape[1]), b.tables[i]) if b.a.measures() and through else None
    return Ends(line, to[0], to[1], x.numel() // x.shape[1])


def _shrink_backward(b: Block, to: _Grads, grad: Tensor, convolved: Tensor, means: Tensor) -> Tensor:
    """Of shrink, se and depthwise_norm."""
    norm, dy, dh = b.device.norm, grad.to(b.dtype), hidden(convolved)
    if b.a.path_scale is not None:
        dy = allocate(grad.shape, grad, b.form, b.dtype)
        b.device.tail.run_backward(grad, grad, None, b.a.path_scale, dy, None)
    linear(dy, b.shrink_weight.t(), None, dh)
    h = hidden(convolved) if to.shrink_weight is not None else None
    c, ends = Coefficients(b.tables[2]), _ends(b, 2, to.depthwise_norm, convolved)
    if b.a.se:
        gate, between = b.gate(means)
        sums = allocate((len(gate), 5, gate.shape[1]), gate)
        norm.backward_images(dh, convolved, c._replace(gate=gate), "gelu", sums, h)
        c = Coefficients(c.table, gate, _gate_backward(sums[:, 0], between, to.se, b.pixels()))
        if ends.wanted():
            norm.finish(sums, c, ends)
    elif ends.wanted():
        norm.backward_sums(dh, convolved, c, "gelu", ends, h)
    elif h is not None:
        norm.run(convolved, c, "gelu", h)
    weight_gradient(dy, convolved if h is None else h, to.shrink_weight, to.shrink_bias)
    norm.backward_input(dh, convolved, c, "gelu", ends.line, dh)
    return dh


def _gate_backward(grad: Tensor, between: tuple[Tensor, ...], to: list[Tensor | None], pixels: int) -> Tensor:
    """The gradient of every pixel of what se pools."""
    mean, reduced, activated, gate, reduce_weight, expand_weight = between
    of_gate = torch.ops.aten.sigmoid_backward(grad, gate)
    of_reduced = torch.ops.aten.silu_backward(of_gate @ expand_weight, reduced)
    for of_layer, x, (weight, bias) in ((of_reduced, mean, to[:2]), (of_gate, activated, to[2:])):
        if weight is not None:
            _product_into(of_layer.t(), x, weight.flatten(1))
        if bias is not None:
            torch.sum(of_layer, 0, dtype=bias.dtype, out=bias)
    return torch.addmm(gate, of_reduced, reduce_weight, beta=0, alpha=1 / max(1, pixels))


def _product_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _depthwise_backward(b: Block, to: _Grads, grad: Tensor, expanded: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the convolution and expand_norm; and the sums of that gradient, where they cost nothing here."""
    norm, c, ends = b.device.norm, Coefficients(b.tables[1]), _ends(b, 1, to.expand_norm, expanded)
    du = hidden(expanded)
    b.device.convolve_backward(grad, expanded, b.dw_weight, du, None, None, conv=b.conv)
    h = hidden(expanded) if to.dw_weight is not None else None
    if ends.wanted():
        norm.backward_sums(du, expanded, c, "gelu", ends, h)
    elif h is not None:
        norm.run(expanded, c, "gelu", h)
    if h is not None:
        b.device.convolve_backward(grad, h, b.dw_weight, None, to.dw_weight, None, conv=b.conv)
    sums, given = None, {}
    if _folds(b) and _through(b, to) and b.device.sums_wide:
        sums = given["sums"] = allocate((du.shape[1],), b.tables[1])
    norm.backward_input(du, expanded, c, "gelu", ends.line, du, **given)
    return du, sums


def _folds(b: Block) -> bool:
    """Whether all of expand_norm and pre_norm follows from the product of du and x itself, and from sums of du."""
    return b.folds or (b.small_weight and b.device.sums_wide and b.dtype == b.x.dtype)


def _through(b: Block, to: _Grads) -> bool:
    """Whether something in front of expand_norm needs that product."""
    return (
        to.expand_weight is not None
        or to.pre_norm[0] is not None
        or to.pre_norm[1] is not None
        or (b.a.measures() and to.x is not None)
    )


def _shortcut_backward(b: Block, to: _Grads, grad: Tensor) -> Tensor | None:
    """The gradient of x by way of the shortcut, in x's dtype."""
    a = b.a
    if a.shortcut_weight is not None:
        grad, own = grad.to(b.dtype), b.pooled().to(b.dtype)
        weight_gradient(grad, own, to.shortcut_weight, to.shortcut_bias)
        if to.x is None:
            return None
        of_own = empty(own.shape, own)
        linear(grad, b.shortcut[0].t(), None, of_own)
        grad = of_own
    if to.x is None:
        return None
    found = grad.to(a.x.dtype) if a.stride == 1 else _pool_backward(grad.to(a.x.dtype), b.x, a.pool_size)
    return pixel_dense(found, b.form)


def _pool_backward(grad: Tensor, x: Tensor, pool_size: int) -> Tensor:
    back = torch.ops.aten.avg_pool2d_backward
    if pool_size == 2:
        return back(grad, x, [2, 2], [2, 2], [0, 0], True, False, None)
    padded, inside = pad_same(x), pad_same(torch.ones_like(x[:1, :1]))
    top, _, left, _ = same_padding(*x.shape[2:])
    dpadded = back(grad / F.avg_pool2d(inside, 3, 2), padded, [3, 3], [2, 2], [0, 0], False, True, None)
    return dpadded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def _expand_backward(b: Block, to: _Grads, du: Tensor, sums: Tensor | None, plus: Tensor | None) -> None:
    """Of expand and pre_norm; plus: what else is the gradient of x."""
    ends = _ends(b, 0, to.pre_norm, b.x, to.x is not None)
    if _folds(b):
        return _folded_backward(b, to, du, sums, plus, ends)
    c, norm = Coefficients(b.tables[0]), b.device.norm
    weight_gradient(du, b.normed(b.x), to.expand_weight)
    if to.x is None and not ends.wanted():
        return
    of_normed = allocate(b.x.shape, b.x, memory_format(b.x), b.dtype)
    linear(du, b.expand_weight.t(), None, of_normed)
    of_normed = of_normed.to(b.x.dtype)
    if ends.wanted():
        norm.backward_sums(of_normed, b.x, c, None, ends)
    if to.x is not None:
        found = to.x if pixel_dense(to.x, b.form) is to.x else of_normed
        norm.backward_input(of_normed, b.x, c, None, ends.line, found, plus)
        if found is not to.x:
            to.x.copy_(found)


def _folded_backward(b: Block, to: _Grads, du: Tensor, known: Tensor | None, plus: Tensor | None, ends: Ends) -> None:
    """By the product of du and x itself and the sums of du, and by a weight that has pre_norm in it."""
    weight, (scale, shift, mean) = b.expand_weight, b.tables[0][:3]
    if _through(b, to):
        product = allocate(weight.shape, weight, dtype=scale.dtype)
        sums = allocate((1, 2, len(scale)), scale)
        of_constant = allocate((len(weight),), scale) if known is None else known
        weight_gradient(du, b.x, product, of_constant if known is None else None)
        centered = product.addr_(of_constant, mean, alpha=-1)
        if ends.wanted():
            wide = weight.to(scale.dtype)
            torch.mv(wide.t(), of_constant, out=sums[0, 0])
            torch.sum(wide * centered, 0, out=sums[0, 1])
            b.device.norm.finish(sums, Coefficients(b.tables[0]), ends)
        if to.expand_weight is not None:
            # Of weight * (scale * (x - mean) + bias).
            bias = torch.addcmul(shift, scale, mean)
            to.expand_weight.flatten(1).copy_(centered.mul_(scale).addr_(of_constant, bias))
    if to.x is None or plus is None:
        return
    total = to.x if pixel_dense(to.x, b.form) is to.x else empty(b.x.shape, b.x)
    if ends.line is None:
        total = plus
    else:
        b.device.norm.backward_input(None, b.x, Coefficients(b.tables[0]), None, ends.line, total, plus)
    folded = torch.mul(weight, scale, out=allocate(weight.shape, weight)).t()
    linear_to(du, folded, None, to.x, plus=total)
