"""MogaNet's channel aggregation, whole: two 1x1 convolutions around a depthwise one, GELU and the decomposition."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import allocate, empty
from ._checks import check_kernel, check_parameter, check_pointwise, check_sigma, check_tensor
from ._devices import device_reasons, on_devices, without_autocast
from ._half_block import HalfBlock
from ._maps import channels_last_dense, product_dense
from ._parameters import Convert, convert, convert_cuda, converted
from ._pointwise import channel_sums, crew_pays, linear, linear_to, multiplies_as_is, products, weight_gradient
from ._registration import FusedOp
from .dwconv import (
    convolution_name,
    convolve_backward_cuda,
    convolve_backward_torch,
    convolve_cuda,
    convolve_torch,
    convolves_cuda,
)
from .gated_recursion import cuda_gates

# Of a chunk of the batch in hidden channels: its tensors stay in a third-level cache between the passes, and large
# images take no more memory.
_CHUNK_BYTES = 8 * 2**20
_LINE_BYTES = 64  # of a cache


class _Arguments(NamedTuple):
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


def _reference(a: _Arguments) -> Tensor:
    return reference.channel_aggregation_ffn(*a[:-1])


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y; of every pixel the score, whose GELU is d; and fc1's output, or nothing of it. h is cheap to compute again."""
    n, _, h, w = a.x.shape
    pitch = _fc1_channels(a)
    shape, strides = (n if a.keep else 0, a.dw_weight.shape[0], h, w), (h * w * pitch, 1, w * pitch, pitch)
    kept = allocate(shape, a.x, strides=strides)
    return empty(a.x.shape, a.x), allocate((n, 1, h, w), a.x, dtype=_wide(a.x)), kept


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _hidden_channels(a: _Arguments) -> int:
    """Room for the hidden channels and for d behind them. Pixels are not a power of two apart, as hidden widths are:
    they would compete for the same sets of a cache."""
    return a.dw_weight.shape[0] + _LINE_BYTES // a.x.dtype.itemsize


def _fc1_channels(a: _Arguments) -> int:
    """No room on a GPU, whose GEMM adds the bias on its way only if its result has no gaps."""
    return a.dw_weight.shape[0] if _native.device_kind(a.x) == "cuda" else _hidden_channels(a)


class _Device(NamedTuple):
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


def _cpu(x: Tensor) -> _Device:
    kernels = _aggregate, _aggregate_backward, channel_sums, convert, _fold, _unfold, product_dense
    return _Device(*kernels, _CHUNK_BYTES, columns=1, spare=1)


def _cuda(x: Tensor) -> _Device:
    """Tensor cores take eight columns."""
    from ..kernels import channel_aggregation_ffn as triton

    compiled = convolves_cuda(x)
    convolve, backward = (
        (convolve_cuda, convolve_backward_cuda) if compiled else (convolve_torch, convolve_backward_torch)
    )
    sums = cuda_gates().channel_sums
    return _Device(
        functools.partial(_aggregate_cuda, convolve),
        functools.partial(_aggregate_backward_cuda, convolve, backward, sums),
        sums,
        convert_cuda,
        triton.fold,
        triton.unfold,
        channels_last_dense,
        None,
        columns=8,
        spare=0,
    )


def _fold(weight: Tensor, sigma: Tensor, end: int, matrix: Tensor, of_d: Tensor) -> None:
    """matrix (C, columns) = [weight (1 + sigma) | of_d up to the column end | 0], of_d = -weight sigma."""
    hidden, wide = weight.shape[1], sigma.to(of_d.dtype)
    torch.mv(weight.to(of_d.dtype), wide, out=of_d).neg_()
    torch.mul(weight, 1 + wide, out=matrix[:, :hidden])
    matrix[:, hidden:end] = of_d[:, None]
    matrix[:, end:] = 0


def _unfold(product: Tensor, weight: Tensor, sigma: Tensor, dweight: Tensor | None, dsigma: Tensor | None) -> None:
    """The gradients of weight and sigma from `product`, that of the matrix."""
    of_h, of_d = product[:, : weight.shape[1]], product[:, weight.shape[1] :].sum(1, keepdim=True)
    difference = of_h - of_d
    if dweight is not None:
        dweight.copy_(of_h.addcmul_(difference, sigma.to(product.dtype)))
    if dsigma is not None:
        dsigma.copy_(difference.mul_(weight).sum(0))


