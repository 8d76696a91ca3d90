"""XCiT's attention between the channels of each head, without its projections."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import _heads
from ._allocation import allocate, allocate_contiguous
from ._attention import check_qkv, triton_reasons
from ._checks import check_parameter
from ._devices import CREW_WORK, device_reasons, on_devices, without_autocast
from ._heads import wide
from ._registration import FusedOp


class _Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    temperature: Tensor


def _reference(a: _Arguments) -> Tensor:
    return reference.cross_covariance(*a)


def _output(a: _Arguments) -> Tensor:
    """In the order of v: its channels stay neighbours where they are, so that merging the heads is a view."""
    b, heads, d, n = a.v.shape
    if a.v.stride(2) == 1 and a.v.stride(3) != 1:
        return allocate(a.v.shape, a.v, strides=(n * heads * d, d, 1, heads * d))
    return allocate_contiguous(a.v.shape, a.v)


# --- The attention of q and k, for this op and for those that contain it. `kernels` are `_heads` or Triton's.


class Attention(NamedTuple):
    gram: Tensor
    norms: Tensor  # squared, of q and of k
    weights: Tensor
    temperature: Tensor  # (heads,)


def attend(
    kernels: ModuleType, q: Tensor, k: Tensor, temperature: Tensor, into: tuple[Tensor, ...] | None = None
) -> Attention:
    """into: where the gram, the norms and the weights go, if they are there."""
    attention = empty_attention(q, temperature) if into is None else kept_attention(into, temperature)
    gram, norms, weights, flat = attention
    kernels.gram(q, k, gram, norms, q, k)
    kernels.softmax(gram, norms, flat, weights)
    return attention


def kept_attention(kept: tuple[Tensor, ...], temperature: Tensor) -> Attention:
    gram, norms, weights = kept
    return Attention(gram, norms, weights, flat_temperature(temperature, gram.dtype))


def flat_temperature(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    return temperature.to(dtype).flatten().contiguous()


def sum_samples(each: Tensor, out: Tensor) -> None:
    """out = the sum of (B, ...) over B."""
    if each.dtype == out.dtype:
        torch.sum(each.view(len(each), *out.shape), 0, out=out)
    else:
        out.copy_(each.sum(0).view_as(out))


def empty_attention(q: Tensor, temperature: Tensor) -> Attention:
    b, heads, d, _ = q.shape
    dtype = wide(q.dtype)
    gram, weights = (allocate_contiguous((b, heads, d, d), q, dtype) for _ in range(2))
    norms = allocate_contiguous((b, 2, heads, d), q, dtype)
    return Attention(gram, norms, weights, flat_temperature(temperature, dtype))


def empty_matrices(attention: Attention) -> Tensor:
    return allocate_contiguous(attention.weights.shape, attention.weights)


def gram_gradient(
    kernels: ModuleType, grad: Tensor, attention: Attention, dtemperature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Turns the gradient of the weights into that of the gram, in place, and returns the factors by which q and k, each
    (B, heads, d, 1), add to their own gradients through their norms."""
    gram, norms, weights, temperature = attention
    scales = allocate_contiguous(norms.shape, norms)
    each = allocate_contiguous((*gram.shape[:2], 1, 1), gram)
    kernels.softmax_backward(grad, weights, gram, norms, temperature, scales, each)
    if dtemperature is not None:
        sum_samples(each, dtemperature)
    of_q, of_k = scales.unsqueeze(-1).unbind(1)
    return of_q, of_k


def attend_backward(
    kernels: ModuleType,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    attention: Attention,
    dq: Tensor | None,
    dk: Tensor | None,
    dtemperature: Tensor | None,
) -> None:
    """grad, that of the weights, is overwritten."""
    of_q, of_k = gram_gradient(kernels, grad, attention, dtemperature)
    if dq is not None:
        kernels.apply(grad, k, dq, scale=of_q, z=q)
    if dk is not None:
        kernels.apply(grad, q, dk, transposed=True, scale=of_k, z=k)


# --- The op


def cpu_heads() -> ModuleType:
    return _heads


def cuda_heads() -> ModuleType:
    from ..kernels import cross_covariance

    return cross_covariance


@without_autocast
def _forward(heads: Callable[[], ModuleType], a: _Arguments) -> Tensor:
    y, kernels = _output(a), heads()
    kernels.apply(attend(kernels, a.q, a.k, a.temperature).weights, a.v, y)
    return y


@without_autocast
def _backward(heads: Callable[[], ModuleType], grads: list[Tensor | None], grad: Tensor, a: _Arguments) -> None:
    (dq, dk, dv, dtemperature), kernels = grads, heads()
    attention = attend(kernels, a.q, a.k, a.temperature)
    if dv is not None:
        kernels.apply(attention.weights, grad, dv, transposed=True)
    if dq is not None or dk is not None or dtemperature is not None:
        dweights = empty_matrices(attention)
        kernels.gram(grad, a.v, dweights)
        attend_backward(kernels, dweights, a.q, a.k, attention, dq, dk, dtemperature)


def _crew_pays(q: Tensor) -> bool:
    return q.numel() * q.shape[2] > CREW_WORK


_KERNELS = on_devices(_forward, _backward, cpu=cpu_heads, cuda=cuda_heads, crew=_crew_pays)
MOST_CHANNELS = 96  # of a head, of whose matrix a Triton program holds some rows in registers


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    return device_reasons(a.q, _KERNELS, triton=True) + triton_reasons(a.q, a.q.shape[2], MOST_CHANNELS), []


_op = FusedOp(
    "cross_covariance",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    uncast=("temperature",),
    dims="B, heads, d, N",
)


def check_temperature(temperature: Any, heads: int, x: Tensor, of: str) -> None:
    """As many as there are heads, (heads, 1, 1) as the modules have them or (heads,)."""
    flat = isinstance(temperature, Tensor) and temperature.ndim == 1
    shape, why = ((heads,), "heads") if flat else ((heads, 1, 1), "heads, 1, 1")
    check_parameter("temperature", temperature, shape, why, x, of)


def fused_cross_covariance(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, backend: str | None = None
) -> Tensor:
    """A v, A = softmax(temperature * normalize(q) normalize(k)^T), d x d in every head; normalize: over the tokens.

    Args:
        q: (B, heads, d, N), any strides, views of a (B, N, 3C) tensor included; float32, bfloat16, float16 or float64.
        k, v: as q, in its dtype. The output has the shape, dtype and order of v.
        temperature: (heads, 1, 1) or (heads,), in the dtype of q, or float32 beside a half q. Autocast leaves it alone.
        backend: as in `vision_ops.use_backend`.

    Norms are F.normalize's, 1e-12 at least; a row of zeros gives cosines of 0, in every dtype. Grams, norms and softmax
    are float32 (float64 for float64). Backward keeps the arguments only and computes the attention again. Gradients
    come in each argument's own dtype and are bitwise repeatable. Without a kernel for the device, and on GPUs for
    float64 and for heads of more than 96 channels, `reference.cross_covariance` runs.

    Raises:
        TypeError, ValueError: an argument is not as above.

    XCiT (arXiv 2106.09681), XCA in xcit.py of facebookresearch/xcit.
    """
    check_qkv(q, k, v, "B, heads, d, N")
    check_temperature(temperature, q.shape[1], q, "q")
    return _op(q, k, v, temperature, backend=backend)
