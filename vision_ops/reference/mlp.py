from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_norm_2d import layer_norm_pixels
from .scaled_residual import scaled

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "hardswish": F.hardswish}


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    path_scale: Tensor | None = None,
) -> Tensor:
    """residual + path_scale * gamma * (W2 act(W1 LN(x) + b1) + b2) of (..., C); arguments as in `fused_mlp`."""
    y = x
    if norm_weight is not None and norm_bias is not None:
        y = layer_norm_pixels(x, norm_weight, norm_bias, eps)
    y = y.to(product_dtype(x, fc1_weight))
    y = _linear(ACTIVATIONS[activation](_linear(y, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    y = scaled(y, gamma, path_scale)
    return y if residual is None else residual + y


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the products: autocast hands half weights over beside an x that is not cast, as the norm takes it."""
    return weight.dtype if x.dtype == torch.float32 else x.dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
