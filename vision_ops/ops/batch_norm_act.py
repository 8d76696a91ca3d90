"""Batch norm with the activation behind it, in the blocks of MOAT, MogaNet and bn_hs EdgeNeXt."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.dwconv import ACTIVATIONS
from ._allocation import allocate, empty, memory_format
from ._batch_norm import (
    BatchNorm,
    Coefficients,
    Ends,
    cpu_batch_norm,
    cuda_batch_norm,
    empty_table,
    prepare,
    track,
)
from ._checks import check_bool, check_eps, check_momentum, check_parameter, check_tensor
from ._devices import device_reasons, on_devices
from ._maps import pixel_dense
from ._registration import FusedOp


class _Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor | None  # None: of the batch
    variance: Tensor | None
    eps: float
    activation: str | None


def _reference(a: _Arguments) -> Tensor:
    options: dict[str, Any] = {"eps": a.eps, "activation": a.activation}
    return reference.batch_norm_act(a.x, a.weight, a.bias, a.mean, a.variance, training=a.mean is None, **options)


def _output(a: _Arguments) -> tuple[Tensor, Tensor]:
    """y, and the table of the norm."""
    return empty(a.x.shape, a.x), empty_table(a.x, a.x.shape[1])


def _forward(on: Callable[[], BatchNorm], a: _Arguments) -> tuple[Tensor, Tensor]:
    device, (y, table) = on(), _output(a)
    x = pixel_dense(a.x, memory_format(a.x))
    prepare(device, x, a[1:3] if a.mean is None else a[1:5], table, a.eps)
    device.run(x, Coefficients(table), a.activation, y)
    return y, table


def _backward(on: Callable[[], BatchNorm], grads: list[Any], grad: Tensor, a: _Arguments, table: Tensor) -> None:
    dx, dweight, dbias, *_ = grads
    device, wanted = on(), memory_format(a.x)
    x, grad, c = pixel_dense(a.x, wanted), pixel_dense(grad, wanted), Coefficients(table)
    line = allocate((2, x.shape[1]), table) if a.mean is None and dx is not None else None
    ends = Ends(line, dweight, dbias, x.numel() // x.shape[1])
    if ends.wanted():
        device.backward_sums(grad, x, c, a.activation, ends)
    if dx is None:
        return
    found = dx if pixel_dense(dx, wanted) is dx else empty(x.shape, x)
    device.backward_input(grad, x, c, a.activation, line, found)
    if found is not dx:
        dx.copy_(found)


_KERNELS = on_devices(_forward, _backward, cpu=cpu_batch_norm, cuda=cuda_batch_norm)


def _torch_is_faster(a: _Arguments) -> bool:
    """PyTorch's own norm has less around it, and is as fast alone but for planes in training (measured, AVX-512)."""
    x = a.x
    if x.device.type != "cpu":
        return False
    planes, trains = memory_format(x) == torch.contiguous_format, a.mean is None
    if x.dtype == torch.float64 or (a.activation is None and not (planes and trains)):
        return True
    if torch.compiler.is_compiling():  # a graph must not depend on the size
        return False
    if planes:
        return x.shape[2] * x.shape[3] < 100 or x.numel() < 100_000
    return x.numel() < (300_000 if trains else 150_000)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS, triton=True)
    if cannot or not _torch_is_faster(a):
        return cannot, []
    return cannot, ["PyTorch's batch norm is faster for few elements and, but for planes in training, alone"]


_op = FusedOp(
    "batch_norm_act",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    autocast=False,
    saved=(Tensor.contiguous,),
    constants=("mean", "variance"),
)


def fused_batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """act((x - mean) / sqrt(variance + eps) * weight + bias), mean and variance of every channel.

    Args:
        x: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its memory format and dtype,
            under autocast too.
        weight, bias: (C,), in the dtype of x, or float32 beside a half x.
        running_mean, running_var: (C,), in the dtype of weight; None for no running statistics, then training is True.
        training: whether the statistics are those of the batch, with the biased variance. The running ones then move
            towards them, in place, by `momentum`, with the unbiased variance; else they are used, as constants. The
            recomputation of a non-reentrant torch.utils.checkpoint moves them again, as those of PyTorch's norm, but
            for the last op in it, at which it ends; `set_checkpoint_early_stop(False)` makes it go on.
        momentum: from 0 to 1.
        eps: 0 or more; 1e-3 in MOAT, 1e-5 in MogaNet and EdgeNeXt.
        activation: None, "gelu" (the erf form) or "silu".
        backend: as in `vision_ops.use_backend`.

    Statistics are float32 (float64 for float64), those of some pixels at a time about their own mean, merged. Gradients
    are bitwise repeatable and come in each argument's own dtype; backward keeps the arguments and five numbers of every
    channel. Without a kernel for the device, `reference.batch_norm_act` runs; so it does on CPUs where PyTorch's own is
    faster: for small tensors and float64, and without activation but for contiguous ones in training (`explain` tells).
    Statistics over several processes are SyncBatchNorm's, which is left to PyTorch.

    Raises:
        TypeError, ValueError: an argument is not as above, or a batch has one value per channel in training.

    Batch normalization (arXiv 1502.03167), torch.nn.BatchNorm2d.
    """
    check_tensor("x", x, "N, C, H, W")
    channels = x.shape[1]
    check_parameter("weight", weight, (channels,), "C", x)
    check_parameter("bias", bias, (channels,), "C", x)
    check_bool("training", training)
    check_running(("running_mean", "running_var"), (running_mean, running_var), weight, training)
    check_momentum(momentum)
    check_eps(eps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if not training:
        return _op(x, weight, bias, running_mean, running_var, float(eps), activation, backend=backend)
    check_count(x)
    options: dict[str, Any] = {"momentum": float(momentum), "eps": float(eps), "activation": activation}

    def in_pytorch() -> Tensor:
        return reference.batch_norm_act(x, weight, bias, running_mean, running_var, training=True, **options)

    y, *tables = _op.with_saved(
        x, weight, bias, None, None, float(eps), activation, backend=backend, reference=in_pytorch
    )
    if tables:
        track((running_mean, running_var), tables, [x.numel() // channels], momentum)
    return y


def check_running(names: Sequence[str], statistics: Sequence[Any], weight: Tensor, training: bool) -> None:
    if training and all(t is None for t in statistics):
        return
    for name, t in zip(names, statistics, strict=True):
        check_parameter(name, t, tuple(weight.shape), "C", weight, "weight")
        if t.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {t.dtype}")


def check_count(x: Tensor, stride: int = 1) -> None:
    n, _, h, w = x.shape
    if n * -(-h // stride) * -(-w // stride) == 1:
        raise ValueError(f"x must have more than one value per channel in training, got shape {tuple(x.shape)}")
