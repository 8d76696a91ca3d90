"""The passes of MBConv, forward and backward, around the kernels of batch norms, products and convolutions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.mbconv import pad_same, pool_same, product_type, same_padding
from ._allocation import allocate, allocate_channels_last, empty, memory_format
from ._devices import without_autocast
from ._maps import pixel_dense
from ._pointwise import (
    channel_sums,
    linear,
    linear_scaled,
    linear_to,
    operand,
    weight_gradient,
)
from .batch_norm_act import (
    BatchNorm,
    Coefficients,
    Norm,
    cpu_batch_norm,
    cuda_batch_norm,
    measure,
    wide,
)
from .dwconv import (
    convolve,
    convolve_backward,
    convolve_backward_cuda,
    convolve_backward_torch,
    convolve_cuda,
    convolve_torch,
    convolves_cuda,
)
from .gated_recursion import cuda_gates

# Of the images that are evaluated at once, in hidden channels: they stay in a third-level cache between the passes.
_CHUNK_BYTES = 8 * 2**20


class Arguments(NamedTuple):
    x: Tensor
    pre_norm: list[Tensor]  # weight and bias; mean and variance unless they are those of the batch
    expand_weight: Tensor
    expand_norm: list[Tensor]
    dw_weight: Tensor
    depthwise_norm: list[Tensor]
    se: list[Tensor | None]  # weight and bias of both layers, or none
    shrink_weight: Tensor
    shrink_bias: Tensor | None
    shortcut_weight: Tensor | None
    shortcut_bias: Tensor | None
    path_scale: Tensor | None
    stride: int
    pool_size: int
    eps: float
    keep: bool  # what the backward pass needs

    def measures(self) -> bool:
        """Whether the statistics are those of the batch."""
        return len(self.pre_norm) == 2

    def norms(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.pre_norm, self.expand_norm, self.depthwise_norm


def output(a: Arguments) -> tuple[Tensor, ...]:
    """y; the inputs of expand_norm and depthwise_norm, from which all between is elementwise; mean and variance of the
    three norms; and the sums that se pools."""
    (n, _, h, w), hidden, dtype = a.x.shape, a.dw_weight.shape[0], product_type(a.x, a.expand_weight)
    rows, columns = (h, w) if a.stride == 1 else ((h + 1) // 2, (w + 1) // 2)
    own_type = a.x.dtype if a.shortcut_weight is None else dtype
    y = allocate(
        (n, a.shrink_weight.shape[0], rows, columns), a.x, memory_format(a.x), torch.promote_types(own_type, dtype)
    )
    kept = n if a.keep else 0
    expanded, convolved = (
        allocate((kept, hidden, *size), a.x, torch.channels_last, dtype) for size in ((h, w), (rows, columns))
    )
    channels = [len(norm[0]) if a.measures() else 0 for norm in a.norms()]
    statistics = (allocate((2, c), a.x, dtype=wide(a.x)) for c in channels)
    return y, expanded, convolved, *statistics, allocate((kept if a.se else 0, hidden), a.x, dtype=wide(a.x))


class _Device(NamedTuple):
    """The kernels of a device, and what suits it. Convolutions are of channels_last tensors, and at stride 2 "SAME"."""

    norm: BatchNorm
    convolve: Callable[..., None]
    convolve_backward: Callable[..., None]
    channel_sums: Callable[[Tensor, Tensor | None], None]
    form: Callable[[Tensor], torch.memory_format]  # in which x is taken
    chunk_bytes: int | None  # None: the whole batch at once


def cpu(x: Tensor) -> _Device:
    return _Device(cpu_batch_norm(), convolve, convolve_backward, channel_sums, memory_format, _CHUNK_BYTES)


def cuda(x: Tensor) -> _Device:
    compiled = convolves_cuda(x)
    convolutions = (convolve_cuda, convolve_backward_cuda) if compiled else (_convolve_torch, _convolve_backward_torch)
    return _Device(cuda_batch_norm(), *convolutions, cuda_gates().channel_sums, lambda t: torch.channels_last, None)


def _geometry(stride: int, x: Tensor) -> tuple[int, ...]:
    """Kernel, stride, dilation and the padding before."""
    top, _, left, _ = (1, 1, 1, 1) if stride == 1 else same_padding(*x.shape[2:])
    return 3, stride, 1, top, left


def _convolve_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, activation: str | None = None, *, conv: tuple[int, ...]
) -> None:
    padded = F.pad(x, (1,) * 4) if conv[1] == 1 else pad_same(x)
    convolve_torch(padded, weight, bias, y, activation, padding=0, stride=conv[1])


def _convolve_backward_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    conv: tuple[int, ...],
) -> None:
    padded = F.pad(x, (1,) * 4) if conv[1] == 1 else pad_same(x)
    dpadded = None if dx is None else torch.empty_like(padded)
    convolve_backward_torch(grad, padded, weight, dpadded, dweight, dbias, padding=0, stride=conv[1])
    top, left = conv[3:]
    if dx is not None and dpadded is not None:
        dx.copy_(dpadded[:, :, top : top + dx.shape[2], left : left + dx.shape[3]])


class _Block:
    """What all passes need."""

    def __init__(self, device: _Device, a: Arguments, statistics: Sequence[Tensor]) -> None:
        self.a, self.device, self.statistics = a, device, statistics
        self.dtype, self.form = product_type(a.x, a.expand_weight), device.form(a.x)
        self.x = operand(pixel_dense(a.x, self.form))
        # Of half types a constant that the next norm nearly cancels would be rounded, and the product with it.
        # A weight that is larger than x would take longer to change than x.
        self.folds = self.dtype == wide(a.x) and a.x.numel() >= a.expand_weight.numel()
        self.expand_weight, self.shrink_weight = a.expand_weight.flatten(1), a.shrink_weight.flatten(1)
        self.dw_weight, self.conv = a.dw_weight.contiguous(), _geometry(a.stride, a.x)

    def norm(self, i: int) -> Norm:
        parameters = self.a.norms()[i]
        found = self.statistics[i] if self.a.measures() else parameters[2:]
        return Norm.of(self.a.x, (*parameters[:2], *found), self.a.eps)

    def measure(self, i: int, x: Tensor) -> None:
        if self.a.measures():
            measure(self.device.norm, x, *self.statistics[i])

    def hidden(self, like: Tensor) -> Tensor:
        """A buffer."""
        return allocate_channels_last(like.shape, like)

    def expand(self) -> tuple[Tensor, Tensor | None]:
        """expand_weight with pre_norm in it, as a matrix and a constant, where it is folded."""
        if not self.folds:
            return self.expand_weight, None
        c = self.norm(0).coefficients()
        return self.expand_weight * c.scale, torch.mv(self.expand_weight.to(c.shift.dtype), c.shift)

    def normed(self, x: Tensor) -> Tensor:
        """What expand_weight multiplies."""
        if self.folds:
            return x
        u = empty(x.shape, x)
        self.device.norm.run(x, self.norm(0).coefficients(), None, u)
        return u.to(self.dtype)

    def gate(self, pooled: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """That of squeeze and excitation, and what its gradient is computed from."""
        reduce_weight, reduce_bias, expand_weight, expand_bias = (
            None if t is None else (t.flatten(1) if t.ndim > 1 else t).to(pooled.dtype) for t in self.a.se
        )
        mean = pooled / max(1, self.pixels())
        assert reduce_weight is not None and expand_weight is not None
        reduced = F.linear(mean, reduce_weight, reduce_bias)
        gate = F.linear(F.silu(reduced), expand_weight, expand_bias).sigmoid_()
        return gate, (mean, reduced, gate, reduce_weight, expand_weight)

    def pixels(self) -> int:
        h, w = self.a.x.shape[2:]
        return h * w if self.a.stride == 1 else ((h + 1) // 2) * ((w + 1) // 2)

    def pooled(self) -> Tensor:
        """What the shortcut takes."""
        return self.x if self.a.stride == 1 else operand(pool_same(self.x, self.a.pool_size))

    def add_shortcut(self, y: Tensor) -> Tensor:
        """What is to be added to the product, y itself perhaps."""
        own = self.pooled()
        if self.a.shortcut_weight is None:
            return own
        linear(own.to(self.dtype), self.a.shortcut_weight.flatten(1), self.a.shortcut_bias, y)
        return y

    def shrink(self, h: Tensor, y: Tensor, own: Tensor, images: slice = slice(None)) -> None:
        """y = own + path_scale * (shrink_weight h + shrink_bias)."""
        scale = None if self.a.path_scale is None else self.a.path_scale[images]
        given = h, self.shrink_weight, self.a.shrink_bias
        if own.dtype == self.dtype:
            if scale is None:
                return linear_to(*given, y, plus=own)
            if linear_scaled(*given, None, scale, own, y):
                return
        product = allocate(y.shape, y, memory_format(y), self.dtype)
        linear_to(*given, product)
        if scale is not None:
            product *= scale[:, None, None, None].to(product.dtype)
        torch.add(own, product, out=y)


# In between everything is channels_last, whatever x is.
@without_autocast
def forward(on: Callable[[Tensor], _Device], a: Arguments) -> tuple[Tensor, ...]:
    y, expanded, convolved, *statistics, pooled = result = output(a)
    b = _Block(on(a.x), a, statistics)
    if not a.keep:
        _evaluate(b, y)
        return result
    norm = b.device.norm
    b.measure(0, b.x)
    matrix, constant = b.expand()
    linear(b.normed(b.x), matrix, constant, expanded)
    b.measure(1, expanded)
    c = b.norm(1).coefficients()
    for images in _chunks(b):
        h = b.hidden(expanded[images])
        norm.run(expanded[images], c, "gelu", h)
        b.device.convolve(h, b.dw_weight, None, convolved[images], conv=b.conv)
    b.measure(2, convolved)
    c, own = b.norm(2).coefficients(), b.add_shortcut(y)
    for images in _chunks(b):
        u, h = convolved[images], b.hidden(convolved[images])
        if a.se:
            norm.run(u, c._replace(gate=None), "gelu", None, pooled[images])
            c = c._replace(gate=b.gate(pooled[images])[0])
        norm.run(u, c, "gelu", h)
        to = y[images]
        b.shrink(h, to, to if own is y else own[images], images)
    return result


def _chunks(b: _Block) -> Iterator[slice]:
    n, _, h, w = b.a.x.shape
    size = max(1, len(b.dw_weight) * h * w * b.dtype.itemsize)
    images = n if b.device.chunk_bytes is None else max(1, b.device.chunk_bytes // size)
    return (slice(begin, min(begin + images, n)) for begin in range(0, n, max(images, 1)))


def _evaluate(b: _Block, y: Tensor) -> None:
    """Some images at a time."""
    norm, hidden = b.device.norm, len(b.dw_weight)
    (matrix, constant), expand_norm, dw_norm = b.expand(), b.norm(1).coefficients(), b.norm(2).coefficients()
    ones = torch.ones_like(dw_norm.scale)
    own, h, u = b.add_shortcut(y), None, None
    for images in _chunks(b):
        x, to = b.x[images], y[images]
        if h is None or u is None or len(h) != len(x):
            h = allocate((len(x), hidden, *x.shape[2:]), y, torch.channels_last, b.dtype)
            u = allocate((len(x), hidden, *y.shape[2:]), y, torch.channels_last, b.dtype)
        linear(b.normed(x), matrix, constant, h)
        norm.run(h, expand_norm, "gelu", h)
        b.device.convolve(h, b.dw_weight, None, u, conv=b.conv)
        if b.a.se:
            sums = allocate((len(x), hidden), y, dtype=wide(b.a.x))
            norm.run(u, dw_norm, "gelu", u, sums)
            norm.run(u, Coefficients(ones, torch.zeros_like(ones), ones, b.gate(sums)[0]), None, u)
        else:
            norm.run(u, dw_norm, "gelu", u)
        b.shrink(u, to, to if own is y else own[images], images)


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
    on: Callable[[Tensor], _Device],
    grads: list[Any],
    grad: Tensor,
    a: Arguments,
    expanded: Tensor,
    convolved: Tensor,
    *rest: Tensor,
) -> None:
    to, (*statistics, pooled) = _Grads(*grads), rest
    b = _Block(on(a.x), a, statistics)
    for t in (*to.pre_norm[2:], *to.expand_norm[2:], *to.depthwise_norm[2:]):
        if t is not None:  # of a constant
            t.zero_()
    given = operand(pixel_dense(grad, b.form))
    dy = given.to(b.dtype)
    if a.path_scale is not None:
        dy = dy * a.path_scale[:, None, None, None].to(dy.dtype)
    dh, h = b.hidden(convolved), b.hidden(convolved)
    linear(dy, b.shrink_weight.t(), None, dh)
    c = _shrink_backward(b, to, dy, dh, h, convolved, pooled)
    _norm_backward(b, 2, to.depthwise_norm, dh, convolved, c)
    du, c = h if a.stride == 1 else b.hidden(expanded), b.norm(1).coefficients()
    if to.dw_weight is not None:
        b.device.norm.run(expanded, c, "gelu", du)
        b.device.convolve_backward(dh, du, b.dw_weight, None, to.dw_weight, None, conv=b.conv)
    b.device.convolve_backward(dh, expanded, b.dw_weight, du, None, None, conv=b.conv)
    del dh, h
    _norm_backward(b, 1, to.expand_norm, du, expanded, c)
    _expand_backward(b, to, du, _shortcut_backward(b, to, given))


def _norm_backward(b: _Block, i: int, to: list[Tensor | None], grad: Tensor, x: Tensor, c: Coefficients) -> None:
    """Of one with GELU; grad becomes that of x."""
    norm, sums, measures = b.norm(i), None, b.a.measures()
    if measures or to[0] is not None or to[1] is not None:
        sums = allocate((2, len(norm.weight)), norm.weight)
        b.device.norm.backward_sums(grad, x, c, "gelu", sums)
        norm.gradients(sums, to[0], to[1])
    line = norm.line(sums if measures else None, max(1, x.numel() // x.shape[1]))
    b.device.norm.backward_input(grad, x, c, "gelu", line, grad)


def _shrink_backward(
    b: _Block, to: _Grads, dy: Tensor, dh: Tensor, h: Tensor, convolved: Tensor, pooled: Tensor
) -> Coefficients:
    """Of shrink and se. Returns depthwise_norm's coefficients, by whose gate and offset dh is its gradient."""
    c = b.norm(2).coefficients()
    if b.a.se:
        gate, between = b.gate(pooled)
        c = c._replace(gate=gate)
    if to.shrink_weight is not None:
        b.device.norm.run(convolved, c, "gelu", h)
        weight_gradient(dy, h, to.shrink_weight)
    b.device.channel_sums(dy, to.shrink_bias)
    if b.a.se:
        of_gate = torch.empty_like(gate)
        b.device.norm.backward_gate(dh, convolved, c._replace(gate=None), "gelu", of_gate)
        c = c._replace(offset=_gate_backward(of_gate, between, to.se) / max(1, b.pixels()))
    return c


