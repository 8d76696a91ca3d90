from collections.abc import Sequence

from torch import Tensor

from ._pointwise import pointwise
from .dwconv import dwconv
from .gated_recursion import gated_recursion


def gnconv(
    x: Tensor,
    proj_in_weight: Tensor,
    proj_in_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weights: Sequence[Tensor],
    pw_biases: Sequence[Tensor | None] | None,
    proj_out_weight: Tensor,
    proj_out_bias: Tensor | None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """HorNet's recursive gated convolution; arguments as in `fused_gnconv`."""
    total = dw_weight.shape[0]
    projected = pointwise(x, proj_in_weight, proj_in_bias)
    pwa, abc = projected.split([projected.shape[1] - total, total], dim=1)
    p = gated_recursion(pwa, dwconv(abc, dw_weight, dw_bias) * scale, pw_weights, pw_biases)
    return pointwise(p, proj_out_weight, proj_out_bias)
