import torch.nn.functional as F
from torch import Tensor

from .cross_covariance import cross_covariance


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (B, heads, d, N) from (B, N, 3C)."""
    b, n, width = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 4, 1).unbind(0)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, d, N) -> (B, N, C)."""
    return x.permute(0, 3, 1, 2).flatten(2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def xca(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
) -> Tensor:
    """Cross-covariance attention of (B, N, C); arguments as in `fused_xca`."""
    q, k, v = split_heads(_linear(x, qkv_weight, qkv_bias), num_heads)
    return _linear(merge_heads(cross_covariance(q, k, v, temperature)), proj_weight, proj_bias)
