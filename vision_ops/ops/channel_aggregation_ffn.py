"""MogaNet's channel aggregation, whole: two 1x1 convolutions around a depthwise one, GELU and the decomposition."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, reference
from ..dispatch import Explanation, explainers
from ._checks import check_kernel, check_parameter, check_pointwise, check_sigma, check_tensor
from ._pointwise import linear, linear_to, products, weight_gradient
from ._registration import FusedOp, allocate, device_reasons, empty, without_autocast
from .dwconv import (
    convolution_name,
    convolve_backward,
    convolve_backward_cuda,
    convolve_backward_torch,
    convolve_cuda,
    convolve_torch,
    convolves_cuda,
)
from .gated_recursion import channel_sums, cuda_gates, pixel_dense

# Of a chunk of the batch in hidden channels: its three tensors stay in a third-level cache between the passes.
_CHUNK_BYTES, _WHOLE_BATCH = 6 * 2**20, 2**62
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
    kept = allocate((n if a.keep else 0, _fc1_channels(a), h, w), a.x, torch.channels_last)
    return empty(a.x.shape, a.x), allocate((n, 1, h, w), a.x, dtype=_wide(a.x)), kept


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _hidden_channels(a: _Arguments) -> int:
    """Room for the hidden channels and for d behind them. Pixels are not a power of two apart, as hidden widths are:
    they would compete for the same sets of a cache."""
    return a.dw_weight.shape[0] + _LINE_BYTES // a.x.dtype.itemsize


def _fc1_channels(a: _Arguments) -> int:
    """No room on a GPU, whose GEMM adds the bias on its way only if its result has no gaps."""
    return a.dw_weight.shape[0] if a.x.device.type == "cuda" else _hidden_channels(a)


class _Device(NamedTuple):
    """The kernels of a device, and what suits it."""

    aggregate: Callable[..., None]
    aggregate_backward: Callable[..., Tensor]
    convolve_backward: Callable[..., None]
    channel_sums: Callable[[Tensor, Tensor | None], None]
    chunk_bytes: int
    columns: int  # fc2's matrix has a multiple of so many


def _cpu(x: Tensor) -> _Device:
    return _Device(_aggregate, _aggregate_backward, convolve_backward, channel_sums, _CHUNK_BYTES, columns=1)


def _cuda(x: Tensor) -> _Device:
    """The whole batch at once; tensor cores take eight columns."""
    compiled = convolves_cuda(x)
    convolve, backward = (
        (convolve_cuda, convolve_backward_cuda) if compiled else (convolve_torch, convolve_backward_torch)
    )
    kernels = functools.partial(_aggregate_cuda, convolve), functools.partial(_aggregate_backward_cuda, convolve)
    return _Device(*kernels, backward, cuda_gates().channel_sums, _WHOLE_BATCH, columns=8)


class _Fc2:
    """fc2 of h + sigma * (h - d), as one matrix for [h | d]: W2 (1 + sigma) and a column -(W2 sigma) for d.

    In half types d has a second column, for what the first one rounds off: d is one number for all channels of a pixel,
    whose rounding errors would add up.
    """

    def __init__(self, a: _Arguments, multiple: int) -> None:
        """multiple: of which the columns are, filled up with zeros."""
        wide, hidden = _wide(a.x), a.dw_weight.shape[0]
        self.weight, self.sigma = a.fc2_weight.flatten(1), a.sigma.flatten().to(wide)
        self.hidden, self.end = hidden, hidden + (2 if a.x.dtype.itemsize == 2 else 1)
        self.columns = -(-self.end // multiple) * multiple
        self.of_d = (self.weight.to(wide) @ self.sigma).neg_()
        self.matrix = allocate((len(self.weight), self.columns), a.x)
        torch.mul(self.weight, 1 + self.sigma, out=self.matrix[:, :hidden])
        self.matrix[:, hidden : self.end] = self.of_d[:, None]
        self.matrix[:, self.end :] = 0

    def append(self, scores: Tensor, h: Tensor) -> None:
        """Writes d behind the channels of h."""
        d = F.gelu(scores)
        column = h[:, self.hidden : self.hidden + 1]
        column.copy_(d)
        for k in range(self.hidden + 1, self.end):
            h[:, k : k + 1].copy_(d.sub_(column))

    def gradient_of_d(self, grad: Tensor) -> Tensor:
        n, _, h, w = grad.shape
        return (grad.flatten(2).transpose(1, 2).to(self.of_d.dtype) @ self.of_d).view(n, 1, h, w)

    def gradients(self, product: Tensor, dweight: Tensor | None, dsigma: Tensor | None) -> None:
        """From the gradient of y times [h | d], summed over the pixels."""
        of_h, of_d = product[:, : self.hidden], product[:, self.hidden :].sum(1, keepdim=True)
        difference = of_h - of_d
        if dweight is not None:
            dweight.flatten(1).copy_(of_h.addcmul_(difference, self.sigma))
        if dsigma is not None:
            dsigma.view(-1).copy_(difference.mul_(self.weight).sum(0))


class _Total:
    """A gradient that is summed over the chunks, in float32 at least; one that is not needed has no part."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, needed: bool = True) -> None:
        self.value: Tensor | None = None
        self.part = allocate(shape, like, dtype=_wide(like)) if needed else None

    def add(self) -> None:
        if self.part is not None and self.value is None:
            self.value, self.part = self.part, torch.empty_like(self.part)
        elif self.part is not None:
            self.value += self.part

    def write(self, grad: Tensor | None) -> None:
        if grad is None:
            return
        if self.value is None:  # of an empty batch
            grad.zero_()
        else:
            grad.view(self.value.shape).copy_(self.value)


