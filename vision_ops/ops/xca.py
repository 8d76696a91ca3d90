"""Cross-covariance attention of XCiT and EdgeNeXt, whole: attention between channels and the projections around it."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from .._internals import statically_known_true
from . import _gram_xca, _heads
from ._allocation import allocate_contiguous
from ._attention import check_projection, check_tokens, triton_reasons
from ._checks import autocast_enabled
from ._devices import device_reasons, with_crew, without_autocast
from ._half_block import HalfBlock
from ._heads import by_head, wide
from ._parameters import convert, convert_cuda, converted
from ._pointwise import (
    crew_pays_for_tokens,
    linear_tokens,
    multiplies_tokens,
    products_of_tokens,
    tf32_allowed,
    weight_gradient_tokens,
)
from ._registration import FusedOp
from .cross_covariance import (
    MOST_CHANNELS,
    Attention,
    attend,
    attend_backward,
    check_temperature,
    cuda_heads,
    empty_matrices,
    kept_attention,
    sum_samples,
)


class _Arguments(NamedTuple):
    x: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    temperature: Tensor
    proj_weight: Tensor
    proj_bias: Tensor | None
    num_heads: int
    gram: bool  # which of two forms computes it; they differ in what they save


def _reference(a: _Arguments) -> Tensor:
    return reference.xca(*a[:6], num_heads=a.num_heads)


def _output(a: _Arguments) -> tuple[Tensor, ...]:
    """y and, unless the Gram form computes it from x, [q | k | v] and the attention: the products of q and k,
    their norms, the weights."""
    (b, n, c), heads, d = a.x.shape, a.num_heads, a.x.shape[2] // a.num_heads
    of_heads = [b, heads, d, d]
    shapes = [[0]] * 4 if a.gram else [[b, n, 3 * c], of_heads, [b, 2, heads, d], of_heads]
    saved = map(allocate_contiguous, shapes, [a.x] * 4, [a.x.dtype, *[wide(a.x.dtype)] * 3])
    return allocate_contiguous((b, n, c), a.x), *saved


def _takes_gram(x: Tensor) -> bool:
    """Whether the Gram form is taken: its products are C x C and float32 at least, and small ones do not pay for the
    longer way (measured, AVX2). Graphs for all sizes keep to the qkv form, as they must not depend on the size; so do
    GPUs where products may round to TF32, which would show where the form's terms cancel, and their graphs, as the user
    may allow it later."""
    n, c = x.shape[1:]
    kind, compiling = _native.device_kind(x), torch.compiler.is_compiling()
    dtype = torch.get_autocast_dtype(kind) if autocast_enabled(x) and x.dtype != torch.float64 else x.dtype
    if kind == "cuda" and dtype == torch.float32 and (compiling or tf32_allowed()):
        return False
    holds = statically_known_true if compiling else bool
    return dtype in (torch.float32, torch.float64) and holds(n >= 4 * c) and holds(n * c >= 32768)


# --- The qkv form: q, k and v of every token.


def _converted(a: _Arguments, kernels: ModuleType, backward: bool) -> _Arguments:
    """With the parameters as products take them; without the biases, which the backward pass does not need."""
    biases = (None, None) if backward else (a.qkv_bias, a.proj_bias)
    run = convert if kernels is _heads else convert_cuda
    qkv, proj, qkv_bias, proj_bias = converted(run, (a.qkv_weight, a.proj_weight, *biases), a.x.dtype)
    return a._replace(qkv_weight=qkv, proj_weight=proj, qkv_bias=qkv_bias, proj_bias=proj_bias)


def _forward_qkv(a: _Arguments, kernels: ModuleType, y: Tensor, qkv: Tensor, *kept: Tensor) -> None:
    (_, n, c), heads, a = a.x.shape, a.num_heads, _converted(a, kernels, backward=False)
    linear_tokens(a.x, a.qkv_weight, a.qkv_bias, qkv)
    q, k, v = _split(qkv, heads)
    attention = attend(kernels, q, k, a.temperature, kept)
    if n >= c:
        linear_tokens(qkv[:, :, 2 * c :], _folded(a, attention, kernels), a.proj_bias, y)
    else:
        linear_tokens(_weighted(v, attention, kernels), a.proj_weight, a.proj_bias, y)


def _backward_qkv(
    grads: list[Tensor | None], grad: Tensor, a: _Arguments, kernels: ModuleType, qkv: Tensor, *kept: Tensor
) -> None:
    dx, dqkv_weight, dqkv_bias, dtemperature, dproj_weight, dproj_bias = grads
    (b, n, c), heads, a = a.x.shape, a.num_heads, _converted(a, kernels, backward=True)
    q, k, v = _split(qkv, heads)
    attention = kept_attention(kept, a.temperature)
    grad = grad.contiguous()
    _bias_gradient(grad, dproj_bias)

    dqkv, dweights = allocate_contiguous(qkv.shape, qkv), empty_matrices(attention)
    dq, dk, dv = _split(dqkv, heads)
    if n >= c:
        linear_tokens(grad, _folded(a, attention, kernels).transpose(1, 2), None, dqkv[:, :, 2 * c :])
        dfolded = allocate_contiguous((b, c, c), grad)
        weight_gradient_tokens(grad, qkv[:, :, 2 * c :], dfolded)
        dfolded = by_head(dfolded, heads)
        kernels.gram(_proj_heads(a), dfolded, dweights)
        if dproj_weight is not None:
            each = allocate_contiguous((b, c, c), dweights)
            kernels.apply(attention.weights, dfolded, by_head(each, heads))
            sum_samples(each, dproj_weight)
    else:
        if dproj_weight is not None:
            weight_gradient_tokens(grad, _weighted(v, attention, kernels), dproj_weight)
        dweighted = allocate_contiguous((b, n, c), grad)
        linear_tokens(grad, a.proj_weight.t(), None, dweighted)
        dweighted = by_head(dweighted, heads)
        kernels.gram(dweighted, v, dweights)
        kernels.apply(attention.weights, dweighted, dv, transposed=True)
    attend_backward(kernels, dweights, q, k, attention, dq, dk, dtemperature)

    _bias_gradient(dqkv, dqkv_bias)
    if dqkv_weight is not None:
        weight_gradient_tokens(dqkv, a.x, dqkv_weight)
    if dx is not None:
        linear_tokens(dqkv, a.qkv_weight.t(), None, dx)


def _bias_gradient(grad: Tensor, out: Tensor | None) -> None:
    if out is None:
        return
    rows = grad.flatten(0, 1)
    if multiplies_tokens(grad):
        out.copy_(_heads.sum_tokens(rows[None])[0])
    else:
        torch.sum(rows, 0, dtype=out.dtype, out=out)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    b, n, width = qkv.shape
    return qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 4, 1).unbind(0)


def _proj_heads(a: _Arguments) -> Tensor:
    return by_head(a.proj_weight.expand(len(a.x), -1, -1), a.num_heads)


def _folded(a: _Arguments, attention: Attention, kernels: ModuleType) -> Tensor:
    """The attention and the projection in one matrix for every sample, (B, C, C): fewer products from N = C on."""
    b, _, c = a.x.shape
    folded = allocate_contiguous((b, c, c), a.x)
    kernels.apply(attention.weights, _proj_heads(a), by_head(folded, a.num_heads), transposed=True)
    return folded


def _weighted(v: Tensor, attention: Attention, kernels: ModuleType) -> Tensor:
    """A v, (B, N, C)."""
    b, heads, d, n = v.shape
    weighted = allocate_contiguous((b, n, heads * d), v)
    kernels.apply(attention.weights, v, by_head(weighted, heads))
    return weighted


# --- The op


def _forward(a: _Arguments, kernels: ModuleType) -> tuple[Tensor, ...]:
    y, *saved = _output(a)
    if y.numel() == 0:
        return y, *saved
    if a.gram:
        _gram_xca.forward(a, y, kernels)
    else:
        _forward_qkv(a, kernels, y, *saved)
    return y, *saved


def _backward(grads: list[Tensor | None], grad: Tensor, a: _Arguments, kernels: ModuleType, *saved: Tensor) -> None:
    if grad.numel() == 0:
        for t in grads:
            if t is not None:
                t.zero_()
    elif a.gram:
        _gram_xca.backward(grads, grad, a, kernels)
    else:
        _backward_qkv(grads, grad, a, kernels, *saved)


_forward_in_crew, _backward_in_crew = (with_crew(run, crew_pays_for_tokens) for run in (_forward, _backward))


# PyTorch's own copies are parallel outside of a crew only.
@without_autocast
def _forward_cpu(a: _Arguments) -> tuple[Tensor, ...]:
    return _forward_in_crew(a._replace(x=a.x.contiguous()), _heads)


@without_autocast
def _backward_cpu(grads: list[Tensor | None], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward_in_crew(grads, grad.contiguous(), a._replace(x=a.x.contiguous()), _heads, *saved)


@without_autocast
def _forward_cuda(a: _Arguments) -> tuple[Tensor, ...]:
    return _forward(a, cuda_heads())


@without_autocast
def _backward_cuda(grads: list[Tensor | None], grad: Tensor, a: _Arguments, *saved: Tensor) -> None:
    _backward(grads, grad, a, cuda_heads(), *saved)


_KERNELS = {"CPU": (_forward_cpu, _backward_cpu), "CUDA": (_forward_cuda, _backward_cuda)}


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.x, _KERNELS, triton=True)
    return cannot + triton_reasons(a.x, a.x.shape[2] // a.num_heads, MOST_CHANNELS), []


def _parts(a: _Arguments) -> dict[str, str]:
    kernel = "Triton kernels" if _native.device_kind(a.x) == "cuda" else _native.kernel_name(_native.device_kind(a.x))
    form = "the Gram form" if _takes_gram(a.x) else "q, k and v"
    return {"attention": kernel, "products over all channels": f"{products_of_tokens(a.x)}, of {form}"}


_op = FusedOp(
    "xca",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("temperature",),
    wide=("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
    saved=(Tensor.contiguous,) * 4,
    parts=_parts,
    dims="B, N, C",
)
_half = HalfBlock(_op, last=("proj_weight", "proj_bias"), norm=True, maps=False)


def fused_xca(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """proj(A v), [q | k | v] = qkv(x), A = softmax(temperature * normalize(q) normalize(k)^T), d x d in each head.

    Args:
        x: (B, N, C), any strides; float32, bfloat16, float16 or float64. The output has its shape and dtype and is
            contiguous.
        qkv_weight, qkv_bias: (3C, C), and (3C,) or None.
        temperature: (num_heads, 1, 1) or (num_heads,). Autocast leaves it alone.
        proj_weight, proj_bias: (C, C), and (C,) or None.
        num_heads: a divisor of C.
        norm_weight, norm_bias, eps: of a layer norm over C in front, (C,) each, both or none.
        gamma, residual, path_scale: of residual + path_scale * gamma * (the above), as in `fused_mlp`; residual is as
            x in its shape, and is given with the others.
        backend: as in `vision_ops.use_backend`.

    Parameters have the dtype of x, or float32 beside a half x. The attention is that of `fused_cross_covariance`, and
    is merged into the projection where that means less work. With many tokens for its channels (`explain` tells), a
    float32 or float64 x takes the Gram form instead, which has no q, k and v: everything follows from the second
    moments of x, centred over the tokens. The GEMMs over all channels are PyTorch's, but for 16 tokens or more in
    float32 on CPUs with AVX2 or AVX-512. Backward keeps, besides the arguments, [q | k | v] and of every sample
    the attention of the heads, or in the Gram form nothing. Gradients come in each argument's own dtype
    and are bitwise repeatable with the same number of threads. Without a kernel for the device, and on GPUs for float64
    and for heads of more than 96 channels, `reference.xca` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    XCiT (arXiv 2106.09681), XCA in xcit.py of facebookresearch/xcit.
    """
    c = check_tokens(x, "B, N, C", num_heads)
    check_projection("qkv", qkv_weight, qkv_bias, 3 * c, "3C", x)
    check_temperature(temperature, num_heads, x, "x")
    check_projection("proj", proj_weight, proj_bias, c, "C", x)
    given = x, qkv_weight, qkv_bias, temperature, proj_weight, proj_bias
    tail: dict[str, Any] = {"gamma": gamma, "residual": residual, "path_scale": path_scale, "backend": backend}
    norm: dict[str, Any] = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    return _half(given, num_heads, _takes_gram(x), **norm, **tail)
