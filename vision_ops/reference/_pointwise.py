import torch.nn.functional as F
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of (N, C, H, W); weight (O, I) or (O, I, 1, 1)."""
    return F.conv2d(x, weight[:, :, None, None] if weight.ndim == 2 else weight, bias)
