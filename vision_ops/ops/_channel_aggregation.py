"""How MogaNet's channel aggregation takes a batch: its chunks, fc2 with the decomposition in it, sums over chunks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from ._allocation import allocate, empty
from ._parameters import Convert, converted
from ._pointwise import linear

_LINE_BYTES = 64  # of a cache


class Arguments(NamedTuple):
    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    dw_weight: Tensor
    dw_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    decompose_weight: Tensor
    decompose_bias: Tensor | None
    sigma: Tensor
    keep: bool  # fc1's output for the backward pass


def output(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y; of every pixel the score, whose GELU is d; and fc1's output, or nothing of it. h is cheap to compute again."""
    n, _, h, w = a.x.shape
    pitch = _fc1_channels(a)
    shape, strides = (n if a.keep else 0, a.dw_weight.shape[0], h, w), (h * w * pitch, 1, w * pitch, pitch)
    kept = allocate(shape, a.x, strides=strides)
    return empty(a.x.shape, a.x), allocate((n, 1, h, w), a.x, dtype=_wide(a.x)), kept


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _hidden_channels(a: Arguments) -> int:
    """Room for the hidden channels and for d behind them. Pixels are not a power of two apart, as hidden widths are:
    they would compete for the same sets of a cache."""
    return a.dw_weight.shape[0] + _LINE_BYTES // a.x.dtype.itemsize


def _fc1_channels(a: Arguments) -> int:
    """No room on a GPU, whose GEMM adds the bias on its way only if its result has no gaps."""
    return a.dw_weight.shape[0] if _native.device_kind(a.x) == "cuda" else _hidden_channels(a)


class Device(NamedTuple):
    """The kernels of a device, and what suits it."""

    aggregate: Callable[..., None]
    aggregate_backward: Callable[..., Tensor]
    channel_sums: Callable[[Tensor, Tensor | None], None]
    convert: Convert
    fold: Callable[[Tensor, Tensor, int, Tensor, Tensor], None]
    unfold: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]
    dense: Callable[[Tensor], Tensor]  # x and the gradient of y as the others take them
    chunk_bytes: int | None  # None: the whole batch at once
    columns: int  # fc2's matrix has a multiple of so many
    spare: int  # tensors of hidden channels that the backward pass takes beside h and its gradient


