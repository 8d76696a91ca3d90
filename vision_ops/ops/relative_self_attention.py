"""MOAT's self-attention, whole: the norm, the products around `fused_relative_attention` and the residual."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ..reference.mlp import product_dtype
from . import _relative
from ._checks import check_beside, check_eps, check_integer, check_parameter, check_path_scale, check_tensor
from ._maps import as_map, as_tokens, pixel_dense, product_dense
from ._pointwise import crew_pays, linear, linear_scaled, linear_to, products, weight_gradient
from ._registration import (
    FusedOp,
    allocate,
    allocate_contiguous,
    device_reasons,
    empty,
    memory_format,
    on_devices,
    without_autocast,
)
from ._relative import Geometry
from .layer_norm_2d import MOST_CHANNELS, Norm, cpu_norm, cuda_norm
from .relative_attention import (
    attend_backward,
    check_scale,
    check_table,
    check_window,
    empty_lse,
    resized,
    triton_reasons,
)
from .scaled_residual import Tail, cpu_tail, cuda_tail, sum_dtype


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
    residual: Tensor | None
    path_scale: Tensor | None
    num_heads: int
    window_height: int
    window_width: int
    scale: float
    eps: float
    adds_x: bool  # x is the residual


def _reference(a: _Arguments) -> Tensor:
    return reference.relative_self_attention(
        *a[:10],
        num_heads=a.num_heads,
        window_size=(a.window_height, a.window_width),
        scale=a.scale,
        norm_weight=a.norm_weight,
        norm_bias=a.norm_bias,
        eps=a.eps,
        residual=_residual(a),
        path_scale=a.path_scale,
    )


def _residual(a: _Arguments) -> Tensor | None:
    return a.x if a.adds_x else a.residual


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the backward pass [q | k | v], what the heads give, and lse."""
    (b, h, w, c), x, dtype = a.x.shape, as_map(a.x), product_dtype(a.x, a.q_weight)
    y = allocate(x.shape, x, memory_format(x), sum_dtype(_residual(a), dtype, None))
    qkv, mixed = (allocate_contiguous((b, h, w, n * c), a.x, dtype) for n in (3, 1))
    return as_tokens(y, a.x), qkv, mixed, empty_lse(_heads(mixed, a))


class _Device(NamedTuple):
    """The passes between the products."""

    attention: ModuleType
    tail: Tail
    norm: Norm


def _cpu() -> _Device:
    return _Device(_relative, cpu_tail(), cpu_norm())


def _cuda() -> _Device:
    from ..kernels import relative_attention

    return _Device(relative_attention, cuda_tail(), cuda_norm())


def _of_qkv(a: _Arguments) -> list[tuple[Any, Any]]:
    """Weights and biases, or their gradients."""
    return [(a.q_weight, a.q_bias), (a.k_weight, a.k_bias), (a.v_weight, a.v_bias)]


