"""MOAT's self-attention, whole: the products around `fused_relative_attention`, and the half-block around these."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from .. import _native, reference
from ._allocation import allocate_contiguous
from ._attention import check_projection, check_tokens, triton_reasons
from ._devices import device_reasons, on_devices, without_autocast
from ._half_block import HalfBlock
from ._maps import as_map, empty_tokens, product_dense
from ._pointwise import crew_pays, linear, linear_to, products, weight_gradient
from ._registration import FusedOp
from ._relative import Geometry
from .relative_attention import (
    MOST_CHANNELS,
    attend_backward,
    check_scale,
    check_table,
    check_window,
    cpu_attention,
    cuda_attention,
    empty_lse,
    resized,
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
    num_heads: int
    window_height: int
    window_width: int
    scale: float


def _reference(a: _Arguments) -> Tensor:
    window = a.window_height, a.window_width
    return reference.relative_self_attention(*a[:10], num_heads=a.num_heads, window_size=window, scale=a.scale)


def _output(a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the backward pass [q | k | v], what the heads give, and lse."""
    b, h, w, c = a.x.shape
    y = empty_tokens(a.x, a.x.dtype)
    qkv, mixed = (allocate_contiguous((b, h, w, n * c), a.x) for n in (3, 1))
    return y, qkv, mixed, empty_lse(_heads(mixed, a))


def _of_qkv(a: _Arguments) -> list[tuple[Any, Any]]:
    """Weights and biases, or their gradients."""
    return [(a.q_weight, a.q_bias), (a.k_weight, a.k_bias), (a.v_weight, a.v_bias)]


def _thirds(t: Tensor) -> tuple[Tensor, ...]:
    return t.chunk(3, dim=-1)


def _heads(t: Tensor, a: _Arguments) -> Tensor:
    """(B, H, W, C) as (B, heads, N, d)."""
    b, h, w, c = t.shape
    return t.view(b, h * w, a.num_heads, c // a.num_heads).transpose(1, 2)


def _geometry(a: _Arguments) -> Geometry:
    _, height, width, _ = a.x.shape
    return Geometry(height, width, a.window_height, a.window_width, a.scale)


@without_autocast
def _forward(attention: Callable[[], ModuleType], a: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, qkv, mixed, lse = result = _output(a)
    if y.numel() == 0:
        return result
    x, geometry = product_dense(as_map(a.x)), _geometry(a)
    for (weight, bias), t in zip(_of_qkv(a), _thirds(qkv), strict=True):
        linear(x, weight, bias, as_map(t))
    q, k, v = (_heads(t, a) for t in _thirds(qkv))
    attention().forward(q, k, v, resized(a.bias_table, geometry, q), geometry, _heads(mixed, a), lse)
    linear_to(as_map(mixed), a.o_weight, a.o_bias, as_map(y))
    return result


@without_autocast
def _backward(
    attention: Callable[[], ModuleType],
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
    dy = product_dense(as_map(grad))
    weight_gradient(dy, as_map(mixed), of.o_weight, of.o_bias)
    products_need = any(t is not None for pair in _of_qkv(of) for t in pair)
    if not products_need and of.x is None and of.bias_table is None:
        return
    dmixed, dqkv = allocate_contiguous(mixed.shape, mixed), allocate_contiguous(qkv.shape, qkv)
    linear(dy, a.o_weight.t(), None, as_map(dmixed))
    q, k, v, given, dgiven, *of_tokens = (_heads(t, a) for t in (*_thirds(qkv), mixed, dmixed, *_thirds(dqkv)))
    tokens, grads_of = (dgiven, q, k, v), [*of_tokens, of.bias_table]
    attend_backward(attention(), *tokens, a.bias_table, _geometry(a), given, lse, grads_of)
    parts = [as_map(t) for t in _thirds(dqkv)]
    if products_need:
        x = product_dense(as_map(a.x))
        for part, (dweight, dbias) in zip(parts, _of_qkv(of), strict=True):
            weight_gradient(part, x, dweight, dbias)
    if of.x is not None:
        # Into the memory of what is not needed any more.
        dx = as_map(dmixed)
        for i, (part, (weight, _)) in enumerate(zip(parts, _of_qkv(a), strict=True)):
            linear(part, weight.t(), None, dx, plus=dx if i else None)
        of.x.copy_(dmixed)


def _crew_pays(x: Tensor) -> bool:
    return crew_pays(as_map(x))


_KERNELS = on_devices(_forward, _backward, cpu=cpu_attention, cuda=cuda_attention, crew=_crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS, triton=True)
    return cannot + triton_reasons(a.x, a.x.shape[3] // a.num_heads, MOST_CHANNELS), []


def _parts(a: _Arguments) -> dict[str, str]:
    device = a.x.device.type
    kernel = "Triton kernel" if device == "cuda" else _native.kernel_name(device)
    return {"attention": kernel, "q, k, v and o": products(as_map(a.x))}


_op = FusedOp(
    "relative_self_attention",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("bias_table",),
    saved=(Tensor.contiguous,) * 3,
    parts=_parts,
    dims="B, H, W, C",
)
_half = HalfBlock(_op, last=("o_weight", "o_bias"), norm=True, maps=False)


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
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """o(attention(q(x), k(x), v(x))), with `fused_relative_attention`.

    Args:
        x: (B, H, W, C), any strides; float32, bfloat16, float16 or float64. The output has its shape and layout.
        q_weight, k_weight, v_weight, o_weight: (C, C), in the dtype of x, or float32 beside a half x, as the biases.
        q_bias, k_bias, v_bias, o_bias: (C,), each may be None.
        bias_table, window_size, scale: as in `fused_relative_attention`.
        num_heads: a divisor of C.
        norm_weight, norm_bias, eps: of a layer norm over C in front, (C,) each, both or none.
        gamma, residual, path_scale: of residual + path_scale * gamma * (the above), as in `fused_mlp`; residual is as
            x in its shape, and is given with the others.
        backend: as in `vision_ops.use_backend`.

    The products are PyTorch's, but for those in float32 on CPUs with AVX2 or AVX-512. Backward keeps, besides x and the
    parameters, [q | k | v], what the heads give, and a number for each query and head. Gradients come in each
    argument's own dtype and are bitwise repeatable with the same number of threads. Without a kernel for the device,
    and on GPUs for float64 and for heads of more than 64 channels, `reference.relative_self_attention` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    MOAT (arXiv 2210.01820), Attention in model/layers/moat_attention.py of google-research/deeplab2.
    """
    c = check_tokens(x, "B, H, W, C", num_heads)
    weights = {"q": (q_weight, q_bias), "k": (k_weight, k_bias), "v": (v_weight, v_bias), "o": (o_weight, o_bias)}
    for name, (weight, bias) in weights.items():
        check_projection(name, weight, bias, c, "C", x)
    if bias_table is not None:
        check_table(bias_table, num_heads, x, "x")
    check_window(window_size)
    check_scale(scale)
    given = x, *(t for pair in weights.values() for t in pair), bias_table
    window = x.shape[1:3] if window_size is None else window_size
    scale = (c // num_heads) ** -0.5 if scale is None else float(scale)
    tail: dict[str, Any] = {"gamma": gamma, "residual": residual, "path_scale": path_scale, "backend": backend}
    norm: dict[str, Any] = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    return _half(given, num_heads, *window, scale, **norm, **tail)
