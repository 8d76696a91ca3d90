from torch import Tensor

from .dwconv import dwconv
from .layer_norm_2d import layer_norm_pixels


def dwconv_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C); arguments as in `fused_dwconv_layer_norm`."""
    return layer_norm_pixels(dwconv(x, weight, bias).permute(0, 2, 3, 1), ln_weight, ln_bias, eps)
