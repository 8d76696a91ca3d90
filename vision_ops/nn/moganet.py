"""MogaNet (arXiv 2211.03295), after models/moganet.py of Westlake-AI/MogaNet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.channel_aggregation_ffn import fused_channel_aggregation_ffn
from ..ops.dwconv import fused_dwconv
from ..ops.feature_decompose import fused_feature_decompose
from ..ops.moga_aggregation import fused_moga_aggregation
from ..ops.multi_order_dwconv import check_multi_order, fused_multi_order_dwconv
from ._blocks import DropPath, convolve, evaluated, half_of, normalize, residual, tail_layers
from ._layers import Layer, Layers, batch_norm, computed, depthwise, dropout, module, pointwise
from .layer_norm import LayerNorm2d

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"GELU": F.gelu, "ReLU": F.relu, "SiLU": F.silu}
_NORMS: dict[str, Callable[[int, bool], nn.Module]] = {
    "BN": lambda channels, fused: nn.BatchNorm2d(channels),
    "SyncBN": lambda channels, fused: nn.SyncBatchNorm(channels),
    "GN": lambda channels, fused: nn.GroupNorm(channels, channels),
    "LN2d": lambda channels, fused: LayerNorm2d(channels, fused=fused),
}


def _activation(argument: str, name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"{argument} must be one of {tuple(_ACTIVATIONS)}, got {name!r}")
    return name


def build_norm(argument: str, name: str, channels: int, fused: bool) -> nn.Module:
    """A norm of (N, C, H, W). "LN", which the official class accepts and then crashes on, is not one: see "LN2d"."""
    if name not in _NORMS:
        raise ValueError(f"{argument} must be one of {tuple(_NORMS)}, got {name!r}")
    return _NORMS[name](channels, fused)


@computed
class ElementScale(nn.Module):
    """A factor per channel. Keys: scale (1, C, 1, 1)."""

    def __init__(self, embed_dims: int, init_value: float = 0.0, requires_grad: bool = True) -> None:
        super().__init__()
        self.init_value = init_value
        self.scale = nn.Parameter(torch.full((1, embed_dims, 1, 1), float(init_value)), requires_grad=requires_grad)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init_value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _scale(channels: int) -> Layer:
    return module(ElementScale)._replace(tensors=("scale",), shape=(1, channels, 1, 1))


@computed
class MultiOrderDWConv(nn.Module):
    """Multi-order features: `fused_multi_order_dwconv` with kernels 5, 5, 7, then a pointwise convolution.

    Args:
        embed_dims: channels C; a multiple of sum(channel_split).
        dw_dilation: dilations of the three convolutions, 1 to 3.
        channel_split: ratio of the three branches.
        fused: False runs plain PyTorch.

    Input and output are (N, C, H, W). Keys: DW_conv0, DW_conv1, DW_conv2, PW_conv.
    """

    def __init__(
        self,
        embed_dims: int,
        dw_dilation: Sequence[int] = (1, 2, 3),
        channel_split: Sequence[int] = (1, 3, 4),
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.dw_dilation, self.channel_split, self.fused = tuple(dw_dilation), tuple(channel_split), fused
        self._widths = check_multi_order(embed_dims, self.dw_dilation, self.channel_split)
        convs: dict[str, Layer] = {}
        for i, (width, kernel_size) in enumerate(zip((embed_dims, *self._widths[1:]), (5, 5, 7), strict=True)):
            d = self.dw_dilation[i]
            conv = nn.Conv2d(width, width, kernel_size, padding=d * (kernel_size // 2), groups=width, dilation=d)
            self.add_module(f"DW_conv{i}", conv)
            convs[f"DW_conv{i}"] = depthwise(width, kernel_size, dilation=d)
        self._kernel = Layers("multi_order_dwconv", convs)
        self.PW_conv = nn.Conv2d(embed_dims, embed_dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._kernel.tensors(self, x)
        if parameters is None:
            low, middle, high = self.DW_conv0(x).split(self._widths, dim=1)
            return self.PW_conv(torch.cat([low, self.DW_conv1(middle), self.DW_conv2(high)], dim=1))
        weights, biases = parameters[::2], parameters[1::2]
        split = self.channel_split
        return self.PW_conv(fused_multi_order_dwconv(x, weights, biases, dilations=self.dw_dilation, split=split))


@computed
class MultiOrderGatedAggregation(nn.Module):
    """Spatial aggregation: decompose, gate and value branches, and the block's own inner shortcut.

    y = proj_2(act(gate(u)) * act(value(u))) + x, u = act(p + sigma * (p - mean(p))), p = proj_1(x).

    Args:
        embed_dims, attn_dw_dilation, attn_channel_split: as `MultiOrderDWConv`.
        attn_act_type: "SiLU", "GELU" or "ReLU".
        attn_force_fp32: the official option, which in truth applies the gates' activation twice: the same as
            double_gate_act. It has no effect on the precision here.
        double_gate_act: for weights that were trained so: those of openmixup, unlike those of Westlake-AI/MogaNet.
            The wrong choice moves the logits by 0.12 of their standard deviation.
        fused: False runs plain PyTorch.

    With SiLU it is `fused_moga_aggregation`, one op. Input and output are (N, C, H, W). Keys: proj_1, gate, value,
    proj_2, sigma.
    """

    def __init__(
        self,
        embed_dims: int,
        attn_dw_dilation: Sequence[int] = (1, 2, 3),
        attn_channel_split: Sequence[int] = (1, 3, 4),
        attn_act_type: str = "SiLU",
        attn_force_fp32: bool = False,
        *,
        double_gate_act: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.act_type = _activation("attn_act_type", attn_act_type)
        self.double_gate_act, self.fused = attn_force_fp32 or double_gate_act, fused
        self.proj_1 = nn.Conv2d(embed_dims, embed_dims, 1)
        self.gate = nn.Conv2d(embed_dims, embed_dims, 1)
        self.value = MultiOrderDWConv(embed_dims, attn_dw_dilation, attn_channel_split, fused=fused)
        self.proj_2 = nn.Conv2d(embed_dims, embed_dims, 1)
        self.sigma = ElementScale(embed_dims, init_value=1e-5)
        sigma = {"sigma": _scale(embed_dims)}
        self._kernel, self._decompose = None, Layers("feature_decompose", sigma)
        if attn_act_type == "SiLU":
            pw = pointwise(embed_dims, embed_dims)
            options = {name: getattr(self.value, name) for name in ("dw_dilation", "channel_split")}
            value = {"value": module(MultiOrderDWConv, fused=True, **options), "value.PW_conv": pw}
            convs = {f"value.{name}": conv for name, conv in self.value._kernel.layers.items()}
            layers = {"proj_1": pw, "gate": pw, **value, "proj_2": pw, **sigma, **convs}
            self._kernel = Layers("moga_aggregation", layers)

    def forward(self, x: Tensor) -> Tensor:
        parameters = None if self._kernel is None else self._kernel.tensors(self, x)
        return self._composed(x) if parameters is None else self.whole(x, parameters)

    def whole(self, x: Tensor, parameters: list[Any], **half: Any) -> Tensor:
        """As one op. half: what it takes as a half-block."""
        into, out, convs = parameters[:4], parameters[4:9], parameters[9:]
        given = *into, convs[::2], convs[1::2], *out
        return fused_moga_aggregation(
            x,
            *given,
            dilations=self.value.dw_dilation,
            split=self.value.channel_split,
            double_gate_act=self.double_gate_act,
            **half,
        )

    def _composed(self, x: Tensor) -> Tensor:
        act = _ACTIVATIONS[self.act_type]
        p = self.proj_1(x)
        sigma = self._decompose.tensors(self, p)
        if sigma is None:
            u = act(p + self.sigma(p - p.mean(dim=(2, 3), keepdim=True)))
        else:
            u = act(fused_feature_decompose(p, *sigma, activation=None))
        gate, value = act(self.gate(u)), act(self.value(u))
        if self.double_gate_act:
            gate, value = act(gate), act(value)
        return self.proj_2(gate * value) + x


@computed
class ChannelAggregationFFN(nn.Module):
    """Feed-forward network with a depthwise convolution and channel aggregation.

    y = fc2(h + sigma * (h - act(decompose(h)))), h = act(dwconv(fc1(x))), with dropout after h and y.

    Args:
        embed_dims: channels of input and output.
        feedforward_channels: channels of h.
        kernel_size: of the depthwise convolution, odd.
        act_type: "GELU" (the erf form), "SiLU" or "ReLU".
        ffn_drop: dropout rate.
        fused: False runs plain PyTorch.

    With GELU, and unless it drops, it is `fused_channel_aggregation_ffn`, one op. Input and output are (N, C, H, W).
    Keys: fc1, dwconv, fc2, decompose, sigma.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        kernel_size: int = 3,
        act_type: str = "GELU",
        ffn_drop: float = 0.0,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        hidden = feedforward_channels
        self.act_type, self.fused = _activation("act_type", act_type), fused
        self.fc1 = nn.Conv2d(embed_dims, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, embed_dims, 1)
        self.drop = nn.Dropout(ffn_drop)
        self.decompose = nn.Conv2d(hidden, 1, 1)
        self.sigma = ElementScale(hidden, init_value=1e-5)
        dwconv = {"dwconv": depthwise(hidden, kernel_size)}
        self._kernel, self._dwconv = None, Layers("dwconv", dwconv)
        if act_type == "GELU":
            ends = {"fc2": pointwise(hidden, embed_dims), "decompose": pointwise(hidden, 1), "sigma": _scale(hidden)}
            layers = {"fc1": pointwise(embed_dims, hidden), **dwconv, **ends, "drop": dropout()}
            self._kernel = Layers("channel_aggregation_ffn", layers)

    def forward(self, x: Tensor) -> Tensor:
        parameters = None if self._kernel is None else self._kernel.tensors(self, x)
        return self._composed(x) if parameters is None else fused_channel_aggregation_ffn(x, *parameters)

    def _composed(self, x: Tensor) -> Tensor:
        """With what the whole op lacks: dropout within, other activations, and layers that are to be called."""
        act, h = _ACTIVATIONS[self.act_type], self.fc1(x)
        parameters = None if self.act_type == "ReLU" else self._dwconv.tensors(self, h)
        if parameters is None:
            h = act(convolve(self, self._dwconv, h))
        else:
            h = fused_dwconv(h, *parameters, activation=self.act_type.lower())
        h = self.drop(h)
        return self.drop(self.fc2(h + self.sigma(h - act(self.decompose(h)))))


