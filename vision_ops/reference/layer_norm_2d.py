import torch.nn.functional as F
from torch import Tensor


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the channels of (N, C, H, W); arguments as in `fused_layer_norm_2d`."""
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
