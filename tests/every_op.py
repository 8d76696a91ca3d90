"""One call of every op, for what is tested of all of them."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from harness import Case, laid_out
from torch import Tensor

import vision_ops as ops
from vision_ops.ops import xca


def every_op(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    size: int = 14,
    layout: str = "channels_last",
    bias: bool = True,
    channels: int = 32,
) -> dict[str, Case]:
    """run takes the tensors in the order of the public function, lists flat. layout: of the maps, of which tokens and
    pixels are views. channels: a multiple of 8."""

    def draw(*shape: int) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        return (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)

    c = channels

    def maps(channels: int = c) -> Tensor:
        return laid_out(torch.randn(batch, channels, size, size, device=device).to(dtype), layout)

    def maybe(*shape: int) -> Tensor | None:
        return draw(*shape) if bias else None

    def draws(count: int) -> list[Tensor]:
        return [draw(c) for _ in range(count)]

    def pointwise(outputs: int, inputs: int) -> list[Tensor | None]:
        return [draw(outputs, inputs), maybe(outputs)]

    def depthwise(channels: int, kernel: int) -> list[Tensor | None]:
        return [draw(channels, 1, kernel, kernel), maybe(channels)]

    def chain(widths: tuple[int, ...]) -> list[Tensor | None]:
        weights = [draw(o, i) for i, o in itertools.pairwise(widths)]
        return [*weights, *(maybe(o) for o in widths[1:])]

    branches = [draw(o, 1, k, k) for o, k in ((c, 5), (3 * c // 8, 5), (c // 2, 7))]
    branch_biases = [maybe(len(weight)) for weight in branches]
    around = [*pointwise(2 * c, c), *depthwise(7 * c // 4, 7)]
    blocks = [t for _ in range(4) for t in pointwise(c, c)]
    hidden = [*pointwise(2 * c, c), *depthwise(2 * c, 3), *pointwise(c, 2 * c), *pointwise(1, 2 * c)]
    splits = [draw(c // 4, 1, 3, 3) for _ in range(3)], [maybe(c // 4) for _ in range(3)]
    tokens = [maps().unflatten(1, (4, c // 4)).flatten(3) for _ in range(3)]
    pixels = [maps(o).permute(0, 2, 3, 1) for o in (c, 3 * c)]
    flat = maps().flatten(2).mT
    # What is pooled is a sum: of larger weights the softmax would choose one branch.
    mlps = [draw(c, c) / size**2, draw(3 * c, c)]
    temperature = torch.rand(4, 1, 1, device=device).to(dtype) + 0.5
    drops = torch.where(torch.arange(batch, device=device) % 2 == 0, 1.25, 0.0).to(dtype)
    linears = [*pointwise(3 * c, c), *pointwise(c, c)]
    by_position = [t.transpose(2, 3) for t in tokens]
    table = torch.randn(4, 27, 27, device=device).to(dtype) if bias else None
    h = 2 * c
    inverted = [draw(h, c), draw(h), draw(h), draw(h, 1, 3, 3), draw(h), draw(h), *pointwise(c, h)]

    def mbconv(t: Sequence[Tensor | None], backend: str) -> Tensor:
        """In training. The bias of pre_norm, whose gradient is zero, is none of the tensors."""
        x, pre, expand, *rest = t
        norms = [[weight, bias, None, None] for weight, bias in ((pre, torch.zeros_like(pre)), rest[:2], rest[3:5])]
        given = norms[0], expand, norms[1], rest[2], norms[2], *rest[5:7]
        return ops.fused_mbconv(x, *given, se=rest[7:], training=True, backend=backend)

    def mlp(t: Sequence[Tensor | None], backend: str) -> Tensor:
        x, residual = (t[i].permute(0, 2, 3, 1) for i in (0, 8))
        around = {"norm_weight": t[5], "norm_bias": t[6], "gamma": t[7], "path_scale": t[9]}
        return ops.fused_mlp(x, *t[1:5], residual=x if t[8] is t[0] else residual, **around, backend=backend)

    return {
        "dwconv": Case(lambda t, b: ops.fused_dwconv(*t, activation="gelu", backend=b), [maps(), *depthwise(c, 7)]),
        "multi_order_dwconv": Case(
            lambda t, b: ops.fused_multi_order_dwconv(t[0], t[1:4], t[4:], backend=b),
            [maps(), *branches, *branch_biases],
        ),
        "global_filter": Case(
            lambda t, b: ops.fused_global_filter(*t, backend=b), [maps(), draw(c, size, size // 2 + 1, 2)]
        ),
        "batch_norm_act": Case(
            lambda t, b: ops.fused_batch_norm_act(*t, None, None, training=True, activation="gelu", backend=b),
            [maps(), draw(c), draw(c)],
        ),
        "mbconv": Case(mbconv, [maps(), draw(c), *inverted, *pointwise(8, h), *pointwise(h, 8)]),
        "layer_norm_2d": Case(lambda t, b: ops.fused_layer_norm_2d(*t, backend=b), [maps(), draw(c), draw(c)]),
        "dwconv_layer_norm": Case(
            lambda t, b: ops.fused_dwconv_layer_norm(*t, backend=b), [maps(), *depthwise(c, 7), draw(c), draw(c)]
        ),
        "split_cascade": Case(
            lambda t, b: ops.fused_split_cascade(t[0], t[1:4], t[4:], backend=b), [maps(), *splits[0], *splits[1]]
        ),
        "gated_recursion": Case(
            lambda t, b: ops.fused_gated_recursion(t[0], t[1], t[2:4], t[4:], backend=b),
            [maps(c // 4), maps(7 * c // 4), *chain((c // 4, c // 2, c))],
        ),
        "gnconv": Case(
            lambda t, b: ops.fused_gnconv(*t[:5], t[5:7], t[7:9], *t[9:], scale=1 / 3, backend=b),
            [maps(), *around, *chain((c // 4, c // 2, c)), *pointwise(c, c)],
        ),
        "moga_gate": Case(lambda t, b: ops.fused_moga_gate(*t, backend=b), [maps(), maps()]),
        "feature_decompose": Case(lambda t, b: ops.fused_feature_decompose(*t, backend=b), [maps(), draw(c)]),
        "moga_aggregation": Case(
            lambda t, b: ops.fused_moga_aggregation(*t[:5], t[5:8], t[8:11], *t[11:], backend=b),
            [maps(), *blocks[:4], *branches, *branch_biases, *blocks[4:], draw(c)],
        ),
        "channel_aggregation_ffn": Case(
            lambda t, b: ops.fused_channel_aggregation_ffn(*t, backend=b), [maps(), *hidden, draw(h)]
        ),
        "cross_covariance": Case(lambda t, b: ops.fused_cross_covariance(*t, backend=b), [*tokens, temperature]),
        "xca": Case(
            lambda t, b: ops.fused_xca(*t, num_heads=4, backend=b),
            [flat, *pointwise(3 * c, c), temperature, *pointwise(c, c)],
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
            lambda t, b: ops.fused_scaled_residual(*t, backend=b), [maps(), maps(), draw(c), drops], constants=(3,)
        ),
        "mlp": Case(
            mlp, [maps(), *pointwise(3 * c, c), *pointwise(c, 3 * c), *draws(3), maps(), drops], constants=(9,)
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

        with patched(ops, f"fused_{name}", whole):
            return case.run(own, backend)

    return Case(run, [*case.tensors, *more], constants=(count + 1,))


@contextlib.contextmanager
def patched(module: ModuleType, name: str, function: Any) -> Iterator[None]:
    """The cases look their ops up when they run."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def gram_form(**options: Any) -> Case:
    """`xca` in the form that it takes for many tokens."""
    case = every_op(**options)["xca"]

    def run(t: Sequence[Tensor | None], backend: str) -> Tensor:
        with patched(xca, "_takes_gram", lambda x: True):
            return case.run(t, backend)

    return Case(run, case.tensors)


NAMES = sorted(every_op("meta"))
HALF_BLOCKS = sorted(half_blocks("meta"))
