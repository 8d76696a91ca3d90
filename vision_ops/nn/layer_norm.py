"""The LayerNorm of convolutional feature maps, in the stems, downsampling and blocks of HorNet and EdgeNeXt."""

import torch
from torch import Tensor, nn

from ..ops.layer_norm_2d import fused_layer_norm_2d
from ..reference.layer_norm_2d import layer_norm_2d
from ._layers import Layers, computed

torch.fx.wrap("layer_norm_2d")  # it asks for the dtype and the layout of x


@computed
class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (N, C, H, W): `fused_layer_norm_2d` with parameters.

    Args:
        normalized_shape: channels C.
        eps: added to the variance.
        fused: False runs plain PyTorch.

    Keys: weight, bias. It is the official `LayerNorm(normalized_shape, eps, data_format="channels_first")`.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-6, *, fused: bool = True) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.fused = (normalized_shape,), eps, fused
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self._kernel = Layers("layer_norm_2d", own=("weight", "bias"))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._kernel.tensors(self, x)
        if parameters is None:
            return layer_norm_2d(x, self.weight, self.bias, eps=self.eps)
        return fused_layer_norm_2d(x, *parameters, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"
