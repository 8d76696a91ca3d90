"""S2-MLPv2 (arXiv 2108.01072); its authors published no code: after s2_mlp_v2.py of liuruiyang98/Jittor-MLP."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import fused_s2_attention, fused_shift_split_attention
from ..ops._checks import check_integer
from ..reference.shift_split_attention import spatial_shift, weigh_branches
from ._blocks import Blocks, DropPath, half_of, mlp, mlp_layers
from ._layers import Layers, computed, dropout, layer_norm, linear, module


@computed
class SplitAttention(nn.Module):
    """Weighs k branches channel by channel: sum_k softmax_k(mlp2(GELU(mlp1(sum of all))))_k * x_k.

    Args:
        channel: channels C.
        k: branches.
        reduction: C over the hidden width. 1 is the article's; 4 is what the paper's parameter counts come out with.

    Input is (B, k, H, W, C), output (B, H, W, C). Keys: mlp1, mlp2, without biases.
    """

    def __init__(self, channel: int = 512, k: int = 3, *, reduction: int = 1) -> None:
        super().__init__()
        check_integer("reduction", reduction, 1)
        self.mlp1 = nn.Linear(channel, channel // reduction, bias=False)
        self.mlp2 = nn.Linear(channel // reduction, channel * k, bias=False)

    def forward(self, x_all: Tensor) -> Tensor:
        hidden = F.gelu(self.mlp1(x_all.sum(dim=(1, 2, 3))))
        return weigh_branches(x_all, self.mlp2(hidden))


@computed
class S2Attention(nn.Module):
    """Spatial shifts of three branches, weighed by split attention, between two linear layers.

    The shifts are clean: out of place, borders keep their own value. The in-place slices of the article's code read
    what they have overwritten (wrong on the CPU, undefined on a GPU) and its gradient is that of the clean shift.

    Args:
        channels: channels C, any number; quarters round down.
        reduction: as `SplitAttention`.
        fused: False runs plain PyTorch.

    Input and output are (B, H, W, C). Keys: mlp1, mlp2, split_attention.
    """

    def __init__(self, channels: int = 512, *, reduction: int = 1, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.mlp1, self.mlp2 = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.split_attention = SplitAttention(channels, reduction=reduction)
        split = {
            "split_attention": module(SplitAttention),
            "split_attention.mlp1": linear(channels, channels // reduction, bias=False),
            "split_attention.mlp2": linear(channels // reduction, 3 * channels, bias=False),
        }
        mlps = {"mlp1": linear(channels, 3 * channels), "mlp2": linear(channels, channels)}
        self._kernel, self._split = Layers("s2_attention", {**mlps, **split}), Layers("shift_split_attention", split)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._kernel.tensors(self, x)
        if parameters is None:
            return self.mlp2(self._attend(self.mlp1(x)))
        return self.whole(x, parameters)

    def whole(self, x: Tensor, parameters: list[Any], **half: Any) -> Tensor:
        """As one op. half: what it takes as a half-block."""
        weight1, bias1, weight2, bias2, split_weight1, _, split_weight2, _ = parameters
        return fused_s2_attention(x, weight1, bias1, weight2, bias2, split_weight1, split_weight2, **half)

    def _attend(self, x: Tensor) -> Tensor:
        parameters = self._split.tensors(self, x)
        if parameters is not None:
            return fused_shift_split_attention(x, parameters[0], parameters[2])
        x1, x2, x3 = x.chunk(3, dim=-1)
        return self.split_attention(torch.stack([spatial_shift(x1, (1, 2)), spatial_shift(x2, (2, 1)), x3], dim=1))


class PreNormResidual(nn.Module):
    """x + fn(norm(x)) of (N, H, W, C). Keys: norm, fn.

    Args:
        dim: channels.
        fn: what is called; linear layer, GELU, dropout, linear layer and dropout are one op.
        drop_path: stochastic depth.
        fused: False runs plain PyTorch.
    """

    def __init__(self, dim: int, fn: nn.Module, drop_path: float = 0.0, *, fused: bool = True) -> None:
        super().__init__()
        self.norm, self.fn, self.drop_path = nn.LayerNorm(dim), fn, DropPath(drop_path)
        self.fused, self._mlp, self._half = fused, None, None
        if type(fn) is S2Attention:
            self._half = half_of(fn._kernel, "fn", S2Attention, gamma=None, norm="norm", norms=layer_norm(dim))
        if isinstance(fn, nn.Sequential):
            others = {"fn.1": module(nn.GELU, approximate="none"), "fn.2": dropout(), "fn.4": dropout()}
            self._mlp = mlp_layers(dim, fn[0].out_features, ("fn.0", "fn.3"), norm="norm", others=others)

    def forward(self, x: Tensor) -> Tensor:
        given = None if self._half is None else self._half.given(self, x, x)
        if given is not None:
            return self.fn.whole(x, given[0], **given[1])
        y = None if self._mlp is None else mlp(self, self._mlp, x, x)
        return x + self.drop_path(self.fn(self.norm(x))) if y is None else y


class S2Block(nn.Module):
    """`depth` times x + S2Attention(LN(x)), x + Linear(GELU(Linear(LN(x)))), on (N, C, H, W).

    Args:
        d_model: channels.
        depth: how often.
        expansion_factor: hidden channels over d_model.
        dropout: after both linear layers.
        reduction: as `SplitAttention`.
        drop_path: stochastic depth, of all layers or of each; the article's code has none.
        fused: False runs plain PyTorch.

    Keys: model.{layer}.{0, 1}.{norm, fn}.
    """

    def __init__(
        self,
        d_model: int,
        depth: int,
        expansion_factor: int = 4,
        dropout: float = 0.0,
        *,
        reduction: int = 1,
        drop_path: float | Sequence[float] = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        hidden = d_model * expansion_factor
        rates = [drop_path] * depth if isinstance(drop_path, (int, float)) else list(drop_path)
        if len(rates) != depth:
            raise ValueError(f"drop_path must be one number or {depth} of them, got {len(rates)}")

        def layer(rate: float) -> nn.Sequential:
            bottleneck = nn.Sequential(
                nn.Linear(d_model, hidden),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(hidden, d_model),
                nn.Dropout(dropout),
            )
            attention = S2Attention(d_model, reduction=reduction, fused=fused)
            return nn.Sequential(*(PreNormResidual(d_model, fn, rate, fused=fused) for fn in (attention, bottleneck)))

        self.model = Blocks(*(layer(rate) for rate in rates))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
