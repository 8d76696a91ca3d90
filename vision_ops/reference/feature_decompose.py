from torch import Tensor

from .dwconv import ACTIVATIONS


def feature_decompose(x: Tensor, sigma: Tensor, *, activation: str | None = "silu") -> Tensor:
    """act(x + sigma * (x - mean(x over H, W))); arguments as in `fused_feature_decompose`."""
    y = x + sigma.reshape(-1, 1, 1) * (x - x.mean(dim=(2, 3), keepdim=True))
    return ACTIVATIONS[activation](y).to(x.dtype)  # where sigma was float32 beside a half x