class Fc2:
    """fc2 of h + sigma * (h - d), as one matrix for [h | d]: W2 (1 + sigma) and a column -(W2 sigma) for d.

    In half types d has a second column, for what the first one rounds off: d is one number for all channels of a pixel,
    whose rounding errors would add up.
    """

    def __init__(self, a: Arguments, device: Device) -> None:
        """The columns are filled up with zeros to a multiple that suits the device."""
        self.hidden = a.dw_weight.shape[0]
        self.weight, self.sigma = a.fc2_weight.flatten(1).contiguous(), a.sigma.flatten()
        self.end = self.hidden + (2 if a.x.dtype.itemsize == 2 else 1)
        self.columns = -(-self.end // device.columns) * device.columns
        self.of_d = allocate((len(self.weight),), a.x, dtype=_wide(a.x))
        self.matrix = allocate((len(self.weight), self.columns), a.x)
        self._unfold = device.unfold
        device.fold(self.weight, self.sigma, self.end, self.matrix, self.of_d)

    def columns_of_d(self, h: Tensor) -> Tensor:
        """Behind the channels of a buffer for both."""
        return h[:, self.hidden : self.columns]

    def gradient_of_d(self, grad: Tensor) -> Tensor:
        n, _, h, w = grad.shape
        of_d = allocate((n, 1, h, w), self.of_d)
        linear(grad.to(self.of_d.dtype), self.of_d[None], None, of_d)
        return of_d

    def gradients(self, product: Tensor, dweight: Tensor | None, dsigma: Tensor | None) -> None:
        """From the gradient of y times [h | d], summed over the pixels."""
        of_weight = None if dweight is None else dweight.flatten(1)
        self._unfold(product, self.weight, self.sigma, of_weight, None if dsigma is None else dsigma.view(-1))


class Total:
    """A gradient that is summed over the chunks, in float32 at least; one that is not needed has no part. Of one chunk
    the part is `only`, the gradient itself."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, needed: bool = True, only: Tensor | None = None) -> None:
        self.value: Tensor | None = None
        self._only = only
        self.part = (
            only.view(shape) if only is not None else allocate(shape, like, dtype=_wide(like)) if needed else None
        )

    def add(self) -> None:
        if self._only is not None:
            self.value = self.part
        elif self.part is not None and self.value is None:
            self.value, self.part = self.part, torch.empty_like(self.part)
        elif self.part is not None:
            self.value += self.part

    def write(self, grad: Tensor | None) -> None:
        if grad is None:
            return
        if self.value is None:  # of an empty batch
            grad.zero_()
        elif self._only is None:
            grad.view(self.value.shape).copy_(self.value)


class Chunk(NamedTuple):
    """Whole images, or rows of one."""

    images: slice
    rows: slice
    height: int

    def of(self, t: Tensor) -> Tensor:
        return t[self.images, :, self.rows]

    def around(self, reach: int) -> "Chunk":
        """With the rows that a convolution reads around it."""
        rows = slice(max(self.rows.start - reach, 0), min(self.rows.stop + reach, self.height))
        return self._replace(rows=rows)

    def first(self, t: Tensor) -> Tensor:
        """As much of a buffer."""
        return t[: self.images.stop - self.images.start, :, : self.rows.stop - self.rows.start]


def _converted(device: Device, a: Arguments) -> Arguments:
    """With the parameters of fc1 and the bias of fc2 as products take them."""
    found = converted(device.convert, (a.fc1_weight, a.fc1_bias, a.fc2_bias), a.x.dtype)
    return a._replace(fc1_weight=found[0], fc1_bias=found[1], fc2_bias=found[2])


class Chunks:
    """What is taken at once, and what all of it needs."""

    least_rows = 8  # of large images: fewer would mostly overlap

    def __init__(self, a: Arguments, device: Device) -> None:
        n, _, h, w = a.x.shape
        a = _converted(device, a)
        self.a, self.fc2 = a, Fc2(a, device)
        # Tensor cores' columns are all that lies behind the channels on a GPU.
        self.pitch = _hidden_channels(a) if device.columns == 1 else self.fc2.columns
        self.fc1_pitch = _fc1_channels(a)
        self.images, self.rows, self.reach = n, h, a.dw_weight.shape[-1] // 2
        if device.chunk_bytes is not None:
            row_bytes = max(1, _hidden_channels(a) * w * a.x.dtype.itemsize)
            self.images = max(1, device.chunk_bytes // (max(h, 1) * row_bytes))
            count = -(-h // max(device.chunk_bytes // row_bytes, self.least_rows, self.reach))
            self.rows = -(-h // max(count, 1))
        self.fc1_weight = a.fc1_weight.flatten(1)
        self.dw_weight = a.dw_weight.contiguous()
        biases = (None if t is None else t.contiguous() for t in (a.fc1_bias, a.dw_bias, a.fc2_bias))
        self.fc1_bias, self.dw_bias, self.fc2_bias = biases
        self.decompose_weight = a.decompose_weight.flatten().contiguous()

    def __iter__(self) -> Iterator[Chunk]:
        n, _, h, _ = self.a.x.shape
        for begin in range(0, n, max(self.images, 1)):
            for row in range(0, h, max(self.rows, 1)):
                images = slice(begin, min(begin + self.images, n))
                yield Chunk(images, slice(row, min(row + self.rows, h)), h)

    def buffer(self, channels: int, reach: int = 0) -> Tensor:
        """For the hidden channels of a chunk with the rows around it."""
        n, _, h, w = self.a.x.shape
        shape = min(self.images, n), channels, min(self.rows + 2 * reach, h), w
        return allocate(shape, self.a.x, torch.channels_last)

    def operand(self, used: int) -> Tensor:
        """A buffer for an operand of PyTorch's products, which may read what lies between the rows of `used` channels
        and multiply it by zero: written zeros, or nothing."""
        t = self.buffer(self.pitch)
        if used < self.pitch:
            t[:, used:] = 0
        return t

    def hidden(self, t: Tensor) -> Tensor:
        return t[:, : self.fc2.hidden]

    def fc1(self, x: Tensor, f: Tensor) -> Tensor:
        """Writes fc1's output; returns it."""
        linear(x, self.fc1_weight, self.fc1_bias, self.hidden(f))
        return self.hidden(f)


class Parts(NamedTuple):
    """Where a chunk's share of the gradients goes."""

    product: Tensor | None
    dw: Tensor | None
    dw_bias: Tensor | None
    decompose: Tensor
    decompose_bias: Tensor | None
    fc1_bias: Tensor | None
