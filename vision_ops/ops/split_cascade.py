"""The cascade of depthwise convolutions in EdgeNeXt's split depthwise transpose attention."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.split_cascade import cascade_widths
from ._allocation import allocate_channels_last, channels_dense, empty, to_channels_dense
from ._checks import check_parameter, check_sequence, check_tensor
from ._devices import device_reasons
from ._registration import FusedOp
from .dwconv import convolve_backward_cuda, convolve_cuda


class _Arguments(NamedTuple):
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]


def _reference(a: _Arguments) -> Tensor:
    return reference.split_cascade(a.x, a.weights, a.biases)


def _output(a: _Arguments) -> Tensor:
    return empty(a.x.shape, a.x)


class _Parameters:
    """Weights and biases as the binding takes them; keeps the tensors alive."""

    def __init__(self, a: _Arguments) -> None:
        self._weights = [w.contiguous() for w in a.weights]
        self._biases = [None if b is None else b.contiguous() for b in a.biases]
        self.views = list(map(_native.channels_view, self._weights)), list(map(_native.channels_view, self._biases))


_CONV = (3, 1, 1, 1, 1)


def _forward_cpu(a: _Arguments) -> Tensor:
    y, p = _output(a), _Parameters(a)
    _native.cpu_kernels().split_cascade(_native.view(a.x), *p.views, _native.view(y), _CONV)
    return y


def _backward_cpu(grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    p = _Parameters(a)
    dx, dweights, dbiases = grads
    outputs = _native.view(dx), list(map(_native.channels_view, dweights)), list(map(_native.channels_view, dbiases))
    _native.cpu_kernels().split_cascade_backward(_native.view(grad), _native.view(a.x), *p.views, *outputs, _CONV)


# On a GPU the depthwise engine runs level by level, on channels_last tensors and channel slices of them.
def _splits(t: Tensor, a: _Arguments) -> list[Tensor]:
    width, levels = a.weights[0].shape[0], len(a.weights)
    return list(t.split_with_sizes([width] * levels + [t.shape[1] - levels * width], dim=1))


def _convolved(t: Tensor, a: _Arguments, level: int, y: Tensor) -> None:
    bias = a.biases[level]
    convolve_cuda(t, a.weights[level].contiguous(), None if bias is None else bias.contiguous(), y)


def _sum(s: Tensor, t: Tensor) -> Tensor:
    return torch.add(s, t, out=allocate_channels_last(s.shape, s))


def _forward_cuda(a: _Arguments) -> Tensor:
    y, x = _output(a), to_channels_dense(a.x)
    out = y if channels_dense(y) else allocate_channels_last(y.shape, y)
    *s, last = _splits(x, a)
    *outs, out_last = _splits(out, a)
    for i, split in enumerate(s):
        _convolved(split if i == 0 else _sum(split, outs[i - 1]), a, i, outs[i])
    out_last.copy_(last)
    return y if out is y else y.copy_(out)


def _backward_cuda(grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    dx, dweights, dbiases = grads
    out = dx if dx is not None and channels_dense(dx) else allocate_channels_last(grad.shape, grad)
    s, outs, dy = (_splits(t, a) for t in (to_channels_dense(a.x), out, to_channels_dense(grad)))
    inputs = s[:1]
    for i in range(1, len(a.weights)):
        y = allocate_channels_last(s[i].shape, out)
        _convolved(inputs[-1], a, i - 1, y)
        inputs.append(_sum(s[i], y))
    for i in reversed(range(len(a.weights))):
        du = dy[i] if i == len(a.weights) - 1 else _sum(dy[i], outs[i + 1])
        convolve_backward_cuda(du, inputs[i], a.weights[i].contiguous(), outs[i], dweights[i], dbiases[i])
    if dx is not None:
        outs[-1].copy_(dy[-1])
    if dx is not None and out is not dx:
        dx.copy_(out)


_KERNELS = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS), []


def _parts(a: _Arguments) -> dict[str, str]:
    kernel = _native.kernel_name(_native.device_kind(a.x))
    if _native.device_kind(a.x) == "cuda":
        return {"depthwise convolutions": f"{kernel}, level by level", "sums": "PyTorch"}
    return {"split_cascade": kernel}


_op = FusedOp(
    "split_cascade",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    wide=("weights", "biases"),
    parts=_parts,
)


def fused_split_cascade(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """s_0, ..., s_n = splits of the channels of x; y_0 = dw_0(s_0), y_i = dw_i(y_{i-1} + s_i); cat(y_0, ..., y_{n-1},
    s_n), without the sums in memory.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format and
            dtype.
        weights: n of (c, 1, 3, 3), n >= 1, in the dtype of x, or float32 beside a half x. With n + 1 splits c is
            ceil(C / (n + 1)), and n * c must be below C: the last split has what is left.
        biases: n of (c,); each or all may be None.
        backend: as in `vision_ops.use_backend`.

    Every convolution keeps the size; what it adds up is zero outside of the image. Sums are float32 (float64 for
    float64), and on CPUs no y_i is rounded before the next level. Backward keeps the arguments only and computes every
    y_i again; gradients are bitwise repeatable and come in each argument's own dtype. Without a kernel for the device,
    `reference.split_cascade` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    EdgeNeXt (arXiv 2206.10589), SDTAEncoder in models/sdta_encoder.py of mmaaz60/EdgeNeXt.
    """
    check_tensor("x", x, "N, C, H, W")
    check_sequence("weights", weights)
    biases = [None] * len(weights) if biases is None else biases
    check_sequence("biases", biases, len(weights))
    if len(weights) == 0:
        raise ValueError("weights must be a sequence of at least 1, got 0: with one split there is no cascade")
    width = check_cascade(x.shape[1], len(weights) + 1, "weights")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_parameter(f"weights[{i}]", weight, (width, 1, 3, 3), "c, 1, 3, 3", x)
        if bias is not None:
            check_parameter(f"biases[{i}]", bias, (width,), "c", x)
    return _op(x, list(weights), list(biases), backend=backend)


def check_cascade(channels: int, scales: int, name: str) -> int:
    """The channels of every split but the last. Refuses, for the argument `name`, what the official class refuses."""
    width, *_, last = cascade_widths(channels, scales)
    if last <= 0:
        raise ValueError(
            f"{name} must leave channels for the last split, (scales - 1) * ceil(C / scales) < C: {scales - 1} splits "
            f"of {width} use up all {channels}"
        )
    return width