class MogaBlock(nn.Module):
    """x + layer_scale_1 * attn(norm1(x)), then x + layer_scale_2 * mlp(norm2(x)), each with its own drop path.

    Args:
        embed_dims: channels.
        ffn_ratio: hidden channels of the feed-forward network over embed_dims.
        drop_rate: dropout in the feed-forward network.
        drop_path_rate: stochastic depth.
        act_type: of the feed-forward network.
        norm_type: "BN", "SyncBN", "GN" or "LN2d".
        init_value: of the layer scales.
        attn_dw_dilation, attn_channel_split, attn_act_type, attn_force_fp32, double_gate_act: as
            `MultiOrderGatedAggregation`.
        fused: False runs plain PyTorch.

    The gate multiplies two activations that no norm bounds: with float16 it may overflow, prefer bfloat16.
    """

    def __init__(
        self,
        embed_dims: int,
        ffn_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_type: str = "GELU",
        norm_type: str = "BN",
        init_value: float = 1e-5,
        attn_dw_dilation: Sequence[int] = (1, 2, 3),
        attn_channel_split: Sequence[int] = (1, 3, 4),
        attn_act_type: str = "SiLU",
        attn_force_fp32: bool = False,
        *,
        double_gate_act: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.init_value = init_value
        self.layer_scale_1 = nn.Parameter(torch.full((1, embed_dims, 1, 1), float(init_value)))
        self.layer_scale_2 = nn.Parameter(torch.full((1, embed_dims, 1, 1), float(init_value)))
        self.norm1 = build_norm("norm_type", norm_type, embed_dims, fused)
        self.attn = MultiOrderGatedAggregation(
            embed_dims,
            attn_dw_dilation,
            attn_channel_split,
            attn_act_type,
            attn_force_fp32,
            double_gate_act=double_gate_act,
            fused=fused,
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = build_norm("norm_type", norm_type, embed_dims, fused)
        hidden = int(embed_dims * ffn_ratio)
        self.mlp = ChannelAggregationFFN(embed_dims, hidden, act_type=act_type, ffn_drop=drop_rate, fused=fused)
        self.fused = fused
        self._norm1: Layers | None = None
        self._norm2: Layers | None = None
        if norm_type in ("BN", "SyncBN"):
            self._norm1, self._norm2 = (
                Layers("batch_norm_act", {name: batch_norm(embed_dims)}) for name in ("norm1", "norm2")
            )
        self._tail1, self._tail2 = tail_layers("layer_scale_1"), tail_layers("layer_scale_2")
        self._attn = half_of(self.attn._kernel, "attn", MultiOrderGatedAggregation, gamma="layer_scale_1")
        self._mlp = half_of(self.mlp._kernel, "mlp", ChannelAggregationFFN, gamma="layer_scale_2")

    def reset_parameters(self) -> None:
        """Of the layer scales; the layers have their own."""
        for scale in (self.layer_scale_1, self.layer_scale_2):
            nn.init.constant_(scale, self.init_value)

    def forward(self, x: Tensor) -> Tensor:
        y = normalize(self, self._norm1, x, name="norm1")
        given = None if self._attn is None else self._attn.given(self, y, x)
        if given is None:
            x = residual(self, self._tail1, x, self.attn(y))
        else:
            x = self.attn.whole(y, given[0], **given[1])
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x + layer_scale_2 * mlp(norm2(x)). In evaluation norm2 is part of fc1, of maps larger than its weight.
        A half type would round the constant."""
        given = None if self._mlp is None else self._mlp.given(self, x, x)
        if given is None:
            return residual(self, self._tail2, x, self.mlp(normalize(self, self._norm2, x, name="norm2")))
        weight, bias, *rest = given[0]
        affine = evaluated(self, self._norm2, x, name="norm2")
        folds = affine is not None and x.dtype.itemsize > 2 and not torch.compiler.is_compiling()
        if affine is None or not folds or x.numel() <= weight.numel():
            y = normalize(self, self._norm2, x, name="norm2")
            return fused_channel_aggregation_ffn(y, weight, bias, *rest, **given[1])
        scale, shift = affine
        constant = weight.flatten(1) @ shift
        bias = constant if bias is None else bias + constant
        return fused_channel_aggregation_ffn(x, weight * scale[:, None, None], bias, *rest, **given[1])
