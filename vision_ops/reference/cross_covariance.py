import torch
import torch.nn.functional as F
from torch import Tensor


def _normalized(x: Tensor) -> Tensor:
    """F.normalize over the tokens; half types through float32, where the bound of 1e-12 on the norm is not 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


def cross_covariance_weights(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    """softmax(temperature * normalize(q) normalize(k)^T): (B, heads, d, d)."""
    return ((_normalized(q) @ _normalized(k).transpose(-2, -1)) * temperature.reshape(-1, 1, 1)).softmax(dim=-1)


def cross_covariance(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Attention between channels, (B, heads, d, N); arguments as in `fused_cross_covariance`."""
    weights = cross_covariance_weights(q, k, temperature)
    return weights.to(v.dtype) @ v
