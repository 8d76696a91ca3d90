import torch.nn.functional as F
from torch import Tensor

from ._pointwise import pointwise
from .dwconv import dwconv


def channel_aggregation_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    decompose_weight: Tensor,
    decompose_bias: Tensor | None,
    sigma: Tensor,
) -> Tensor:
    """MogaNet's channel aggregation; arguments as in `fused_channel_aggregation_ffn`."""
    h = dwconv(pointwise(x, fc1_weight, fc1_bias), dw_weight, dw_bias, activation="gelu")
    aggregated = h + sigma.reshape(-1, 1, 1) * (h - F.gelu(pointwise(h, decompose_weight, decompose_bias)))
    return pointwise(aggregated.to(h.dtype), fc2_weight, fc2_bias)
