"""What is measured: every op's cases, and how a case becomes tensors (problem.py).

To register an op: its shapes go into shapes.py, a function here turns one of them into a Problem, and OPS names both.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vision_ops
from benchmarks import shapes
from benchmarks.problem import Op, Problem, Setting
from vision_ops import reference
from vision_ops.reference.relative_attention import relative_bias
from vision_ops.reference.xca import merge_heads, split_heads


def live_taps(size: int, kernel: int, *, dilation: int = 1, stride: int = 1, before: int, after: int) -> int:
    """Taps along one axis that meet the image, summed over the outputs: those in the padding need no work."""
    outputs = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    return sum(0 <= stride * i - before + dilation * k < size for i in range(outputs) for k in range(kernel))


def dwconv_flops(
    images: int,
    channels: int,
    size: int,
    kernel: int,
    *,
    dilation: int = 1,
    stride: int = 1,
    padding: tuple[int, int, int, int] | None = None,
) -> int:
    top, bottom, left, right = padding or (dilation * (kernel - 1) // 2,) * 4
    rows = live_taps(size, kernel, dilation=dilation, stride=stride, before=top, after=bottom)
    columns = live_taps(size, kernel, dilation=dilation, stride=stride, before=left, after=right)
    return 2 * images * channels * rows * columns


def build_dwconv(shape: shapes.DWConvShape, setting: Setting) -> Problem:
    channels, kernel = shape.channels, shape.kernel
    x = setting.normal(setting.batch, channels, shape.size, shape.size)
    weight = setting.normal(channels, 1, kernel, kernel)
    bias = setting.normal(channels) if shape.bias else None
    window = {"dilation": shape.dilation, "stride": shape.stride, "padding": shape.padding}
    flops = dwconv_flops(setting.batch, channels, shape.size, kernel, **window)
    return Problem((x, weight, bias), flops, {**window, "activation": shape.activation})


def build_multi_order(shape: shapes.MultiOrderShape, setting: Setting) -> Problem:
    channels, size = shape.channels, shape.size
    convs = ((channels, 5, 1), (channels * 3 // 8, 5, 2), (channels // 2, 7, 3))
    x = setting.normal(setting.batch, channels, size, size)
    weights = tuple(setting.normal(width, 1, kernel, kernel) for width, kernel, _ in convs)
    biases = tuple(setting.normal(width) for width, _, _ in convs)
    flops = sum(dwconv_flops(setting.batch, width, size, kernel, dilation=d) for width, kernel, d in convs)
    return Problem((x, weights, biases), flops)


def build_layer_norm(shape: shapes.LayerNormShape, setting: Setting) -> Problem:
    x = setting.normal(setting.batch, shape.channels, shape.size, shape.size)
    weight, bias = setting.normal(shape.channels), setting.normal(shape.channels)
    # Mean, deviation, square and sum; scale, shift.
    return Problem((x, weight, bias), 8 * x.numel())


def build_batch_norm(shape: shapes.BatchNormShape, setting: Setting) -> Problem:
    x = setting.normal(setting.batch, shape.channels, shape.size, shape.size)
    weight, bias = setting.normal(shape.channels), setting.normal(shape.channels)
    # Mean, deviation, square and sum; scale, shift; an error function.
    return Problem(
        (x, weight, bias), (8 if shape.activation is None else 28) * x.numel(), {"activation": shape.activation}
    )


def in_training(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A batch norm by the statistics of the batch, and none that run."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, **options: str) -> Tensor:
        return norm(x, weight, bias, None, None, training=True, **options)

    return run


def build_mbconv(shape: shapes.MBConvShape, setting: Setting) -> Problem:
    c, o, hidden = shape.before, shape.channels, shapes.MOAT_EXPANSION * shape.channels
    x = setting.normal(setting.batch, c, shape.size, shape.size)

    def drawn(*size: int) -> Tensor:
        return setting.normal(*size) / math.prod(size[1:]) ** 0.5

    def norm_weight(channels: int) -> Tensor:
        """Near one, as in networks: a channel with hardly any is divided by next to nothing in the norm behind it."""
        return 1 + 0.1 * setting.normal(channels)

    weights = drawn(hidden, c, 1, 1), norm_weight(hidden), setting.normal(hidden), drawn(hidden, 1, 3, 3)
    rest = norm_weight(hidden), setting.normal(hidden), drawn(o, hidden, 1, 1), setting.normal(o)
    reduced = o // 4
    se = (drawn(reduced, hidden, 1, 1), setting.normal(reduced), drawn(hidden, reduced, 1, 1), setting.normal(hidden))
    own = (drawn(o, c, 1, 1), setting.normal(o)) if c != o else None
    size = shape.size // shape.stride
    padding = (1, 1, 1, 1) if shape.stride == 1 else (0, 1, 0, 1)
    dw = dwconv_flops(setting.batch, hidden, shape.size, 3, stride=shape.stride, padding=padding)
    products = 2 * c * hidden * x[:, 0].numel() + 2 * (hidden + (c if own else 0)) * o * setting.batch * size * size
    options = {"stride": shape.stride}
    return Problem((x, norm_weight(c), *weights, *rest, se if shape.se else None, own), dw + products, options)


def in_its_norms(mbconv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """MBConv in training, without running statistics. The gradient of pre_norm's bias is zero: it is left out."""

    def run(x: Tensor, pre: Tensor, expand: Tensor, *given: Any, **options: int) -> Tensor:
        ew, eb, dw, dww, dwb, shrink, bias, se, shortcut = given
        norms = [(weight, shift, None, None) for weight, shift in ((pre, torch.zeros_like(pre)), (ew, eb), (dww, dwb))]
        weights = norms[0], expand, norms[1], dw, norms[2], shrink, bias
        return mbconv(x, *weights, se=se, shortcut=shortcut, training=True, **options)

    return run


