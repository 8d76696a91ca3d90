"""What is compiled for GPUs that are not here: launchers with tensors that have no memory, at the networks' shapes.

To add an op: a function that calls its launchers once, and LAUNCHES. Every kernel in the KERNELS of a file of kernels/
has to come up.
"""

import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from vision_ops import kernels
from vision_ops.kernels import (
    batch_norm_act,
    channel_aggregation_ffn,
    convert,
    cross_covariance,
    feature_decompose,
    gated_recursion,
    layer_norm_2d,
    mlp,
    moga_gate,
    recursion_chain,
    relative_attention,
    scaled_residual,
    shift_split_attention,
)
from vision_ops.ops._batch_norm import Coefficients, Ends

ARCHS = (80, 90, 100)


def kernel_modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if not found.name.startswith("_")]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


@dataclass(frozen=True)
class Launch:
    op: str
    case: str
    run: Callable[[], None]
    archs: Sequence[int] = ARCHS  # the others are left to `make test-all`


def absent(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False) -> Tensor:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)


def norm(channels: int, size: int, dtype: torch.dtype, channels_last: bool) -> None:
    x, y, grad, dx = (absent(128, channels, size, size, dtype=dtype, channels_last=channels_last) for _ in range(4))
    weight, bias, dweight, dbias = (absent(channels, dtype=dtype) for _ in range(4))
    layer_norm_2d.forward(x, weight, bias, y, 1e-6)
    layer_norm_2d.backward(grad, x, weight, dx, dweight, dbias, 1e-6)


def norm_without(what: str) -> None:
    x, grad, dx = (absent(128, 96, 56, 56, channels_last=True) for _ in range(3))
    weight, dweight, dbias = (absent(96) for _ in range(3))
    sums = (None, None) if what == "sums" else (dweight, dbias)
    layer_norm_2d.backward(grad, x, weight, None if what == "dx" else dx, *sums, 1e-6)


def norm_of_a_half_block() -> None:
    """Under autocast, where x is the residual, too."""
    y, grad = (absent(128, 128, 28, 28, channels_last=True) for _ in range(2))
    x, dx, plus = (absent(*y.shape, dtype=torch.float32, channels_last=True) for _ in range(3))
    weight, bias, dweight, dbias = (absent(128, dtype=torch.float32) for _ in range(4))
    layer_norm_2d.forward(x, weight, bias, y, 1e-6)
    layer_norm_2d.backward(grad, x, weight, dx, dweight, dbias, 1e-6, plus)


