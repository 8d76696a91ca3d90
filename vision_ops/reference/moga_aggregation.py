from collections.abc import Sequence

from torch import Tensor

from ._pointwise import pointwise
from .feature_decompose import feature_decompose
from .moga_gate import moga_gate
from .multi_order_dwconv import multi_order_dwconv


def moga_aggregation(
    x: Tensor,
    proj_1_weight: Tensor,
    proj_1_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    dw_weights: Sequence[Tensor],
    dw_biases: Sequence[Tensor | None] | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    proj_2_weight: Tensor,
    proj_2_bias: Tensor | None,
    sigma: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 3),
    split: Sequence[int] = (1, 3, 4),
    double_gate_act: bool = False,
) -> Tensor:
    """MogaNet's spatial aggregation with its inner shortcut; arguments as in `fused_moga_aggregation`."""
    u = feature_decompose(pointwise(x, proj_1_weight, proj_1_bias), sigma)
    gate = pointwise(u, gate_weight, gate_bias)
    value = multi_order_dwconv(u, dw_weights, dw_biases, dilations=dilations, split=split)
    y = moga_gate(gate, pointwise(value, pw_weight, pw_bias), double_gate_act=double_gate_act)
    return pointwise(y, proj_2_weight, proj_2_bias) + x