def build_moga_gate(shape: shapes.MultiOrderShape, setting: Setting) -> Problem:
    gate, value = (setting.normal(setting.batch, shape.channels, shape.size, shape.size) for _ in range(2))
    # Exponential, sum and division for each, two products.
    return Problem((gate, value), 8 * gate.numel())


def build_feature_decompose(shape: shapes.MultiOrderShape, setting: Setting) -> Problem:
    x = setting.normal(setting.batch, shape.channels, shape.size, shape.size)
    # Mean, difference, product and sum; SiLU.
    return Problem((x, setting.normal(1, shape.channels, 1, 1)), 7 * x.numel())


def build_moga_aggregation(shape: shapes.MultiOrderShape, setting: Setting) -> Problem:
    channels = shape.channels
    multi_order = build_multi_order(shape, setting)
    x, weights, biases = multi_order.args
    # Such that the gates see what they do in a network: sums of large numbers that cancel would err by luck.
    weights = tuple(w / w.shape[-1] for w in weights)
    pointwise = [
        t
        for _ in range(4)
        for t in (setting.normal(channels, channels, 1, 1) / channels**0.5, setting.normal(channels))
    ]
    sigma = setting.normal(1, channels, 1, 1)
    flops = multi_order.flops + (4 * 2 * channels + 20) * x.numel()
    return Problem((x, *pointwise[:4], weights, biases, *pointwise[4:], sigma), flops)


def build_channel_aggregation(shape: shapes.ChannelAggregationShape, setting: Setting) -> Problem:
    channels, hidden = shape.channels, shape.hidden
    x = setting.normal(setting.batch, channels, shape.size, shape.size)
    sizes = (hidden, channels, 1, 1), (hidden, 1, 3, 3), (channels, hidden, 1, 1), (1, hidden, 1, 1)
    # Such that GELU sees what it does in a network, not its tails only.
    parameters = [
        t for size in sizes for t in (setting.normal(*size) / math.prod(size[1:]) ** 0.5, setting.normal(size[0]))
    ]
    pixels = setting.batch * shape.size**2
    flops = dwconv_flops(setting.batch, hidden, shape.size, 3) + pixels * hidden * (4 * channels + 10)
    return Problem((x, *parameters, setting.normal(1, hidden, 1, 1)), flops)


