"""HorNet's recursive gated convolution, whole: two 1x1 convolutions around a depthwise one and the gated recursion."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import reference
from ._allocation import allocate, allocate_channels_last, empty
from ._checks import check_kernel, check_parameter, check_pointwise, check_sequence, check_tensor
from ._devices import device_reasons, on_devices, without_autocast
from ._half_block import HalfBlock
from ._maps import channels_last_dense, product_dense
from ._parameters import Convert, convert, convert_cuda, converted
from ._pointwise import crew_pays, linear, operand, weight_gradient
from ._registration import FusedOp
from .dwconv import (
    convolution_name,
    convolve,
    convolve_backward,
    convolve_backward_cuda,
    convolve_backward_torch,
    convolve_cuda,
    convolve_torch,
    convolves_cuda,
)
from .gated_recursion import (
    Gates,
    backward_chain,
    check_chain,
    cpu_gates,
    cuda_gates,
    gate_parts,
    run_chain,
)


class _Arguments(NamedTuple):
    x: Tensor
    proj_in_weight: Tensor
    proj_in_bias: Tensor | None
    dw_weight: Tensor
    dw_bias: Tensor | None
    proj_out_weight: Tensor
    proj_out_bias: Tensor | None
    pw_weights: list[Tensor]
    pw_biases: list[Tensor | None]
    scale: float


def _reference(a: _Arguments) -> Tensor:
    parameters = a.proj_in_weight, a.proj_in_bias, a.dw_weight, a.dw_bias, a.pw_weights, a.pw_biases
    return reference.gnconv(a.x, *parameters, a.proj_out_weight, a.proj_out_bias, scale=a.scale)


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y; and for the backward pass proj_in's output [pwa | abc] and the scaled convolution of abc."""
    n, c, h, w = a.x.shape
    projected = allocate_channels_last((n, 2 * c, h, w), a.x)
    return empty(a.x.shape, a.x), projected, allocate_channels_last((n, a.dw_weight.shape[0], h, w), a.x)


class _Device(NamedTuple):
    gates: Gates
    convert: Convert
    convolve: Callable[..., None]
    convolve_backward: Callable[..., None]  # with the scale that the weight has
    dense: Callable[[Tensor], Tensor]


def _cpu(x: Tensor) -> _Device:
    return _Device(cpu_gates(), convert, convolve, functools.partial(_then_scaled, convolve_backward), product_dense)


def _cuda(x: Tensor) -> _Device:
    if convolves_cuda(x):
        return _Device(cuda_gates(), convert_cuda, convolve_cuda, convolve_backward_cuda, channels_last_dense)
    backward = functools.partial(_then_scaled, convolve_backward_torch)
    return _Device(cuda_gates(), convert_cuda, convolve_torch, backward, channels_last_dense)


def _then_scaled(
    backward: Callable[..., None],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    scale: float,
) -> None:
    sums = (
        None if dweight is None else allocate(weight.shape, weight),
        None if dbias is None else allocate(dbias.shape, weight),
    )
    backward(grad, x, weight, dx, *sums)
    for given, total in zip((dweight, dbias), sums, strict=True):
        if given is not None and total is not None:
            given.copy_(total.mul_(scale))


def _converted(device: _Device, a: _Arguments, backward: bool) -> _Arguments:
    """As products and kernels take the parameters, the depthwise convolution's with `scale` in them; without the biases
    that the backward pass does not need."""
    biases = (None, None, None) if backward else (a.proj_in_bias, a.proj_out_bias, a.dw_bias)
    given = a.proj_in_weight, a.proj_out_weight, *biases[:2], *a.pw_weights
    found = converted(device.convert, given, a.x.dtype, (a.dw_weight, biases[2]), a.scale)
    proj_in, proj_out, proj_in_bias, proj_out_bias, *pw_weights, dw_weight, dw_bias = found
    return a._replace(
        proj_in_weight=proj_in,
        proj_in_bias=proj_in_bias,
        proj_out_weight=proj_out,
        proj_out_bias=proj_out_bias,
        pw_weights=pw_weights,
        dw_weight=dw_weight.contiguous(),
        dw_bias=None if dw_bias is None else dw_bias.contiguous(),
    )


