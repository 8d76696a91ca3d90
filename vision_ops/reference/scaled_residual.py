from torch import Tensor


def scaled_residual(x: Tensor, branch: Tensor, gamma: Tensor | None = None, path_scale: Tensor | None = None) -> Tensor:
    """x + path_scale * gamma * branch of (N, C, H, W); arguments as in `fused_scaled_residual`."""
    return x + scaled(branch.permute(0, 2, 3, 1), gamma, path_scale).permute(0, 3, 1, 2)


def scaled(branch: Tensor, gamma: Tensor | None, path_scale: Tensor | None) -> Tensor:
    """path_scale * gamma * branch of (N, ..., C), in the dtype of gamma * branch."""
    if gamma is not None:
        branch = gamma * branch
    if path_scale is None:
        return branch
    return path_scale.to(branch.dtype).view(-1, *(1,) * (branch.ndim - 1)) * branch
