from collections.abc import Sequence

from torch import Tensor

from .relative_attention import relative_attention
from .xca import _linear


def relative_self_attention(
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
) -> Tensor:
    """Self-attention between the positions of (B, H, W, C); arguments as in `fused_relative_self_attention`."""
    height, width = x.shape[1:3]
    tokens = x.flatten(1, 2)
    products = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    q, k, v = (_linear(tokens, *product).unflatten(-1, (num_heads, -1)).transpose(1, 2) for product in products)
    y = relative_attention(q, k, v, bias_table, height=height, width=width, window_size=window_size, scale=scale)
    return _linear(y.transpose(1, 2).flatten(2), o_weight, o_bias).unflatten(1, (height, width))
