"""HorNet's gated recursion: a chain of gates with 1x1 convolutions between them, that double the channels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from ._allocation import empty, memory_format
from ._autograd import any_requires_grad
from ._checks import autocast_enabled, check_parameter, check_pointwise, check_sequence, check_tensor
from ._devices import device_reasons, on_devices, without_autocast
from ._maps import pixel_dense
from ._pointwise import (
    channel_sums,
    crew_pays,
    linear,
    linear_times,
    multiplies,
    products,
    weight_gradient,
)
from ._registration import FusedOp


class _Arguments(NamedTuple):
    pwa: Tensor
    dw: Tensor
    pw_weights: list[Tensor]  # (O, I)
    pw_biases: list[Tensor | None]


def _reference(a: _Arguments) -> Tensor:
    return reference.gated_recursion(*a)


def _output(a: _Arguments) -> Tensor:
    n, _, h, w = a.pwa.shape
    return empty((n, chain_widths(a.pwa, a.pw_weights)[-1], h, w), a.pwa)


def chain_widths(pwa: Tensor, pw_weights: Sequence[Tensor]) -> list[int]:
    return [pwa.shape[1], *(w.shape[0] for w in pw_weights)]


# --- The chain, for this op and for those that contain it. Its tensors are pixel_dense in one memory format.


class Gates(NamedTuple):
    """The kernels of a device. chain and chain_backward compute all in one, where has_chain, of widths and dtype;
    elsewhere chain returns False."""

    gate: Callable[[Tensor, Tensor | None, Tensor, Tensor], None]
    gate_backward: Callable[..., None]
    channel_sums: Callable[[Tensor, Tensor | None], None]
    chain: Callable[..., bool]
    chain_backward: Callable[..., None]
    has_chain: Callable[[Sequence[int], torch.dtype], bool]


@functools.cache
def cpu_gates() -> Gates:
    return Gates(_gate, _gate_backward, channel_sums, lambda *_: False, lambda *_: None, lambda *_: False)


def cuda_gates() -> Gates:
    from ..kernels import gated_recursion as triton
    from ..kernels import recursion_chain

    gates = triton.gate, triton.gate_backward, triton.channel_sums
    return Gates(*gates, recursion_chain.chain, recursion_chain.chain_backward, recursion_chain.has_chain)


def run_chain(
    gates: Gates, pwa: Tensor, dw: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor
) -> None:
    """out = p_order."""
    if gates.chain(pwa, dw, weights, biases, out):
        return
    n, _, h, w = pwa.shape
    first, *rest = dw.split_with_sizes(chain_widths(pwa, weights), dim=1)
    p = empty(pwa.shape, pwa) if weights else out
    gates.gate(pwa, None, first, p)
    for k, (weight, bias, q) in enumerate(zip(weights, biases, rest, strict=True), start=1):
        u = empty((n, len(weight), h, w), pwa) if k < len(weights) else out
        if not linear_times(p, weight.flatten(1), bias, q, u):
            linear(p, weight.flatten(1), None, u)
            gates.gate(u, bias, q, u)
        p = u


class ChainAgain:
    """The chain computed once more for its backward pass: `p` has every p_k."""

    def __init__(
        self,
        gates: Gates,
        pwa: Tensor,
        dw: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        last: bool,
    ) -> None:
        """last: whether p_order is wanted, too."""
        self.gates, self.weights, self.biases = gates, [w.flatten(1) for w in weights], [None, *biases]
        self.q = dw.split_with_sizes(chain_widths(pwa, weights), dim=1)
        self.u, self.p = [pwa], list[Tensor]()
        for k, q in enumerate(self.q):
            if k > 0:
                self.u.append(empty(q.shape, pwa))
                linear(self.p[-1], self.weights[k - 1], None, self.u[-1])
            if last or k < len(weights):
                self.p.append(empty(q.shape, pwa))
                gates.gate(self.u[k], self.biases[k], q, self.p[k])

    def backward(
        self,
        dp: Tensor,
        dpwa: Tensor,
        ddw: Tensor,
        dweights: Sequence[Tensor | None],
        dbiases: Sequence[Tensor | None],
        sums: Tensor | None = None,
    ) -> None:
        """Writes the gradients of all arguments, and that of a bias of pwa into `sums`. Only once: gradients take the
        memory of what they are the last to need."""
        dq = ddw.split_with_sizes([q.shape[1] for q in self.q], dim=1)
        for k in reversed(range(1, len(self.q))):
            u = self.u[k]
            self.gates.gate_backward(dp, u, self.biases[k], self.q[k], u, dq[k], dbiases[k - 1])
            weight_gradient(u, self.p[k - 1], dweights[k - 1])
            dp = self.p[k - 1]
            linear(u, self.weights[k - 1].t(), None, dp)
        self.gates.gate_backward(dp, self.u[0], None, self.q[0], dpwa, dq[0], sums)


def backward_chain(
    gates: Gates,
    pwa: Tensor,
    dw: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dp: Tensor,
    grads: Sequence[Any],
    sums: Tensor | None = None,
    use_last: Callable[[Tensor], None] | None = None,
) -> None:
    """grads: of pwa, dw, weights and biases. sums: of a bias of pwa. use_last is given p_order."""
    dpwa, ddw, dweights, dbiases = grads
    widths, weights = chain_widths(pwa, weights), [w.flatten(1) for w in weights]
    if not gates.has_chain(widths, pwa.dtype):
        chain = ChainAgain(gates, pwa, dw, weights, biases, last=use_last is not None)
        if use_last is not None:
            use_last(chain.p.pop())
        return chain.backward(dp, dpwa, ddw, dweights, dbiases, sums)
    p, du = empty(ddw.shape, ddw), empty((len(dp), sum(widths[1:]), *dp.shape[2:]), ddw)
    gates.chain_backward(pwa, dw, weights, biases, dp, p, dpwa, ddw, du, [sums, *dbiases])
    each = p.split_with_sizes(widths, dim=1)
    if use_last is not None:
        use_last(each[-1])
    for of_u, before, dweight in zip(du.split_with_sizes(widths[1:], dim=1), each, dweights, strict=False):
        weight_gradient(of_u, before, dweight)


def _gate(u: Tensor, bias: Tensor | None, q: Tensor, p: Tensor) -> None:
    """p = (u + bias) * q; p may be u."""
    bias = None if bias is None else bias.contiguous()
    _native.cpu_kernels().gate(_native.view(u), _native.channels_view(bias), _native.view(q), _native.view(p))


def _gate_backward(
    dp: Tensor, u: Tensor, bias: Tensor | None, q: Tensor, du: Tensor, dq: Tensor, dbias: Tensor | None
) -> None:
    """du = dp * q, dq = dp * (u + bias), dbias = the sum of du over the pixels; du may be u."""
    bias = None if bias is None else bias.contiguous()
    inputs = _native.view(dp), _native.view(u), _native.channels_view(bias), _native.view(q)
    _native.cpu_kernels().gate_backward(*inputs, _native.view(du), _native.view(dq), _native.channels_view(dbias))


# --- The op


@without_autocast
def _forward(gates: Callable[[], Gates], a: _Arguments) -> Tensor:
    y, wanted = _output(a), memory_format(a.pwa)
    run_chain(gates(), pixel_dense(a.pwa, wanted), pixel_dense(a.dw, wanted), a.pw_weights, a.pw_biases, y)
    return y


@without_autocast
def _backward(gates: Callable[[], Gates], grads: list[Any], grad: Tensor, a: _Arguments) -> None:
    dpwa, ddw, dweights, dbiases = grads
    wanted = memory_format(a.pwa)
    pwa, dw, dp = (pixel_dense(t, wanted) for t in (a.pwa, a.dw, grad))
    into_pwa, into_dw = (
        empty(t.shape, pwa) if given is None or pixel_dense(given, wanted) is not given else given
        for t, given in ((pwa, dpwa), (dw, ddw))
    )
    of_chain = into_pwa, into_dw, dweights, dbiases
    backward_chain(gates(), pwa, dw, a.pw_weights, a.pw_biases, dp, of_chain)
    for given, found in ((dpwa, into_pwa), (ddw, into_dw)):
        if given is not None and given is not found:
            given.copy_(found)


_KERNELS = on_devices(_forward, _backward, cpu=cpu_gates, cuda=cuda_gates, crew=crew_pays)


def _predicate(a: _Arguments) -> tuple[list[str], list[str]]:
    cannot = device_reasons(a.pwa, _KERNELS, triton=True)
    if cannot or _native.device_kind(a.pwa) != "cpu" or multiplies(a.pwa):
        return cannot, []
    if torch.is_grad_enabled() and any_requires_grad(a):
        return [], ["on CPUs PyTorch trains faster, keeping every p_k where the kernels compute them again"]
    if _native.cpu_kernels().isa != "avx512":
        return [], ["PyTorch is faster on CPUs without AVX-512"]
    return [], []


def _parts(a: _Arguments) -> dict[str, str]:
    return gate_parts(a.pwa, chain_widths(a.pwa, a.pw_weights))


def gate_parts(x: Tensor, widths: list[int]) -> dict[str, str]:
    """What runs the chain for tensors like x."""
    if _native.device_kind(x) != "cuda":
        return {"gates": _native.kernel_name(_native.device_kind(x)), "1x1 convolutions": products(x)}
    from ..kernels.recursion_chain import has_chain

    if not has_chain(widths, x.dtype):
        return {"gates": "Triton kernel", "1x1 convolutions": "PyTorch's GEMMs"}
    return {"recursion": "Triton kernel", "1x1 convolutions around it": "PyTorch's GEMMs"}


_op = FusedOp(
    "gated_recursion",
    _Arguments,
    output=_output,
    kernels=_KERNELS,
    reference=_reference,
    predicate=_predicate,
    triton=True,
    wide=("pw_weights", "pw_biases"),
    parts=_parts,
)


def fused_gated_recursion(
    pwa: Tensor,
    dw: Tensor,
    pw_weights: Sequence[Tensor],
    pw_biases: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """p_1 = pwa * q_0, p_{k+1} = (pw_weights[k-1] p_k + pw_biases[k-1]) * q_k; q_0, q_1, ... = the channels of dw.

    Args:
        pwa: (N, d_0, H, W), any strides; float32, bfloat16, float16 or float64. The output has its memory format and
            dtype.
        dw: (N, d_0 + d_1 + ..., H, W), in the dtype of pwa. Channel slices of larger tensors are not copied.
        pw_weights: of the 1x1 convolutions, (d_{k+1}, d_k) or (d_{k+1}, d_k, 1, 1), in the dtype of pwa, or float32
            beside a half pwa. There may be none.
        pw_biases: (d_{k+1},), as the weights; each or all may be None.
        backend: as in `vision_ops.use_backend`.

    Returns (N, d_last, H, W). Bias and gate are one pass, or where the products are ours, in float32 on CPUs, their
    end. Backward keeps the arguments only and computes every p_k again. Gradients come in each argument's own dtype and
    are bitwise repeatable with the same number of threads. Without a kernel for the device, `reference.gated_recursion`
    runs; so it does on CPUs where the products are PyTorch's and it is faster, in training and without AVX-512
    (`explain` tells). `fused_gnconv` always has the kernels.

    Raises:
        TypeError, ValueError: an argument is not as above.

    HorNet (arXiv 2207.14284), gnconv in hornet.py of raoyongming/HorNet.
    """
    check_tensor("pwa", pwa, "N, C, H, W")
    check_tensor("dw", dw, "N, C, H, W")
    weights, biases = check_chain(pwa.shape[1], pw_weights, pw_biases, "pwa", pwa)
    n, d, h, w = pwa.shape
    total = d + sum(weight.shape[0] for weight in weights)
    check_parameter("dw", dw, (n, total, h, w), "N, sum of all d_k, H, W", pwa, "pwa")
    if dw.dtype != pwa.dtype and not autocast_enabled(pwa):
        raise TypeError(f"dw must have the dtype of pwa, {pwa.dtype}, got {dw.dtype}")
    return _op(pwa, dw, weights, biases, backend=backend)


def check_chain(
    width: int,
    pw_weights: Sequence[Tensor],
    pw_biases: Sequence[Tensor | None] | None,
    name: str,
    x: Tensor,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The parameters of a chain that begins with d_0 = `width` channels, for an x of that name."""
    check_sequence("pw_weights", pw_weights)
    biases = [None] * len(pw_weights) if pw_biases is None else pw_biases
    check_sequence("pw_biases", biases, len(pw_weights))
    for k, (weight, bias) in enumerate(zip(pw_weights, biases, strict=True)):
        check_pointwise(f"pw_weights[{k}]", weight, (None, width), f"d_{k + 1}, d_{k}", x, name)
        width = weight.shape[0]
        if bias is not None:
            check_parameter(f"pw_biases[{k}]", bias, (width,), f"d_{k + 1}", x, name)
    return list(pw_weights), list(biases)