def _gate_backward(grad: Tensor, between: tuple[Tensor, ...], to: list[Tensor | None]) -> Tensor:
    """The gradient of what se pools."""
    mean, reduced, gate, reduce_weight, expand_weight = between
    of_gate = grad * gate * (1 - gate)
    of_reduced = torch.ops.aten.silu_backward(of_gate @ expand_weight, reduced)
    found = of_reduced.t() @ mean, of_reduced.sum(0), of_gate.t() @ F.silu(reduced), of_gate.sum(0)
    for t, value in zip(to, found, strict=True):
        if t is not None:
            t.copy_(value.view(t.shape))
    return of_reduced @ reduce_weight


def _shortcut_backward(b: _Block, to: _Grads, grad: Tensor) -> Tensor | None:
    """The gradient of x by way of the shortcut, in x's dtype."""
    a = b.a
    if a.shortcut_weight is not None:
        grad, own = grad.to(b.dtype), b.pooled().to(b.dtype)
        weight_gradient(grad, own, to.shortcut_weight)
        b.device.channel_sums(grad, to.shortcut_bias)
        if to.x is None:
            return None
        of_own = empty(own.shape, own)
        linear(grad, a.shortcut_weight.flatten(1).t(), None, of_own)
        grad = of_own
    if to.x is None:
        return None
    return grad.to(a.x.dtype) if a.stride == 1 else _pool_backward(grad.to(a.x.dtype), b.x, a.pool_size)


