"""MogaNet's channel aggregation, whole: two 1x1 convolutions around a depthwise one, GELU and the decomposition."""

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from . import _channel_aggregation_passes as passes
from ._channel_aggregation import Arguments, output
from ._checks import check_kernel, check_parameter, check_pointwise, check_sigma, check_tensor
from ._devices import device_reasons, on_devices
from ._half_block import HalfBlock
from ._maps import channels_last_dense
from ._pointwise import crew_pays, products
from ._registration import FusedOp
from .dwconv import convolution_name


def _reference(a: Arguments) -> Tensor:
    return reference.channel_aggregation_ffn(*a[:-1])


_KERNELS = on_devices(passes.forward, passes.backward, cpu=passes.cpu, cuda=passes.cuda, crew=crew_pays)


def _predicate(a: Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def _parts(a: Arguments) -> dict[str, str]:
    gemms = {"1x1 convolutions": products(a.x)}
    if _native.device_kind(a.x) != "cuda":
        return {"depthwise convolution, GELU and aggregation": _native.kernel_name(_native.device_kind(a.x)), **gemms}
    return {"depthwise convolution and GELU": convolution_name(a.x), "aggregation": "Triton kernels", **gemms}


_op = FusedOp(
    "channel_aggregation_ffn",
    Arguments,
    output=output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("sigma",),
    wide=Arguments._fields[1:9],
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
