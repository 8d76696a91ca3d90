"""EdgeNeXt (arXiv 2206.10589), after models/ of mmaaz60/EdgeNeXt; LPI after xcit.py of facebookresearch/xcit."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._internals import dispatch_modes
from ..ops._checks import check_integer
from ..ops.cross_covariance import fused_cross_covariance
from ..ops.dwconv import fused_dwconv
from ..ops.dwconv_layer_norm import fused_dwconv_layer_norm
from ..ops.split_cascade import check_cascade, fused_split_cascade
from ..ops.xca import fused_xca
from ..reference.cross_covariance import cross_covariance_weights
from ..reference.xca import merge_heads, split_heads
from ._blocks import (
    DropPath,
    HalfBlock,
    convolve,
    convolve_normalize,
    fill_,
    half_of,
    inverted_bottleneck,
    layer_scale,
    mlp,
    mlp_layers,
    normalize,
    residual,
    tail_layers,
)
from ._layers import Layers, batch_norm, computed, depthwise, dropout, layer_norm, linear, module

_MOST_TABLES = 16  # training at several scales has a few; at any size, there is no end of them


def fourier_table(
    H: int, W: int, hidden_dim: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sines and cosines of row and column, (1, 2 * hidden_dim, H, W), computed in float32."""

    def axis(n: int) -> Tensor:
        position = torch.arange(1, n + 1, dtype=torch.float32, device=device) / (n + 1e-6) * (2 * math.pi)
        exponent = torch.arange(hidden_dim // 2, dtype=torch.float32, device=device) * (2 / hidden_dim)
        angles = position[:, None] / temperature**exponent
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

    rows, columns = axis(H)[:, None, :].expand(-1, W, -1), axis(W)[None, :, :].expand(H, -1, -1)
    return torch.cat([rows, columns], dim=-1).permute(2, 0, 1)[None].to(dtype)


# Leaves of symbolic traces: what they compute with are sizes and dtypes.
torch.fx.wrap("fourier_table")
torch.fx.wrap("cross_covariance_weights")


class PositionalEncodingFourier(nn.Module):
    """A Fourier encoding of the position, projected to `dim` channels; called with (B, H, W), gives (B, dim, H, W).

    Args:
        hidden_dim: frequencies of each axis, times two (a sine and a cosine).
        dim: channels.
        temperature: the longest wavelength is about 2 pi times this.

    The table is computed in float32, as the networks were trained, and cast to the type of the projection; it is kept
    for every size, but not by compiled and exported graphs. The batch is a view of one map. Keys: token_projection.
    """

    def __init__(self, hidden_dim: int = 32, dim: int = 768, temperature: float = 10000) -> None:
        super().__init__()
        if hidden_dim % 2:
            raise ValueError(f"hidden_dim must be even, a sine and a cosine for each frequency, got {hidden_dim}")
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, 1)
        self.hidden_dim, self.temperature = hidden_dim, temperature
        self._tables: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}}

    def _table(self, H: int, W: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return fourier_table(H, W, self.hidden_dim, self.temperature, dtype, device)

    def _kept_table(self, *key: Any) -> Tensor:
        table = self._tables.get(key)
        if table is None:
            # Not as an inference tensor, which no later backward pass could save.
            with torch.inference_mode(False), torch.no_grad():
                if len(self._tables) >= _MOST_TABLES:
                    self._tables.clear()
                self._tables[key] = table = self._table(*key)
        return table

    def forward(self, B: int, H: int, W: int, device: torch.device | None = None) -> Tensor:
        """device: where the table is to be, if not where the weight of the projection is before it is called."""
        weight = getattr(self.token_projection, "weight", None)
        if not isinstance(weight, (Tensor, torch.fx.Proxy)):  # a wrapper's
            weight = next(self.token_projection.parameters())
        key = H, W, weight.dtype, weight.device if device is None else device
        # Under a dispatch mode, such as that of fake tensors, tables are not what they seem.
        plain = not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not dispatch_modes()
        table = self._kept_table(*key) if plain and isinstance(H, int) else self._table(*key)
        return self.token_projection(table).expand(B, -1, -1, -1)


def _bottleneck(
    block: Any, kernel: HalfBlock, y: Tensor, x: Tensor, norm: nn.Module | None, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """x + gamma * pwconv2(act(pwconv1(norm(y)))) of y (N, H, W, C) and x (N, C, H, W)."""
    found = mlp(block, kernel, y, x.permute(0, 2, 3, 1), act.__name__)
    if found is not None:
        return found.permute(0, 3, 1, 2)
    y = y if norm is None else norm(y)
    return x + block.drop_path(inverted_bottleneck(y, block.pwconv1, act, block.pwconv2, block.gamma))


class ConvEncoder(nn.Module):
    """x + gamma * pwconv2(GELU(pwconv1(norm(dwconv(x))))).

    Args:
        dim: channels.
        drop_path: stochastic depth.
        layer_scale_init_value: of gamma; 0 for none.
        expan_ratio: hidden channels over dim.
        kernel_size: of the depthwise convolution, odd.
        fused: False runs plain PyTorch.

    Input and output are (N, C, H, W). Keys: gamma, dwconv, norm, pwconv1, pwconv2.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        expan_ratio: int = 4,
        kernel_size: int = 7,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused, self.layer_scale_init_value = fused, layer_scale_init_value
        self.gamma = layer_scale(dim, layer_scale_init_value)
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._kernel = Layers("dwconv_layer_norm", {"dwconv": depthwise(dim, kernel_size), "norm": layer_norm(dim)})
        self.pwconv1, self.pwconv2 = nn.Linear(dim, expan_ratio * dim), nn.Linear(expan_ratio * dim, dim)
        self.drop_path = DropPath(drop_path)
        self._mlp = mlp_layers(dim, expan_ratio * dim, gamma="gamma" if layer_scale_init_value > 0 else None)

    def reset_parameters(self) -> None:
        """Of gamma; the layers have their own."""
        fill_(self.gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._kernel.tensors(self, x)
        if parameters is None:
            y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        else:
            y = fused_dwconv_layer_norm(x, *parameters, eps=self.norm.eps)
        return _bottleneck(self, self._mlp, y, x, None, F.gelu)


class ConvEncoderBNHS(nn.Module):
    """`ConvEncoder` with batch norm, Hardswish and a convolution without bias. Arguments as there."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        expan_ratio: int = 4,
        kernel_size: int = 7,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused, self.layer_scale_init_value = fused, layer_scale_init_value
        self.gamma = layer_scale(dim, layer_scale_init_value)
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self._kernel = Layers("dwconv", {"dwconv": depthwise(dim, kernel_size)})
        self.norm = nn.BatchNorm2d(dim)
        self._norm = Layers("batch_norm_act", {"norm": batch_norm(dim)})
        self.pwconv1, self.pwconv2 = nn.Linear(dim, expan_ratio * dim), nn.Linear(expan_ratio * dim, dim)
        self.drop_path = DropPath(drop_path)
        self._mlp = mlp_layers(dim, expan_ratio * dim, gamma="gamma" if layer_scale_init_value > 0 else None)

    def reset_parameters(self) -> None:
        """Of gamma; the layers have their own."""
        fill_(self.gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        y = convolve_normalize(self, self._kernel, self._norm, x, name="norm").permute(0, 2, 3, 1)
        return _bottleneck(self, self._mlp, y, x, None, F.hardswish)


@computed
class XCA(nn.Module):
    """Cross-covariance attention: softmax(temperature * q k^T) v between the channels of each head.

    q and k are normalised over the tokens; their norm is bounded at 1e-12 from below. It runs as `fused_xca`; where
    it calls its layers, as `fused_cross_covariance` between them; in plain PyTorch while attention dropout is active.

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: heads.
        qkv_bias: whether qkv has a bias.
        attn_drop, proj_drop: dropout rates.
        fused: False runs plain PyTorch.

    Input and output are (B, N, C). Keys: temperature, qkv, proj.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads={num_heads}, got {dim}")
        self.num_heads, self.fused = num_heads, fused
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        layers = {"qkv": linear(dim, 3 * dim), "attn_drop": dropout(), "proj": linear(dim, dim)}
        self._kernel = Layers("xca", layers, own=("temperature",))
        self._attention = Layers("cross_covariance", {"attn_drop": dropout()}, own=("temperature",))

    def reset_parameters(self) -> None:
        """Of the temperature; the layers have their own."""
        nn.init.ones_(self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._kernel.tensors(self, x)
        if parameters is None:
            return self.proj_drop(self.proj(self._attend(self.qkv(x))))
        return self.proj_drop(self.whole(x, parameters))

    def whole(self, x: Tensor, parameters: list[Any], **half: Any) -> Tensor:
        """As one op. half: what it takes as a half-block."""
        temperature, weight, bias, *proj = parameters
        return fused_xca(x, weight, bias, temperature, *proj, num_heads=self.num_heads, **half)

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = split_heads(qkv, self.num_heads)
        if self._attention.tensors(self, qkv) is not None:
            return merge_heads(fused_cross_covariance(q, k, v, self.temperature))
        weights = self.attn_drop(cross_covariance_weights(q, k, self.temperature)).to(v.dtype)
        return merge_heads(weights @ v)

    def no_weight_decay(self) -> set[str]:
        return {"temperature"}


class LPI(nn.Module):
    """Local patch interaction of XCiT (arXiv 2106.09681): conv2(bn(act(conv1(x)))), depthwise, on tokens of an image.

    Args:
        in_features: channels.
        out_features: the same, as both convolutions are depthwise; None means in_features.
        act_layer: makes the activation.
        drop: accepted and unused, as in the official class.
        kernel_size: odd.
        fused: False runs plain PyTorch.

    Called with tokens (B, N, C) and H, W with H * W = N. Keys: conv1, bn, conv2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        kernel_size: int = 3,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if out_features not in (None, in_features):
            raise ValueError(f"out_features must be None or in_features={in_features}, got {out_features}")
        self.fused = fused
        shared = {"kernel_size": kernel_size, "padding": kernel_size // 2, "groups": in_features}
        self.conv1 = nn.Conv2d(in_features, in_features, **shared)
        self.act = act_layer()
        self.bn = nn.BatchNorm2d(in_features)
        self.conv2 = nn.Conv2d(in_features, in_features, **shared)
        conv, self._gelu = depthwise(in_features, kernel_size), None
        if type(self.act) is nn.GELU and self.act.approximate == "none":
            self._gelu = Layers("dwconv", {"conv1": conv, "act": module(nn.GELU, approximate="none")})
        self._conv1, self._conv2 = Layers("dwconv", {"conv1": conv}), Layers("dwconv", {"conv2": conv})

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        y = x.unflatten(1, (H, W)).permute(0, 3, 1, 2)
        parameters = None if self._gelu is None else self._gelu.tensors(self, y)
        if parameters is None:
            y = self.act(convolve(self, self._conv1, y))
        else:
            y = fused_dwconv(y, *parameters, activation="gelu")
        y = convolve(self, self._conv2, self.bn(y))
        return y.flatten(2).transpose(1, 2)


class _SDTA(nn.Module):
    """What both split depthwise transpose attention encoders are made of; they differ in the norm, and in the order."""

    make_norm: ClassVar[Any]  # from channels to a module

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        expan_ratio: int = 4,
        use_pos_emb: bool = True,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        scales: int = 1,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_integer("scales", scales, 2)
        width = check_cascade(dim, scales, "scales")
        self.width, self.fused, self.layer_scale_init_value = width, fused, layer_scale_init_value
        self.gamma_xca, self.gamma = layer_scale(dim, layer_scale_init_value), layer_scale(dim, layer_scale_init_value)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(scales - 1))
        self._kernel = Layers("split_cascade", {f"convs.{i}": depthwise(width, 3) for i in range(scales - 1)})
        self.pos_embd = PositionalEncodingFourier(dim=dim) if use_pos_emb else None
        self.norm_xca = self.make_norm(dim)
        self.xca = XCA(dim, num_heads, qkv_bias, attn_drop, drop, fused=fused)
        self.norm = self.make_norm(dim)
        batch = self.make_norm is nn.BatchNorm2d
        self._norm_xca, self._norm = (
            Layers("batch_norm_act", {name: batch_norm(dim)}) if batch else None for name in ("norm_xca", "norm")
        )
        self.pwconv1, self.pwconv2 = nn.Linear(dim, expan_ratio * dim), nn.Linear(expan_ratio * dim, dim)
        self.drop_path = DropPath(drop_path)
        scaled, normed = layer_scale_init_value > 0, self.make_norm is not nn.BatchNorm2d
        gamma_xca = "gamma_xca" if scaled else None
        self._tail, self._half = tail_layers(gamma_xca), None
        if normed:
            kernel = Layers("xca", {**self.xca._kernel.layers, "proj_drop": dropout()}, own=self.xca._kernel.own)
            norm = layer_norm(dim)
            self._half = half_of(kernel, "xca", XCA, gamma=gamma_xca, norm="norm_xca", norms=norm)
        gamma = "gamma" if scaled else None
        self._mlp = mlp_layers(dim, expan_ratio * dim, norm="norm" if normed else None, gamma=gamma)

    def reset_parameters(self) -> None:
        """Of gamma_xca and gamma; the layers have their own."""
        for gamma in (self.gamma_xca, self.gamma):
            fill_(gamma, self.layer_scale_init_value)

    def cascade(self, x: Tensor) -> Tensor:
        parameters = self._kernel.tensors(self, x)
        if parameters is not None:
            return fused_split_cascade(x, parameters[::2], parameters[1::2])
        splits = x.split(self.width, dim=1)
        outputs: list[Tensor] = []
        for i, conv in enumerate(self.convs):
            outputs.append(conv(outputs[-1] + splits[i] if i else splits[i]))
        return torch.cat([*outputs, splits[len(self.convs)]], dim=1)

    def with_position(self, x: Tensor) -> Tensor:
        """Adds the encoding of the position to (N, H, W, C)."""
        if self.pos_embd is None:
            return x
        height, width = x.shape[1:3]
        return x + self.pos_embd(1, height, width, x.device).permute(0, 2, 3, 1)

    def attend(self, t: Tensor, x: Tensor) -> Tensor:
        """t + gamma_xca * xca(x) of (N, H, W, C), with its drop path."""
        y = self.xca(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return residual(self, self._tail, t.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SDTAEncoder(_SDTA):
    """Split depthwise transpose attention: a cascade of 3x3 convolutions, attention between channels, a bottleneck.

    t = cascade(x) + position; t += gamma_xca * xca(norm_xca(t)); y = x + gamma * pwconv2(GELU(pwconv1(norm(t)))).
    The last residual comes from x, not from t. The two residuals drop their paths independently.

    Args:
        dim: channels.
        drop_path: stochastic depth.
        layer_scale_init_value: of gamma and gamma_xca; 0 for none.
        expan_ratio: hidden channels over dim.
        use_pos_emb: whether to add the Fourier encoding.
        num_heads, qkv_bias, attn_drop: of the attention; drop: dropout after its projection.
        scales: splits of the channels, at least 2; (scales - 1) * ceil(dim / scales) must be below dim. (The official
            default of 1 crashes there.)
        fused: False runs plain PyTorch.

    Input and output are (N, C, H, W). Keys: gamma_xca, gamma, convs, pos_embd, norm_xca, xca, norm, pwconv1, pwconv2.
    """

    make_norm = staticmethod(partial(nn.LayerNorm, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        t = self.with_position(self.cascade(x).permute(0, 2, 3, 1))
        tokens = t.flatten(1, 2)
        given = None if self._half is None else self._half.given(self, tokens, tokens)
        if given is None:
            t = self.attend(t, self.norm_xca(t))
        else:
            t = self.xca.whole(tokens, given[0], **given[1]).unflatten(1, t.shape[1:3])
        return _bottleneck(self, self._mlp, t, x, self.norm, F.gelu)


class SDTAEncoderBNHS(_SDTA):
    """`SDTAEncoder` with batch norm and Hardswish. Arguments as there.

    Here the position is added after norm_xca, and the attention's residual is the normed map.
    """

    make_norm = nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        normed = normalize(self, self._norm_xca, self.cascade(x), name="norm_xca")
        t = self.with_position(normed.permute(0, 2, 3, 1))
        t = normalize(self, self._norm, self.attend(t, t).permute(0, 3, 1, 2), name="norm").permute(0, 2, 3, 1)
        return _bottleneck(self, self._mlp, t, x, None, F.hardswish)
