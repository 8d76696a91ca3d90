import torch.nn.functional as F
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of (N, C, H, W) in the dtype of x; weight (O, I) or (O, I, 1, 1)."""
    weight = (weight[:, :, None, None] if weight.ndim == 2 else weight).to(x.dtype)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype))
