"""The MOAT of the article (pytorch-MOAT), which is another network than the paper's and deeplab2's in `moat.py`.

Written from its description and its numbers; its code has no licence and is not used here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops._checks import check_integer, check_sequence
from ..ops.relative_attention import fused_relative_attention
from ..reference.relative_attention import relative_attention
from ._blocks import DropPath, convolve_normalize, normalize
from ._layers import Layers, batch_norm, depthwise

# What looks at shapes. torch.fx then does not trace them, but calls them, wherever they are wrapped by name.
fx.wrap("relative_attention")
fx.wrap("check_fits")


def check_fits(what: str, found: Sequence[int], wanted: tuple[int, ...], *, multiples: bool = False) -> None:
    """Refuses sizes that are not the wanted ones, or not multiples of them."""
    pairs = list(zip(found, wanted, strict=False))
    if len(found) != len(wanted) or not all(n % size == 0 if multiples else n == size for n, size in pairs):
        raise ValueError(f"{what} must be {'multiples of ' if multiples else ''}{wanted}, got {tuple(found)}")


class ArticleSqueezeExcite(nn.Module):
    """x * sigmoid(conv_expand(ReLU(conv_reduce(mean(x))))), a quarter as wide. Keys: conv_reduce, conv_expand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, round(channels / 4))
        self.conv_reduce, self.conv_expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_expand(F.relu(self.conv_reduce(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()


class DepthwiseSeparable(nn.Module):
    """bn2(conv_pw(GELU(bn1(conv_dw(x))))). Keys: conv_dw and conv_pw, without biases, bn1, bn2."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, fused: bool = True) -> None:
        super().__init__()
        self.stride, self.fused = stride, fused
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self._kernel = Layers("dwconv", {"conv_dw": depthwise(in_channels, 3, stride=stride, padding=1)})
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self._bn1, self._bn2 = (
            Layers("batch_norm_act", {name: batch_norm(channels)})
            for name, channels in (("bn1", in_channels), ("bn2", out_channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = convolve_normalize(self, self._kernel, self._bn1, x, "gelu", stride=self.stride, name="bn1")
        return normalize(self, self._bn2, self.conv_pw(y), name="bn2")


class ArticleMBConv(nn.Module):
    """The article's MBConv: skip(x) + conv1x1(SE(BN(conv1x1(GELU(BN(dw3x3(BN(x)))))))), on (N, C, H, W).

    Args:
        in_channels, out_channels: channels of input and output, equal unless it downscales.
        downscale: halves height and width, which must be even; the skip is then a max pool and a 1x1 convolution.
        use_se: whether there is a squeeze and excitation.
        drop_path: stochastic depth.
        fused: False runs plain PyTorch.

    Unlike in the paper, `MBConv` here, the depthwise convolution comes before the expansion, to 4 * out_channels or, in
    downscaling, 2 * out_channels; there is no activation behind the expansion; BN has eps 1e-5.

    Keys: main_path.0 (BN), main_path.1 (conv_dw, bn1, conv_pw, bn2), main_path.2 (SE), main_path.3, skip_path.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        downscale: bool = False,
        *,
        use_se: bool = False,
        drop_path: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if not downscale and in_channels != out_channels:
            raise ValueError(f"out_channels must be in_channels={in_channels} without downscale, got {out_channels}")
        self.downscale = downscale
        hidden = (2 if downscale else 4) * out_channels
        self.main_path = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            DepthwiseSeparable(in_channels, hidden, stride=2 if downscale else 1, fused=fused),
            ArticleSqueezeExcite(hidden) if use_se else nn.Identity(),
            nn.Conv2d(hidden, out_channels, 1),
        )
        pooled = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(in_channels, out_channels, 1)) if downscale else None
        self.skip_path = nn.Identity() if pooled is None else pooled
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.downscale:
            check_fits("height and width of x", x.shape[2:], (2, 2), multiples=True)
        return self.skip_path(x) + self.drop_path(self.main_path(x))


class ArticleSelfAttention(nn.Module):
    """The article's self-attention between all tokens of (B, N, C): proj(softmax(q k^T / sqrt(C / heads) + bias) v).

    Args:
        in_channels: C, a multiple of num_heads.
        num_heads: heads.
        window_size: (height, width) of the map that the tokens are, N = height * width.
        fused: False runs plain PyTorch.

    The table of biases, ((2 height - 1) (2 width - 1), heads), is Swin's: indexed by query - key, of this size only.
    Checkpoints also hold that index, `relative_position_index`, which is computed here and ignored when it is loaded.

    Keys: relative_position_bias_table, qkv_mapping, proj.
    """

    def __init__(
        self, in_channels: int, num_heads: int = 32, window_size: Sequence[int] = (7, 7), *, fused: bool = True
    ) -> None:
        super().__init__()
        check_integer("num_heads", num_heads, 1)
        if in_channels % num_heads:
            raise ValueError(f"in_channels must be a multiple of num_heads={num_heads}, got {in_channels}")
        check_sequence("window_size", window_size, 2)
        for side in window_size:
            check_integer("window_size", side, 1)
        self.num_heads, self.window_size, self.fused = num_heads, tuple(window_size), fused
        height, width = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        self.qkv_mapping = nn.Linear(in_channels, 3 * in_channels)
        self.proj = nn.Linear(in_channels, in_channels)
        self._kernel = Layers("relative_attention", own=("relative_position_bias_table",))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table's first values; the layers have their own."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.window_size
        check_fits("tokens of x", x.shape[1:2], (height * width,))
        q, k, v = self.qkv_mapping(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        # `relative_attention` has its table by head, and indexes it by key - query.
        table = self.relative_position_bias_table.t().unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1, 2)
        attend = relative_attention if self._kernel.tensors(self, q) is None else fused_relative_attention
        y = attend(q, k, v, table, height=height, width=width)
        return self.proj(y.transpose(1, 2).flatten(2))


class ArticleMOATAttention(nn.Module):
    """x + attention(norm_1(x)) within each window of (N, C, H, W). Keys: norm_1, attention."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: Sequence[int],
        drop_path: float = 0.0,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(channels)
        self.attention = ArticleSelfAttention(channels, num_heads, window_size, fused=fused)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.attention.window_size
        check_fits("height and width of x", x.shape[2:], (height, width), multiples=True)
        n, channels, rows, columns = x.shape
        shape = n, rows // height, height, columns // width, width, channels
        tokens = x.permute(0, 2, 3, 1).reshape(shape).transpose(2, 3).reshape(-1, height * width, channels)
        tokens = tokens + self.drop_path(self.attention(self.norm_1(tokens)))
        windows = tokens.reshape(n, rows // height, columns // width, height, width, channels).transpose(2, 3)
        return windows.reshape(n, rows, columns, channels).permute(0, 3, 1, 2)


class ArticleMOATBlock(nn.Module):
    """`ArticleMBConv` without SE, then x + attention(LN(x)); both residuals drop their paths with the same probability.

    Args:
        in_channels, out_channels, downscale, drop_path, fused: as `ArticleMBConv`.
        num_heads: heads.
        window_size: (height, width) of the windows, which must tile the map that attention gets; that map's own size is
            attention over all of it. The table of biases is tied to it.

    Drop paths drop windows of samples. Input and output are (N, C, H, W).

    Keys: mb_conv, moat_attention.norm_1, moat_attention.attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        downscale: bool = False,
        *,
        num_heads: int,
        window_size: Sequence[int] = (7, 7),
        drop_path: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.mb_conv = ArticleMBConv(in_channels, out_channels, downscale, drop_path=drop_path, fused=fused)
        self.moat_attention = ArticleMOATAttention(out_channels, num_heads, window_size, drop_path, fused=fused)

    def forward(self, x: Tensor) -> Tensor:
        return self.moat_attention(self.mb_conv(x))
