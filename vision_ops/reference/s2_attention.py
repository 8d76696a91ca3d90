import torch.nn.functional as F
from torch import Tensor

from .shift_split_attention import shift_split_attention


def s2_attention(
    x: Tensor,
    mlp1_weight: Tensor,
    mlp1_bias: Tensor | None,
    mlp2_weight: Tensor,
    mlp2_bias: Tensor | None,
    split_mlp1_weight: Tensor,
    split_mlp2_weight: Tensor,
) -> Tensor:
    """S2-MLPv2's operator on (B, H, W, C); arguments as in `fused_s2_attention`."""
    y = shift_split_attention(_linear(x, mlp1_weight, mlp1_bias), split_mlp1_weight, split_mlp2_weight)
    return _linear(y, mlp2_weight, mlp2_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
