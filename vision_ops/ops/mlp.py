"""The MLP of a block as one node: layer norm, two products with an activation between, layer scale, residual."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.mlp import ACTIVATIONS
from ..reference.scaled_residual import scaled
from ._allocation import allocate, allocate_channels_last, empty, memory_format
from ._autograd import any_requires_grad
from ._checks import (
    autocast_dtype,
    check_beside,
    check_eps,
    check_parameter,
    check_path_scale,
    check_pointwise,
    check_tensor,
    check_vector,
)
from ._devices import device_reasons, on_devices, without_autocast
from ._folded_weight import FoldedWeight
from ._maps import as_map, empty_tokens, pixel_dense, product_dense
from ._parameters import Convert, convert, convert_cuda, converted
from ._pointwise import ACTIVATIONS as ACTIVATION_CODES
from ._pointwise import (
    crew_pays,
    linear,
    linear_activated,
    linear_activation_backward,
    linear_scaled,
    linear_to,
    products,
    weight_gradient,
)
from ._registration import FusedOp
from .layer_norm_2d import MOST_CHANNELS, Norm, cpu_norm, cuda_norm
from .scaled_residual import Tail, add, cpu_tail, cuda_tail, sum_dtype

_WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


class _Arguments(NamedTuple):
    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gamma: Tensor | None
    residual: Tensor | None
    path_scale: Tensor | None
    eps: float
    activation: str
    adds_x: bool  # x is the residual
    keep: bool  # fc1's output for the backward pass
    computes: str | None  # the dtype of the products, where autocast makes it another than that of x


def _reference(a: _Arguments) -> Tensor:
    return reference.mlp(
        *a[:5],
        norm_weight=a.norm_weight,
        norm_bias=a.norm_bias,
        eps=a.eps,
        activation=a.activation,
        gamma=a.gamma,
        residual=_residual(a),
        path_scale=a.path_scale,
    )


def _residual(a: _Arguments) -> Tensor | None:
    return a.x if a.adds_x else a.residual


def _output(a: _Arguments) -> tuple[Tensor, Tensor]:
    """y, and fc1's output as a map."""
    dtype = _product_dtype(a)
    n, _, h, w = as_map(a.x).shape
    u = allocate((n if a.keep else 0, len(a.fc1_weight), h, w), a.x, torch.channels_last, dtype)
    return empty_tokens(a.x, _result_dtype(a, dtype)), u


def _product_dtype(a: _Arguments) -> torch.dtype:
    return a.x.dtype if a.computes is None else cast(torch.dtype, getattr(torch, a.computes))


def _result_dtype(a: _Arguments, dtype: torch.dtype) -> torch.dtype:
    return sum_dtype(_residual(a), dtype, a.gamma)


class _Device(NamedTuple):
    """The passes between the products, and what makes half weights of float32 ones."""

    convert: Convert
    tail: Tail
    norm: Norm
    activate: Callable[[Tensor, Tensor, str], None]
    activate_backward: Callable[..., None]


def _cpu() -> _Device:
    return _Device(convert, cpu_tail(), cpu_norm(), _activate, _activate_backward)


def _cuda() -> _Device:
    from ..kernels import mlp

    return _Device(convert_cuda, cuda_tail(), cuda_norm(), mlp.activate, mlp.activate_backward)


def _activate(u: Tensor, a: Tensor, activation: str) -> None:
    """a = act(u); a may be u."""
    _native.run("activate", u, a, ACTIVATION_CODES[activation])


def _activate_backward(
    da: Tensor, u: Tensor, du: Tensor, a: Tensor | None, dbias: Tensor | None, activation: str
) -> None:
    """du = da * act'(u), a = act(u), dbias = the sum of du over the pixels. du may be da."""
    _native.run("activate_backward", da, u, du, a, dbias, ACTIVATION_CODES[activation])