def chain_parameters(shape: shapes.GnConvShape, setting: Setting) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases of the recursion, scaled so that its products keep their size."""
    pairs = list(pairwise(shape.widths))
    return tuple(setting.normal(o, i, 1, 1) / i**0.5 for i, o in pairs), tuple(setting.normal(o) for _, o in pairs)


def build_gated_recursion(shape: shapes.GnConvShape, setting: Setting) -> Problem:
    images, size = setting.batch, shape.size
    pwa = setting.normal(images, shape.widths[0], size, size)
    dw = setting.normal(images, sum(shape.widths), size, size)
    pixels = images * size * size
    flops = pixels * (sum(2 * i * o for i, o in pairwise(shape.widths)) + sum(shape.widths))
    return Problem((pwa, dw, *chain_parameters(shape, setting)), flops)


def build_gnconv(shape: shapes.GnConvShape, setting: Setting) -> Problem:
    channels, size, total = shape.channels, shape.size, sum(shape.widths)
    x = setting.normal(setting.batch, channels, size, size)
    into = setting.normal(2 * channels, channels, 1, 1) / channels**0.5, setting.normal(2 * channels)
    depthwise = setting.normal(total, 1, 7, 7) / 7, setting.normal(total)
    out = setting.normal(channels, channels, 1, 1) / channels**0.5, setting.normal(channels)
    products = 3 * channels**2 + sum(i * o for i, o in pairwise(shape.widths))
    flops = 2 * setting.batch * size * size * products + dwconv_flops(setting.batch, total, size, 7)
    return Problem((x, *into, *depthwise, *chain_parameters(shape, setting), *out), flops, {"scale": 1 / 3})


def build_global_filter(shape: shapes.GlobalFilterShape, setting: Setting) -> Problem:
    channels, size = shape.channels, shape.size
    x = setting.normal(setting.batch, channels, size, size)
    weight = torch.randn(channels, size, size // 2 + 1, 2, device=setting.device, dtype=setting.dtype)
    # As of an FFT there and back: 2.5 n log2 n each, and 6 for a product of complex numbers, of which there are n / 2.
    pixels = size * size
    return Problem((x, weight), round(setting.batch * channels * pixels * (5 * math.log2(pixels) + 3)))


def build_dwconv_layer_norm(shape: shapes.DWConvLayerNormShape, setting: Setting) -> Problem:
    channels, size, kernel = shape.channels, shape.size, shape.kernel
    x = setting.normal(setting.batch, channels, size, size)
    weight = setting.normal(channels, 1, kernel, kernel)
    flops = dwconv_flops(setting.batch, channels, size, kernel) + 8 * x.numel()
    return Problem((x, weight, *(setting.normal(channels) for _ in range(3))), flops)


def build_split_cascade(shape: shapes.SplitCascadeShape, setting: Setting) -> Problem:
    channels, size, levels = shape.channels, shape.size, shape.scales - 1
    width = shapes.split_width(channels, shape.scales)
    x = setting.normal(setting.batch, channels, size, size)
    weights = tuple(setting.normal(width, 1, 3, 3) for _ in range(levels))
    biases = tuple(setting.normal(width) for _ in range(levels))
    return Problem((x, weights, biases), levels * dwconv_flops(setting.batch, width, size, 3))


def build_cross_covariance(shape: shapes.XcaShape, setting: Setting) -> Problem:
    """Views of one tensor, as the projection of the tokens leaves them."""
    tokens, channels, heads = shape.tokens, shape.channels, shape.heads
    qkv = setting.normal(setting.batch, tokens, 3 * channels).view(setting.batch, tokens, 3, heads, channels // heads)
    # Two products over the tokens.
    flops = 2 * 2 * setting.batch * tokens * channels * (channels // heads)
    q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
    return Problem((q, k, v, setting.normal(heads).abs().view(heads, 1, 1)), flops)


def sdpa_cross_covariance(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Its tokens are our channels. Copied, as its fast kernels want neighbours along the last dimension."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def build_xca(shape: shapes.XcaShape, setting: Setting) -> Problem:
    tokens, channels, heads = shape.tokens, shape.channels, shape.heads
    x = setting.normal(setting.batch, tokens, channels)
    qkv, proj = (setting.normal(n * channels, channels) / channels**0.5 for n in (3, 1))
    temperature = setting.normal(heads).abs().view(heads, 1, 1)
    # The projections, and the products over the tokens.
    flops = 2 * setting.batch * tokens * channels * (4 * channels + 2 * channels // heads)
    parameters = qkv, setting.normal(3 * channels), temperature, proj, setting.normal(channels)
    return Problem((x, *parameters), flops, {"num_heads": heads})


def sdpa_xca(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    q, k, v = split_heads(F.linear(x, qkv_weight, qkv_bias), num_heads)
    return F.linear(merge_heads(sdpa_cross_covariance(q, k, v, temperature)), proj_weight, proj_bias)


def split_mlps(channels: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """Scaled as for features that the layer before has normalised: the pooled vector is a sum over all pixels."""
    hidden = channels // shapes.S2MLPV2_REDUCTION
    return setting.normal(hidden, channels) * 1e-3, setting.normal(3 * channels, hidden) * hidden**-0.5


def build_shift_split_attention(shape: shapes.S2Shape, setting: Setting) -> Problem:
    c, size = shape.channels, shape.size
    x = setting.pixels(setting.batch, size, size, 3 * c)
    # Three products and their sum, and the sum over the pixels.
    return Problem((x, *split_mlps(c, setting)), 3 * x.numel())


def build_s2_attention(shape: shapes.S2Shape, setting: Setting) -> Problem:
    c, size = shape.channels, shape.size
    x = setting.pixels(setting.batch, size, size, c)
    mlp1, mlp2 = ((setting.normal(n, c) * c**-0.5, setting.normal(n)) for n in (3 * c, c))
    return Problem((x, *mlp1, *mlp2, *split_mlps(c, setting)), (2 * (3 * c + c) + 9) * x.numel())


def build_scaled_residual(shape: shapes.LayerNormShape, setting: Setting) -> Problem:
    x, branch = (setting.normal(setting.batch, shape.channels, shape.size, shape.size) for _ in range(2))
    return Problem((x, branch, setting.normal(shape.channels)), 2 * x.numel())


def build_mlp(shape: shapes.MlpShape, setting: Setting) -> Problem:
    channels, hidden = shape.channels, shape.hidden
    x = setting.pixels(setting.batch, shape.size, shape.size, channels)
    weights = [
        t
        for o, i in ((hidden, channels), (channels, hidden))
        for t in (setting.normal(o, i) / i**0.5, setting.normal(o))
    ]
    norm = [setting.normal(channels) if shape.norm else None for _ in range(2)]
    gamma = setting.normal(channels) if shape.gamma else None
    return Problem((x, *weights, *norm, gamma), (4 * hidden + 10) * x.numel())


def half_block(mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An MLP with x for a residual."""

    def run(x: Tensor, *given: Tensor | None, **options: str) -> Tensor:
        *weights, norm_weight, norm_bias, gamma = given
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return mlp(x, *weights, **norm, gamma=gamma, residual=x, **options)

    return run


