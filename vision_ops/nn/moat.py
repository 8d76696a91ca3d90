"""MOAT (arXiv 2210.01820) in the semantics of model/layers/moat_*.py of google-research/deeplab2, which is TensorFlow.

The article's PyTorch code is another network, that of `moat_article.py`: no expansion before the depthwise convolution,
no norm in the stem, other shortcuts; it cannot load the official weights and misses the paper's parameter counts.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_integer, check_sequence
from ..ops.dwconv import fused_dwconv
from ..ops.mbconv import fused_mbconv
from ..ops.relative_attention import check_window, fused_relative_attention
from ..ops.relative_self_attention import fused_relative_self_attention
from ..reference.mbconv import pad_same, pool_same, same_padding
from ..reference.relative_attention import relative_attention
from ._blocks import DropPath, convolve, half_of, of_call
from ._layers import Layers, computed, depthwise, layer_norm, linear, module, pointwise, unbiased
from ._layers import batch_norm as batch_norm_layer

torch.fx.wrap("relative_attention")  # it asks for the size of the table


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


@computed
class SqueezeExcite(nn.Module):
    """x * sigmoid(expand_conv2d(SiLU(reduce_conv2d(mean(x))))). Keys: reduce_conv2d, expand_conv2d."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce_conv2d, self.expand_conv2d = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)
        return x * self.expand_conv2d(F.silu(self.reduce_conv2d(pooled))).sigmoid()


class MBConv(nn.Module):
    """Inverted bottleneck: shortcut(x) + shrink_conv(SE(GELU(BN(dw(GELU(BN(expand_conv(BN(x)))))))))).

    Args:
        in_channels, out_channels: channels of input and output.
        stride: 1 or 2. At 2 the shortcut is an average pool, and every padding is TensorFlow's "SAME".
        expansion: hidden channels over out_channels.
        se: whether there is a squeeze and excitation, of out_channels / 4.
        pool_size: of the average pool, 2 (classification) or 3 (the official choice for dense tasks).
        drop_path: stochastic depth.
        fused: False runs plain PyTorch.

    BN has eps 1e-3 and momentum 0.01 (0.99 in TensorFlow's terms). Where the channels change, the shortcut has a 1x1
    convolution. Input and output are (N, C, H, W).

    Keys: shortcut_conv, pre_norm, expand_conv, expand_norm, depthwise_conv, depthwise_norm, se, shrink_conv.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expansion: int = 4,
        se: bool = True,
        pool_size: int = 2,
        drop_path: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_integer("stride", stride, 1, 2)
        check_integer("pool_size", pool_size, 2, 3)
        self.stride, self.pool_size, self.fused = stride, pool_size, fused
        hidden = expansion * out_channels
        self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.pre_norm = batch_norm(in_channels)
        self.expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.expand_norm = batch_norm(hidden)
        padding = 1 if stride == 1 else 0  # at stride 2 it depends on the size: pad_same
        self.depthwise_conv = nn.Conv2d(hidden, hidden, 3, stride, padding, groups=hidden, bias=False)
        self.depthwise_norm = batch_norm(hidden)
        self.se = SqueezeExcite(hidden, max(1, out_channels // 4)) if se else None
        self.shrink_conv = nn.Conv2d(hidden, out_channels, 1)
        self.drop_path = DropPath(drop_path)
        dw = {"depthwise_conv": depthwise(hidden, 3, stride=stride, padding=padding)}
        layers = {
            "pre_norm": batch_norm_layer(in_channels),
            "expand_conv": unbiased(pointwise(in_channels, hidden)),
            "expand_norm": batch_norm_layer(hidden),
            "depthwise_conv": unbiased(dw["depthwise_conv"]),
            "depthwise_norm": batch_norm_layer(hidden),
            "shrink_conv": pointwise(hidden, out_channels),
            "drop_path": module(DropPath),
        }
        if self.se is not None:
            reduced = self.se.reduce_conv2d.out_channels
            layers |= {
                "se": module(SqueezeExcite),
                "se.reduce_conv2d": pointwise(hidden, reduced),
                "se.expand_conv2d": pointwise(reduced, hidden),
            }
        if self.shortcut_conv is not None:
            layers["shortcut_conv"] = pointwise(in_channels, out_channels)
        self._whole, self._kernel = Layers("mbconv", layers), Layers("dwconv", dw)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = pool_same(x, self.pool_size)
        return x if self.shortcut_conv is None else self.shortcut_conv(x)

    def _depthwise(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return convolve(self, self._kernel, x)
        parameters = self._kernel.tensors(self, x)
        if parameters is None:
            return self.depthwise_conv(pad_same(x))
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # The padding depends on the size, on which a graph must not.
            return fused_dwconv(pad_same(x), *parameters, stride=2, padding=0)
        return fused_dwconv(x, *parameters, stride=2, padding=same_padding(*x.shape[2:]))

    def _residual(self, x: Tensor) -> Tensor:
        y = F.gelu(self.expand_norm(self.expand_conv(self.pre_norm(x))))
        y = F.gelu(self.depthwise_norm(self._depthwise(y)))
        return self.shrink_conv(y if self.se is None else self.se(y))

    def _norms_agree(self) -> bool:
        """Whether they are called alike, as the op's are."""
        first, *rest = (
            (norm.training, norm.momentum, norm.eps) for norm in (self.pre_norm, self.expand_norm, self.depthwise_norm)
        )
        return first[1] is not None and all(other == first for other in rest)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._whole.tensors(self, x)
        if parameters is None or not self._norms_agree():
            return self._shortcut(x) + self.drop_path(self._residual(x))
        pre, expand, expand_norm, dw, dw_norm = (parameters[i:j] for i, j in itertools.pairwise((0, 4, 6, 10, 12, 16)))
        shrink, own = parameters[16:18], parameters[18:]
        for norm in (self.pre_norm, self.expand_norm):
            of_call(norm)
        return fused_mbconv(
            x,
            *(pre, expand[0], expand_norm, dw[0], dw_norm, *shrink),
            se=None if self.se is None else own[:4],
            shortcut=own[-2:] if self.shortcut_conv is not None else None,
            path_scale=self.drop_path.draw(x),
            stride=self.stride,
            pool_size=self.pool_size,
            **of_call(self.depthwise_norm),
        )


