"""MOAT's self-attention, whole: the norm, the products around `fused_relative_attention` and the residual."""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.relative_self_attention import product_type
from . import _relative, layer_norm_2d
from ._checks import check_eps, check_integer, check_parameter, check_tensor
from ._pointwise import crew_pays, linear, products, weight_gradient
from ._registration import FusedOp, Kernels, allocate_contiguous, device_reasons, with_crew, without_autocast
from ._relative import Geometry
from .gated_recursion import cpu_gates, cuda_gates
from .relative_attention import (
    attend_backward,
    check_scale,
    check_table,
    check_window,
    empty_lse,
    resized,
    triton_reasons,
)


class _Arguments(NamedTuple):
    x: Tensor
    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    o_weight: Tensor
    o_bias: Tensor | None
    bias_table: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    path_scale: Tensor | None
    num_heads: int
    window_height: int
    window_width: int
    scale: float
    eps: float
    residual: bool  # whether x is added

    @property
    def qkv(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(self.q_weight, self.q_bias), (self.k_weight, self.k_bias), (self.v_weight, self.v_bias)]


def _reference(a: _Arguments) -> Tensor:
    return reference.relative_self_attention(
        *a[:10],
        num_heads=a.num_heads,
        window_size=(a.window_height, a.window_width),
        scale=a.scale,
        norm_weight=a.norm_weight,
        norm_bias=a.norm_bias,
        eps=a.eps,
        residual=a.x if a.residual else None,
        path_scale=a.path_scale,
    )


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the backward pass [q | k | v], what the heads give, and lse."""
    b, h, w, c = a.x.shape
    dtype = product_type(a.x, a.q_weight)
    y = allocate_contiguous(a.x.shape, a.x, torch.promote_types(a.x.dtype, dtype) if a.residual else dtype)
    qkv = allocate_contiguous((b, h, w, 3 * c), a.x, dtype)
    mixed = allocate_contiguous((b, h, w, c), a.x, dtype)
    return y, qkv, mixed, empty_lse(_heads(mixed, a))


class _Device(NamedTuple):
    attention: ModuleType
    norm: Kernels
    channel_sums: Callable[[Tensor, Tensor | None], None]


def _cpu() -> _Device:
    return _Device(_relative, layer_norm_2d.KERNELS["CPU"], cpu_gates().channel_sums)


def _cuda() -> _Device:
    from ..kernels import relative_attention

    return _Device(relative_attention, layer_norm_2d.KERNELS["CUDA"], cuda_gates().channel_sums)


def _map(t: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W)."""
    return t.permute(0, 3, 1, 2)