def _pool_backward(grad: Tensor, x: Tensor, pool_size: int) -> Tensor:
    back = torch.ops.aten.avg_pool2d_backward
    if pool_size == 2:
        return back(grad, x, [2, 2], [2, 2], [0, 0], True, False, None)
    padded, inside = pad_same(x), pad_same(torch.ones_like(x[:1, :1]))
    top, _, left, _ = same_padding(*x.shape[2:])
    dpadded = back(grad / F.avg_pool2d(inside, 3, 2), padded, [3, 3], [2, 2], [0, 0], False, True, None)
    return dpadded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def _expand_backward(b: _Block, to: _Grads, du: Tensor, plus: Tensor | None) -> None:
    """Of expand and pre_norm; plus: what else is the gradient of x."""
    norm, of_norm = b.norm(0), to.pre_norm[:2]
    c, count = norm.coefficients(), max(1, b.x.numel() // b.x.shape[1])
    weight, sums = b.expand_weight, None
    measures = b.a.measures() and to.x is not None
    if b.folds:
        if to.expand_weight is not None or measures or any(t is not None for t in of_norm):
            product = allocate(weight.shape, weight)
            weight_gradient(du, b.x, product)
            of_constant = allocate((len(weight),), weight)
            b.device.channel_sums(du, of_constant)
            centered = torch.addr(product, of_constant, norm.mean, alpha=-1)
            sums = torch.stack([torch.mv(weight.t(), of_constant), (weight * centered).sum(0)])
            if to.expand_weight is not None:
                found = torch.addr(centered * c.scale, of_constant, norm.bias)
                to.expand_weight.copy_(found.view(to.expand_weight.shape))
            norm.gradients(sums, *of_norm)
        if to.x is None or plus is None:
            return
        plus = pixel_dense(plus, b.form)
        if measures:
            total = empty(b.x.shape, b.x)
            one = c._replace(scale=torch.ones_like(c.scale))
            b.device.norm.backward_input(plus, b.x, one, None, norm.line(sums, count), total)
            plus = total
        return linear_to(du, (weight * c.scale).t(), None, to.x, plus=plus)
    weight_gradient(du, b.normed(b.x), to.expand_weight)
    of_normed = allocate(b.x.shape, b.x, memory_format(b.x), b.dtype)
    linear(du, weight.t(), None, of_normed)
    of_normed = of_normed.to(b.x.dtype)
    if measures or any(t is not None for t in of_norm):
        sums = allocate((2, len(norm.weight)), norm.weight)
        b.device.norm.backward_sums(of_normed, b.x, c, None, sums)
        norm.gradients(sums, *of_norm)
    if to.x is None or plus is None:
        return
    line = norm.line(sums if b.a.measures() else None, count)
    b.device.norm.backward_input(of_normed, b.x, c, None, line, of_normed)
    torch.add(of_normed, plus, out=to.x)
