"""What the passes of MogaNet's channel aggregation run on CPUs and GPUs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._allocation import allocate, workspace
from ._channel_aggregation import Arguments, Chunk, Chunks, Device, Parts, Total, output
from ._devices import without_autocast
from ._maps import channels_last_dense, product_dense
from ._parameters import convert, convert_cuda
from ._pointwise import channel_sums, linear, linear_to, multiplies_as_is, weight_gradient
from .dwconv import convolve_backward_cuda, convolve_backward_torch, convolve_cuda, convolve_torch, convolves_cuda
from .gated_recursion import cuda_gates

# Of a chunk of the batch in hidden channels: its tensors stay in a third-level cache between the passes, and large
# images take no more memory.
_CHUNK_BYTES = 8 * 2**20


@without_autocast
def forward(on: Callable[[Tensor], Device], a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    device, (y, scores, kept) = on(a.x), output(a)
    chunks, x = Chunks(a, device), device.dense(a.x)
    if on is cpu and multiplies_as_is(x):
        _forward_whole(chunks, x, y, scores, kept)
        return y, scores, kept
    fc2, reach = chunks.fc2, chunks.reach
    h_buffer = chunks.operand(fc2.columns)
    f_buffer = None if a.keep else chunks.buffer(chunks.fc1_pitch, reach)
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
def backward(
    on: Callable[[Tensor], Device], grads: list[Any], grad: Tensor, a: Arguments, scores: Tensor, kept: Tensor
) -> None:
    dx, dfc1, dfc1_bias, ddw, ddw_bias, dfc2, dfc2_bias, ddecompose, ddecompose_bias, dsigma = grads
    device = on(a.x)
    x, grad = device.dense(a.x), device.dense(grad)
    chunks = Chunks(a, device)
    device.channel_sums(grad, dfc2_bias)
    if on is cpu and multiplies_as_is(x):
        return _backward_whole(chunks, x, grad, scores, kept, grads)
    fc2, reach, c = chunks.fc2, chunks.reach, a.x.shape[1]

    def total(t: Tensor | None, *shape: int) -> Total:
        return Total(shape, a.x, t is not None, t if device.chunk_bytes is None else None)

    product = Total((c, fc2.columns), a.x, dfc2 is not None or dsigma is not None)
    of_decompose = Total((fc2.hidden,), a.x, True, ddecompose if device.chunk_bytes is None else None)
    of_decompose_bias = total(ddecompose_bias, 1)
    of_fc1, of_fc1_bias = total(dfc1, fc2.hidden, c), total(dfc1_bias, fc2.hidden)
    of_dw, of_dw_bias = total(ddw, *a.dw_weight.shape), total(ddw_bias, fc2.hidden)
    totals = product, of_decompose, of_decompose_bias, of_fc1, of_fc1_bias, of_dw, of_dw_bias
    h_buffer, dh_buffer = chunks.operand(fc2.columns), chunks.buffer(chunks.fc1_pitch, reach)
    spare_buffer = chunks.operand(fc2.hidden) if device.spare else None
    f_buffer = None if a.keep else chunks.buffer(chunks.fc1_pitch, 2 * reach)
    for chunk in chunks:
        near, far = chunk.around(reach), chunk.around(2 * reach)
        f = far.of(kept) if f_buffer is None else chunks.fc1(far.of(x), far.first(f_buffer))
        h, dh = chunk.first(h_buffer), chunks.hidden(near.first(dh_buffer))
        linear(near.of(grad), fc2.matrix[:, : fc2.hidden].t(), None, dh)
        parts = Parts(*(t.part for t in (product, of_dw, of_dw_bias, of_decompose, of_decompose_bias, of_fc1_bias)))
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


def cpu(x: Tensor) -> Device:
    kernels = _aggregate, _aggregate_backward, channel_sums, convert, _fold, _unfold, product_dense
    return Device(*kernels, _CHUNK_BYTES, columns=1, spare=1)


def cuda(x: Tensor) -> Device:
    """Tensor cores take eight columns."""
    from ..kernels import channel_aggregation_ffn as triton

    compiled = convolves_cuda(x)
    convolve, backward = (
        (convolve_cuda, convolve_backward_cuda) if compiled else (convolve_torch, convolve_backward_torch)
    )
    sums = cuda_gates().channel_sums
    return Device(
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


def _native_arguments(c: Chunks, h: Tensor) -> tuple[list[Any], tuple[Any, ...]]:
    """The parameters; h, and d behind its channels."""
    parameters = c.dw_weight, c.dw_bias, c.decompose_weight, c.a.decompose_bias
    views = _native.view(c.hidden(h)), _native.view(h[:, c.fc2.hidden : c.fc2.end])
    return [_native.channels_view(t) for t in parameters], views


def _convolution(c: Chunks, above: int) -> tuple[int, ...]:
    """That of rows whose input begins so many rows above them."""
    return 2 * c.reach + 1, 1, 1, c.reach - above, c.reach


def _aggregate(c: Chunks, chunk: Chunk, f: Tensor, h: Tensor, scores: Tensor) -> None:
    """scores = decompose h, h = GELU(dwconv f), with d behind its channels. f has the rows around the chunk."""
    parameters, views = _native_arguments(c, h)
    conv = _convolution(c, chunk.rows.start - chunk.around(c.reach).rows.start)
    _native.cpu_kernels().channel_aggregation(_native.view(f), *parameters, *views, _native.view(scores), conv)


def _aggregate_backward(
    c: Chunks,
    chunk: Chunk,
    f: Tensor,
    grad: Tensor,
    h: Tensor,
    dh: Tensor,
    spare: Tensor,
    scores: Tensor,
    parts: Parts,
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


def _marches(c: Chunks, f: Tensor) -> bool:
    """Whether the CUDA kernels take the convolution with all that is done at its pixels; else its kernel or PyTorch's
    and Triton's take turns."""
    kernel_size = c.dw_weight.shape[-1]
    return convolves_cuda(f) and _native.cuda_kernels().has_aggregation_kernel(_native.view(f), kernel_size)