def _normed(device: _Device, a: _Arguments, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What fc1 multiplies."""
    if a.norm_weight is None or a.norm_bias is None:
        return product_dense(x.to(dtype))
    y = allocate(x.shape, x, memory_format(x), dtype)
    device.norm.run(x, a.norm_weight, a.norm_bias, y, a.eps)
    return product_dense(y)


def _converted(device: _Device, a: _Arguments, names: Sequence[str]) -> _Arguments:
    """With these parameters as the products take them."""
    given, dtype = [getattr(a, name) for name in names], _product_dtype(a)
    if all([t is None or t.dtype == dtype for t in given]):
        return a
    found = converted(device.convert, given, dtype)
    return a._replace(**dict(zip(names, found, strict=True)))


@without_autocast
def _forward(device: Callable[[], _Device], a: _Arguments) -> tuple[Tensor, Tensor]:
    passes, x, dtype = device(), as_map(a.x), _product_dtype(a)
    a = _converted(passes, a, _WEIGHTS)
    normed = _normed(passes, a, x, dtype)
    hidden = (len(x), len(a.fc1_weight), *x.shape[2:])
    act = allocate_channels_last(hidden, normed)
    u = allocate_channels_last(hidden, normed) if a.keep else act[:0]
    if not linear_activated(normed, a.fc1_weight, a.fc1_bias, a.activation, act, u if a.keep else None):
        before = u if a.keep else act
        linear(normed, a.fc1_weight, a.fc1_bias, before)
        passes.activate(before, act, a.activation)
    y = empty_tokens(a.x, _result_dtype(a, dtype))
    _second(passes, a, act, as_map(y))
    return y, u


def _second(passes: _Device, a: _Arguments, act: Tensor, y: Tensor) -> None:
    """fc2 and the tail."""
    scales, residual = (a.gamma, a.path_scale), _residual(a)
    if residual is None and scales == (None, None):
        return linear_to(act, a.fc2_weight, a.fc2_bias, y)
    form = memory_format(y)
    if residual is not None:
        residual = pixel_dense(as_map(residual).to(y.dtype), form)
        if linear_scaled(act, a.fc2_weight, a.fc2_bias, *scales, residual, y):
            return None
    branch = allocate(y.shape, y, form, act.dtype)
    linear_to(act, a.fc2_weight, a.fc2_bias, branch)
    if residual is None:
        y.movedim(1, -1).copy_(scaled(branch.movedim(1, -1), *scales))
    else:
        passes.tail.run(residual, branch, *scales, y)
    return None


@without_autocast
def _backward(device: Callable[[], _Device], grads: list[Any], grad: Tensor, a: _Arguments, u: Tensor) -> None:
    dx, dfc1, dfc1_bias, dfc2, dfc2_bias, dnorm, dnorm_bias, dgamma, *_ = grads
    passes, x, dtype, grad = device(), as_map(a.x), _product_dtype(a), as_map(grad)
    # Small gammas, which layer scale begins with, underflow in float16 when they meet the weight; elsewhere they may.
    folds = a.gamma is not None and dtype != torch.float16
    a = _converted(passes, a, ["fc1_weight", *([] if a.keep else ["fc1_bias"]), *([] if folds else ["fc2_weight"])])
    if not a.keep:
        u = allocate_channels_last((len(x), len(a.fc1_weight), *x.shape[2:]), grad.new_empty(0, dtype=dtype))
        linear(_normed(passes, a, x, dtype), a.fc1_weight, a.fc1_bias, u)

    dbranch = _branch_gradient(passes, grad, None if folds else a.gamma, a.path_scale, dtype, memory_format(x))
    weight = a.fc2_weight
    if folds and a.gamma is not None:
        weight = FoldedWeight(passes.tail, weight, None, a.gamma).weight(dtype)
    du = allocate_channels_last(u.shape, u)
    act = None if dfc2 is None and dgamma is None else allocate_channels_last(u.shape, u)
    summed = not linear_activation_backward(dbranch, weight.t(), u, a.activation, du, act)
    if summed:
        linear(dbranch, weight.t(), None, du)
        passes.activate_backward(du, u, du, act, dfc1_bias, a.activation)
    _second_gradients(passes, a, grad, dbranch, act, folds, dfc2, dfc2_bias, dgamma)
    del act

    if dfc1 is not None:
        weight_gradient(du, _normed(passes, a, x, dtype), dfc1, None if summed else dfc1_bias)
    elif not summed:
        weight_gradient(du, du, None, dfc1_bias)
    if dx is None and dnorm is None and dnorm_bias is None:
        return
    into = None
    if dx is not None:
        dx = as_map(dx)
        into = dx if pixel_dense(dx, memory_format(x)) is dx else empty(x.shape, x)
    plus = pixel_dense(grad, memory_format(x)) if a.adds_x else None
    _input_gradients(passes, a, plus, x, du, into, dnorm, dnorm_bias)
    if into is not dx:
        dx.copy_(into)


def _input_gradients(
    passes: _Device,
    a: _Arguments,
    plus: Tensor | None,
    x: Tensor,
    du: Tensor,
    dx: Tensor | None,
    dnorm: Tensor | None,
    dnorm_bias: Tensor | None,
) -> None:
    """Through fc1 and the norm; plus: what is added to dx."""
    if a.norm_weight is not None:
        dnormed = allocate(x.shape, x, memory_format(x), du.dtype)
        linear_to(du, a.fc1_weight.t(), None, dnormed)
        passes.norm.run_backward(dnormed, x, a.norm_weight, dx, dnorm, dnorm_bias, a.eps, plus)
    elif dx is not None:
        dnormed = dx if dx.dtype == du.dtype else allocate(x.shape, x, memory_format(x), du.dtype)
        linear_to(du, a.fc1_weight.t(), None, dnormed)
        if dnormed is not dx:
            dx.copy_(dnormed)
        if plus is not None:
            add(passes.tail, plus, dx)


def _branch_gradient(
    passes: _Device,
    grad: Tensor,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    dtype: torch.dtype,
    form: torch.memory_format,
) -> Tensor:
    """path_scale * gamma * grad, as the products take it."""
    if gamma is None and path_scale is None:
        return product_dense(grad.to(dtype))
    found = allocate(grad.shape, grad, form, dtype)
    passes.tail.run_backward(pixel_dense(grad, form), found, gamma, path_scale, found, None)
    return product_dense(found)


def _second_gradients(
    passes: _Device,
    a: _Arguments,
    grad: Tensor,
    dbranch: Tensor,
    act: Tensor | None,
    folds: bool,
    dfc2: Tensor | None,
    dfc2_bias: Tensor | None,
    dgamma: Tensor | None,
) -> None:
    """Of fc2 and gamma. folds: gamma is folded into the weight, and dbranch not multiplied by it."""
    if act is None:
        if dfc2_bias is not None:
            weight_gradient(dbranch, dbranch, None, dfc2_bias)
            if folds and a.gamma is not None:
                dfc2_bias.mul_(a.gamma)
        return
    if not folds:
        if dfc2 is not None:
            weight_gradient(dbranch, act, dfc2, dfc2_bias)
        elif dfc2_bias is not None:
            weight_gradient(dbranch, dbranch, None, dfc2_bias)
        if dgamma is not None:
            form = memory_format(grad)
            branch = allocate(grad.shape, grad, form, act.dtype)
            linear_to(act, a.fc2_weight, a.fc2_bias, branch)
            passes.tail.run_backward(pixel_dense(grad, form), branch, a.gamma, a.path_scale, None, dgamma)
        return
    assert a.gamma is not None
    folded = FoldedWeight(passes.tail, a.fc2_weight, a.fc2_bias, a.gamma)
    dweight, dbias = folded.empty_gradients(act.dtype)
    weight_gradient(dbranch, act, dweight, dbias)
    folded.gradients(dweight, dbias, dfc2, dfc2_bias, dgamma)


_KERNELS = on_devices(_forward, _backward, cpu=_cpu, cuda=_cuda, crew=lambda x: crew_pays(as_map(x)))


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS, triton=True)
    if _native.device_kind(a.x) == "cuda" and a.norm_weight is not None and a.x.shape[-1] > MOST_CHANNELS:
        cannot.append(f"the Triton kernel of the norm takes at most {MOST_CHANNELS} channels, x has {a.x.shape[-1]}")
    return cannot, []


def _parts(a: _Arguments) -> dict[str, str]:
    device = _native.device_kind(a.x)
    passes = "Triton kernel" if device == "cuda" else _native.kernel_name(device)
    return {"norm, activation and residual": passes, "fc1 and fc2": products(as_map(a.x))}


def _unread(a: _Arguments, needs: _Arguments) -> tuple[str, ...]:
    return ("residual",)


_op = FusedOp(
    "mlp",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("x", "norm_weight", "norm_bias", "gamma", "residual", "path_scale"),
    wide=_WEIGHTS,
    saved=(lambda u: pixel_dense(u, torch.channels_last),),
    passes="residual",
    constants=("path_scale",),
    unread=_unread,
    parts=_parts,
    dims="..., C",
)


def fused_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + path_scale[n] * gamma[c] * (fc2_weight act(fc1_weight LN(x) + fc1_bias) + fc2_bias), LN over C.

    Args:
        x: (N, ..., C), any strides, so that maps are passed permuted; float32, bfloat16, float16 or float64. The output
            has its shape and its layout.
        fc1_weight: (hidden, C), or (hidden, C, 1, 1), in the dtype of x, or float32 beside a half x; as the other
            weights and biases.
        fc1_bias: (hidden,) or None.
        fc2_weight: (C, hidden), or (C, hidden, 1, 1).
        fc2_bias: (C,) or None.
        norm_weight, norm_bias: of a layer norm over C in front, (C,), both or none.
        eps: of the norm, 0 or more.
        activation: "gelu" (by erf), "silu" or "hardswish".
        gamma: layer scale, (C,), in any of these dtypes.
        residual: what is added, in the shape of x, in any of these dtypes. It may be x.
        path_scale: stochastic depth, (N,), 0 or 1 / keep_prob as a rule; it has no gradient.
        backend: as in `vision_ops.use_backend`.

    The output has the dtype that PyTorch gives the formula: under autocast the products are in its dtype, and a float32
    gamma or residual makes the sum float32. Backward keeps x and fc1's output, and computes the norm again. Gradients
    come in each argument's own dtype. Without a kernel for the device, `reference.mlp` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    HorNet's Block, EdgeNeXt's ConvEncoder and SDTAEncoder, S2-MLPv2's and ConvNeXt's (arXiv 2201.03545) blocks.
    """
    check_tensor("x", x, "..., C")
    channels = x.shape[-1]
    check_pointwise("fc1_weight", fc1_weight, (None, channels), "hidden, C", x)
    hidden = fc1_weight.shape[0]
    check_pointwise("fc2_weight", fc2_weight, (channels, hidden), "C, hidden", x)
    for name, bias, size, why in (("fc1_bias", fc1_bias, hidden, "hidden"), ("fc2_bias", fc2_bias, channels, "C")):
        if bias is not None:
            check_parameter(name, bias, (size,), why, x)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must both be given, or none")
    if norm_weight is not None:
        check_parameter("norm_weight", norm_weight, (channels,), "C", x)
        check_parameter("norm_bias", norm_bias, (channels,), "C", x)
    check_eps(eps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    check_vector("gamma", gamma, channels, "C", x)
    check_path_scale(path_scale, x)
    if residual is not None and residual is not x:
        check_beside("residual", residual, x, "..., C")
    weights = (fc1_weight.flatten(1), fc1_bias, fc2_weight.flatten(1), fc2_bias)
    given = (x, *weights, norm_weight, norm_bias, gamma, None if residual is x else residual, path_scale)
    keep = torch.is_grad_enabled() and any_requires_grad(given)
    return _op(*given, float(eps), activation, residual is x, keep, autocast_dtype(x), backend=backend)
