"""Batch norm with the activation behind it, in the blocks of MOAT, MogaNet and bn_hs EdgeNeXt."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.dwconv import ACTIVATIONS
from ._checks import check_eps, check_momentum, check_parameter, check_tensor
from ._maps import pixel_dense
from ._registration import FusedOp, allocate, device_reasons, empty, memory_format, on_devices
from .dwconv import ACTIVATION_CODES


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


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the batch's mean and biased variance, or nothing of them."""
    size = a.x.shape[1] if a.mean is None else 0
    mean, variance = (allocate((size,), a.x, dtype=wide(a.x)) for _ in range(2))
    return empty(a.x.shape, a.x), mean, variance


class Coefficients(NamedTuple):
    """z = scale * x + shift, of every channel; gate and offset, if there are, of every image's. In the type of sums."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    gate: Tensor | None = None
    offset: Tensor | None = None


class BatchNorm(NamedTuple):
    """The passes of a device, as in csrc/include/batch_norm_act.h. Tensors are all in one format, pixel_dense."""

    moments: Callable[[Tensor, Tensor, Tensor], None]
    run: Callable[..., None]
    backward_gate: Callable[..., None]
    backward_sums: Callable[..., None]
    backward_input: Callable[..., None]


def _moments(x: Tensor, mean: Tensor, variance: Tensor) -> None:
    _native.cpu_kernels().batch_norm_moments(_native.view(x), *map(_native.channels_view, (mean, variance)))


def _views(c: Coefficients) -> list[Any]:
    return [*map(_native.channels_view, c[:3]), *map(_native.vectors_view, c[3:])]


def _run(x: Tensor, c: Coefficients, activation: str | None, y: Tensor | None, sums: Tensor | None = None) -> None:
    code = ACTIVATION_CODES[activation]
    _native.cpu_kernels().batch_norm_act(_native.view(x), _views(c), _native.view(y), _native.vectors_view(sums), code)


def _backward_gate(grad: Tensor, x: Tensor, c: Coefficients, activation: str | None, sums: Tensor) -> None:
    given = _native.view(grad), _native.view(x), _views(c), _native.vectors_view(sums)
    _native.cpu_kernels().batch_norm_act_backward_gate(*given, ACTIVATION_CODES[activation])


def _backward_sums(grad: Tensor, x: Tensor, c: Coefficients, activation: str | None, sums: Tensor) -> None:
    given = _native.view(grad), _native.view(x), _views(c), _native.vectors_view(sums)
    _native.cpu_kernels().batch_norm_act_backward_sums(*given, ACTIVATION_CODES[activation])


def _backward_input(grad: Tensor, x: Tensor, c: Coefficients, activation: str | None, line: Tensor, dx: Tensor) -> None:
    given = _native.view(grad), _native.view(x), _views(c), _native.vectors_view(line), _native.view(dx)
    _native.cpu_kernels().batch_norm_act_backward_input(*given, ACTIVATION_CODES[activation])


@functools.cache
def cpu_batch_norm() -> BatchNorm:
    return BatchNorm(_moments, _run, _backward_gate, _backward_sums, _backward_input)


def cuda_batch_norm() -> BatchNorm:
    from ..kernels import batch_norm_act as triton

    return BatchNorm(triton.moments, triton.forward, triton.backward_gate, triton.backward_sums, triton.backward_input)


class Norm(NamedTuple):
    """A batch norm of known statistics, in the type of sums."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, x: Tensor, tensors: Sequence[Tensor], eps: float) -> "Norm":
        weight, bias, mean, variance = (t.to(wide(x)) for t in tensors)
        return cls(weight, bias, mean, variance, eps)

    def inverse_deviation(self) -> Tensor:
        return (self.variance + self.eps).rsqrt()

    def coefficients(self, gate: Tensor | None = None, offset: Tensor | None = None) -> Coefficients:
        scale = self.weight * self.inverse_deviation()
        return Coefficients(scale, torch.addcmul(self.bias, scale, self.mean, value=-1), self.mean, gate, offset)

    def gradients(self, sums: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
        """From those of dz and of dz * (x - mean)."""
        if dweight is not None:
            dweight.copy_(sums[1] * self.inverse_deviation())
        if dbias is not None:
            dbias.copy_(sums[0])

    def line(self, sums: Tensor | None, count: int) -> Tensor:
        """Slope and constant of the part of dx that comes by way of a batch's statistics; none of constant ones."""
        line = allocate((2, len(self.weight)), self.weight)
        if sums is None:
            return line.zero_()
        inverse = self.inverse_deviation()
        torch.mul(sums[0], self.weight * inverse / -count, out=line[1])
        torch.mul(sums[1], self.weight * inverse.pow(3) / -count, out=line[0])
        return line


def measure(device: BatchNorm, x: Tensor, mean: Tensor, variance: Tensor) -> None:
    """The statistics of a batch; of none they are those that change nothing."""
    if x.numel():
        device.moments(x, mean, variance)
    else:
        mean.zero_(), variance.zero_()


def _norm(a: _Arguments, mean: Tensor, variance: Tensor) -> Norm:
    if a.mean is None or a.variance is None:
        return Norm.of(a.x, (a.weight, a.bias, mean, variance), a.eps)
    return Norm.of(a.x, (a.weight, a.bias, a.mean, a.variance), a.eps)


def _forward(on: Callable[[], BatchNorm], a: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    device, (y, mean, variance) = on(), _output(a)
    x = pixel_dense(a.x, memory_format(a.x))
    if a.mean is None:
        measure(device, x, mean, variance)
    device.run(x, _norm(a, mean, variance).coefficients(), a.activation, y)
    return y, mean, variance


def _backward(
    on: Callable[[], BatchNorm], grads: list[Any], grad: Tensor, a: _Arguments, mean: Tensor, variance: Tensor
) -> None:
    dx, dweight, dbias, *_ = grads
    device, wanted = on(), memory_format(a.x)
    x, grad = pixel_dense(a.x, wanted), pixel_dense(grad, wanted)
    norm = _norm(a, mean, variance)
    c, sums = norm.coefficients(), None
    if a.mean is None or dweight is not None or dbias is not None:
        sums = allocate((2, len(norm.weight)), norm.weight)
        device.backward_sums(grad, x, c, a.activation, sums)
        norm.gradients(sums, dweight, dbias)
    if dx is None:
        return
    found = dx if pixel_dense(dx, wanted) is dx else empty(x.shape, x)
    line = norm.line(sums if a.mean is None else None, max(1, x.numel() // x.shape[1]))
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
        return x.shape[2] * x.shape[3] < 100 or x.numel() < 400_000
    return x.numel() < (1_000_000 if trains else 150_000)


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
    saved=(Tensor.contiguous, Tensor.contiguous),
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
            towards them, in place, by `momentum`, with the unbiased variance; else they are used, as constants.
        momentum: from 0 to 1.
        eps: 0 or more; 1e-3 in MOAT, 1e-5 in MogaNet and EdgeNeXt.
        activation: None, "gelu" (the erf form) or "silu".
        backend: as in `vision_ops.use_backend`.

    Statistics are float32 (float64 for float64), those of some pixels at a time about their own mean, merged. Gradients
    are bitwise repeatable and come in each argument's own dtype; backward keeps the arguments and the batch's
    statistics. Without a kernel for the device, `reference.batch_norm_act` runs; so it does on CPUs where PyTorch's own
    is faster: for small tensors and float64, and without activation but for contiguous ones in training (`explain`
    tells). Statistics over several processes are SyncBatchNorm's, which is left to PyTorch.

    Raises:
        TypeError, ValueError: an argument is not as above, or a batch has one value per channel in training.

    Batch normalization (arXiv 1502.03167), torch.nn.BatchNorm2d.
    """
    check_tensor("x", x, "N, C, H, W")
    channels = x.shape[1]
    check_parameter("weight", weight, (channels,), "C", x)
    check_parameter("bias", bias, (channels,), "C", x)
    check_running("running_mean", running_mean, weight, training)
    check_running("running_var", running_var, weight, training)
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

    y, *measured = _op.with_saved(
        x, weight, bias, None, None, float(eps), activation, backend=backend, reference=in_pytorch
    )
    if measured:
        track((running_mean, running_var), measured, x.numel() // channels, momentum)
    return y


def check_running(name: str, t: Any, weight: Tensor, training: bool) -> None:
    if t is None and training:
        return
    check_parameter(name, t, tuple(weight.shape), "C", weight, "weight")
    if t.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {t.dtype}")


def check_count(x: Tensor, stride: int = 1) -> None:
    n, _, h, w = x.shape
    if n * -(-h // stride) * -(-w // stride) == 1:
        raise ValueError(f"x must have more than one value per channel in training, got shape {tuple(x.shape)}")


def track(running: Sequence[Tensor | None], measured: Sequence[Tensor], count: int, momentum: float) -> None:
    """Moves running mean and variance towards a batch's; those of an empty one change nothing."""
    if count == 0:
        return
    mean, variance = measured
    with torch.no_grad():
        for moving, batch in zip(running, (mean, variance * (count / (count - 1))), strict=True):
            if moving is None:
                continue
            if moving.dtype == batch.dtype:
                moving.lerp_(batch, momentum)
            else:
                moving.copy_(moving.to(batch.dtype).lerp_(batch, momentum))