def norms() -> Iterator[Launch]:
    yield Launch("layer_norm_2d", "of a half-block", norm_of_a_half_block, ARCHS)
    for what in ("dx", "sums"):
        yield Launch("layer_norm_2d", f"without {what}", lambda what=what: norm_without(what), (90,))
    hornet = ((64, 56), (128, 28), (256, 14), (512, 7), (96, 56), (192, 28), (384, 14), (768, 7))
    edgenext = ((24, 64), (48, 32), (88, 16), (100, 16), (584, 8))
    for channels, size in (*hornet, *edgenext, (2048, 7)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for last in (True, False):
                named = f"{channels}x{size}x{size} {str(dtype)[6:]} {'channels_last' if last else 'contiguous'}"
                usual, widest = dtype == torch.bfloat16 and channels in (64, 256), channels == 2048
                archs = ARCHS if widest and last and dtype == torch.bfloat16 else (90,) if usual or widest else ()
                yield Launch("layer_norm_2d", named, lambda a=(channels, size, dtype, last): norm(*a), archs)


def slices(channels: int, widths: Sequence[int], size: int, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    """pwa, a slice of proj_in's output, and dw, as fused_gnconv has them."""
    projected = absent(128, 2 * channels, size, size, dtype=dtype, channels_last=last)
    return projected[:, : widths[0]], absent(128, sum(widths), size, size, dtype=dtype, channels_last=last)


def gates(channels: int, size: int, dtype: torch.dtype, last: bool, bias: bool) -> None:
    u, dw = slices(channels, (channels // 2, channels), size, dtype, last)
    q = dw[:, : u.shape[1]]
    b, db = (absent(u.shape[1], dtype=dtype) if bias else None for _ in range(2))
    gated_recursion.gate(u, b, q, q)
    gated_recursion.gate_backward(q, u, b, q, u, q, db)


def chain(channels: int, order: int, size: int, dtype: torch.dtype, last: bool) -> None:
    widths = [channels >> k for k in reversed(range(order))]
    weights = [absent(o, i, 1, 1, dtype=dtype) for i, o in itertools.pairwise(widths)]
    biases = [absent(o, dtype=dtype) for o in widths[1:]]
    out = absent(128, channels, size, size, dtype=dtype, channels_last=last)
    expected = channels <= 256 and dtype != torch.float32
    pwa, dw = slices(channels, widths, size, dtype, last)
    assert recursion_chain.chain(pwa, dw, weights, biases, out) == expected
    du = absent(128, sum(widths[1:]), size, size, dtype=dtype, channels_last=last)
    if expected:
        sums = [absent(width, dtype=torch.float32) for width in widths]
        recursion_chain.chain_backward(pwa, dw, weights, biases, out, dw, pwa, dw, du, sums)


HORNET = ((64, 2, 56), (128, 3, 28), (256, 4, 14), (512, 5, 7), (96, 2, 56), (192, 3, 28), (384, 4, 14), (768, 5, 7))


def recursions() -> Iterator[Launch]:
    for channels, order, size in HORNET:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for last in (True, False):
                named = f"{channels}x{size}x{size} {str(dtype)[6:]} {'channels_last' if last else 'contiguous'}"
                usual = dtype == torch.bfloat16 and last
                run = functools.partial(chain, channels, order, size, dtype, last)
                # The widest that has a kernel, and those that have none; others, one of which leaves tiles incomplete.
                archs = ARCHS if channels >= 256 else (90,) if channels in (64, 128, 192) else ()
                yield Launch("gated_recursion", f"chain {named}", run, archs if usual else ())
                for bias in (True, False):
                    run = functools.partial(gates, channels, size, dtype, last, bias)
                    archs = ARCHS if usual and bias and channels == 64 else (90,) if channels == 768 and bias else ()
                    yield Launch("gated_recursion", f"gates {named}{' bias' if bias else ''}", run, archs)


def s2_passes(channels: int, size: int, dtype: torch.dtype, with_y: bool) -> None:
    """As `shift_split_attention` calls them or, with_y, as `s2_attention` does."""
    x, dx = (absent(128, size, size, 3 * channels, dtype=dtype) for _ in range(2))
    y, dy = (absent(128, size, size, channels, dtype=dtype) for _ in range(2))
    sums_type = torch.promote_types(dtype, torch.float32)
    pooled, dpooled = (absent(128, channels, dtype=sums_type) for _ in range(2))
    bias = absent(3 * channels, dtype=dtype) if with_y else None
    edge_sums, weights, sums = (absent(128, k, channels, dtype=sums_type) for k in (9, 3, 4))
    shift_split_attention.edge_sums(y if with_y else x, edge_sums)
    shift_split_attention.pool(edge_sums, pooled, bias, size**2)
    shift_split_attention.weigh(x, weights, bias, y)
    given = (bias, sums, y) if with_y else (None, sums, None)
    shift_split_attention.weigh_backward_weights(dy, x, weights, *given)
    shift_split_attention.weigh_backward_input(dy, weights, dpooled, dx)
    hidden, mlps = absent(128, 8, dtype=sums_type), [absent(8, channels), absent(3 * channels, 8)]
    shift_split_attention.branch_weights_backward(sums, bias, weights, hidden, pooled, mlps, [None, None], dpooled)
    if bias is not None:
        shift_split_attention.bias_backward(sums, weights, dpooled, size**2, bias)


def parameters() -> None:
    """Of HorNet-T.3, under autocast."""
    half = [
        (absent(*shape, dtype=torch.float32), absent(*shape)) for shape in ((512, 256), (256, 256), (512,), (64, 32))
    ]
    scaled = [(absent(*shape, dtype=torch.float32),) * 2 for shape in ((480, 1, 7, 7), (480,))]
    sources, targets = zip(*half, *scaled, strict=True)
    convert.convert(sources, targets, [1.0] * len(half) + [1 / 3] * len(scaled))


def s2() -> Iterator[Launch]:
    for channels, size in ((192, 32), (384, 16), (256, 32), (512, 16), (100, 15), (10, 7)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for with_y in (False, True):
                op = "s2_attention" if with_y else "shift_split_attention"
                archs = ARCHS if channels == 192 and dtype == torch.bfloat16 else (90,) if channels == 192 else ()
                named, given = f"{channels}x{size}x{size} {str(dtype)[6:]}", (channels, size, dtype, with_y)
                yield Launch(op, named, lambda given=given: s2_passes(*given), archs)


def attention(tokens: int, channels: int, heads: int, dtype: torch.dtype, batch: int) -> None:
    """What both forms of fused_xca launch by head, forward and backward."""

    def by_head(width: int) -> Tensor:
        t = absent(batch, tokens, width, dtype=dtype)[:, :, :channels]
        return t.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)

    d = channels // heads
    gram, weights, grad = (absent(batch, heads, d, d, dtype=torch.float32) for _ in range(3))
    norms, scales = (absent(batch, 2, heads, d, dtype=torch.float32) for _ in range(2))
    temperature, each = absent(heads, dtype=torch.float32), absent(batch, heads, 1, 1, dtype=torch.float32)
    q, k, v, y = (by_head(width * channels) for width in (3, 3, 3, 1))
    cross_covariance.gram(q, k, gram, norms, q, k)
    cross_covariance.softmax(gram, norms, temperature, weights)
    cross_covariance.apply(weights, v, y)
    cross_covariance.gram(y, v, grad)
    cross_covariance.softmax_backward(grad, weights, gram, norms, temperature, scales, each)
    scale = scales[:, 0].unsqueeze(-1)
    cross_covariance.apply(grad, k, q, scale=scale, z=q)
    cross_covariance.apply(grad, q, k, transposed=True, scale=scale, z=k)


def softmax_in_float64(heads: int, d: int) -> None:
    """The Gram form's backward pass."""
    grad, weights, gram = (absent(128, heads, d, d, dtype=torch.float64) for _ in range(3))
    norms, scales = (absent(128, 2, heads, d, dtype=torch.float64) for _ in range(2))
    temperature, each = absent(heads, dtype=torch.float64), absent(128, heads, 1, 1, dtype=torch.float64)
    cross_covariance.softmax_backward(grad, weights, gram, norms, temperature, scales, each)


def attentions() -> Iterator[Launch]:
    edgenext = ((1024, 96, 8), (256, 160, 8), (64, 304, 8), (256, 288, 8), (256, 100, 4), (64, 192, 4))
    wide = (64, 584, 8), (196, 768, 8)
    for tokens, channels, heads in (*edgenext, (196, 384, 8), (196, 512, 8), *wide):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            # Heads in groups, and heads in rows; of half type one to a tile, and rows of whole vectors, too.
            usual, others = channels in (96, 584), channels in (304, 768)
            if dtype == torch.bfloat16:
                archs = ARCHS if usual else (90,) if others else ()
            else:
                archs = (90,) if usual and dtype == torch.float32 else ()
            # The tokens of one sample are summed in chunks.
            for batch in (128, 1) if tokens == 1024 else (128,):
                named = f"{tokens}x{channels} h{heads} {str(dtype)[6:]} b{batch}"
                run = functools.partial(attention, tokens, channels, heads, dtype, batch)
                yield Launch("cross_covariance", named, run, archs)
        archs = ARCHS if channels in (96, 584) else (90,) if channels in (304, 768) else ()
        run = functools.partial(softmax_in_float64, heads, channels // heads)
        yield Launch("cross_covariance", f"{channels} h{heads} float64", run, archs)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def decomposition(channels: int, size: int, dtype: torch.dtype, last: bool, activation: str | None) -> None:
    x, y = (absent(128, channels, size, size, dtype=dtype, channels_last=last) for _ in range(2))
    means, sigma = absent(128, channels, 1, 1, dtype=wide(dtype)), absent(channels, dtype=dtype)
    feature_decompose.image_means(x, means)
    feature_decompose.decompose(x, means, sigma, activation, y)
    feature_decompose.decompose_backward(y, x, means, sigma, activation, y, sigma, sigma)


def gate(channels: int, size: int, dtype: torch.dtype, last: bool, sliced: bool, doubled: bool) -> None:
    """sliced: gate and value are slices of one tensor."""
    both = absent(128, 2 * channels, size, size, dtype=dtype, channels_last=last)
    y = absent(128, channels, size, size, dtype=dtype, channels_last=last)
    left, right = both.split(channels, dim=1) if sliced else (y, y)
    moga_gate.gate(left, right, doubled, y)
    moga_gate.gate_backward(y, left, right, doubled, left, right)
    sums = [absent(channels, dtype=dtype) for _ in range(2)]
    moga_gate.gate_backward(y, left, right, doubled, left, right, y, sums)


def aggregation(channels: int, hidden: int, size: int, dtype: torch.dtype) -> None:
    x = absent(128, channels, size, size, dtype=dtype, channels_last=True)
    room = absent(128, hidden + 64 // dtype.itemsize, size, size, dtype=dtype, channels_last=True)
    dh = absent(128, hidden, size, size, dtype=dtype, channels_last=True)
    scores, of_d = absent(128, 1, size, size, dtype=wide(dtype)), absent(channels, dtype=wide(dtype))
    weight, bias, dweight = absent(hidden, dtype=dtype), absent(1, dtype=dtype), absent(hidden, dtype=wide(dtype))
    h, d = room[:, :hidden], room[:, hidden : hidden + 8]
    channel_aggregation_ffn.scores(h, d, weight, bias, scores)
    channel_aggregation_ffn.scores_backward(x, of_d, scores, scores, d)
    channel_aggregation_ffn.gelu_backward(h, dh, weight, scores, dweight, absent(1, dtype=dtype))
    matrix, product = absent(channels, hidden + 8, dtype=dtype), absent(channels, hidden + 8, dtype=wide(dtype))
    fc2, sigma, of_d = (
        absent(channels, hidden, dtype=dtype),
        absent(hidden, dtype=dtype),
        absent(channels, dtype=wide(dtype)),
    )
    channel_aggregation_ffn.fold(fc2, sigma, hidden + 2, matrix, of_d)
    channel_aggregation_ffn.unfold(product, fc2, sigma, fc2, sigma)


MOGANET = (
    *((32, 8, 56), (64, 8, 28), (96, 4, 14), (192, 4, 7), (128, 4, 14), (256, 4, 7)),
    *((64, 8, 56), (128, 8, 28), (320, 4, 14), (512, 4, 7), (160, 8, 28), (640, 4, 7)),
    *((96, 8, 56), (192, 8, 28), (480, 4, 14), (960, 4, 7)),
)


def moganet() -> Iterator[Launch]:
    for channels, ratio, size in MOGANET:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            # Of two stages by default: one for every architecture, one that leaves blocks and vectors incomplete.
            first = (channels, size, dtype) == (64, 56, torch.bfloat16)
            archs = ARCHS if first else (90,) if (channels, size, dtype) == (512, 7, torch.float32) else ()
            of, hidden = f"{channels}x{size}x{size} {str(dtype)[6:]}", channels * ratio
            run = functools.partial(aggregation, channels, hidden, size, dtype)
            yield Launch("channel_aggregation_ffn", f"{hidden} of {of}", run, archs)
            for last in (True, False):
                named, usual = f"{of} {'channels_last' if last else 'contiguous'}", archs if last else ()
                for activation in ("silu", "gelu", None) if channels == 64 else ("silu",):
                    run = functools.partial(decomposition, channels, size, dtype, last, activation)
                    yield Launch(
                        "feature_decompose", f"{named} {activation}", run, usual if activation == "silu" else ()
                    )
                for sliced, doubled in ((False, False), (True, True)):
                    run = functools.partial(gate, channels, size, dtype, last, sliced, doubled)
                    form = f"{named}{', slices, doubled' if sliced else ''}"
                    yield Launch("moga_gate", form, run, usual if sliced != first else ())


def tail(channels: int, size: int, dtype: torch.dtype, last: bool, mixed: bool) -> None:
    form = {"dtype": dtype, "channels_last": last}
    x, y = (absent(128, channels, size, size, **form) for _ in range(2))
    branch = absent(128, channels, size, size, dtype=torch.bfloat16 if mixed else dtype, channels_last=last)
    gamma, dgamma, drops = absent(channels, dtype=dtype), absent(channels, dtype=dtype), absent(128, dtype=dtype)
    scaled_residual.forward(x, branch, gamma, drops, y)
    scaled_residual.backward(y, branch, gamma, None if mixed else drops, branch, None if mixed else dgamma)


def activations(hidden: int, size: int, dtype: torch.dtype, activation: str) -> None:
    u, a, du = (absent(128, hidden, size, size, dtype=dtype, channels_last=True) for _ in range(3))
    mlp.activate(u, a, activation)
    mlp.activate_backward(du, u, du, a, absent(hidden, dtype=dtype), activation)


def mlps() -> Iterator[Launch]:
    shapes = ((64, 56), (128, 28), (256, 14), (512, 7), (96, 32), (160, 16), (304, 8), (192, 28), (384, 14))
    for channels, size in shapes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            first = channels == 64 and dtype in (torch.bfloat16, torch.float64)
            for last in (True, False):
                named = f"{channels}x{size}x{size} {str(dtype)[6:]} {'channels_last' if last else 'contiguous'}"
                for mixed in (False, True)[: 2 if dtype == torch.float32 else 1]:
                    run = functools.partial(tail, channels, size, dtype, last, mixed)
                    archs = ARCHS if first and last else (90,) if first or (mixed and channels == 64) else ()
                    yield Launch("scaled_residual", f"{named}{', bfloat16 branch' if mixed else ''}", run, archs)
            for activation in ("gelu", "silu", "hardswish"):
                run = functools.partial(activations, 4 * channels, size, dtype, activation)
                named = f"{activation} {4 * channels}x{size}x{size} {str(dtype)[6:]}"
                yield Launch("mlp", named, run, ARCHS if first and activation == "gelu" else (90,) if first else ())


def positions(size: tuple[int, int], heads: int, d: int, dtype: torch.dtype, table: bool, with_y: bool) -> None:
    """As `relative_attention` calls them or, with_y, as `relative_self_attention` does."""
    height, width = size
    geometry = height, width, height, width, d**-0.5
    qkv = absent(128, height * width, 3 * heads * d, dtype=dtype)
    q, k, v = (t.unflatten(2, (heads, d)).transpose(1, 2) for t in qkv.split(heads * d, dim=2))
    y = absent(128, height * width, heads * d, dtype=dtype).unflatten(2, (heads, d)).transpose(1, 2)
    lse, biases = absent(128, heads, height * width, dtype=torch.float32), None
    if table:
        biases = absent(heads, 2 * height - 1, 2 * width - 1, dtype=torch.float32)
    relative_attention.forward(q, k, v, biases, geometry, y, lse)
    relative_attention.backward(y, q, k, v, biases, geometry, y if with_y else None, lse, q, k, v, biases)


def moat() -> Iterator[Launch]:
    """Both stages at 224, 256, 384 and 512; heads do not matter. Tiles differ from 49 to 196 to 576 positions."""
    for side in (7, 14, 8, 16, 12, 24, 32):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for d in (32, 64) if side in (7, 14, 24) else (32,):
                tiles, usual = side in (7, 14, 24), dtype == torch.bfloat16 and d == 32
                archs = ARCHS if tiles and usual else (90,) if tiles and dtype != torch.float16 else ()
                named = f"{side}x{side} d{d} {str(dtype)[6:]}"
                run = functools.partial(positions, (side, side), 12, d, dtype, True, True)
                yield Launch("relative_attention", named, run, archs)
                run = functools.partial(positions, (side, side), 12, d, dtype, False, False)
                yield Launch("relative_attention", f"{named} without biases", run, (90,) if tiles and usual else ())
    run = functools.partial(positions, (3, 100), 12, 32, torch.bfloat16, True, False)
    yield Launch("relative_attention", "3x100 d32 bfloat16", run, ())


def batch_norm(channels: int, size: int, dtype: torch.dtype, last: bool, by_image: bool) -> None:
    """by_image: with gates and sums of every image, as squeeze and excitation takes them."""
    x, y, grad = (absent(128, channels, size, size, dtype=dtype, channels_last=last) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    table, line, gate = (absent(rows, channels, dtype=wide) for rows in (5, 2, 128))
    weight, bias, dweight, dbias = (absent(channels, dtype=wide) for _ in range(4))
    c, ends = Coefficients(table), Ends(line, dweight, dbias, x.numel() // channels)
    activation = "gelu" if by_image or channels != 96 else None
    if by_image:
        c, sums = Coefficients(table, gate, gate), absent(128, 5, channels, dtype=wide)
        batch_norm_act.forward(x, Coefficients(table), activation, y, gate)
        batch_norm_act.backward_images(grad, x, Coefficients(table, gate), activation, sums, y)
        batch_norm_act.finish(sums, c, ends)
    else:
        batch_norm_act.prepare(x, weight, bias, None, None, table, 1e-3)
        batch_norm_act.prepare(None, weight, bias, dweight, dbias, table, 1e-3)
        batch_norm_act.forward(x, c, activation, y)
        batch_norm_act.backward_sums(grad, x, c, activation, ends, y)
        batch_norm_act.backward_input(None, x, c, None, line, grad, y)
    batch_norm_act.backward_input(grad, x, c, activation, line, grad)


def batch_norms() -> Iterator[Launch]:
    """Of MOAT, and of MogaNet's planes."""
    for channels, size in ((96, 56), (384, 56), (768, 28), (1536, 14), (3072, 7), (32, 56), (88, 16)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for last, by_image in ((True, False), (True, True), (False, False)):
                named = f"{channels}x{size}x{size} {str(dtype)[6:]} {'channels_last' if last else 'contiguous'}"
                run = functools.partial(batch_norm, channels, size, dtype, last, by_image)
                usual = dtype == torch.bfloat16 and last
                archs = ARCHS if usual and channels == 384 else (90,) if channels == 88 and not by_image else ()
                yield Launch("batch_norm_act", f"{named}{' by image' if by_image else ''}", run, archs)


LAUNCHES = (
    *batch_norms(),
    Launch("convert", "HorNet-T.3", parameters),
    *norms(),
    *recursions(),
    *s2(),
    *attentions(),
    *moganet(),
    *mlps(),
    *moat(),
)