def _thirds(t: Tensor) -> tuple[Tensor, ...]:
    return t.split(t.shape[-1] // 3, dim=-1)


def _heads(t: Tensor, a: _Arguments) -> Tensor:
    """(B, H, W, C) as (B, heads, N, d)."""
    return t.flatten(1, 2).unflatten(2, (a.num_heads, -1)).transpose(1, 2)


def _geometry(a: _Arguments) -> Geometry:
    _, height, width, _ = a.x.shape
    return Geometry(height, width, a.window_height, a.window_width, a.scale)


def _norm_arguments(a: _Arguments) -> Any:
    return layer_norm_2d.Arguments(_map(a.x), a.norm_weight, a.norm_bias, a.eps)


def _normed(device: _Device, a: _Arguments) -> Tensor:
    """What the products take, (B, C, H, W)."""
    u = _map(a.x) if a.norm_weight is None else device.norm[0](_norm_arguments(a))
    return u.to(product_type(a.x, a.q_weight))


def _per_sample(path_scale: Tensor, like: Tensor) -> Tensor:
    return path_scale.to(like.dtype).view(-1, 1, 1, 1)


@without_autocast
def _forward(of_device: Callable[[], _Device], a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, qkv, mixed, lse = result = _output(a)
    if y.numel() == 0:
        return result
    device, geometry = of_device(), _geometry(a)
    u = _normed(device, a)
    for (weight, bias), t in zip(a.qkv, _thirds(qkv), strict=True):
        linear(u, weight, bias, _map(t))
    q, k, v = (_heads(t, a) for t in _thirds(qkv))
    device.attention.forward(q, k, v, resized(a.bias_table, geometry, q), geometry, _heads(mixed, a), lse)
    if a.path_scale is None and (not a.residual or y.dtype == mixed.dtype):
        linear(_map(mixed), a.o_weight, a.o_bias, _map(y), plus=_map(a.x) if a.residual else None)
        return result
    out = allocate_contiguous(mixed.shape, mixed)
    linear(_map(mixed), a.o_weight, a.o_bias, _map(out))
    if a.path_scale is None:
        torch.add(a.x, out, out=y)
    elif a.residual:
        torch.addcmul(a.x, out, _per_sample(a.path_scale, out), out=y)
    else:
        torch.mul(out, _per_sample(a.path_scale, out), out=y)
    return result


@without_autocast
def _backward(
    of_device: Callable[[], _Device],
    grads: list[Tensor | None],
    grad: Tensor,
    a: _Arguments,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
) -> None:
    if grad.numel() == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return
    device, of = of_device(), _Arguments(*grads, *a[len(grads) :])  # type: ignore[arg-type]
    dout = grad.to(mixed.dtype)
    if of.path_scale is not None:
        out = allocate_contiguous(mixed.shape, mixed)
        linear(_map(mixed), a.o_weight, a.o_bias, _map(out))
        of.path_scale.copy_((dout * out).sum((1, 2, 3), dtype=lse.dtype))
    if a.path_scale is not None:
        dout = dout * _per_sample(a.path_scale, dout)
    weight_gradient(_map(dout), _map(mixed), of.o_weight)
    device.channel_sums(_map(dout), of.o_bias)

    inner = [of.x, *(t for pair in of.qkv for t in pair), of.bias_table, of.norm_weight, of.norm_bias]
    if all(t is None for t in inner):
        return
    dmixed, dqkv = allocate_contiguous(mixed.shape, mixed), allocate_contiguous(qkv.shape, qkv)
    linear(_map(dout), a.o_weight.t(), None, _map(dmixed))
    q, k, v, dy, *of_tokens = (_heads(t, a) for t in (*_thirds(qkv), dmixed, *_thirds(dqkv)))
    attend_backward(
        device.attention, dy, q, k, v, a.bias_table, _geometry(a), _heads(mixed, a), lse, [*of_tokens, of.bias_table]
    )

    u, parts = _normed(device, a), [_map(t) for t in _thirds(dqkv)]
    for part, (dweight, dbias) in zip(parts, of.qkv, strict=True):
        weight_gradient(part, u, dweight)
        device.channel_sums(part, dbias)
    if of.x is None and of.norm_weight is None and of.norm_bias is None:
        return
    du = _map(dmixed)
    for i, (part, (weight, _)) in enumerate(zip(parts, a.qkv, strict=True)):
        linear(part, weight.t(), None, du, plus=du if i else None)
    if a.norm_weight is not None:
        dx = None if of.x is None else _map(of.x)
        device.norm[1]([dx, of.norm_weight, of.norm_bias], du.to(a.x.dtype), _norm_arguments(a))
    elif of.x is not None:
        of.x.copy_(dmixed)
    if of.x is not None and a.residual:
        of.x.add_(grad)


def _crew_pays(x: Tensor) -> bool:
    return crew_pays(_map(x))


_forward_in_crew = with_crew(functools.partial(_forward, _cpu), _crew_pays)
_backward_in_crew = with_crew(functools.partial(_backward, _cpu), _crew_pays)


# PyTorch's own copies are parallel outside of a crew only.
def _forward_cpu(a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_in_crew(a._replace(x=a.x.contiguous()))


def _backward_cpu(grads: list[Tensor | None], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward_in_crew(grads, grad.contiguous(), a._replace(x=a.x.contiguous()), *saved)


def _forward_cuda(a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(_cuda, a._replace(x=a.x.contiguous()))


def _backward_cuda(grads: list[Tensor | None], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward(_cuda, grads, grad.contiguous(), a._replace(x=a.x.contiguous()), *saved)


_KERNELS: dict[str, Kernels] = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    c = a.x.shape[3]
    cannot = device_reasons(a.x, _KERNELS, triton=True) + triton_reasons(a.x, c // a.num_heads)
    if a.x.device.type == "cuda" and a.norm_weight is not None and c > layer_norm_2d.MOST_CHANNELS:
        cannot.append(f"the Triton kernel of the norm takes at most {layer_norm_2d.MOST_CHANNELS} channels, x has {c}")
    return cannot, []


def _parts(a: _Arguments) -> dict[str, str]:
    kernel = "Triton kernels" if a.x.is_cuda else _native.kernel_name(a.x.device.type)
    return {"attention": kernel, "products over all channels": products(_map(a.x))}


_op = FusedOp(
    "relative_self_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("x", "bias_table", "norm_weight", "norm_bias", "path_scale"),
    saved=(Tensor.contiguous,) * 3,
    parts=_parts,
    dims="B, H, W, C",
)


def fused_relative_self_attention(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    o_weight: Tensor,
    o_bias: Tensor | None,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Sequence[int] | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + path_scale * o(attention(q(u), k(u), v(u))), u = LayerNorm(x), with `fused_relative_attention`.

    Args:
        x: (B, H, W, C), any strides; float32, bfloat16, float16 or float64. The output has its shape and is contiguous.
        q_weight, k_weight, v_weight, o_weight: (C, C).
        q_bias, k_bias, v_bias, o_bias: (C,), each may be None.
        bias_table, window_size, scale: as in `fused_relative_attention`.
        num_heads: a divisor of C.
        norm_weight, norm_bias: (C,) both, or None for u = x.
        eps: of the norm.
        residual: (B, H, W, C), in the dtype of x, mostly x itself, whose gradient is then added in the kernels; None to
            add nothing.
        path_scale: (B,), what stochastic depth has drawn for each sample, or None for 1.
        backend: as in `vision_ops.use_backend`.

    Parameters have the dtype of x, or float32 beside a half x. Under autocast the weights are cast, and u with them; x,
    the norm, the table, the residual and path_scale are not, and the output has the dtype of the residual, if there is
    one. The products are PyTorch's, but for those in float32 on CPUs with AVX2 or AVX-512. Backward keeps, besides the
    arguments, [q | k | v], what the heads give, and a number for each query and head. Gradients come in each argument's
    own dtype and are bitwise repeatable with the same number of threads. Without a kernel for the device, and on GPUs
    for float64, for heads of more than 128 channels and for norms of more than 2048,
    `reference.relative_self_attention` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MOAT (arXiv 2210.01820), Attention in model/layers/moat_attention.py of google-research/deeplab2.
    """
    check_tensor("x", x, "B, H, W, C")
    check_integer("num_heads", num_heads, 1)
    b, height, width, c = x.shape
    if c % num_heads:
        raise ValueError(f"x must have a multiple of num_heads={num_heads} channels, got {c}")
    weights = {"q": (q_weight, q_bias), "k": (k_weight, k_bias), "v": (v_weight, v_bias), "o": (o_weight, o_bias)}
    for name, (weight, bias) in weights.items():
        check_parameter(f"{name}_weight", weight, (c, c), "C, C", x)
        if bias is not None:
            check_parameter(f"{name}_bias", bias, (c,), "C", x)
    if bias_table is not None:
        check_table(bias_table, num_heads, x, "x")
    check_window(window_size)
    check_scale(scale)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must be given together, or neither")
    if norm_weight is not None:
        check_parameter("norm_weight", norm_weight, (c,), "C", x)
        check_parameter("norm_bias", norm_bias, (c,), "C", x)
    check_eps(eps)
    if path_scale is not None:
        check_parameter("path_scale", path_scale, (b,), "B", x)
    if residual is not None and residual is not x:
        check_parameter("residual", residual, tuple(x.shape), "as x", x)
    given = x, *(t for pair in weights.values() for t in pair), bias_table, norm_weight, norm_bias, path_scale
    window = (height, width) if window_size is None else window_size
    scale = (c // num_heads) ** -0.5 if scale is None else float(scale)
    y = _op(*given, num_heads, *window, scale, float(eps), residual is x, backend=backend)
    return y if residual is None or residual is x or not isinstance(y, Tensor) else residual + y
