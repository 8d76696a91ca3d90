import torch
import torch.nn.functional as F
from torch import Tensor


def _moved(x: Tensor, dim: int, forward: bool) -> Tensor:
    """x moved by one along dim; the row or column at the border keeps its own value."""
    n = x.shape[dim]
    if forward:
        return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, n - 1)], dim)
    return torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, n - 1, 1)], dim)


def spatial_shift(x: Tensor, dims: tuple[int, int]) -> Tensor:
    """Quarters of the channels of (B, H, W, C) moved forward and back along dims[0], then dims[1].

    Out of place. The article's in-place slices overwrite what they still read: wrong in eager mode on the CPU,
    undefined on a GPU, and something else again once compiled or exported.
    """
    c, (a, b) = x.shape[-1], dims
    first, second = x[..., : c // 4], x[..., c // 4 : c // 2]
    third, fourth = x[..., c // 2 : c * 3 // 4], x[..., c * 3 // 4 :]
    return torch.cat(
        [_moved(first, a, True), _moved(second, a, False), _moved(third, b, True), _moved(fourth, b, False)], -1
    )


def split_attention(branches: Tensor, split_mlp1_weight: Tensor, split_mlp2_weight: Tensor) -> Tensor:
    """Weighs the k branches of (B, k, H, W, C) channel by channel; the pooled vector is a sum, not a mean."""
    pooled = branches.sum(dim=(1, 2, 3))
    hidden = F.gelu(F.linear(pooled, split_mlp1_weight.to(pooled.dtype)))
    return weigh_branches(branches, F.linear(hidden, split_mlp2_weight.to(pooled.dtype)))


def weigh_branches(branches: Tensor, weights: Tensor) -> Tensor:
    """sum_k softmax_k(weights)_k * branches_k; weights (B, k * C)."""
    k, c = branches.shape[1], branches.shape[-1]
    return (branches * weights.unflatten(-1, (k, c)).softmax(dim=1)[:, :, None, None]).sum(dim=1)


def shift_split_attention(x: Tensor, split_mlp1_weight: Tensor, split_mlp2_weight: Tensor) -> Tensor:
    """(B, H, W, 3C) -> (B, H, W, C); arguments as in `fused_shift_split_attention`."""
    x1, x2, x3 = x.chunk(3, dim=-1)
    branches = torch.stack([spatial_shift(x1, (1, 2)), spatial_shift(x2, (2, 1)), x3], dim=1)
    return split_attention(branches, split_mlp1_weight, split_mlp2_weight)