# In between everything is channels_last, whatever x is: the GEMMs at either end change the layout on their way.
@without_autocast
def _forward(on: Callable[[Tensor], _Device], a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    device, (y, projected, dw) = on(a.x), _output(a)
    a = _converted(device, a, backward=False)
    linear(operand(a.x), a.proj_in_weight.flatten(1), a.proj_in_bias, projected)
    pwa, abc = _split(projected, a)
    device.convolve(abc, a.dw_weight, a.dw_bias, dw)
    p = allocate_channels_last(a.x.shape, a.x)
    run_chain(device.gates, pwa, dw, a.pw_weights, a.pw_biases, p)
    linear(p, a.proj_out_weight.flatten(1), a.proj_out_bias, y)
    return y, projected, dw


@without_autocast
def _backward(
    on: Callable[[Tensor], _Device], grads: list[Any], grad: Tensor, a: _Arguments, projected: Tensor, dw: Tensor
) -> None:
    device = on(a.x)
    gates, a = device.gates, _converted(device, a, backward=True)
    dx, dproj_in, dproj_in_bias, ddw_weight, ddw_bias, dproj_out, dproj_out_bias, dpws, dpw_biases = grads
    pwa, abc = _split(projected, a)
    grad = device.dense(grad)
    gates.channel_sums(grad, dproj_out_bias)
    dp = allocate_channels_last(a.x.shape, a.x)
    linear(grad, a.proj_out_weight.flatten(1).t(), None, dp)

    dprojected, ddw = allocate_channels_last(projected.shape, a.x), allocate_channels_last(dw.shape, a.x)
    dpwa, dabc = _split(dprojected, a)
    sums = (None, None) if dproj_in_bias is None else dproj_in_bias.split_with_sizes([pwa.shape[1], abc.shape[1]])
    use_last = None if dproj_out is None else lambda p: weight_gradient(grad, p, dproj_out)
    of_chain = dpwa, ddw, dpws, dpw_biases
    backward_chain(gates, pwa, dw, a.pw_weights, a.pw_biases, dp, of_chain, sums[0], use_last)
    device.convolve_backward(ddw, abc, a.dw_weight, dabc, ddw_weight, ddw_bias, scale=a.scale)
    gates.channel_sums(dabc, sums[1])
    weight_gradient(dprojected, device.dense(a.x), dproj_in)
    if dx is not None:
        linear(dprojected, a.proj_in_weight.flatten(1).t(), None, dx)


def _split(projected: Tensor, a: _Arguments) -> tuple[Tensor, Tensor]:
    total = a.dw_weight.shape[0]
    return projected[:, : projected.shape[1] - total], projected[:, projected.shape[1] - total :]


_KERNELS = on_devices(_forward, _backward, cpu=_cpu, cuda=_cuda, crew=crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def _parts(a: _Arguments) -> dict[str, str]:
    widths = [a.x.shape[1] >> k for k in reversed(range(len(a.pw_weights) + 1))]
    return {"depthwise convolution": convolution_name(a.x), **gate_parts(a.x, widths)}


_op = FusedOp(
    "gnconv",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    wide=_Arguments._fields[1:9],
    saved=(channels_last_dense, channels_last_dense),
    parts=_parts,
)
_half = HalfBlock(_op, last=("proj_out_weight", "proj_out_bias"), norm=True, maps=True)


def fused_gnconv(
    x: Tensor,
    proj_in_weight: Tensor,
    proj_in_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weights: Sequence[Tensor],
    pw_biases: Sequence[Tensor | None] | None,
    proj_out_weight: Tensor,
    proj_out_bias: Tensor | None,
    *,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """[p_0, a] = proj_in x; q = scale * dwconv(a); p_1 = p_0 * q_0; p_{k+1} = (pw_k p_k + b_k) * q_k; y = proj_out p_n.

    The order n is len(pw_weights) + 1; p_k has C / 2^(n - k) channels and q all of them, D together.

    Args:
        x: (N, C, H, W), any strides, C a multiple of 2^(n - 1); float32, bfloat16, float16 or float64. The output has
            its shape, memory format and dtype.
        proj_in_weight, proj_in_bias: (2C, C) or (2C, C, 1, 1), and (2C,) or None.
        dw_weight, dw_bias: (D, 1, K, K), K odd, 7 in the published networks, and (D,) or None.
        pw_weights, pw_biases: n - 1 of each, (2d, d) or (2d, d, 1, 1), and (2d,); each or all biases may be None.
        proj_out_weight, proj_out_bias: (C, C) or (C, C, 1, 1), and (C,) or None.
        scale: of the depthwise convolution; 1/3 in the published networks.
        norm_weight, norm_bias, eps: of a layer norm over C in front, (C,) each, both or none.
        gamma, residual, path_scale: of residual + path_scale * gamma * (the above), as in `fused_mlp`; residual is as
            x in its shape, and is given with the others.
        backend: as in `vision_ops.use_backend`.

    Parameters have the dtype of x, or float32 beside a half x. GEMMs are PyTorch's, but for those in float32 on CPUs
    with AVX2 or AVX-512. Backward keeps, besides the arguments, the outputs of proj_in and of the depthwise
    convolution, 5C numbers a pixel with x, and computes the recursion again. Gradients come in each argument's own
    dtype and are bitwise repeatable with the same number of threads. On GPUs where the CUDA kernels are missing, the
    depthwise convolution is PyTorch's, whose gradients may not be repeatable. Without a kernel for the device,
    `reference.gnconv` runs. The variant with a global filter is composed in `nn.GnConv`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    HorNet (arXiv 2207.14284), gnconv in hornet.py of raoyongming/HorNet.
    """
    check_tensor("x", x, "N, C, H, W")
    check_sequence("pw_weights", pw_weights)
    c, order = x.shape[1], len(pw_weights) + 1
    if c % 2 ** (order - 1):
        raise ValueError(f"x must have a multiple of 2^(order - 1) = {2 ** (order - 1)} channels, got {c}")
    widths = [c >> k for k in reversed(range(order))]
    check_pointwise("proj_in_weight", proj_in_weight, (2 * c, c), "2C, C", x)
    if proj_in_bias is not None:
        check_parameter("proj_in_bias", proj_in_bias, (2 * c,), "2C", x)
    kernel_size = check_kernel("dw_weight", dw_weight)
    total = sum(widths)
    check_parameter("dw_weight", dw_weight, (total, 1, kernel_size, kernel_size), "D, 1, K, K", x)
    if dw_bias is not None:
        check_parameter("dw_bias", dw_bias, (total,), "D", x)
    for k, weight in enumerate(pw_weights):
        check_pointwise(
            f"pw_weights[{k}]", weight, (widths[k + 1], widths[k]), f"C/{c // widths[k + 1]}, C/{c // widths[k]}", x
        )
    weights, biases = check_chain(widths[0], pw_weights, pw_biases, "x", x)
    check_pointwise("proj_out_weight", proj_out_weight, (c, c), "C, C", x)
    if proj_out_bias is not None:
        check_parameter("proj_out_bias", proj_out_bias, (c,), "C", x)
    given = x, proj_in_weight, proj_in_bias, dw_weight, dw_bias, proj_out_weight, proj_out_bias, weights, biases
    tail: dict[str, Any] = {"gamma": gamma, "residual": residual, "path_scale": path_scale, "backend": backend}
    norm: dict[str, Any] = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    return _half(given, float(scale), **norm, **tail)