def _thirds(t: Tensor) -> tuple[Tensor, ...]:
    return t.split(t.shape[-1] // 3, dim=-1)


def _heads(t: Tensor, a: _Arguments) -> Tensor:
    """(B, H, W, C) as (B, heads, N, d)."""
    return t.flatten(1, 2).unflatten(2, (a.num_heads, -1)).transpose(1, 2)


def _geometry(a: _Arguments) -> Geometry:
    _, height, width, _ = a.x.shape
    return Geometry(height, width, a.window_height, a.window_width, a.scale)


def _normed(device: _Device, a: _Arguments) -> Tensor:
    """What q, k and v multiply, (B, C, H, W)."""
    u = x = as_map(a.x)
    if a.norm_weight is not None and a.norm_bias is not None:
        u = empty(x.shape, x)
        device.norm.run(x, a.norm_weight, a.norm_bias, u, a.eps)
    return product_dense(u.to(product_dtype(a.x, a.q_weight)))


@without_autocast
def _forward(of_device: Callable[[], _Device], a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, qkv, mixed, lse = result = _output(a)
    if y.numel() == 0:
        return result
    device, geometry = of_device(), _geometry(a)
    u = _normed(device, a)
    for (weight, bias), t in zip(_of_qkv(a), _thirds(qkv), strict=True):
        linear(u, weight, bias, as_map(t))
    q, k, v = (_heads(t, a) for t in _thirds(qkv))
    device.attention.forward(q, k, v, resized(a.bias_table, geometry, q), geometry, _heads(mixed, a), lse)
    _project(device, a, as_map(mixed), as_map(y))
    return result


def _project(device: _Device, a: _Arguments, mixed: Tensor, y: Tensor) -> None:
    """o and the residual."""
    residual, form = _residual(a), memory_format(y)
    if residual is None and a.path_scale is None:
        return linear_to(mixed, a.o_weight, a.o_bias, y)
    if residual is not None:
        residual = pixel_dense(as_map(residual).to(y.dtype), form)
        if linear_scaled(mixed, a.o_weight, a.o_bias, None, a.path_scale, residual, y):
            return None
    branch = allocate(y.shape, y, form, mixed.dtype)
    linear_to(mixed, a.o_weight, a.o_bias, branch)
    if residual is not None:
        device.tail.run(residual, branch, None, a.path_scale, y)
    elif a.path_scale is not None:
        torch.mul(branch, a.path_scale.to(branch.dtype).view(-1, 1, 1, 1), out=y)
    return None


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
    of = _Arguments(*grads, *a[len(grads) :])  # type: ignore[arg-type]
    if grad.numel() == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return
    device, grad = of_device(), as_map(grad)
    dout = _branch_gradient(device, grad, a.path_scale, mixed.dtype)
    weight_gradient(dout, as_map(mixed), of.o_weight, of.o_bias)
    products_need = any(t is not None for pair in _of_qkv(of) for t in pair)
    input_needs = any(t is not None for t in (of.x, of.norm_weight, of.norm_bias))
    if not products_need and not input_needs and of.bias_table is None:
        return
    dmixed, dqkv = allocate_contiguous(mixed.shape, mixed), allocate_contiguous(qkv.shape, qkv)
    linear(dout, a.o_weight.t(), None, as_map(dmixed))
    q, k, v, y, dy, *of_tokens = (_heads(t, a) for t in (*_thirds(qkv), mixed, dmixed, *_thirds(dqkv)))
    attend_backward(device.attention, dy, q, k, v, a.bias_table, _geometry(a), y, lse, [*of_tokens, of.bias_table])
    parts = [as_map(t) for t in _thirds(dqkv)]
    if products_need:
        u = _normed(device, a)
        for part, (dweight, dbias) in zip(parts, _of_qkv(of), strict=True):
            weight_gradient(part, u, dweight, dbias)
    if input_needs:
        _input_gradients(device, a, of, grad, parts)


def _branch_gradient(device: _Device, grad: Tensor, path_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """That of o's output, as the products take it."""
    if path_scale is None:
        return product_dense(grad.to(dtype))
    form = memory_format(grad)
    found = allocate(grad.shape, grad, form, dtype)
    device.tail.run_backward(pixel_dense(grad, form), found, None, path_scale, found, None)
    return product_dense(found)


def _input_gradients(device: _Device, a: _Arguments, of: _Arguments, grad: Tensor, parts: list[Tensor]) -> None:
    """Through q, k, v and the norm, and that of the residual if it is x."""
    x, dx = as_map(a.x), None if of.x is None else as_map(of.x)
    du = allocate(x.shape, x, memory_format(x), parts[0].dtype)
    for i, (part, (weight, _)) in enumerate(zip(parts, _of_qkv(a), strict=True)):
        linear(part, weight.t(), None, du, plus=du if i else None)
    if a.norm_weight is not None:
        into = dx
        if dx is not None and pixel_dense(dx, memory_format(x)) is not dx:
            into = empty(x.shape, x)
        device.norm.run_backward(du.to(x.dtype), x, a.norm_weight, into, of.norm_weight, of.norm_bias, a.eps)
        du = du if into is None else into
    if dx is not None:
        if du is not dx:
            dx.copy_(du)
        if a.adds_x:
            dx.add_(grad)


def _crew_pays(x: Tensor) -> bool:
    return crew_pays(as_map(x))


_KERNELS = on_devices(_forward, _backward, cpu=_cpu, cuda=_cuda, crew=_crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    c = a.x.shape[3]
    cannot = device_reasons(a.x, _KERNELS, triton=True) + triton_reasons(a.x, c // a.num_heads)
    if a.x.device.type == "cuda" and a.norm_weight is not None and c > MOST_CHANNELS:
        cannot.append(f"the Triton kernel of the norm takes at most {MOST_CHANNELS} channels, x has {c}")
    return cannot, []


def _parts(a: _Arguments) -> dict[str, str]:
    device = a.x.device.type
    kernel = "Triton kernel" if device == "cuda" else _native.kernel_name(device)
    return {"norm, attention and residual": kernel, "q, k, v and o": products(as_map(a.x))}


def _unread(a: _Arguments, needs: _Arguments) -> tuple[str, ...]:
    return ("residual",)


_op = FusedOp(
    "relative_self_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("x", "bias_table", "norm_weight", "norm_bias", "residual", "path_scale"),
    saved=(Tensor.contiguous,) * 3,
    passes="residual",
    constants=("path_scale",),
    unread=_unread,
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
        x: (B, H, W, C), any strides; float32, bfloat16, float16 or float64. The output has its shape and layout.
        q_weight, k_weight, v_weight, o_weight: (C, C), in the dtype of x, or float32 beside a half x, as the biases.
        q_bias, k_bias, v_bias, o_bias: (C,), each may be None.
        bias_table, window_size, scale: as in `fused_relative_attention`.
        num_heads: a divisor of C.
        norm_weight, norm_bias: of a layer norm over C in front, (C,), both or none.
        eps: of the norm, 0 or more.
        residual: what is added, in the shape of x, in any of these dtypes. It may be x.
        path_scale: stochastic depth, (B,), 0 or 1 / keep_prob as a rule; it has no gradient.
        backend: as in `vision_ops.use_backend`.

    The output has the dtype that PyTorch gives the formula: under autocast the products are in its dtype, and a float32
    residual makes the sum float32. The products are PyTorch's, but for those in float32 on CPUs with AVX2 or AVX-512.
    Backward keeps, besides x and the parameters, [q | k | v], what the heads give, and a number for each query and
    head. Gradients come in each argument's own dtype and are bitwise repeatable with the same number of threads.
    Without a kernel for the device, and on GPUs for float64, for heads of more than 64 channels and for norms of more
    than 2048, `reference.relative_self_attention` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MOAT (arXiv 2210.01820), Attention in model/layers/moat_attention.py of google-research/deeplab2.
    """
    check_tensor("x", x, "B, H, W, C")
    check_integer("num_heads", num_heads, 1)
    _, height, width, c = x.shape
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
        raise ValueError("norm_weight and norm_bias must both be given, or none")
    if norm_weight is not None:
        check_parameter("norm_weight", norm_weight, (c,), "C", x)
        check_parameter("norm_bias", norm_bias, (c,), "C", x)
    check_eps(eps)
    check_path_scale(path_scale, x)
    if residual is not None and residual is not x:
        check_beside("residual", residual, x, "B, H, W, C")
    given = x, *(t for pair in weights.values() for t in pair), bias_table, norm_weight, norm_bias
    around = None if residual is x else residual, path_scale
    window = (height, width) if window_size is None else window_size
    scale = (c // num_heads) ** -0.5 if scale is None else float(scale)
    return _op(*given, *around, num_heads, *window, scale, float(eps), residual is x, backend=backend)