class _Chunks:
    """The images that are taken at once, and tensors of hidden channels for them."""

    def __init__(self, a: _Arguments, device: _Device, tensors: int) -> None:
        n, _, h, w = a.x.shape
        self.a, self.fc2 = a, _Fc2(a, device.columns)
        channels = _hidden_channels(a)
        self.images = max(1, min(n, device.chunk_bytes // (channels * h * w * a.x.dtype.itemsize)))
        widths = channels, *[_fc1_channels(a)] * (tensors - 1)
        self.tensors = [allocate((self.images, width, h, w), a.x, torch.channels_last) for width in widths]
        self.dw_weight = a.dw_weight.contiguous()
        self.dw_bias = None if a.dw_bias is None else a.dw_bias.contiguous()
        self.decompose_weight = a.decompose_weight.flatten().contiguous()

    def __iter__(self) -> Iterator[tuple[slice, list[Tensor]]]:
        n = len(self.a.x)
        for begin in range(0, n, self.images):
            count = min(self.images, n - begin)
            yield slice(begin, begin + count), [t[:count] for t in self.tensors]

    def hidden(self, t: Tensor) -> Tensor:
        return t[:, : self.fc2.hidden]

    def fc1(self, x: Tensor, f: Tensor) -> Tensor:
        """Writes fc1's output; returns it."""
        linear(x, self.a.fc1_weight.flatten(1), self.a.fc1_bias, self.hidden(f))
        return self.hidden(f)


def _native_arguments(c: _Chunks) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    size = c.dw_weight.shape[-1]
    parameters = c.dw_weight, c.dw_bias, c.decompose_weight
    return tuple(map(_native.weight_view, parameters)), (size, 1, 1, size // 2, size // 2)


def _aggregate(c: _Chunks, f: Tensor, h: Tensor, scores: Tensor) -> None:
    """scores = decompose h, h = GELU(dwconv f), with d behind its channels."""
    parameters, conv = _native_arguments(c)
    views = _native.view(c.hidden(h)), _native.view(scores)
    _native.kernels().channel_aggregation(_native.view(f), *parameters, *views, conv)
    if c.a.decompose_bias is not None:
        scores += c.a.decompose_bias
    c.fc2.append(scores, h)


def _aggregate_backward(
    c: _Chunks, f: Tensor, grad: Tensor, h: Tensor, dh: Tensor, scores: Tensor, dweight: Tensor
) -> Tensor:
    """Returns the gradient of the scores. h is as above once more, dh becomes the gradient of dwconv's result, dweight
    that of decompose."""
    dscores = torch.ops.aten.gelu_backward(c.fc2.gradient_of_d(grad), scores)
    parameters, conv = _native_arguments(c)
    views = map(_native.view, (dscores, dh, c.hidden(h)))
    sums = _native.weight_view(dweight)
    _native.kernels().channel_aggregation_backward(_native.view(f), *parameters, *views, sums, conv)
    c.fc2.append(scores, h)
    return dscores


def _aggregate_cuda(convolve: Callable[..., None], c: _Chunks, f: Tensor, h: Tensor, scores: Tensor) -> None:
    from ..kernels import channel_aggregation_ffn as triton

    h, fc2, bias = c.hidden(h), c.fc2, c.a.decompose_bias
    convolve(f, c.dw_weight, c.dw_bias, h, "gelu")
    triton.scores(h, fc2.columns - fc2.hidden, c.decompose_weight, bias, scores)


def _aggregate_backward_cuda(
    convolve: Callable[..., None],
    c: _Chunks,
    f: Tensor,
    grad: Tensor,
    h: Tensor,
    dh: Tensor,
    scores: Tensor,
    dweight: Tensor,
) -> Tensor:
    from ..kernels import channel_aggregation_ffn as triton

    h, fc2, dscores = c.hidden(h), c.fc2, allocate(scores.shape, scores)
    triton.scores_backward(grad, fc2.of_d, scores, dscores)
    convolve(f, c.dw_weight, c.dw_bias, h)
    triton.gelu_backward(h, dh, fc2.columns - fc2.hidden, c.decompose_weight, scores, dscores, dweight)
    return dscores


@without_autocast
def _forward(on: Callable[[Tensor], _Device], a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    device, (y, scores, kept) = on(a.x), _output(a)
    chunks, x = _Chunks(a, device, 1 if a.keep else 2), pixel_dense(a.x, torch.channels_last)
    fc2 = chunks.fc2
    kept[:, fc2.hidden :] = 0  # a result of the op, if only for its backward pass
    for part, (h, *rest) in chunks:
        f = chunks.fc1(x[part], kept[part] if a.keep else rest[0])
        device.aggregate(chunks, f, h, scores[part])
        linear_to(h[:, : fc2.columns], fc2.matrix, a.fc2_bias, y[part])
    return y, scores, kept


@without_autocast
def _backward(
    on: Callable[[Tensor], _Device], grads: list[Any], grad: Tensor, a: _Arguments, scores: Tensor, kept: Tensor
) -> None:
    dx, dfc1, dfc1_bias, ddw, ddw_bias, dfc2, dfc2_bias, ddecompose, ddecompose_bias, dsigma = grads
    device, x, grad = on(a.x), *(pixel_dense(t, torch.channels_last) for t in (a.x, grad))
    chunks = _Chunks(a, device, 2 if a.keep else 3)
    fc2, c = chunks.fc2, a.x.shape[1]

    def total(t: Tensor | None, *shape: int) -> _Total:
        return _Total(shape, a.x, t is not None)

    product = _Total((c, fc2.columns), a.x, dfc2 is not None or dsigma is not None)
    of_decompose = _Total((fc2.hidden,), a.x)
    of_decompose_bias, of_fc2_bias = total(ddecompose_bias, 1), total(dfc2_bias, c)
    of_fc1, of_fc1_bias = total(dfc1, fc2.hidden, c), total(dfc1_bias, fc2.hidden)
    of_dw, of_dw_bias = total(ddw, *a.dw_weight.shape), total(ddw_bias, fc2.hidden)
    totals = product, of_decompose, of_decompose_bias, of_fc2_bias, of_fc1, of_fc1_bias, of_dw, of_dw_bias
    for part, (h, dh, *rest) in chunks:
        f, g = chunks.hidden(kept[part]) if a.keep else chunks.fc1(x[part], rest[0]), grad[part]
        du = chunks.hidden(dh)
        linear(g, fc2.matrix[:, : fc2.hidden].t(), None, du)
        ds = device.aggregate_backward(chunks, f, g, h, du, scores[part], of_decompose.part)
        device.channel_sums(ds, of_decompose_bias.part)
        device.channel_sums(g, of_fc2_bias.part)
        weight_gradient(g, h[:, : fc2.columns], product.part)
        df = chunks.hidden(h)
        device.convolve_backward(du, f, chunks.dw_weight, df, of_dw.part, of_dw_bias.part)
        device.channel_sums(df, of_fc1_bias.part)
        weight_gradient(df, x[part], of_fc1.part)
        if dx is not None:
            linear_to(df, a.fc1_weight.flatten(1).t(), None, dx[part])
        for t in totals:
            t.add()
    if product.part is not None:
        fc2.gradients(torch.zeros_like(product.part) if product.value is None else product.value, dfc2, dsigma)
    for t, given in zip(
        totals[1:], (ddecompose, ddecompose_bias, dfc2_bias, dfc1, dfc1_bias, ddw, ddw_bias), strict=True
    ):
        t.write(given)


_KERNELS = {
    key: (functools.partial(_forward, device), functools.partial(_backward, device))
    for key, device in (("CPU", _cpu), ("CUDA", _cuda))
}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def _parts(a: _Arguments) -> dict[str, str]:
    gemms = {"1x1 convolutions": products(a.x)}
    if a.x.device.type != "cuda":
        return {"depthwise convolution, GELU and aggregation": _native.kernel_name(a.x.device.type), **gemms}
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
    saved=2,
    parts=_parts,
)


def _explain(x: Tensor, *parameters: Tensor | None, backend: str | None = None) -> Explanation:
    check_tensor("x", x, "N, C, H, W")
    return _op.explain(x, *(*parameters, *[None] * 9)[:9], False, backend=backend)


explainers["channel_aggregation_ffn"] = _explain


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
        backend: as in `vision_ops.use_backend`.

    Parameters have the dtype of x, or float32 beside a half x. GELU is the erf form. GEMMs are PyTorch's, but for those
    in float32 on CPUs with AVX2 or AVX-512, of which only the gradients of weights are. That of fc2 has the
    decomposition folded in. Backward keeps, besides the arguments, one tensor of the hidden width h, where eager keeps
    five, and computes the rest again; without gradients nothing of that width outlives the call, on CPUs not even a
    chunk of the batch. Gradients come in each argument's own dtype and are bitwise repeatable with the same number of
    threads. On GPUs where the CUDA kernels are missing, the depthwise convolution is PyTorch's, whose gradients may not
    be repeatable. Without a kernel for the device, `reference.channel_aggregation_ffn` runs.

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
    return _op(*given, keep, backend=backend)
