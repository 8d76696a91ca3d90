from collections.abc import Sequence

from torch import Tensor

from .layer_norm_2d import layer_norm_pixels
from .mlp import _linear, product_dtype
from .relative_attention import relative_attention
from .scaled_residual import scaled


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
    u = u.to(product_dtype(x, q_weight)).flatten(1, 2)

    products = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    q, k, v = (_linear(u, *product).unflatten(-1, (num_heads, -1)).transpose(1, 2) for product in products)
    y = relative_attention(q, k, v, bias_table, height=height, width=width, window_size=window_size, scale=scale)
    y = _linear(y.transpose(1, 2).flatten(2), o_weight, o_bias).unflatten(1, (height, width))
    y = scaled(y, None, path_scale)
    return y if residual is None else residual + y
