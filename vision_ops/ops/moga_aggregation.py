"""MogaNet's spatial aggregation, whole: four 1x1 convolutions around the decomposition, the multi-order depthwise
convolution and the gate."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import allocate, allocate_channels_last, empty
from ._checks import check_bool, check_parameter, check_pointwise, check_sigma, check_tensor
from ._devices import device_reasons, on_devices, without_autocast
from ._half_block import HalfBlock
from ._maps import channels_last_dense, product_dense
from ._parameters import Convert, convert, convert_cuda, converted
from ._pointwise import channel_sums, crew_pays, linear, linear_to, products, tf32_allowed, weight_gradient
from ._registration import FusedOp
from .dwconv import convolution_name, convolves_cuda
from .feature_decompose import Decomposition, cpu_decomposition, cuda_decomposition, flat, image_means
from .gated_recursion import cuda_gates
from .moga_gate import Gate, cpu_gate, cuda_gate
from .multi_order_dwconv import (
    check_branches,
    multi_order,
    multi_order_backward,
    multi_order_backward_cuda,
    multi_order_backward_torch,
    multi_order_cuda,
    multi_order_torch,
)


class _Arguments(NamedTuple):
    x: Tensor
    proj_1_weight: Tensor
    proj_1_bias: Tensor | None
    gate_weight: Tensor
    gate_bias: Tensor | None
    pw_weight: Tensor
    pw_bias: Tensor | None
    proj_2_weight: Tensor
    proj_2_bias: Tensor | None
    sigma: Tensor
    dw_weights: list[Tensor]
    dw_biases: list[Tensor | None]
    dilations: list[int]
    double_gate_act: bool


def _reference(a: _Arguments) -> Tensor:
    return reference.moga_aggregation(
        a.x,
        *(a.proj_1_weight, a.proj_1_bias, a.gate_weight, a.gate_bias, a.dw_weights, a.dw_biases),
        *(a.pw_weight, a.pw_bias, a.proj_2_weight, a.proj_2_bias, a.sigma),
        dilations=a.dilations,
        split=_widths(a),
        double_gate_act=a.double_gate_act,
    )


def _widths(a: _Arguments) -> tuple[int, int, int]:
    c, c1, c2 = (w.shape[0] for w in a.dw_weights)
    return c - c1 - c2, c1, c2


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, proj_1's output and that of the depthwise convolutions, and the means of the former. What lies between is
    elementwise or a product of C x C and is computed again: with x, 3C numbers a pixel are kept."""
    kept = allocate_channels_last(a.x.shape, a.x), allocate_channels_last(a.x.shape, a.x)
    wide = torch.promote_types(a.x.dtype, torch.float32)
    return empty(a.x.shape, a.x), *kept, allocate((*a.x.shape[:2], 1, 1), a.x, dtype=wide)


class _Device(NamedTuple):
    decomposition: Decomposition
    gate: Gate
    convert: Convert
    channel_sums: Callable[[Tensor, Tensor | None], None]
    multi_order: Callable[..., None]
    multi_order_backward: Callable[..., None]
    dense: Callable[[Tensor], Tensor]


def _cpu(x: Tensor) -> _Device:
    kernels = cpu_decomposition(), cpu_gate(), convert, channel_sums
    return _Device(*kernels, multi_order, multi_order_backward, product_dense)


def _cuda(x: Tensor) -> _Device:
    kernels = cuda_decomposition(), cuda_gate(), convert_cuda, cuda_gates().channel_sums
    if convolves_cuda(x):
        return _Device(*kernels, multi_order_cuda, multi_order_backward_cuda, channels_last_dense)
    return _Device(*kernels, multi_order_torch, multi_order_backward_torch, channels_last_dense)


