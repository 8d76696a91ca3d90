"""One call of every op, for what is tested of all of them."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import Case, laid_out
from torch import Tensor

import vision_ops as ops


def every_op(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    size: int = 14,
    layout: str = "channels_last",
    bias: bool = True,
) -> dict[str, Case]:
    """32 channels. run takes the tensors in the order of the public function, lists flat."""

    def draw(*shape: int) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        return (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)

    def maps(channels: int = 32) -> Tensor:
        return laid_out(torch.randn(batch, channels, size, size, device=device).to(dtype), layout)

    def maybe(*shape: int) -> Tensor | None:
        return draw(*shape) if bias else None

    def draws(count: int) -> list[Tensor]:
        return [draw(32) for _ in range(count)]

    def pointwise(outputs: int, inputs: int) -> list[Tensor | None]:
        return [draw(outputs, inputs), maybe(outputs)]

    def depthwise(channels: int, kernel: int) -> list[Tensor | None]:
        return [draw(channels, 1, kernel, kernel), maybe(channels)]

    def chain(widths: tuple[int, ...]) -> list[Tensor | None]:
        weights = [draw(o, i) for i, o in itertools.pairwise(widths)]
        return [*weights, *(maybe(o) for o in widths[1:])]

    branches = [draw(c, 1, k, k) for c, k in ((32, 5), (12, 5), (16, 7))]
    branch_biases = [maybe(32), maybe(12), maybe(16)]
    around = [*pointwise(64, 32), *depthwise(56, 7)]
    blocks = [t for _ in range(4) for t in pointwise(32, 32)]
    hidden = [*pointwise(64, 32), *depthwise(64, 3), *pointwise(32, 64), *pointwise(1, 64)]
    splits = [draw(8, 1, 3, 3) for _ in range(3)], [maybe(8) for _ in range(3)]
    tokens = [torch.randn(batch, size * size, 4, 8, device=device).to(dtype).permute(0, 2, 3, 1) for _ in range(3)]
    pixels = [torch.randn(batch, size, size, c, device=device).to(dtype) for c in (32, 96)]
    flat = torch.randn(batch, size * size, 32, device=device).to(dtype)
    mlps, temperature = [draw(32, 32), draw(96, 32)], torch.rand(4, 1, 1, device=device).to(dtype) + 0.5
    drops = torch.where(torch.arange(batch, device=device) % 2 == 0, 1.25, 0.0).to(dtype)
    linears = [*pointwise(96, 32), *pointwise(32, 32)]
    by_position = [t.transpose(2, 3) for t in tokens]
    table = torch.randn(4, 27, 27, device=device).to(dtype) if bias else None
    inverted = [draw(64, 32), draw(64), draw(64), draw(64, 1, 3, 3), draw(64), draw(64), *pointwise(32, 64)]

    def mbconv(t: Sequence[Tensor | None], backend: str) -> Tensor:
        """In training. The bias of pre_norm, whose gradient is zero, is none of the tensors."""
        x, pre, expand, *rest = t
        norms = [[weight, bias, None, None] for weight, bias in ((pre, torch.zeros_like(pre)), rest[:2], rest[3:5])]
        given = norms[0], expand, norms[1], rest[2], norms[2], *rest[5:7]
        return ops.fused_mbconv(x, *given, se=rest[7:], training=True, backend=backend)

    return {
        "dwconv": Case(lambda t, b: ops.fused_dwconv(*t, activation="gelu", backend=b), [maps(), *depthwise(32, 7)]),
        "multi_order_dwconv": Case(
            lambda t, b: ops.fused_multi_order_dwconv(t[0], t[1:4], t[4:], backend=b),
            [maps(), *branches, *branch_biases],
        ),
        "global_filter": Case(
            lambda t, b: ops.fused_global_filter(*t, backend=b), [maps(), draw(32, size, size // 2 + 1, 2)]
        ),
        "batch_norm_act": Case(
            lambda t, b: ops.fused_batch_norm_act(*t, None, None, training=True, activation="gelu", backend=b),
            [maps(), draw(32), draw(32)],
        ),
        "mbconv": Case(mbconv, [maps(), draw(32), *inverted, *pointwise(8, 64), *pointwise(64, 8)]),
        "layer_norm_2d": Case(lambda t, b: ops.fused_layer_norm_2d(*t, backend=b), [maps(), draw(32), draw(32)]),
        "dwconv_layer_norm": Case(
            lambda t, b: ops.fused_dwconv_layer_norm(*t, backend=b), [maps(), *depthwise(32, 7), draw(32), draw(32)]
        ),
        "split_cascade": Case(
            lambda t, b: ops.fused_split_cascade(t[0], t[1:4], t[4:], backend=b), [maps(), *splits[0], *splits[1]]
        ),
        "gated_recursion": Case(
            lambda t, b: ops.fused_gated_recursion(t[0], t[1], t[2:4], t[4:], backend=b),
            [maps(8), maps(56), *chain((8, 16, 32))],
        ),
        "gnconv": Case(
            lambda t, b: ops.fused_gnconv(*t[:5], t[5:7], t[7:9], *t[9:], scale=1 / 3, backend=b),
            [maps(), *around, *chain((8, 16, 32)), *pointwise(32, 32)],
        ),
        "moga_gate": Case(lambda t, b: ops.fused_moga_gate(*t, backend=b), [maps(), maps()]),
        "feature_decompose": Case(lambda t, b: ops.fused_feature_decompose(*t, backend=b), [maps(), draw(32)]),
        "moga_aggregation": Case(
            lambda t, b: ops.fused_moga_aggregation(*t[:5], t[5:8], t[8:11], *t[11:], backend=b),
            [maps(), *blocks[:4], *branches, *branch_biases, *blocks[4:], draw(32)],
        ),
        "channel_aggregation_ffn": Case(
            lambda t, b: ops.fused_channel_aggregation_ffn(*t, backend=b), [maps(), *hidden, draw(64)]
        ),
        "cross_covariance": Case(lambda t, b: ops.fused_cross_covariance(*t, backend=b), [*tokens, temperature]),
        "xca": Case(
            lambda t, b: ops.fused_xca(*t, num_heads=4, backend=b),
            [flat, *pointwise(96, 32), temperature, *pointwise(32, 32)],
        ),
        "relative_attention": Case(
            lambda t, b: ops.fused_relative_attention(*t, height=size, width=size, backend=b), [*by_position, table]
        ),
        "relative_self_attention": Case(
            lambda t, b: ops.fused_relative_self_attention(*t[:4], None, *t[4:9], num_heads=4, backend=b),
            [pixels[0], *blocks[:3], *blocks[4:], table],  # without a key bias, whose gradient vanishes
        ),
        "shift_split_attention": Case(lambda t, b: ops.fused_shift_split_attention(*t, backend=b), [pixels[1], *mlps]),
        "s2_attention": Case(lambda t, b: ops.fused_s2_attention(*t, backend=b), [pixels[0], *linears, *mlps]),
        "scaled_residual": Case(
            lambda t, b: ops.fused_scaled_residual(*t, backend=b), [maps(), maps(), draw(32), drops], constants=(3,)
        ),
        "mlp": Case(
            lambda t, b: ops.fused_mlp(
                t[0].permute(0, 2, 3, 1),
                *t[1:5],
                norm_weight=t[5],
                norm_bias=t[6],
                gamma=t[7],
                residual=t[8].permute(0, 2, 3, 1),
                path_scale=t[9],
                backend=b,
            ),
            [maps(), *pointwise(96, 32), *pointwise(32, 96), *draws(3), maps(), drops],
            constants=(9,),
        ),
    }


# What an op takes besides as a half-block: (norm in front, dimension of the channels of x).
_HALVES = {
    "gnconv": (True, 1),
    "xca": (True, -1),
    "s2_attention": (True, -1),
    "relative_self_attention": (True, -1),
    "moga_aggregation": (False, 1),
    "channel_aggregation_ffn": (False, 1),
}


def half_blocks(
    device: str = "cpu", dtype: torch.dtype = torch.float32, *, adds_x: bool = False, **options: Any
) -> dict[str, Case]:
    """The same ops as half-blocks. adds_x: x is the residual."""
    cases = every_op(device, dtype, **options)
    return {f"{name}_half_block": _half(name, cases[name], norm, adds_x) for name, (norm, _) in _HALVES.items()}


def _half(name: str, case: Case, norm: bool, adds_x: bool) -> Case:
    x, count = case.tensors[0], len(case.tensors)
    channels = x.shape[_HALVES[name][1]]

    def draw() -> Tensor:
        return torch.randn(channels, device=x.device).to(x.dtype)

    drops = torch.where(torch.arange(len(x), device=x.device) % 2 == 0, 1.25, 0.0).to(x.dtype)
    more = [draw(), drops, *([draw(), draw()] if norm else []), *([] if adds_x else [torch.randn_like(x)])]
    function = getattr(ops, f"fused_{name}")

    def run(t: Sequence[Tensor | None], backend: str) -> Tensor:
        own, (gamma, path_scale, *rest) = t[:count], t[count:]
        extra = {"gamma": gamma, "path_scale": path_scale, "residual": own[0] if adds_x else rest[-1]}
        if norm:
            extra |= {"norm_weight": rest[0], "norm_bias": rest[1]}

        def whole(*given: Any, **named: Any) -> Tensor:
            return function(*given, **named, **extra)

        with patched(f"fused_{name}", whole):
            return case.run(own, backend)

    return Case(run, [*case.tensors, *more], constants=(count + 1,))


@contextlib.contextmanager
def patched(name: str, function: Any) -> Iterator[None]:
    """The cases look their ops up when they run."""
    original = getattr(ops, name)
    setattr(ops, name, function)
    try:
        yield
    finally:
        setattr(ops, name, original)


NAMES = sorted(every_op("meta"))
HALF_BLOCKS = sorted(half_blocks("meta"))
