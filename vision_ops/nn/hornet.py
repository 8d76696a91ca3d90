"""HorNet (arXiv 2207.14284), after hornet.py of raoyongming/HorNet."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_integer
from ..ops.gated_recursion import fused_gated_recursion
from ..ops.global_filter import fused_global_filter
from ..ops.gnconv import fused_gnconv
from ..reference.global_filter import global_filter
from ._blocks import (
    DropPath,
    convolve,
    fill_,
    half_of,
    inverted_bottleneck,
    layer_scale,
    mlp,
    mlp_layers,
    residual,
    tail_layers,
)
from ._layers import Layers, computed, depthwise, layer_norm_2d, pointwise
from .layer_norm import LayerNorm2d

torch.fx.wrap("global_filter")  # it asks for the size and the dtype of x


class GlobalLocalFilter(nn.Module):
    """A depthwise 3x3 convolution on one half of the channels, a global filter in frequency space on the other.

    y = post_norm(interleave(dw(a), irfft2(rfft2(b) * W))), (a, b) = halves of pre_norm(x).

    Args:
        dim: channels, even.
        h, w: size of the filter; (H, W // 2 + 1) of the maps it was trained on. For another size it is interpolated in
            every forward pass, which is not the same as a filter resized once for another training size.
        fused: False runs plain PyTorch.

    Keys: complex_weight (dim / 2, h, w, 2), dw, pre_norm, post_norm.
    """

    def __init__(self, dim: int, h: int = 14, w: int = 8, *, fused: bool = True) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, as each half of the channels has its own filter, got {dim}")
        self.fused = fused
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, h, w, 2))
        self.reset_parameters()
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, bias=False, groups=dim // 2)
        self._dw = Layers("dwconv", {"dw": depthwise(dim // 2, 3)})
        self._filter = Layers("global_filter", own=("complex_weight",))
        self.pre_norm, self.post_norm = LayerNorm2d(dim, fused=fused), LayerNorm2d(dim, fused=fused)

    def reset_parameters(self) -> None:
        """Of complex_weight; the layers have their own."""
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        local, globally = self.pre_norm(x).chunk(2, dim=1)
        local = convolve(self, self._dw, local)
        weight = self._filter.tensors(self, globally)
        if weight is None:
            globally = global_filter(globally, self.complex_weight)
        else:
            globally = fused_global_filter(globally, *weight)
        return self.post_norm(torch.stack([local, globally], dim=2).flatten(1, 2))


@computed
class GnConv(nn.Module):
    """Recursive gated convolution.

    [p_0, a] = proj_in(x), q = s * dwconv(a), p_1 = p_0 * q_0, p_{k+1} = pws[k-1](p_k) * q_k, y = proj_out(p_order).

    Args:
        dim: channels; a multiple of 2^(order - 1), and of 2^order with a `gflayer`.
        order: number of gates.
        gflayer: None for a 7x7 depthwise convolution, else what is called with (channels, h=h, w=w), such as
            `GlobalLocalFilter`.
        h, w: size of the global filter.
        s: scale; exactly 1/3 in every published network.
        fused: False runs plain PyTorch.

    Keys: proj_in, dwconv, proj_out, pws.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        gflayer: Callable[..., nn.Module] | None = None,
        h: int = 14,
        w: int = 8,
        s: float = 1.0,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_integer("order", order, 1)
        least = 2 ** (order if gflayer is not None else order - 1)
        if dim % least:
            filtered = "" if gflayer is None else " with a global filter"
            raise ValueError(f"dim must be a multiple of {least} for order {order}{filtered}, got {dim}")
        self.order, self.scale, self.fused = order, s, fused
        self.dims = [dim // 2**i for i in reversed(range(order))]
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        if gflayer is None:
            self.dwconv: nn.Module = nn.Conv2d(total, total, 7, padding=3, groups=total)
        else:
            self.dwconv = gflayer(total, h=h, w=w)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        pairs = list(zip(self.dims, self.dims[1:], strict=False))
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        pws = {f"pws.{i}": pointwise(a, b) for i, (a, b) in enumerate(pairs)}
        self._kernel = self._dwconv = None
        if gflayer is None:
            dwconv = {"dwconv": depthwise(total, 7)}
            layers = {"proj_in": pointwise(dim, 2 * dim), **dwconv, "proj_out": pointwise(dim, dim), **pws}
            self._kernel, self._dwconv = Layers("gnconv", layers), Layers("dwconv", dwconv)
        self._recursion = Layers("gated_recursion", pws)

    def forward(self, x: Tensor) -> Tensor:
        parameters = None if self._kernel is None else self._kernel.tensors(self, x)
        if parameters is not None:
            return self.whole(x, parameters)
        pwa, abc = self.proj_in(x).split([self.dims[0], sum(self.dims)], dim=1)
        gates = self.dwconv(abc) if self._dwconv is None else convolve(self, self._dwconv, abc)
        return self.proj_out(self._recurse(pwa, gates * self.scale))

    def whole(self, x: Tensor, parameters: list[Any], **half: Any) -> Tensor:
        """As one op. half: what it takes as a half-block."""
        into, out, pws = parameters[:4], parameters[4:6], parameters[6:]
        given = *into, pws[::2], pws[1::2], *out
        return fused_gnconv(x, *given, scale=self.scale, **half)

    def _recurse(self, p: Tensor, gates: Tensor) -> Tensor:
        parameters = self._recursion.tensors(self, p)
        if parameters is not None:
            return fused_gated_recursion(p, gates, parameters[::2], parameters[1::2])
        q = gates.split(self.dims, dim=1)
        p = p * q[0]
        for i, pw in enumerate(self.pws):
            p = pw(p) * q[i + 1]
        return p


class HorBlock(nn.Module):
    """x + gamma1 * gnconv(norm1(x)), then x + gamma2 * pwconv2(GELU(pwconv1(norm2(x)))), each with its own drop path.

    Args:
        dim: channels.
        drop_path: stochastic depth.
        layer_scale_init_value: of gamma1 and gamma2; 0 for none.
        gnconv: called with dim, makes the gated convolution.
        fused: False runs plain PyTorch; the gated convolution takes it from `gnconv`.

    Input and output are (N, C, H, W). Keys: gamma1, gamma2, norm1, gnconv, norm2, pwconv1, pwconv2.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        gnconv: Callable[[int], nn.Module] = GnConv,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused, self.layer_scale_init_value = fused, layer_scale_init_value
        self.gamma1, self.gamma2 = layer_scale(dim, layer_scale_init_value), layer_scale(dim, layer_scale_init_value)
        self.norm1 = LayerNorm2d(dim, fused=fused)
        self.gnconv = gnconv(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale_init_value > 0
        gamma1 = "gamma1" if scaled else None
        self._tail, self._half = tail_layers(gamma1), None
        if type(self.gnconv) is GnConv:
            kernel, norm = self.gnconv._kernel, layer_norm_2d(dim)
            self._half = half_of(kernel, "gnconv", GnConv, gamma=gamma1, norm="norm1", norms=norm)
        self._mlp = mlp_layers(dim, 4 * dim, norm="norm2", gamma="gamma2" if scaled else None)

    def reset_parameters(self) -> None:
        """Of gamma1 and gamma2; the layers have their own."""
        for gamma in (self.gamma1, self.gamma2):
            fill_(gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        given = None if self._half is None else self._half.given(self, x, x)
        if given is None:
            x = residual(self, self._tail, x, self.gnconv(self.norm1(x)))
        else:
            x = self.gnconv.whole(x, given[0], **given[1])
        pixels = x.permute(0, 2, 3, 1)
        y = mlp(self, self._mlp, pixels, pixels)
        if y is not None:
            return y.permute(0, 3, 1, 2)
        y = inverted_bottleneck(self.norm2(pixels), self.pwconv1, F.gelu, self.pwconv2, self.gamma2)
        return x + self.drop_path(y)
