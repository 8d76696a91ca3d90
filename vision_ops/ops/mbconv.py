"""MOAT's MBConv, whole: an inverted bottleneck of three batch norms, squeeze and excitation, and its shortcut."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from . import _mbconv, _mbconv_backward
from ._batch_norm import track
from ._checks import (
    check_bool,
    check_eps,
    check_integer,
    check_momentum,
    check_parameter,
    check_path_scale,
    check_pointwise,
    check_sequence,
    check_tensor,
)
from ._devices import device_reasons, on_devices
from ._maps import channels_last_dense
from ._mbconv import Arguments
from ._pointwise import crew_pays, products
from ._registration import FusedOp
from .batch_norm_act import check_count, check_running
from .dwconv import convolution_name


def _reference(a: Arguments) -> Tensor:
    norms = [(*norm, None, None)[:4] for norm in a.norms()]
    return reference.mbconv(
        *(a.x, norms[0], a.expand_weight, norms[1], a.dw_weight, norms[2], a.shrink_weight, a.shrink_bias),
        se=a.se,
        shortcut=None if a.shortcut_weight is None else (a.shortcut_weight, a.shortcut_bias),
        path_scale=a.path_scale,
        stride=a.stride,
        pool_size=a.pool_size,
        training=a.measures(),
        eps=a.eps,
    )


_KERNELS = on_devices(_mbconv.forward, _mbconv_backward.backward, cpu=_mbconv.cpu, cuda=_mbconv.cuda, crew=crew_pays)


def _predicate(a: Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.x, _KERNELS, triton=True), []


def _parts(a: Arguments) -> dict[str, str]:
    gemms = {"1x1 convolutions": products(a.x)}
    if a.x.device.type != "cuda":
        return {"norms and depthwise convolution": _native.kernel_name(a.x.device.type), **gemms}
    return {"depthwise convolution": convolution_name(a.x), "norms": "Triton kernels", **gemms}


_op = FusedOp(
    "mbconv",
    Arguments,
    output=_mbconv.output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    constants=("path_scale",),
    uncast=("x", "pre_norm", "expand_norm", "depthwise_norm", "path_scale"),
    wide=("dw_weight", "se", "shrink_weight", "shrink_bias", "shortcut_weight", "shortcut_bias"),
    saved=(channels_last_dense, channels_last_dense, *(Tensor.contiguous,) * 4),
    parts=_parts,
)


def fused_mbconv(
    x: Tensor,
    pre_norm: Sequence[Tensor | None],
    expand_weight: Tensor,
    expand_norm: Sequence[Tensor | None],
    dw_weight: Tensor,
    depthwise_norm: Sequence[Tensor | None],
    shrink_weight: Tensor,
    shrink_bias: Tensor | None = None,
    *,
    se: Sequence[Tensor | None] | None = None,
    shortcut: Sequence[Tensor | None] | None = None,
    path_scale: Tensor | None = None,
    stride: int = 1,
    pool_size: int = 2,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
    backend: str | None = None,
) -> Tensor:
    """shortcut(x) + path_scale * shrink(se(GELU(BN(dw(GELU(BN(expand(BN(x)))))))), with 1x1, 3x3 and 1x1 convolutions.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output (N, O, H', W') has its memory
            format, and rows and columns H / stride, rounded up.
        pre_norm, expand_norm, depthwise_norm: (weight, bias, running_mean, running_var), each (C,) or (E,), as those of
            `fused_batch_norm_act`: in training the running ones move in place, and may be None.
        expand_weight: (E, C) or (E, C, 1, 1), in the dtype of x, or float32 beside a half x, as all that follow.
        dw_weight: (E, 1, 3, 3).
        shrink_weight, shrink_bias: (O, E) or (O, E, 1, 1); (O,), or None.
        se: (reduce_weight, reduce_bias, expand_weight, expand_bias) of squeeze and excitation, h * sigmoid(expand(
            SiLU(reduce(mean(h))))): (S, E), (S,), (E, S), (E,), biases perhaps None; None without.
        shortcut: (weight, bias) of the shortcut's 1x1 convolution, (O, C) and (O,); None where O is C.
        path_scale: (N,), of each sample's residual, a constant: what stochastic depth draws.
        stride: 1 or 2. At 2 padding is TensorFlow's "SAME", and the shortcut begins with an average pool.
        pool_size: of that pool, 2 or 3.
        training, momentum, eps: as those of `fused_batch_norm_act`, for all three norms.
        backend: as in `vision_ops.use_backend`.

    One node of autograd: with gradients it keeps x and the inputs of expand_norm and depthwise_norm; without them some
    images are taken at a time. pre_norm is part of expand_weight in float32 and float64, where x is the larger; the
    other norms are part of the passes of GELU. Under autocast x and the norms stay as they are. Sums are float32
    (float64 for float64). Without a kernel for the device, `reference.mbconv` runs.

    Raises:
        TypeError, ValueError: an argument is not as above, or a batch has one value per channel in training.

    MOAT (arXiv 2210.01820), model/layers/moat_blocks.py of google-research/deeplab2.
    """
    check_tensor("x", x, "N, C, H, W")
    check_integer("stride", stride, 1, 2)
    check_integer("pool_size", pool_size, 2, 3)
    check_momentum(momentum)
    check_eps(eps)
    check_bool("training", training)
    channels = x.shape[1]
    check_pointwise("expand_weight", expand_weight, (None, channels), "E, C", x)
    hidden = expand_weight.shape[0]
    check_parameter("dw_weight", dw_weight, (hidden, 1, 3, 3), "E, 1, 3, 3", x)
    check_pointwise("shrink_weight", shrink_weight, (None, hidden), "O, E", x)
    outputs = shrink_weight.shape[0]
    if shrink_bias is not None:
        check_parameter("shrink_bias", shrink_bias, (outputs,), "O", x)
    for name, norm, size in (
        ("pre_norm", pre_norm, channels),
        ("expand_norm", expand_norm, hidden),
        ("depthwise_norm", depthwise_norm, hidden),
    ):
        _check_norm(name, norm, size, x, training)
    _check_se(se, hidden, x)
    if shortcut is not None:
        check_sequence("shortcut", shortcut, 2)
        check_pointwise("shortcut[0]", shortcut[0], (outputs, channels), "O, C", x)
        if shortcut[1] is not None:
            check_parameter("shortcut[1]", shortcut[1], (outputs,), "O", x)
    elif outputs != channels:
        raise ValueError(f"shrink_weight must have the {channels} rows of x's channels without shortcut, got {outputs}")
    check_path_scale(path_scale, x)
    norms: list[list[Any]] = [list(norm) for norm in (pre_norm, expand_norm, depthwise_norm)]
    given = [t for norm in norms for t in norm[:2]] + [x, expand_weight, dw_weight, shrink_weight, shrink_bias]
    given += [*(se or ()), *(shortcut or ())]
    keep = training or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given))
    if training:
        check_count(x, stride)
    own = (None, None) if shortcut is None else shortcut
    used = [norm[:2] if training else [t.detach() if i > 1 else t for i, t in enumerate(norm)] for norm in norms]
    ordered = x, used[0], expand_weight, used[1], dw_weight, used[2], list(se or ()), shrink_weight, shrink_bias, *own
    options: dict[str, Any] = {"stride": stride, "pool_size": pool_size, "eps": float(eps)}

    def in_pytorch() -> Tensor:
        weights = expand_weight, norms[1], dw_weight, norms[2], shrink_weight, shrink_bias
        constants: dict[str, Any] = {"path_scale": path_scale, "training": True, "momentum": momentum, **options}
        return reference.mbconv(x, norms[0], *weights, se=se, shortcut=shortcut, **constants)

    y, *saved = _op.with_saved(
        *ordered, path_scale, *options.values(), keep, backend=backend, reference=in_pytorch if training else None
    )
    if training and saved:
        pixels = x.shape[0] * x.shape[2] * x.shape[3], saved[1].shape[0] * saved[1].shape[2] * saved[1].shape[3]
        track([t for norm in norms for t in norm[2:]], saved[2:5], (pixels[0], *pixels), momentum)
    return y


def _check_norm(name: str, norm: Any, size: int, x: Tensor, training: bool) -> None:
    check_sequence(name, norm, 4)
    for i, of in enumerate(("weight", "bias")):
        check_parameter(f"{name}[{i}] ({of})", norm[i], (size,), str(size), x)
    check_running((f"{name}[2] (running_mean)", f"{name}[3] (running_var)"), norm[2:], norm[0], training)


def _check_se(se: Any, hidden: int, x: Tensor) -> None:
    if se is None:
        return
    check_sequence("se", se, 4)
    check_pointwise("se[0]", se[0], (None, hidden), "S, E", x)
    check_pointwise("se[2]", se[2], (hidden, se[0].shape[0]), "E, S", x)
    for i, size in ((1, se[0].shape[0]), (3, hidden)):
        if se[i] is not None:
            check_parameter(f"se[{i}]", se[i], (size,), "SE"[i // 2], x)