class _Fc2:
    """fc2 of h + sigma * (h - d), as one matrix for [h | d]: W2 (1 + sigma) and a column -(W2 sigma) for d.

    In half types d has a second column, for what the first one rounds off: d is one number for all channels of a pixel,
    whose rounding errors would add up.
    """

    def __init__(self, a: _Arguments, device: _Device) -> None:
        """The columns are filled up with zeros to a multiple that suits the device."""
        self.hidden = a.dw_weight.shape[0]
        self.weight, self.sigma = a.fc2_weight.flatten(1).contiguous(), a.sigma.flatten()
        self.end = self.hidden + (2 if a.x.dtype.itemsize == 2 else 1)
        self.columns = -(-self.end // device.columns) * device.columns
        self.of_d = allocate((len(self.weight),), a.x, dtype=_wide(a.x))
        self.matrix = allocate((len(self.weight), self.columns), a.x)
        self._unfold = device.unfold
        device.fold(self.weight, self.sigma, self.end, self.matrix, self.of_d)

    def gradient_of_d(self, grad: Tensor) -> Tensor:
        n, _, h, w = grad.shape
        of_d = allocate((n, 1, h, w), self.of_d)
        linear(grad.to(self.of_d.dtype), self.of_d[None], None, of_d)
        return of_d

    def gradients(self, product: Tensor, dweight: Tensor | None, dsigma: Tensor | None) -> None:
        """From the gradient of y times [h | d], summed over the pixels."""
        of_weight = None if dweight is None else dweight.flatten(1)
        self._unfold(product, self.weight, self.sigma, of_weight, None if dsigma is None else dsigma.view(-1))


class _Total:
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


class _Chunk(NamedTuple):
    """Whole images, or rows of one."""

    images: slice
    rows: slice
    height: int

    def of(self, t: Tensor) -> Tensor:
        return t[self.images, :, self.rows]

    def around(self, reach: int) -> "_Chunk":
        """With the rows that a convolution reads around it."""
        rows = slice(max(self.rows.start - reach, 0), min(self.rows.stop + reach, self.height))
        return self._replace(rows=rows)

    def first(self, t: Tensor) -> Tensor:
        """As much of a buffer."""
        return t[: self.images.stop - self.images.start, :, : self.rows.stop - self.rows.start]


def _converted(device: _Device, a: _Arguments) -> _Arguments:
    """With the parameters of fc1 and the bias of fc2 as products take them."""
    found = converted(device.convert, (a.fc1_weight, a.fc1_bias, a.fc2_bias), a.x.dtype)
    return a._replace(fc1_weight=found[0], fc1_bias=found[1], fc2_bias=found[2])


class _Chunks:
    """What is taken at once, and what all of it needs."""

    least_rows = 8  # of large images: fewer would mostly overlap

    def __init__(self, a: _Arguments, device: _Device) -> None:
        n, _, h, w = a.x.shape
        a = _converted(device, a)
        self.a, self.fc2 = a, _Fc2(a, device)
        # Tensor cores' columns are all that lies behind the channels on a GPU.
        self.pitch = _hidden_channels(a) if device.columns == 1 else self.fc2.columns
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

    def __iter__(self) -> Iterator[_Chunk]:
        n, _, h, _ = self.a.x.shape
        for begin in range(0, n, max(self.images, 1)):
            for row in range(0, h, max(self.rows, 1)):
                images = slice(begin, min(begin + self.images, n))
                yield _Chunk(images, slice(row, min(row + self.rows, h)), h)

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


class _Parts(NamedTuple):
    """Where a chunk's share of the gradients goes."""

    product: Tensor | None
    dw: Tensor | None
    dw_bias: Tensor | None
    decompose: Tensor
    decompose_bias: Tensor | None
    fc1_bias: Tensor | None


def _native_arguments(c: _Chunks, h: Tensor) -> tuple[list[Any], tuple[Any, ...]]:
    """The parameters; h, and d behind its channels."""
    parameters = c.dw_weight, c.dw_bias, c.decompose_weight, c.a.decompose_bias
    views = _native.view(c.hidden(h)), _native.view(h[:, c.fc2.hidden : c.fc2.end])
    return [_native.channels_view(t) for t in parameters], views


def _convolution(c: _Chunks, above: int) -> tuple[int, ...]:
    """That of rows whose input begins so many rows above them."""
    return 2 * c.reach + 1, 1, 1, c.reach - above, c.reach


def _aggregate(c: _Chunks, chunk: _Chunk, f: Tensor, h: Tensor, scores: Tensor) -> None:
    """scores = decompose h, h = GELU(dwconv f), with d behind its channels. f has the rows around the chunk."""
    parameters, views = _native_arguments(c, h)
    conv = _convolution(c, chunk.rows.start - chunk.around(c.reach).rows.start)
    _native.cpu_kernels().channel_aggregation(_native.view(f), *parameters, *views, _native.view(scores), conv)


def _aggregate_backward(
    c: _Chunks,
    chunk: _Chunk,
    f: Tensor,
    grad: Tensor,
    h: Tensor,
    dh: Tensor,
    spare: Tensor,
    scores: Tensor,
    parts: _Parts,
) -> Tensor:
    """Returns the gradient of f. Fills h, with d behind its channels, and the parts.

    dh, without d's share, has the rows around the chunk, f those around these; grad and scores are whole.
    """
    near = chunk.around(c.reach)
    dd = c.fc2.gradient_of_d(near.of(grad))
    (w, b, v, _), views = _native_arguments(c, h)
    given = map(_native.view, (near.of(scores), dd, dh))
    df = c.hidden(spare)
    sums = parts.dw, parts.dw_bias, parts.decompose, parts.decompose_bias, parts.fc1_bias
    grads = _native.view(df), *map(_native.channels_view, sums)
    conv = _convolution(c, near.rows.start - chunk.around(2 * c.reach).rows.start)
    geometry = chunk.rows.start - near.rows.start, conv
    _native.cpu_kernels().channel_aggregation_backward(_native.view(f), w, b, v, *given, *views, *grads, *geometry)
    weight_gradient(chunk.of(grad), h[:, : c.fc2.columns], parts.product)
    return df


def _aggregate_cuda(
    convolve: Callable[..., None], c: _Chunks, chunk: _Chunk, f: Tensor, h: Tensor, scores: Tensor
) -> None:
    from ..kernels import channel_aggregation_ffn as triton

    h, fc2, bias = c.hidden(h), c.fc2, c.a.decompose_bias
    convolve(f, c.dw_weight, c.dw_bias, h, "gelu")
    triton.scores(h, fc2.columns - fc2.hidden, c.decompose_weight, bias, scores)


def _aggregate_backward_cuda(
    convolve: Callable[..., None],
    convolve_backward: Callable[..., None],
    channel_sums: Callable[[Tensor, Tensor | None], None],
    c: _Chunks,
    chunk: _Chunk,
    f: Tensor,
    grad: Tensor,
    h: Tensor,
    dh: Tensor,
    spare: None,
    scores: Tensor,
    parts: _Parts,
) -> Tensor:
    from ..kernels import channel_aggregation_ffn as triton

    u, fc2, dscores = c.hidden(h), c.fc2, allocate(scores.shape, scores)
    triton.scores_backward(grad, fc2.of_d, scores, dscores)
    convolve(f, c.dw_weight, c.dw_bias, u)
    sums = parts.decompose, parts.decompose_bias
    triton.gelu_backward(u, dh, fc2.columns - fc2.hidden, c.decompose_weight, scores, dscores, *sums)
    weight_gradient(grad, h[:, : fc2.columns], parts.product)
    df = u
    convolve_backward(dh, f, c.dw_weight, df, parts.dw, parts.dw_bias)
    channel_sums(df, parts.fc1_bias)
    return df


def _whole(c: _Chunks, x: Tensor) -> tuple[list[Any], tuple[int, int]]:
    """The arguments of the kernels that take all chunks in one call."""
    vectors = c.fc1_bias, c.dw_weight, c.dw_bias, c.decompose_weight, c.a.decompose_bias, c.fc2_bias
    fc1_bias, *of_pixels, fc2_bias = map(_native.channels_view, vectors)
    fc1, fc2 = _native.matrix_view(c.fc1_weight), _native.matrix_view(c.fc2.matrix)
    return [_native.view(x), fc1, fc1_bias, *of_pixels, fc2, fc2_bias], (c.images, c.rows)


def _forward_whole(c: _Chunks, x: Tensor, y: Tensor, scores: Tensor, kept: Tensor) -> None:
    h = c.buffer(_hidden_channels(c.a))
    f = kept if c.a.keep else c.hidden(c.buffer(_fc1_channels(c.a), c.reach))
    _native.cpu_kernels().channel_aggregation_ffn(*_whole(c, x), *map(_native.view, (f, h, scores, y)))


def _backward_whole(c: _Chunks, x: Tensor, grad: Tensor, scores: Tensor, kept: Tensor, grads: list[Any]) -> None:
    dx, dfc1, dfc1_bias, ddw, ddw_bias, dfc2, _, ddecompose, ddecompose_bias, dsigma = grads
    a, channels = c.a, _fc1_channels(c.a)
    h, dh = c.buffer(_hidden_channels(a)), c.hidden(c.buffer(channels, c.reach))
    df = c.hidden(c.buffer(channels))
    f = kept if a.keep else c.hidden(c.buffer(channels, 2 * c.reach))
    product = allocate((x.shape[1], c.fc2.columns), x) if dfc2 is not None or dsigma is not None else None
    of_decompose = allocate((c.fc2.hidden,), x) if ddecompose is None else ddecompose.view(-1)
    vectors = [_native.channels_view(t) for t in (dfc1_bias, ddw, ddw_bias, of_decompose, ddecompose_bias)]
    matrices = [None if t is None else _native.matrix_view(t.flatten(1)) for t in (dfc1, product)]
    given, buffers = map(_native.view, (grad, scores, f)), [_native.view(t) for t in (h, dh, df)]
    totals = [matrices[0], *vectors, matrices[1]]
    _native.cpu_kernels().channel_aggregation_ffn_backward(
        *_whole(c, x), *given, a.keep, buffers, _native.view(dx), totals
    )
    if product is not None:
        c.fc2.gradients(product, dfc2, dsigma)


@without_autocast
def _forward(on: Callable[[Tensor], _Device], a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    device, (y, scores, kept) = on(a.x), _output(a)
    chunks, x = _Chunks(a, device), device.dense(a.x)
    if on is _cpu and multiplies_as_is(x):
        _forward_whole(chunks, x, y, scores, kept)
        return y, scores, kept
    fc2, reach = chunks.fc2, chunks.reach
    h_buffer = chunks.operand(fc2.columns)
    f_buffer = None if a.keep else chunks.buffer(_fc1_channels(a), reach)
    for chunk in chunks:
        near = chunk.around(reach)
        if f_buffer is None:
            above = 0 if chunk.rows.start == 0 else min(chunk.rows.start + reach, chunk.height)  # are there already
            new = near._replace(rows=slice(above, near.rows.stop))
            chunks.fc1(new.of(x), new.of(kept))
            f = near.of(kept)
        else:
            f = chunks.fc1(near.of(x), near.first(f_buffer))
        h = chunk.first(h_buffer)
        device.aggregate(chunks, chunk, f, h, chunk.of(scores))
        linear_to(h[:, : fc2.columns], fc2.matrix, chunks.fc2_bias, chunk.of(y))
    return y, scores, kept


@without_autocast
def _backward(
    on: Callable[[Tensor], _Device], grads: list[Any], grad: Tensor, a: _Arguments, scores: Tensor, kept: Tensor
) -> None:
    dx, dfc1, dfc1_bias, ddw, ddw_bias, dfc2, dfc2_bias, ddecompose, ddecompose_bias, dsigma = grads
    device = on(a.x)
    x, grad = device.dense(a.x), device.dense(grad)
    chunks = _Chunks(a, device)
    device.channel_sums(grad, dfc2_bias)
    if on is _cpu and multiplies_as_is(x):
        return _backward_whole(chunks, x, grad, scores, kept, grads)
    fc2, reach, c = chunks.fc2, chunks.reach, a.x.shape[1]

    def total(t: Tensor | None, *shape: int) -> _Total:
        return _Total(shape, a.x, t is not None, t if device.chunk_bytes is None else None)

    product = _Total((c, fc2.columns), a.x, dfc2 is not None or dsigma is not None)
    of_decompose = _Total((fc2.hidden,), a.x, True, ddecompose if device.chunk_bytes is None else None)
    of_decompose_bias = total(ddecompose_bias, 1)
    of_fc1, of_fc1_bias = total(dfc1, fc2.hidden, c), total(dfc1_bias, fc2.hidden)
    of_dw, of_dw_bias = total(ddw, *a.dw_weight.shape), total(ddw_bias, fc2.hidden)
    totals = product, of_decompose, of_decompose_bias, of_fc1, of_fc1_bias, of_dw, of_dw_bias
    h_buffer, dh_buffer = chunks.operand(fc2.columns), chunks.buffer(_fc1_channels(a), reach)
    spare_buffer = chunks.operand(fc2.hidden) if device.spare else None
    f_buffer = None if a.keep else chunks.buffer(_fc1_channels(a), 2 * reach)
    for chunk in chunks:
        near, far = chunk.around(reach), chunk.around(2 * reach)
        f = far.of(kept) if f_buffer is None else chunks.fc1(far.of(x), far.first(f_buffer))
        h, dh = chunk.first(h_buffer), chunks.hidden(near.first(dh_buffer))
        linear(near.of(grad), fc2.matrix[:, : fc2.hidden].t(), None, dh)
        parts = _Parts(*(t.part for t in (product, of_dw, of_dw_bias, of_decompose, of_decompose_bias, of_fc1_bias)))
        spare = None if spare_buffer is None else chunk.first(spare_buffer)
        df = device.aggregate_backward(chunks, chunk, f, grad, h, dh, spare, scores, parts)
        weight_gradient(df, chunk.of(x), of_fc1.part)
        if dx is not None:
            linear_to(df, chunks.fc1_weight.t(), None, chunk.of(dx))
        for t in totals:
            t.add()
    if product.part is not None:
        fc2.gradients(torch.zeros_like(product.part) if product.value is None else product.value, dfc2, dsigma)
    for t, given in zip(totals[1:], (ddecompose, ddecompose_bias, dfc1, dfc1_bias, ddw, ddw_bias), strict=True):
        t.write(given)


_KERNELS = on_devices(_forward, _backward, cpu=_cpu, cuda=_cuda, crew=crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def _parts(a: _Arguments) -> dict[str, str]:
    gemms = {"1x1 convolutions": products(a.x)}
    if _native.device_kind(a.x) != "cuda":
        return {"depthwise convolution, GELU and aggregation": _native.kernel_name(_native.device_kind(a.x)), **gemms}
    return {"depthwise convolution and GELU": convolution_name(a.x), "aggregation": "Triton kernels", **gemms}


_op = FusedOp(
    "channel_aggregation_ffn",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("sigma",),
    wide=_Arguments._fields[1:9],
    saved=(Tensor.contiguous, channels_last_dense),
    parts=_parts,
)
_half = HalfBlock(_op, last=("fc2_weight", "fc2_bias"), norm=False, maps=True)


def fused_channel_aggregation_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    decompose_weight: Tensor,
    decompose_bias: Tensor | None,
    sigma: Tensor,
    *,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """h = GELU(dwconv(fc1 x)); d = GELU(decompose h), one number a pixel; y = fc2(h + sigma * (h - d)).

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format and
            dtype.
        fc1_weight, fc1_bias: (h, C) or (h, C, 1, 1), and (h,) or None.
        dw_weight, dw_bias: (h, 1, K, K), K odd, 3 in the published networks, and (h,) or None.
        fc2_weight, fc2_bias: (C, h) or (C, h, 1, 1), and (C,) or None.
        decompose_weight, decompose_bias: (1, h) or (1, h, 1, 1), and (1,) or None.
        sigma: (h,) or (1, h, 1, 1); autocast leaves it as it is.
        gamma, residual, path_scale: of residual + path_scale * gamma * (the above), as in `fused_mlp`; residual is as
            x in its shape, and is given with the others.
        backend: as in `vision_ops.use_backend`.

    Parameters have the dtype of x, or float32 beside a half x. GELU is the erf form. GEMMs are PyTorch's, but for those
    in float32 on CPUs with AVX2 or AVX-512. That of fc2 has the decomposition folded in. Backward keeps, besides the
    arguments, one tensor of the hidden width h, where eager keeps five, and computes the rest again; without gradients
    nothing of that width outlives the call, on CPUs not even a chunk of the batch. Gradients come in each argument's
    own dtype and are bitwise repeatable with the same number of threads. On GPUs where the CUDA kernels are missing,
    the depthwise convolution is PyTorch's, whose gradients may not be repeatable. Without a kernel for the device,
    `reference.channel_aggregation_ffn` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MogaNet (arXiv 2211.03295), ChannelAggregationFFN in models/moganet.py of Westlake-AI/MogaNet.
    """
    check_tensor("x", x, "N, C, H, W")
    c = x.shape[1]
    check_pointwise("fc1_weight", fc1_weight, (None, c), "h, C", x)
    hidden = fc1_weight.shape[0]
    kernel_size = check_kernel("dw_weight", dw_weight)
    check_parameter("dw_weight", dw_weight, (hidden, 1, kernel_size, kernel_size), "h, 1, K, K", x)
    check_pointwise("fc2_weight", fc2_weight, (c, hidden), "C, h", x)
    check_pointwise("decompose_weight", decompose_weight, (1, hidden), "1, h", x)
    for name, bias, width, why in (
        ("fc1_bias", fc1_bias, hidden, "h"),
        ("dw_bias", dw_bias, hidden, "h"),
        ("fc2_bias", fc2_bias, c, "C"),
        ("decompose_bias", decompose_bias, 1, "1"),
    ):
        if bias is not None:
            check_parameter(name, bias, (width,), why, x)
    check_sigma(sigma, hidden, "h", x)
    given = x, fc1_weight, fc1_bias, dw_weight, dw_bias, fc2_weight, fc2_bias, decompose_weight, decompose_bias, sigma
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    tail: dict[str, Any] = {"gamma": gamma, "residual": residual, "path_scale": path_scale, "backend": backend}
    return _half(given, keep, **tail)
