"""What the blocks of several networks share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.dwconv import fused_dwconv
from ._checkpointing import checkpointed
from ._layers import Layers, computed


class Blocks(nn.Sequential):
    """Blocks in a row; with grad_checkpointing, each is computed again in backward instead of keeping what it saved."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self:
            x = checkpointed(block, x) if again else block(x)
        return x


@computed
class DropPath(nn.Module):
    """Stochastic depth: drops whole samples of a residual branch in training and scales up what stays."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def path_scale(self, x: Tensor) -> Tensor | None:
        """What forward multiplies each sample by, (N,); None for 1."""
        if self.drop_prob == 0 or not self.training:
            return None
        return x.new_empty(x.shape[0]).bernoulli_(1 - self.drop_prob).div_(1 - self.drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.path_scale(x)
        return x if scale is None else x * scale.view(-1, *(1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


def layer_scale(dim: int, init_value: float) -> nn.Parameter | None:
    """gamma, (C,); None where the official constructors have none."""
    return nn.Parameter(torch.full((dim,), float(init_value))) if init_value > 0 else None


def fill_(parameter: nn.Parameter | None, value: float) -> None:
    """What `reset_parameters` does to a factor, which some blocks are built without."""
    if parameter is not None:
        nn.init.constant_(parameter, value)


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def inverted_bottleneck(
    x: Tensor, pwconv1: nn.Module, act: Callable[[Tensor], Tensor], pwconv2: nn.Module, gamma: Tensor | None
) -> Tensor:
    """gamma * pwconv2(act(pwconv1(x))) of (N, H, W, C), as (N, C, H, W)."""
    return scaled(pwconv2(act(pwconv1(x))), gamma).permute(0, 3, 1, 2)


def convolve(block: nn.Module, kernel: Layers, x: Tensor, stride: int = 1) -> Tensor:
    """The depthwise convolution, padded by half of its kernel, that is the only layer of `kernel`."""
    parameters = kernel.tensors(block, x)
    if parameters is None:
        (name,) = kernel.layers
        return getattr(block, name)(x)
    return fused_dwconv(x, *parameters, stride=stride)
