"""MBConv's forward passes, around the kernels of batch norms, products and convolutions, and what the backward ones
(_mbconv_backward.py) have in common with them."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.mbconv import pad_same, pool_same, product_type, same_padding
from ._allocation import allocate, allocate_channels_last, empty, memory_format
from ._batch_norm import BatchNorm, Coefficients, cpu_batch_norm, cuda_batch_norm, empty_table, prepare, wide
from ._devices import without_autocast
from ._maps import pixel_dense
from ._parameters import Convert, convert, convert_cuda, converted
from ._pointwise import linear, linear_scaled, linear_to, multiplies, operand
from .dwconv import (
    convolve,
    convolve_backward,
    convolve_backward_cuda,
    convolve_backward_torch,
    convolve_cuda,
    convolve_torch,
    convolves_cuda,
)
from .scaled_residual import Tail, cpu_tail, cuda_tail

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
    """y; the inputs of expand_norm and depthwise_norm, from which all between is elementwise; the tables of the three
    norms; and the means that se pools."""
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
    tables = (empty_table(a.x, len(norm[0])) for norm in a.norms())
    return y, expanded, convolved, *tables, allocate((kept if a.se else 0, hidden), a.x, dtype=wide(a.x))


class Device(NamedTuple):
    """The kernels of a device, and what suits it. Convolutions are of channels_last tensors, and at stride 2 "SAME"."""

    norm: BatchNorm
    convolve: Callable[..., None]
    convolve_backward: Callable[..., None]
    tail: Tail
    convert: Convert
    form: Callable[[Tensor], torch.memory_format]  # in which x is taken
    chunk_bytes: int | None  # None: the whole batch at once
    sums_wide: bool  # gradients of half weights are products that come in float32


def cpu(x: Tensor) -> Device:
    kernels = cpu_batch_norm(), convolve, convolve_backward, cpu_tail(), convert
    return Device(*kernels, memory_format, _CHUNK_BYTES, sums_wide=False)


def cuda(x: Tensor) -> Device:
    compiled = convolves_cuda(x)
    convolutions = (convolve_cuda, convolve_backward_cuda) if compiled else (_convolve_torch, _convolve_backward_torch)
    kernels = cuda_batch_norm(), *convolutions, cuda_tail(), convert_cuda
    return Device(*kernels, lambda t: torch.channels_last, None, sums_wide=True)


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


class Block:
    """What all passes need. tables: of the three norms."""

    def __init__(self, device: Device, a: Arguments, tables: Sequence[Tensor]) -> None:
        self.a, self.device, self.tables = a, device, tables
        self.dtype, self.form = product_type(a.x, a.expand_weight), device.form(a.x)
        self.x = operand(pixel_dense(a.x, self.form))
        # A weight that is larger than x would take longer to change than x.
        self.small_weight = a.x.numel() >= a.expand_weight.numel()
        # Of half types a constant that the next norm nearly cancels would be rounded, and the product with it.
        self.folds = self.dtype == wide(a.x) and self.small_weight
        shortcut = None if a.shortcut_weight is None else a.shortcut_weight.flatten(1), a.shortcut_bias
        self.expand_weight, self.dw_weight = a.expand_weight.flatten(1), a.dw_weight.contiguous()
        self.conv = _geometry(a.stride, a.x)
        products = a.shrink_weight.flatten(1), a.shrink_bias, *shortcut
        self.shrink_weight, self.shrink_bias, *self.shortcut = converted(device.convert, products, self.dtype)

    def prepare(self, i: int, x: Tensor) -> None:
        """The table of a norm, x being what it normalizes."""
        prepare(self.device.norm, x, self.a.norms()[i], self.tables[i], self.a.eps)

    def expand(self) -> tuple[Tensor, Tensor | None]:
        """expand_weight with pre_norm in it, as a matrix and a constant, where it is folded."""
        if not self.folds:
            return self.expand_weight, None
        scale, shift = self.tables[0][:2]
        return self.expand_weight * scale, torch.mv(self.expand_weight, shift)

    def normed(self, x: Tensor) -> Tensor:
        """What expand_weight multiplies."""
        if self.folds:
            return x
        u = empty(x.shape, x)
        self.device.norm.run(x, Coefficients(self.tables[0]), None, u)
        return u.to(self.dtype)

    def gate(self, mean: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """That of squeeze and excitation, and what its gradient is computed from."""
        reduce_weight, reduce_bias, expand_weight, expand_bias = (
            None if t is None else (t.flatten(1) if t.ndim > 1 else t).to(mean.dtype) for t in self.a.se
        )
        assert reduce_weight is not None and expand_weight is not None
        reduced = F.linear(mean, reduce_weight, reduce_bias)
        activated = F.silu(reduced)
        gate = F.linear(activated, expand_weight, expand_bias).sigmoid_()
        return gate, (mean, reduced, activated, gate, reduce_weight, expand_weight)

    def pixels(self) -> int:
        """Of an image of the output."""
        h, w = self.a.x.shape[2:]
        return h * w if self.a.stride == 1 else ((h + 1) // 2) * ((w + 1) // 2)

    def excite(self, u: Tensor, h: Tensor, means: Tensor) -> Tensor:
        """h = GELU(norm(u)), and the weight that is to multiply it: the gates of se are in whichever is smaller. h may
        be u."""
        c, weight = Coefficients(self.tables[2]), self.shrink_weight
        self.device.norm.run(u, c, "gelu", h, means if self.a.se else None)
        if not self.a.se:
            return weight
        gate, _ = self.gate(means)
        if self.pixels() < 2 * len(weight):
            h.mul_(gate[:, :, None, None])
            return weight
        gated = allocate((len(gate), *weight.shape), weight)
        return torch.mul(self.a.shrink_weight.flatten(1), gate[:, None], out=gated)

    def pooled(self) -> Tensor:
        """What the shortcut takes."""
        return self.x if self.a.stride == 1 else operand(pool_same(self.x, self.a.pool_size))

    def add_shortcut(self, y: Tensor) -> Tensor:
        """What is to be added to the product, y itself perhaps."""
        own = self.pooled()
        if self.a.shortcut_weight is None:
            return own
        weight, bias = self.shortcut
        linear(own.to(self.dtype), weight, bias, y)
        return y

    def shrink(self, h: Tensor, weight: Tensor, y: Tensor, own: Tensor, scale: Tensor | None) -> None:
        """y = own + scale * (weight h + shrink_bias)."""
        if weight.ndim == 3 and memory_format(y) != torch.channels_last and multiplies(h):
            # Our products by a weight for each image do not change the layout.
            for n in range(len(h)):
                one = slice(n, n + 1)
                self.shrink(h[one], weight[n], y[one], own[one], None if scale is None else scale[one])
            return
        given = h, weight, self.shrink_bias
        if own.dtype == self.dtype:
            if scale is None:
                return linear_to(*given, y, plus=own)
            if linear_scaled(*given, None, scale, own, y):
                return
        form = memory_format(y)
        product = allocate(y.shape, y, form, self.dtype)
        linear_to(*given, product)
        self.device.tail.run(pixel_dense(own.to(y.dtype), form), product, None, scale, y)

    def chunks(self) -> Iterator[slice]:
        n, _, h, w = self.a.x.shape
        size = max(1, len(self.dw_weight) * h * w * self.dtype.itemsize)
        images = n if self.device.chunk_bytes is None else max(1, self.device.chunk_bytes // size)
        return (slice(begin, min(begin + images, n)) for begin in range(0, n, max(images, 1)))


def part(t: Tensor, images: slice) -> Tensor:
    """A slice takes some microseconds."""
    return t if images.stop - images.start == len(t) else t[images]


def hidden(like: Tensor, given: Tensor | None = None) -> Tensor:
    """A buffer: the given one if it has the size."""
    return given if given is not None and given.shape == like.shape else allocate_channels_last(like.shape, like)


# In between everything is channels_last, whatever x is.
@without_autocast
def forward(on: Callable[[Tensor], Device], a: Arguments) -> tuple[Tensor, ...]:
    y, expanded, convolved, *tables, means = result = output(a)
    b, h = Block(on(a.x), a, tables), None
    b.prepare(0, b.x)
    if not a.keep:
        _evaluate(b, y)
        return result
    matrix, constant = b.expand()
    linear(b.normed(b.x), matrix, constant, expanded)
    b.prepare(1, expanded)
    for images in b.chunks():
        u = part(expanded, images)
        h = hidden(u, h)
        b.device.norm.run(u, Coefficients(b.tables[1]), "gelu", h)
        b.device.convolve(h, b.dw_weight, None, part(convolved, images), conv=b.conv)
    b.prepare(2, convolved)
    own = b.add_shortcut(y)
    for images in b.chunks():
        u = part(convolved, images)
        h = hidden(u, h)
        _shrink(b, u, h, part(means, images), y, own, images)
    return result


def _shrink(b: Block, u: Tensor, h: Tensor, means: Tensor, y: Tensor, own: Tensor, images: slice) -> None:
    to, scale = part(y, images), b.a.path_scale
    weight = b.excite(u, h, means)
    plus = to if own is y else part(own, images)
    b.shrink(h, weight, to, plus, None if scale is None else part(scale, images))


def _evaluate(b: Block, y: Tensor) -> None:
    """Some images at a time."""
    matrix, constant = b.expand()
    for i in (1, 2):
        b.prepare(i, b.x)  # by known statistics: x is not read
    own, h, u, sizes = b.add_shortcut(y), None, None, len(b.dw_weight)
    for images in b.chunks():
        x, to = part(b.x, images), part(y, images)
        if h is None or u is None or len(h) != len(x):
            h = allocate((len(x), sizes, *x.shape[2:]), y, torch.channels_last, b.dtype)
            u = allocate((len(x), sizes, *to.shape[2:]), y, torch.channels_last, b.dtype)
        linear(b.normed(x), matrix, constant, h)
        b.device.norm.run(h, Coefficients(b.tables[1]), "gelu", h)
        b.device.convolve(h, b.dw_weight, None, u, conv=b.conv)
        means = allocate((len(x), sizes), b.tables[2]) if b.a.se else b.tables[2]
        _shrink(b, u, u, means, y, own, images)