def _means(device: _Device, x: Tensor, a: _Arguments, into: Tensor) -> None:
    """Of proj_1's output, from those of x."""
    means = image_means(device.decomposition, x)
    # What rounds the means does not round the pixels that they are taken from.
    exact = torch.float64 if _native.device_kind(x) != "cpu" and tf32_allowed() else means.dtype
    projected = into if into.dtype == exact else torch.empty_like(into, dtype=exact)
    bias = None if a.proj_1_bias is None else a.proj_1_bias.to(exact)
    linear(means.to(exact), a.proj_1_weight.flatten(1).to(exact), bias, projected)
    if projected is not into:
        into.copy_(projected)


_LINEARS = tuple(f"{name}_{part}" for name in ("proj_1", "gate", "pw", "proj_2") for part in ("weight", "bias"))


def _converted(device: _Device, a: _Arguments) -> _Arguments:
    """With the linear layers' parameters as products take them."""
    found = converted(device.convert, [getattr(a, name) for name in _LINEARS], a.x.dtype)
    return a._replace(**dict(zip(_LINEARS, found, strict=True)))


def _scratch(a: _Arguments) -> Tensor:
    return allocate_channels_last(a.x.shape, a.x)


# In between everything is channels_last, whatever x is.
@without_autocast
def _forward(on: Callable[[Tensor], _Device], a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, (y, p, dw, means) = on(a.x), _output(a)
    x = device.dense(a.x)
    _means(device, x, a, means)
    a = _converted(device, a)
    linear(x, a.proj_1_weight.flatten(1), a.proj_1_bias, p)
    u, gate, value = _scratch(a), _scratch(a), _scratch(a)
    device.decomposition.run(p, means, flat(a.sigma), "silu", u)
    linear(u, a.gate_weight.flatten(1), a.gate_bias, gate)
    device.multi_order(u, a.dw_weights, a.dw_biases, a.dilations, dw)
    linear(dw, a.pw_weight.flatten(1), a.pw_bias, value)
    device.gate.run(gate, value, a.double_gate_act, gate)
    linear_to(gate, a.proj_2_weight.flatten(1), a.proj_2_bias, y, plus=a.x)
    return y, p, dw, means


@without_autocast
def _backward(
    on: Callable[[Tensor], _Device],
    grads: list[Any],
    grad: Tensor,
    a: _Arguments,
    p: Tensor,
    dw: Tensor,
    means: Tensor,
) -> None:
    dx, dproj_1, dproj_1_bias, dgate, dgate_bias, dpw, dpw_bias, dproj_2, dproj_2_bias, dsigma, ddws, ddw_biases = grads
    device = on(a.x)
    a = _converted(device, a)
    x, given, sigma = device.dense(a.x), device.dense(grad), flat(a.sigma)
    u, gate, value, dgated = (_scratch(a) for _ in range(4))
    device.decomposition.run(p, means, sigma, "silu", u)
    linear(u, a.gate_weight.flatten(1), a.gate_bias, gate)
    linear(dw, a.pw_weight.flatten(1), a.pw_bias, value)
    device.channel_sums(given, dproj_2_bias)
    linear(given, a.proj_2_weight.flatten(1).t(), None, dgated)
    gated, sums = None if dproj_2 is None else _scratch(a), (dgate_bias, dpw_bias)
    device.gate.run_backward(dgated, gate, value, a.double_gate_act, gate, value, gated, sums)
    if gated is not None:
        weight_gradient(given, gated, dproj_2)
    weight_gradient(gate, u, dgate)
    weight_gradient(value, dw, dpw)
    ddw, du = dgated, _scratch(a) if gated is None else gated
    linear(value, a.pw_weight.flatten(1).t(), None, ddw)
    device.multi_order_backward(ddw, u, a.dw_weights, a.dw_biases, a.dilations, du, ddws, ddw_biases)
    linear(gate, a.gate_weight.flatten(1).t(), None, du, plus=du)
    dp = u
    device.decomposition.run_backward(du, p, means, sigma, "silu", dp, flat(dsigma), dproj_1_bias)
    weight_gradient(dp, x, dproj_1)
    if dx is not None:
        linear_to(dp, a.proj_1_weight.flatten(1).t(), None, dx, plus=grad)


_KERNELS = on_devices(_forward, _backward, cpu=_cpu, cuda=_cuda, crew=crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def _parts(a: _Arguments) -> dict[str, str]:
    gemms = {"1x1 convolutions": products(a.x)}
    if _native.device_kind(a.x) != "cuda":
        kernel = _native.kernel_name(_native.device_kind(a.x))
        return {"decomposition, depthwise convolutions and gate": kernel, **gemms}
    return {"depthwise convolutions": convolution_name(a.x), "decomposition and gate": "Triton kernels", **gemms}


_op = FusedOp(
    "moga_aggregation",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("sigma",),
    wide=(*_LINEARS, "dw_weights", "dw_biases"),
    saved=(channels_last_dense, channels_last_dense, Tensor.contiguous),
    parts=_parts,
)
_half = HalfBlock(_op, last=None, norm=False, maps=True)


def fused_moga_aggregation(
    x: Tensor,
    proj_1_weight: Tensor,
    proj_1_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    dw_weights: Sequence[Tensor],
    dw_biases: Sequence[Tensor | None] | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    proj_2_weight: Tensor,
    proj_2_bias: Tensor | None,
    sigma: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 3),
    split: Sequence[int] = (1, 3, 4),
    double_gate_act: bool = False,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """p = proj_1 x; u = SiLU(p + sigma * (p - mean(p over H, W))); y = proj_2(SiLU(gate u) * SiLU(v)) + x, where v is
    the pointwise convolution of the multi-order depthwise convolution of u.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format and
            dtype.
        proj_1_weight, gate_weight, pw_weight, proj_2_weight: (C, C) or (C, C, 1, 1).
        proj_1_bias, gate_bias, pw_bias, proj_2_bias: (C,) or None.
        dw_weights, dw_biases, dilations, split: as in `fused_multi_order_dwconv`.
        sigma: (C,) or (1, C, 1, 1); autocast leaves it as it is.
        double_gate_act: as in `fused_moga_gate`.
        gamma, residual, path_scale: of residual + path_scale * gamma * (the above), as in `fused_mlp`; residual is as
            x in its shape, and is given with the others.
        backend: as in `vision_ops.use_backend`.

    Parameters have the dtype of x, or float32 beside a half x. GEMMs are PyTorch's, but for those in float32 on CPUs
    with AVX2 or AVX-512. The mean of p is proj_1 of the mean of x. Backward keeps, besides the arguments, the outputs
    of proj_1 and of the depthwise convolutions, 3C numbers a pixel with x, where eager keeps 11C, and
    means. Gradients come in each argument's own dtype and are bitwise repeatable with the same number of threads. On
    GPUs where the CUDA kernels are missing, the depthwise convolutions are PyTorch's, whose gradients may not be
    repeatable. Without a kernel for the device, `reference.moga_aggregation` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MogaNet (arXiv 2211.03295), MultiOrderGatedAggregation in models/moganet.py of Westlake-AI/MogaNet.
    """
    check_tensor("x", x, "N, C, H, W")
    c = x.shape[1]
    pointwise = (
        ("proj_1", proj_1_weight, proj_1_bias),
        ("gate", gate_weight, gate_bias),
        ("pw", pw_weight, pw_bias),
        ("proj_2", proj_2_weight, proj_2_bias),
    )
    for name, weight, bias in pointwise:
        check_pointwise(f"{name}_weight", weight, (c, c), "C, C", x)
        if bias is not None:
            check_parameter(f"{name}_bias", bias, (c,), "C", x)
    dw_biases = (None, None, None) if dw_biases is None else dw_biases
    check_branches("dw_weights", dw_weights, "dw_biases", dw_biases, dilations, split, x)
    check_sigma(sigma, c, "C", x)
    check_bool("double_gate_act", double_gate_act)
    flat_given = [t for _, weight, bias in pointwise for t in (weight, bias)]
    given = x, *flat_given, sigma, list(dw_weights), list(dw_biases)
    tail: dict[str, Any] = {"gamma": gamma, "residual": residual, "path_scale": path_scale, "backend": backend}
    return _half(given, list(dilations), double_gate_act, **tail)