def _cuda_arguments(c: Chunks, f: Tensor) -> list[Any]:
    parameters = c.dw_weight, c.dw_bias, c.decompose_weight
    return [_native.view(f), *map(_native.channels_view, parameters)]


def _aggregate_cuda(
    convolve: Callable[..., None], c: Chunks, chunk: Chunk, f: Tensor, h: Tensor, scores: Tensor
) -> None:
    from ..kernels import channel_aggregation_ffn as triton

    u, d, bias = c.hidden(h), c.fc2.columns_of_d(h), c.a.decompose_bias
    if not _marches(c, f):
        convolve(f, c.dw_weight, c.dw_bias, u, "gelu")
        return triton.scores(u, d, c.decompose_weight, bias, scores)
    kernels = _native.cuda_kernels()
    room = workspace(kernels.channel_aggregation_workspace(_native.view(f)), scores)
    given = *_cuda_arguments(c, f), _native.channels_view(bias)
    views = map(_native.view, (u, d, scores))
    kernels.channel_aggregation(*given, *views, room.data_ptr(), *_native.target(f))


def _aggregate_backward_cuda(
    convolve: Callable[..., None],
    convolve_backward: Callable[..., None],
    channel_sums: Callable[[Tensor, Tensor | None], None],
    c: Chunks,
    chunk: Chunk,
    f: Tensor,
    grad: Tensor,
    h: Tensor,
    dh: Tensor,
    spare: None,
    scores: Tensor,
    parts: Parts,
) -> Tensor:
    """df is where h was."""
    from ..kernels import channel_aggregation_ffn as triton

    df = u = c.hidden(h)
    dscores, columns = allocate(scores.shape, scores), c.fc2.columns
    triton.scores_backward(grad, c.fc2.of_d, scores, dscores, c.fc2.columns_of_d(h))
    if _marches(c, f):
        sums = _march_backward(c, f, u, dh, dscores)
        weight_gradient(grad, h[:, :columns], parts.product)
        _march_backward_input(c, f, dh, df, sums, parts)
        return df
    convolve(f, c.dw_weight, c.dw_bias, u)
    triton.gelu_backward(u, dh, c.decompose_weight, dscores, parts.decompose, parts.decompose_bias)
    weight_gradient(grad, h[:, :columns], parts.product)
    convolve_backward(dh, f, c.dw_weight, df, parts.dw, parts.dw_bias)
    channel_sums(df, parts.fc1_bias)
    return df


