import torch.nn.functional as F
from torch import Tensor

from .dwconv import dwconv


def dwconv_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C); arguments as in `fused_dwconv_layer_norm`."""
    y = dwconv(x, weight, bias).permute(0, 2, 3, 1)
    return F.layer_norm(y, ln_weight.shape, ln_weight, ln_bias, eps)
