from collections.abc import Sequence

from torch import Tensor

from ._pointwise import pointwise


def gated_recursion(
    pwa: Tensor, dw: Tensor, pw_weights: Sequence[Tensor], pw_biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """p_1 = pwa * q_0, p_{k+1} = (pws[k-1] p_k + b) * q_k; arguments as in `fused_gated_recursion`."""
    widths = [pwa.shape[1], *(w.shape[0] for w in pw_weights)]
    first, *rest = dw.split(widths, dim=1)
    p = pwa * first
    for weight, bias, q in zip(pw_weights, pw_biases or [None] * len(rest), rest, strict=True):
        p = pointwise(p, weight, bias) * q
    return p