def _march_backward(c: Chunks, f: Tensor, h: Tensor, dh: Tensor, dscores: Tensor) -> Tensor:
    """Computes h, makes of dh the gradient of the convolution's output, and begins sums over the pixels."""
    kernels = _native.cuda_kernels()
    sums = workspace(kernels.channel_aggregation_backward_workspace(_native.view(f)), dscores)
    views = map(_native.view, (dscores, h, dh))
    kernels.channel_aggregation_backward(*_cuda_arguments(c, f), *views, sums.data_ptr(), *_native.target(f))
    return sums


def _march_backward_input(c: Chunks, f: Tensor, du: Tensor, df: Tensor, sums: Tensor, parts: Parts) -> None:
    from ..kernels.sums import sum_parts

    views = _native.view(du), _native.view(f), _native.channels_view(c.dw_weight), _native.view(df)
    _native.cuda_kernels().channel_aggregation_backward_input(*views, sums.data_ptr(), *_native.target(f))
    hidden, taps = c.fc2.hidden, c.dw_weight.numel()
    outs = parts.dw, parts.dw_bias, parts.fc1_bias, parts.decompose, parts.decompose_bias
    lengths = taps, hidden, hidden, hidden, 1
    sum_parts(sums.view(1, -1, sum(lengths)), outs, lengths)


def _whole(c: Chunks, x: Tensor) -> tuple[list[Any], tuple[int, int]]:
    """The arguments of the kernels that take all chunks in one call."""
    vectors = c.fc1_bias, c.dw_weight, c.dw_bias, c.decompose_weight, c.a.decompose_bias, c.fc2_bias
    fc1_bias, *of_pixels, fc2_bias = map(_native.channels_view, vectors)
    fc1, fc2 = _native.matrix_view(c.fc1_weight), _native.matrix_view(c.fc2.matrix)
    return [_native.view(x), fc1, fc1_bias, *of_pixels, fc2, fc2_bias], (c.images, c.rows)


def _forward_whole(c: Chunks, x: Tensor, y: Tensor, scores: Tensor, kept: Tensor) -> None:
    h = c.buffer(c.pitch)
    f = kept if c.a.keep else c.hidden(c.buffer(c.fc1_pitch, c.reach))
    _native.cpu_kernels().channel_aggregation_ffn(*_whole(c, x), *map(_native.view, (f, h, scores, y)))


def _backward_whole(c: Chunks, x: Tensor, grad: Tensor, scores: Tensor, kept: Tensor, grads: list[Any]) -> None:
    dx, dfc1, dfc1_bias, ddw, ddw_bias, dfc2, _, ddecompose, ddecompose_bias, dsigma = grads
    keep, pitch = c.a.keep, c.fc1_pitch
    h, dh = c.buffer(c.pitch), c.hidden(c.buffer(pitch, c.reach))
    df = c.hidden(c.buffer(pitch))
    f = kept if keep else c.hidden(c.buffer(pitch, 2 * c.reach))
    product = allocate((x.shape[1], c.fc2.columns), x) if dfc2 is not None or dsigma is not None else None
    of_decompose = allocate((c.fc2.hidden,), x) if ddecompose is None else ddecompose.view(-1)
    vectors = [_native.channels_view(t) for t in (dfc1_bias, ddw, ddw_bias, of_decompose, ddecompose_bias)]
    matrices = [None if t is None else _native.matrix_view(t.flatten(1)) for t in (dfc1, product)]
    given, buffers = map(_native.view, (grad, scores, f)), [_native.view(t) for t in (h, dh, df)]
    totals = [matrices[0], *vectors, matrices[1]]
    _native.cpu_kernels().channel_aggregation_ffn_backward(
        *_whole(c, x), *given, keep, buffers, _native.view(dx), totals
    )
    if product is not None:
        c.fc2.gradients(product, dfc2, dsigma)
