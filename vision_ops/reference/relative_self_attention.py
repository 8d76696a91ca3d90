from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_norm_2d import layer_norm_pixels
from .relative_attention import relative_attention


def product_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast casts the weights, and leaves x to the norm and to the residual."""
    return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else x.dtype


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
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
) -> Tensor:
    """Self-attention of (B, H, W, C), or the half-block around it; arguments as in `fused_relative_self_attention`."""
    height, width = x.shape[1:3]
    u = x
    if norm_weight is not None and norm_bias is not None:
        u = layer_norm_pixels(x, norm_weight, norm_bias, eps)
    u = u.to(product_type(x, q_weight)).flatten(1, 2)

    def linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(t, weight.to(t.dtype), None if bias is None else bias.to(t.dtype))

    products = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    q, k, v = (linear(u, *product).unflatten(-1, (num_heads, -1)).transpose(1, 2) for product in products)
    y = relative_attention(q, k, v, bias_table, height=height, width=width, window_size=window_size, scale=scale)
    y = linear(y.transpose(1, 2).flatten(2), o_weight, o_bias).unflatten(1, (height, width))
    if path_scale is not None:
        y = y * path_scale.to(y.dtype).view(-1, 1, 1, 1)
    return y if residual is None else residual + y