def build_relative_attention(shape: shapes.RelativeAttentionShape, setting: Setting) -> Problem:
    """Views of one tensor, as the projections of the tokens may leave them."""
    tokens, channels, heads = shape.size**2, shape.channels, shape.heads
    qkv = setting.normal(setting.batch, tokens, 3 * channels).view(setting.batch, tokens, 3, heads, channels // heads)
    table = setting.normal(heads, shape.table, shape.table)
    flops = 2 * 2 * setting.batch * tokens**2 * channels
    size = {"height": shape.size, "width": shape.size}
    return Problem((*qkv.permute(2, 0, 3, 1, 4).unbind(0), table), flops, size)


def sdpa_relative_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, height: int, width: int) -> Tensor:
    """On GPUs by the kernel whose bias has a gradient, and which reads it in float32."""
    bias = relative_bias(table, height, width)[None]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def build_relative_self_attention(shape: shapes.RelativeAttentionShape, setting: Setting) -> Problem:
    """Without a key bias, whose gradient vanishes."""
    channels, pixels = shape.channels, setting.batch * shape.size**2
    x = setting.pixels(setting.batch, shape.size, shape.size, channels)
    products = [
        t for _ in range(4) for t in (setting.normal(channels, channels) / channels**0.5, setting.normal(channels))
    ]
    table = setting.normal(shape.heads, shape.table, shape.table)
    norm = setting.normal(channels), setting.normal(channels)
    flops = 2 * pixels * channels * (4 * channels + 2 * shape.size**2) + 8 * x.numel()
    return Problem((x, *products[:3], None, *products[4:], table, *norm), flops, {"num_heads": shape.heads})


