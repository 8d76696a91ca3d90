"""MogaNet's gate: the product of two branches through SiLU."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import empty, memory_format
from ._autograd import any_requires_grad
from ._checks import autocast_enabled, check_bool, check_parameter, check_tensor
from ._devices import device_reasons, on_devices
from ._maps import pixel_dense
from ._registration import FusedOp


class _Arguments(NamedTuple):
    gate: Tensor
    value: Tensor
    double_gate_act: bool


def _reference(a: _Arguments) -> Tensor:
    return reference.moga_gate(a.gate, a.value, double_gate_act=a.double_gate_act)


def _output(a: _Arguments) -> Tensor:
    return empty(a.gate.shape, a.gate)


class Gate(NamedTuple):
    """The kernels of a device. Tensors are all in one memory format, pixel_dense."""

    run: Callable[[Tensor, Tensor, bool, Tensor], None]
    run_backward: Callable[..., None]


@functools.cache
def cpu_gate() -> Gate:
    return Gate(_gate, _gate_backward)


def cuda_gate() -> Gate:
    from ..kernels import moga_gate as triton

    return Gate(triton.gate, triton.gate_backward)


def _gate(gate: Tensor, value: Tensor, doubled: bool, y: Tensor) -> None:
    """y may be gate or value."""
    _native.cpu_kernels().moga_gate(*map(_native.view, (gate, value, y)), doubled)


def _gate_backward(
    grad: Tensor,
    gate: Tensor,
    value: Tensor,
    doubled: bool,
    dgate: Tensor | None,
    dvalue: Tensor | None,
    y: Tensor | None = None,
    sums: Sequence[Tensor | None] = (None, None),
) -> None:
    """The gradients may be gate and value; y as `run` has it; sums: of the gradients over the pixels."""
    if y is not None:
        _gate(gate, value, doubled, y)
    _native.cpu_kernels().moga_gate_backward(*map(_native.view, (grad, gate, value, dgate, dvalue)), doubled)
    for t, total in zip((dgate, dvalue), sums, strict=True):
        if total is not None:
            _native.cpu_kernels().channel_sums(_native.view(t), _native.channels_view(total))


def _forward(device: Callable[[], Gate], a: _Arguments) -> Tensor:
    y, wanted = _output(a), memory_format(a.gate)
    device().run(pixel_dense(a.gate, wanted), pixel_dense(a.value, wanted), a.double_gate_act, y)
    return y


def _backward(device: Callable[[], Gate], grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    wanted = memory_format(a.gate)
    gate, value, grad = (pixel_dense(t, wanted) for t in (a.gate, a.value, grad))
    found = [t if t is None or pixel_dense(t, wanted) is t else empty(gate.shape, gate) for t in grads]
    device().run_backward(grad, gate, value, a.double_gate_act, *found)
    for given, t in zip(grads, found, strict=True):
        if given is not t:
            given.copy_(t)


_KERNELS = on_devices(_forward, _backward, cpu=cpu_gate, cuda=cuda_gate)


def _torch_is_faster(a: _Arguments) -> bool:
    """Lines of less than some vectors and small tensors cost more around the kernel than in it (measured, AVX-512)."""
    gate = a.gate
    if _native.device_kind(gate) != "cpu" or gate.dtype == torch.float64:
        return False
    short = memory_format(gate) == torch.contiguous_format and gate.shape[2] * gate.shape[3] < 100
    trains = torch.is_grad_enabled() and any_requires_grad(a[:2])
    return short or gate.numel() < (100_000 if trains else 30_000)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.gate, _KERNELS, triton=True)
    # A compiled graph must not depend on the size.
    if cannot or torch.compiler.is_compiling() or not _torch_is_faster(a):
        return cannot, []
    return cannot, ["PyTorch is faster for few elements and for contiguous planes of few pixels"]


_op = FusedOp(
    "moga_gate",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
)


def fused_moga_gate(
    gate: Tensor, value: Tensor, *, double_gate_act: bool = False, backend: str | None = None
) -> Tensor:
    """SiLU(gate) * SiLU(value), one pass.

    Args:
        gate: (N, C, H, W), any strides; float32, bfloat16, float16 or float64. The output has its shape, memory format
            and dtype.
        value: as gate, in its dtype.
        double_gate_act: SiLU twice on both, as weights want that were trained with the official attn_force_fp32=True.
            It has no effect on the precision, which is float32 inside (float64 for float64).
        backend: as in `vision_ops.use_backend`.

    Backward keeps the arguments only. With float16 the product of two activations that nothing bounds may overflow, as
    in plain PyTorch. Without a kernel for the device, and on CPUs for few elements, `reference.moga_gate` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MogaNet (arXiv 2211.03295), MultiOrderGatedAggregation in models/moganet.py of Westlake-AI/MogaNet.
    """
    check_tensor("gate", gate, "N, C, H, W")
    check_parameter("value", value, gate.shape, "the shape of gate", gate, "gate")
    if value.dtype != gate.dtype and not autocast_enabled(gate):
        raise TypeError(f"value must have the dtype of gate, {gate.dtype}, got {value.dtype}")
    check_bool("double_gate_act", double_gate_act)
    return _op(gate, value, double_gate_act, backend=backend)
