"""Modules with the class names, children and forward of the networks' official code, written from its description."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class DropPath(nn.Module):
    """By torch.rand, as timm's was once."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        drawn = keep + torch.rand((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device)
        return x.div(keep) * drawn.floor()


def drop_path(rate):
    return DropPath(rate) if rate else nn.Identity()


def gamma(dim, value=0.5):
    return nn.Parameter(torch.full((dim,), value))


class LayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))
        self.eps, self.data_format, self.normalized_shape = eps, data_format, (normalized_shape,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * normed + self.bias[:, None, None]


def bottleneck(block, x):
    return block.gamma * block.pwconv2(block.act(block.pwconv1(x)))


class ConvEncoder(nn.Module):
    def __init__(self, dim, rate=0.0, kernel_size=7, norm=LayerNorm, act=nn.GELU):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = norm(dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), act(), nn.Linear(4 * dim, dim)
        self.gamma, self.drop_path = gamma(dim), drop_path(rate)

    def forward(self, x):
        y = bottleneck(self, self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvEncoderBNHS(ConvEncoder):
    def __init__(self, dim, rate=0.0, kernel_size=7):
        super().__init__(dim, rate, kernel_size, nn.BatchNorm2d, nn.Hardswish)

    def forward(self, x):
        y = bottleneck(self, self.norm(self.dwconv(x)).permute(0, 2, 3, 1))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class PositionalEncodingFourier(nn.Module):
    def __init__(self, hidden_dim=32, dim=768):
        super().__init__()
        self.token_projection, self.hidden_dim = nn.Conv2d(2 * hidden_dim, dim, 1), hidden_dim

    def forward(self, B, H, W):
        weight = self.token_projection.weight
        exponent = torch.arange(self.hidden_dim // 2, device=weight.device) * (2 / self.hidden_dim)

        def axis(n):
            angles = torch.arange(1, n + 1, device=weight.device)[:, None] / (n + 1e-6) * 2 * math.pi / 10000**exponent
            return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

        rows, columns = axis(H)[:, None].expand(-1, W, -1), axis(W)[None].expand(H, -1, -1)
        table = torch.cat([rows, columns], -1).permute(2, 0, 1).expand(B, -1, -1, -1)
        return self.token_projection(table.to(weight.dtype))


class XCA(nn.Module):
    def __init__(self, dim, num_heads=4, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.temperature = num_heads, nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 4, 1)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(-1)
        y = (self.attn_drop(weights) @ v).permute(0, 3, 1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(y))


class SDTAEncoder(nn.Module):
    batch_norm = False

    def __init__(self, dim, rate=0.0, scales=3):
        super().__init__()
        norm = nn.BatchNorm2d if self.batch_norm else LayerNorm
        self.width, self.nums = math.ceil(dim / scales), scales - 1
        shared = {"kernel_size": 3, "padding": 1, "groups": self.width}
        self.convs = nn.ModuleList(nn.Conv2d(self.width, self.width, **shared) for _ in range(self.nums))
        self.pos_embd = PositionalEncodingFourier(dim=dim)
        self.norm_xca, self.gamma_xca, self.xca, self.norm = norm(dim), gamma(dim), XCA(dim), norm(dim)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = nn.Hardswish() if self.batch_norm else nn.GELU()
        self.gamma, self.drop_path = gamma(dim), drop_path(rate)

    def forward(self, x):
        splits, outputs = x.split(self.width, 1), []
        for i, conv in enumerate(self.convs):
            outputs.append(conv(outputs[-1] + splits[i] if i else splits[i]))
        t = torch.cat([*outputs, splits[self.nums]], 1)
        B, C, H, W = t.shape
        if self.batch_norm:
            t = self.norm_xca(t)
        t = (t + self.pos_embd(B, H, W)).flatten(2).transpose(1, 2)
        t = t + self.drop_path(self.gamma_xca * self.xca(t if self.batch_norm else self.norm_xca(t)))
        t = t.reshape(B, H, W, C)
        t = self.norm(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.batch_norm else self.norm(t)
        return x + self.drop_path(bottleneck(self, t).permute(0, 3, 1, 2))


class SDTAEncoderBNHS(SDTAEncoder):
    batch_norm = True


class LPI(nn.Module):
    def __init__(self, in_features):
        super().__init__()
        shared = {"kernel_size": 3, "padding": 1, "groups": in_features}
        self.conv1, self.act = nn.Conv2d(in_features, in_features, **shared), nn.GELU()
        self.bn, self.conv2 = nn.BatchNorm2d(in_features), nn.Conv2d(in_features, in_features, **shared)

    def forward(self, x, H, W):
        maps = x.transpose(1, 2).unflatten(2, (H, W))
        return self.conv2(self.bn(self.act(self.conv1(maps)))).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            nn.Dropout(drop),
        )

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class XCABlock(nn.Module):
    def __init__(self, dim, rate=0.0, drop=0.0):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.local_mp, self.mlp, self.drop_path = XCA(dim), LPI(dim), Mlp(dim, drop), drop_path(rate)
        self.gamma1, self.gamma2, self.gamma3 = gamma(dim), gamma(dim), gamma(dim)

    def forward(self, x, H, W):
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class GlobalLocalFilter(nn.Module):
    def __init__(self, dim, h=5, w=3):
        super().__init__()
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, bias=False, groups=dim // 2)
        self.complex_weight = nn.Parameter(torch.randn(dim // 2, h, w, 2) * 0.5)
        self.pre_norm, self.post_norm = (LayerNorm(dim, data_format="channels_first") for _ in range(2))

    def forward(self, x):
        x1, x2 = self.pre_norm(x).chunk(2, 1)
        spectrum, weight = torch.fft.rfft2(x2, norm="ortho"), self.complex_weight.permute(3, 0, 1, 2)
        if weight.shape[2:] != spectrum.shape[2:]:
            weight = F.interpolate(weight, size=spectrum.shape[2:], mode="bilinear", align_corners=True)
        weight = torch.view_as_complex(weight.permute(1, 2, 3, 0).contiguous())
        x2 = torch.fft.irfft2(spectrum * weight, s=x2.shape[2:], norm="ortho")
        return self.post_norm(torch.stack([self.dw(x1), x2], 2).flatten(1, 2))


class gnconv(nn.Module):
    def __init__(self, dim, order=3, gflayer=None, s=1 / 3):
        super().__init__()
        self.order, self.scale, self.dims = order, s, [dim // 2**i for i in reversed(range(order))]
        total = sum(self.dims)
        self.proj_in, self.proj_out = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.dwconv = gflayer(total) if gflayer else nn.Conv2d(total, total, 7, padding=3, groups=total)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.dims, self.dims[1:], strict=False))

    def forward(self, x, mask=None, dummy=False):
        pwa, abc = self.proj_in(x).split((self.dims[0], sum(self.dims)), 1)
        gates = (self.dwconv(abc) * self.scale).split(self.dims, 1)
        x = pwa * gates[0]
        for pw, gate in zip(self.pws, gates[1:], strict=True):
            x = pw(x) * gate
        return self.proj_out(x)


class Block(nn.Module):
    """HorNet's."""

    def __init__(self, dim, rate=0.0, gflayer=None):
        super().__init__()
        self.norm1, self.gnconv = LayerNorm(dim, data_format="channels_first"), gnconv(dim, gflayer=gflayer)
        self.norm2, self.act = LayerNorm(dim), nn.GELU()
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma1, self.gamma2, self.drop_path = gamma(dim), gamma(dim), drop_path(rate)

    def forward(self, x):
        x = x + self.drop_path(self.gamma1.view(-1, 1, 1) * self.gnconv(self.norm1(x)))
        y = self.gamma2 * self.pwconv2(self.act(self.pwconv1(self.norm2(x.permute(0, 2, 3, 1)))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ElementScale(nn.Module):
    def __init__(self, embed_dims):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, embed_dims, 1, 1), 0.3))

    def forward(self, x):
        return x * self.scale


class ChannelAggregationFFN(nn.Module):
    def __init__(self, embed_dims, hidden, drop=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(embed_dims, hidden, 1), nn.Conv2d(hidden, embed_dims, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act, self.decompose_act, self.drop = nn.GELU(), nn.GELU(), nn.Dropout(drop)
        self.decompose, self.sigma = nn.Conv2d(hidden, 1, 1), ElementScale(hidden)

    def forward(self, x):
        x = self.drop(self.act(self.dwconv(self.fc1(x))))
        x = x + self.sigma(x - self.decompose_act(self.decompose(x)))
        return self.drop(self.fc2(x))


class MultiOrderDWConv(nn.Module):
    def __init__(self, embed_dims, dilations=(1, 2, 3)):
        super().__init__()
        self.widths = [embed_dims // 8, 3 * embed_dims // 8, embed_dims // 2]
        for i, (c, k, d) in enumerate(zip([embed_dims, *self.widths[1:]], (5, 5, 7), dilations, strict=True)):
            self.add_module(f"DW_conv{i}", nn.Conv2d(c, c, k, padding=d * (k // 2), groups=c, dilation=d))
        self.PW_conv = nn.Conv2d(embed_dims, embed_dims, 1)

    def forward(self, x):
        low, middle, high = self.DW_conv0(x).split(self.widths, 1)
        return self.PW_conv(torch.cat([low, self.DW_conv1(middle), self.DW_conv2(high)], 1))


class MultiOrderGatedAggregation(nn.Module):
    def __init__(self, embed_dims, attn_force_fp32=False, act=nn.SiLU):
        super().__init__()
        self.attn_force_fp32, self.value = attn_force_fp32, MultiOrderDWConv(embed_dims)
        self.proj_1, self.gate, self.proj_2 = (nn.Conv2d(embed_dims, embed_dims, 1) for _ in range(3))
        self.act_value, self.act_gate, self.sigma = act(), act(), ElementScale(embed_dims)

    def forward(self, x):
        p = self.proj_1(x)
        u = self.act_value(p + self.sigma(p - F.adaptive_avg_pool2d(p, 1)))
        g, v = self.act_gate(self.gate(u)), self.act_gate(self.value(u))
        if self.attn_force_fp32:
            g, v = self.act_gate(g), self.act_gate(v)
        return self.proj_2(g * v) + x


class MogaBlock(nn.Module):
    def __init__(self, embed_dims, rate=0.0, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(embed_dims), nn.BatchNorm2d(embed_dims)
        self.attn, self.mlp = MultiOrderGatedAggregation(embed_dims, **options), ChannelAggregationFFN(embed_dims, 32)
        self.drop_path = drop_path(rate)
        self.layer_scale_1, self.layer_scale_2 = (
            nn.Parameter(torch.full((1, embed_dims, 1, 1), 0.5)) for _ in range(2)
        )

    def forward(self, x):
        x = x + self.drop_path(self.layer_scale_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))


def shifted(x, first, second, clean):
    """Quarters of the channels moved by one pixel along `first`, back, along `second`, back; borders stay."""
    source, y, quarter = x, x.clone() if clean else x, x.shape[-1] // 4
    for i, (dim, step) in enumerate([(first, 1), (first, -1), (second, 1), (second, -1)]):
        channels = slice(i * quarter, (i + 1) * quarter if i < 3 else None)
        n = x.shape[dim] - 1
        to, of = (1, 0) if step == 1 else (0, 1)
        y.narrow(dim, to, n)[..., channels] = source.narrow(dim, of, n)[..., channels]
    return y


class SplitAttention(nn.Module):
    def __init__(self, channel, k=3):
        super().__init__()
        self.channel, self.k = channel, k
        self.mlp1, self.gelu = nn.Linear(channel, channel, bias=False), nn.GELU()
        self.mlp2, self.softmax = nn.Linear(channel, channel * k, bias=False), nn.Softmax(1)

    def forward(self, x_all):
        weights = self.mlp2(self.gelu(self.mlp1(x_all.sum((1, 2, 3)))))
        weights = self.softmax(weights.unflatten(1, (self.k, -1)))
        return (weights[:, :, None, None] * x_all).sum(1)


class S2Attention(nn.Module):
    def __init__(self, channels, clean=True):
        super().__init__()
        self.mlp1, self.mlp2 = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.split_attention, self.clean = SplitAttention(channels), clean

    def forward(self, x):
        x, c = self.mlp1(x), x.shape[-1]
        x1, x2, x3 = x[..., :c], x[..., c : 2 * c], x[..., 2 * c :]
        x1, x2 = shifted(x1, 1, 2, self.clean), shifted(x2, 2, 1, self.clean)
        return self.mlp2(self.split_attention(torch.stack([x1, x2, x3], 1)))


class PreNormResidual(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x):
        return self.fn(self.norm(x)) + x


class S2Block(nn.Module):
    def __init__(self, d_model, clean=True, dropout=0.0):
        super().__init__()
        inner = nn.Linear(d_model, 3 * d_model), nn.GELU(), nn.Dropout(dropout)
        mlp = nn.Sequential(*inner, nn.Linear(3 * d_model, d_model), nn.Dropout(dropout))
        blocks = PreNormResidual(d_model, S2Attention(d_model, clean)), PreNormResidual(d_model, mlp)
        self.model = nn.Sequential(nn.Sequential(*blocks))

    def forward(self, x):
        return self.model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A block of tokens as one of maps."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.flatten(2).transpose(1, 2), *x.shape[2:]).transpose(1, 2).unflatten(2, x.shape[2:])