@computed
class RelativeSelfAttention(nn.Module):
    """Self-attention between all positions of (B, H, W, C): softmax(q k^T / sqrt(head_dim) + bias) v.

    It runs as `fused_relative_self_attention`; where it calls its layers, as `fused_relative_attention` between them.

    Args:
        channels: C, a multiple of head_dim.
        head_dim: channels of a head.
        table_size: (height, width) of the table of biases, indexed by key - query and resized to (2H - 1, 2W - 1)
            (bilinear, half-pixel); None for the checkpoints without position embedding.
        fused: False runs plain PyTorch.

    Keys: relative_position_embedding (heads, height, width), q, k, v, o.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int = 32,
        table_size: Sequence[int] | None = (27, 27),
        fused: bool = True,
    ) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"channels must be a multiple of head_dim={head_dim}, got {channels}")
        self.num_heads, self.fused = channels // head_dim, fused
        self.relative_position_embedding = None
        if table_size is not None:
            check_sequence("table_size", table_size, 2)
            self.relative_position_embedding = nn.Parameter(torch.empty(self.num_heads, *table_size))
        self.reset_parameters()
        self.q, self.k, self.v, self.o = (nn.Linear(channels, channels) for _ in range(4))
        own = () if table_size is None else ("relative_position_embedding",)
        self._kernel = Layers("relative_self_attention", dict.fromkeys("qkvo", linear(channels, channels)), own)
        self._attention = Layers("relative_attention", own=own)

    def reset_parameters(self) -> None:
        """Of the table; the layers have their own."""
        if self.relative_position_embedding is not None:
            nn.init.normal_(self.relative_position_embedding, std=0.02)

    def forward(self, x: Tensor, window_size: Sequence[int] | None = None) -> Tensor:
        """window_size: (height, width) of the windows that attend each within itself, None for the whole map."""
        parameters = self._kernel.tensors(self, x)
        if parameters is not None:
            return self.whole(x, parameters, window_size)
        height, width = x.shape[1:3]
        tokens = x.flatten(1, 2)
        q, k, v = (p(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attend = relative_attention if self._attention.tensors(self, q) is None else fused_relative_attention
        table = self.relative_position_embedding
        y = attend(q, k, v, table, height=height, width=width, window_size=window_size)
        return self.o(y.transpose(1, 2).flatten(2)).unflatten(1, (height, width))

    def whole(self, x: Tensor, parameters: list[Any], window_size: Sequence[int] | None, **half: Any) -> Tensor:
        """As one op. half: what it takes as a half-block."""
        *table, products = [*parameters[:-8], parameters[-8:]]
        given = x, *products, *table
        return fused_relative_self_attention(*given, num_heads=self.num_heads, window_size=window_size, **half)


class MOATBlock(MBConv):
    """`MBConv` without SE, then x + attention(LN(x)); both residuals drop their paths with the same probability.

    Args:
        in_channels, out_channels, stride, expansion, pool_size, drop_path, fused: as `MBConv`.
        window_size: (height, width) of the windows of the attention, None for global attention. Maps that windows do
            not tile are padded, and the padding is masked; the official code refuses them.
        head_dim, table_size: as `RelativeSelfAttention`.

    Input and output are (N, C, H, W). Keys: those of `MBConv`, attention_norm, attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        window_size: Sequence[int] | None = None,
        expansion: int = 4,
        pool_size: int = 2,
        head_dim: int = 32,
        table_size: Sequence[int] | None = (27, 27),
        drop_path: float = 0.0,
        fused: bool = True,
    ) -> None:
        shared: dict[str, Any] = {
            "stride": stride,
            "expansion": expansion,
            "pool_size": pool_size,
            "drop_path": drop_path,
        }
        super().__init__(in_channels, out_channels, se=False, fused=fused, **shared)
        check_window(window_size)
        self.window_size = None if window_size is None else tuple(window_size)
        self.attention_norm = nn.LayerNorm(out_channels, eps=1e-5)
        self.attention = RelativeSelfAttention(out_channels, head_dim=head_dim, table_size=table_size, fused=fused)
        kernel, norm = self.attention._kernel, layer_norm(out_channels)
        self._half = half_of(kernel, "attention", RelativeSelfAttention, gamma=None, norm="attention_norm", norms=norm)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).permute(0, 2, 3, 1)
        given = None if self._half is None else self._half.given(self, x, x)
        if given is None:
            x = x + self.drop_path(self.attention(self.attention_norm(x), self.window_size))
        else:
            x = self.attention.whole(x, given[0], self.window_size, **given[1])
        return x.permute(0, 3, 1, 2)