def attention_half_block(x: Tensor, *given: Any, num_heads: int, **options: Any) -> Tensor:
    """x + attention(LN(x)), of positional tensors."""
    *products, norm_weight, norm_bias = given
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": 1e-5}
    return vision_ops.fused_relative_self_attention(x, *products, num_heads=num_heads, residual=x, **norm, **options)


def eager_attention_half_block(x: Tensor, *given: Any, num_heads: int) -> Tensor:
    *products, norm_weight, norm_bias = given
    normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-5)
    return x + reference.relative_self_attention(normed, *products, num_heads=num_heads)


def sdpa_relative_self_attention(x: Tensor, *given: Any, num_heads: int) -> Tensor:
    *products, o_weight, o_bias, table, norm_weight, norm_bias = given
    height, width = x.shape[1:3]
    tokens = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-5).flatten(1, 2)
    q, k, v = (
        F.linear(tokens, *products[i : i + 2]).unflatten(2, (num_heads, -1)).transpose(1, 2) for i in range(0, 6, 2)
    )
    y = sdpa_relative_attention(q, k, v, table, height=height, width=width)
    return x + F.linear(y.transpose(1, 2).flatten(2), o_weight, o_bias).unflatten(1, (height, width))


OPS = {
    op.name: op
    for op in (
        Op(
            "multi_order_dwconv",
            vision_ops.fused_multi_order_dwconv,
            reference.multi_order_dwconv,
            shapes.multi_order_cases(),
            build_multi_order,
            quick=("MogaNet-S.1", "MogaNet-S.2", "MogaNet-S.3"),
            compile_in_short=True,
        ),
        Op(
            "dwconv",
            vision_ops.fused_dwconv,
            reference.dwconv,
            shapes.dwconv_cases(),
            build_dwconv,
            quick=(
                "MOAT-tiny0.2 entry",
                "MogaNet-S.2 dw7d3",
                "MogaNet-S.3 ffn",
                "HorNet-T.2",
                "EdgeNeXt-S.2",
                "EdgeNeXt-S.4",
            ),
            compile_in_short=True,
        ),
        Op(
            "layer_norm_2d",
            vision_ops.fused_layer_norm_2d,
            reference.layer_norm_2d,
            shapes.layer_norm_cases(),
            build_layer_norm,
            quick=("HorNet-T.1", "HorNet-T.3"),
        ),
        Op(
            "moga_gate",
            vision_ops.fused_moga_gate,
            reference.moga_gate,
            shapes.multi_order_cases(),
            build_moga_gate,
            quick=("MogaNet-S.1",),
        ),
        Op(
            "feature_decompose",
            vision_ops.fused_feature_decompose,
            reference.feature_decompose,
            shapes.multi_order_cases(),
            build_feature_decompose,
            quick=("MogaNet-S.1",),
        ),
        Op(
            "moga_aggregation",
            vision_ops.fused_moga_aggregation,
            reference.moga_aggregation,
            shapes.multi_order_cases(),
            build_moga_aggregation,
            quick=("MogaNet-S.1", "MogaNet-S.3"),
        ),
        Op(
            "channel_aggregation_ffn",
            vision_ops.fused_channel_aggregation_ffn,
            reference.channel_aggregation_ffn,
            shapes.channel_aggregation_cases(),
            build_channel_aggregation,
            quick=("MogaNet-S.1", "MogaNet-S.3"),
        ),
        Op(
            "gnconv",
            vision_ops.fused_gnconv,
            reference.gnconv,
            shapes.gnconv_cases(),
            build_gnconv,
            quick=("HorNet-T.1", "HorNet-T.3"),
            compile_in_short=True,
        ),
        Op(
            "gated_recursion",
            vision_ops.fused_gated_recursion,
            reference.gated_recursion,
            shapes.gnconv_cases(),
            build_gated_recursion,
            quick=("HorNet-T.2",),
        ),
        Op(
            "global_filter",
            vision_ops.fused_global_filter,
            reference.global_filter,
            shapes.global_filter_cases(),
            build_global_filter,
            quick=("HorNet-T.3", "HorNet-T.4"),
        ),
        Op(
            "dwconv_layer_norm",
            vision_ops.fused_dwconv_layer_norm,
            reference.dwconv_layer_norm,
            shapes.dwconv_layer_norm_cases(),
            build_dwconv_layer_norm,
            quick=("EdgeNeXt-S.3", "ConvNeXt-T.2"),
            compile_in_short=True,
        ),
        Op(
            "split_cascade",
            vision_ops.fused_split_cascade,
            reference.split_cascade,
            shapes.split_cascade_cases(),
            build_split_cascade,
            quick=("EdgeNeXt-S.3",),
        ),
        Op(
            "xca",
            vision_ops.fused_xca,
            reference.xca,
            shapes.xca_cases(),
            build_xca,
            quick=("EdgeNeXt-S.2", "EdgeNeXt-S.3"),
            others={"sdpa": sdpa_xca},
        ),
        Op(
            "cross_covariance",
            vision_ops.fused_cross_covariance,
            reference.cross_covariance,
            shapes.xca_cases(),
            build_cross_covariance,
            quick=("EdgeNeXt-S.3",),
            others={"sdpa": sdpa_cross_covariance},
        ),
        Op(
            "relative_attention",
            vision_ops.fused_relative_attention,
            reference.relative_attention,
            shapes.relative_attention_cases(),
            build_relative_attention,
            quick=("MOAT-0.3",),
            others={"sdpa": sdpa_relative_attention},
        ),
        Op(
            "relative_self_attention",
            attention_half_block,
            eager_attention_half_block,
            shapes.relative_attention_cases(),
            build_relative_self_attention,
            quick=("MOAT-0.3", "MOAT-0.4"),
            pixels=True,
            others={"sdpa": sdpa_relative_self_attention},
            wrapped=True,
        ),
        Op(
            "shift_split_attention",
            vision_ops.fused_shift_split_attention,
            reference.shift_split_attention,
            shapes.s2_cases(),
            build_shift_split_attention,
            quick=("S2-MLPv2-S.1",),
            pixels=True,
        ),
        Op(
            "s2_attention",
            vision_ops.fused_s2_attention,
            reference.s2_attention,
            shapes.s2_cases(),
            build_s2_attention,
            quick=("S2-MLPv2-S.2",),
            compile_in_short=True,
            pixels=True,
        ),
        Op(
            "batch_norm_act",
            in_training(vision_ops.fused_batch_norm_act),
            in_training(reference.batch_norm_act),
            shapes.batch_norm_cases(),
            build_batch_norm,
            quick=("MogaNet-T.2", "MOAT-0.2"),
            wrapped=True,
        ),
        Op(
            "mbconv",
            in_its_norms(vision_ops.fused_mbconv),
            in_its_norms(reference.mbconv),
            shapes.mbconv_cases(),
            build_mbconv,
            quick=("MOAT-0.2", "MOAT-0.2 entry", "MOAT-tiny0.3"),
            wrapped=True,
        ),
        Op(
            "mlp",
            half_block(vision_ops.fused_mlp),
            half_block(reference.mlp),
            shapes.mlp_cases(),
            build_mlp,
            quick=("HorNet-T.2", "EdgeNeXt-S.3", "S2-MLPv2-S.2"),
            pixels=True,
            wrapped=True,
        ),
        Op(
            "scaled_residual",
            vision_ops.fused_scaled_residual,
            reference.scaled_residual,
            shapes.layer_norm_cases(),
            build_scaled_residual,
            quick=("HorNet-T.1",),
        ),
    )
}


def ops_for(device: str, ops: Mapping[str, Op]) -> dict[str, Op]:
    return {name: op for name, op in ops.items() if device in op.devices}
