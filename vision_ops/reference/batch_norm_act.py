import torch.nn.functional as F
from torch import Tensor

from .dwconv import ACTIVATIONS


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """act((x - mean) / sqrt(variance + eps) * weight + bias); arguments as in `fused_batch_norm_act`."""
    # PyTorch's backward pass of channels_last maps reads a weight as if it had no gaps.
    weight, bias = weight.contiguous(), bias.contiguous()
    return ACTIVATIONS[activation](F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))
