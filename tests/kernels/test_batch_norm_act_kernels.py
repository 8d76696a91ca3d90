"""The Triton kernels of batch norm in the interpreter, and those of fused_mbconv with either convolution."""

import pytest
import torch
from harness import LAYOUTS, Case, check_against_reference, laid_out, relative_error

from vision_ops import reference
from vision_ops.kernels import batch_norm_act as kernels
from vision_ops.kernels import batch_norm_table
from vision_ops.ops import batch_norm_act as ops
from vision_ops.ops import mbconv
from vision_ops.ops._batch_norm import MEAN, VARIANCE

pytestmark = pytest.mark.usefixtures("interpreter")


def make(interpreter, shape, *, training=True, activation="gelu", dtype=torch.float32, layout="contiguous", mean=0.0):
    c = shape[1]
    x = laid_out((torch.randn(shape) * 2 + mean * torch.randn(c, 1, 1)).to(dtype), layout)
    running = torch.randn(c), torch.rand(c) + 0.5

    def run(t, backend):
        statistics = (None, None) if training else tuple(r.to(t[1].dtype) for r in running)
        if backend == "reference":
            return reference.batch_norm_act(*t, *statistics, training=training, eps=1e-3, activation=activation)
        return interpreter.run(ops._op, *t, *statistics, 1e-3, activation)

    return Case(run, [x, (torch.rand(c) + 0.5).to(dtype), torch.randn(c).to(dtype)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(interpreter, layout, dtype, training):
    slack = 10 if dtype == torch.float64 else 2
    case = make(interpreter, (2, 13, 7, 6), dtype=dtype, layout=layout, training=training)
    check_against_reference(case, layout, slack=slack)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_activations(interpreter, activation):
    check_against_reference(make(interpreter, (2, 8, 7, 6), activation=activation), slack=2)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_layouts(interpreter, layout):
    for grad_layout in ("contiguous", "channel_slice", "expanded"):
        check_against_reference(make(interpreter, (2, 7, 6, 7), layout=layout), grad_layout, slack=4)


@pytest.mark.parametrize("shape", [(1, 70, 3, 5), (3, 9, 5, 1), (2, 3, 1, 33), (3, 130, 1, 1), (0, 8, 5, 5)], ids=str)
def test_sizes(interpreter, shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(interpreter, shape, layout=layout), slack=4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_in_several_shares(interpreter, layout, monkeypatch):
    """Of several tiles; the last share has fewer pixels, or none; and more shares than are merged at once."""
    monkeypatch.setattr(batch_norm_table, "TILE", batch_norm_table.Tile(2, 32, num_warps=4))
    for size in (39, 48):
        check_against_reference(make(interpreter, (2, 6, size, 13), layout=layout, mean=20.0), slack=4)


def moments(x):
    table = torch.full((5, x.shape[1]), torch.nan)
    kernels.prepare(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]), None, None, table, 1e-3)
    return table


def test_moments_of_a_trend(interpreter):
    """The means of tiles, shares and images differ, which is most of the variance."""
    x = torch.randn(3, 8, 40, 13) + torch.linspace(-9, 9, 3 * 520).view(3, 1, 40, 13)
    for layout in ("contiguous", "channels_last"):
        table = moments(laid_out(x, layout))
        assert (table[MEAN] - x.double().mean((0, 2, 3))).abs().max() < 1e-5
        assert relative_error(table[VARIANCE], x.double().var((0, 2, 3))) < 1e-5


def test_variance_about_a_large_mean(interpreter):
    x = torch.randn(2, 8, 20, 20) + 1e4
    for layout in ("contiguous", "channels_last"):
        found = moments(laid_out(x, layout))[VARIANCE]
        assert relative_error(found, x.double().var((0, 2, 3))) < 1e-3


def make_block(interpreter, shape, outputs=None, *, stride=1, training=True, dtype=torch.float32, layout="contiguous"):
    """With squeeze and excitation at stride 1; the bias of pre_norm, whose gradient is zero, is no tensor of it."""
    (n, c), o = shape[:2], outputs or shape[1]
    hidden, reduced = 2 * o, 3
    x = laid_out(torch.randn(shape).to(dtype), layout)

    def draw(*size):
        return (torch.randn(size) / max(1, torch.Size(size[1:]).numel()) ** 0.5).to(dtype)

    pre_bias, scale = draw(c), torch.arange(n).remainder(2) * 1.5
    running = [(torch.randn(size) * 0.3, torch.rand(size) + 0.5) for size in (c, hidden, hidden)]
    norms = [torch.rand(size).to(dtype) + 0.5 for size in (c, hidden, hidden)]
    se = [draw(reduced, hidden), draw(reduced), draw(hidden, reduced), draw(hidden)] if stride == 1 else []
    own = [draw(o, c), draw(o)] if outputs else [None, None]

    def run(t, backend):
        statistics = [[r.to(t[1].dtype) for r in pair] for pair in running]
        measured = [[], [], []] if training else statistics
        x, pre, expand, ew, eb, dw, dww, dwb, shrink, bias, shortcut, shortcut_bias, *excitation = t
        given = [pre, pre_bias.to(pre.dtype)], expand, [ew, eb], dw, [dww, dwb]
        a = x, *(t + measured[i // 2] if i % 2 == 0 else t for i, t in enumerate(given))
        options = None if outputs or stride == 2 else scale.to(pre.dtype), stride, 2, 1e-3, True
        if backend == "reference":
            return mbconv._reference(mbconv.Arguments(*a, excitation, shrink, bias, shortcut, shortcut_bias, *options))
        return interpreter.run(mbconv._op, *a, excitation, shrink, bias, shortcut, shortcut_bias, *options)

    weights = [draw(hidden, c), norms[1], draw(hidden), draw(hidden, 1, 3, 3), norms[2], draw(hidden)]
    return Case(run, [x, norms[0], *weights, draw(o, hidden), draw(o), *own, *se])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("outputs", "stride"), [(None, 1), (12, 2)])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float64, "channels_last")],
    ids=str,
)
def test_mbconv(interpreter, convolution, dtype, layout, outputs, stride, training):
    slack = {torch.float64: 50, torch.float32: 6}.get(dtype, 2)
    case = make_block(interpreter, (2, 8, 7, 6), outputs, stride=stride, training=training, dtype=dtype, layout=layout)
    check_against_reference(case, layout, slack=slack)


def test_float32_values_beside_half_weights(interpreter):
    """As autocast gives them: neither the stream of residuals nor norms are cast."""
    case = make_block(interpreter, (2, 8, 7, 6))
    norms = 0, 1, 3, 4, 6, 7  # x, too
    tensors = [t if t is None or i in norms else t.bfloat16() for i, t in enumerate(case.tensors)]
    check_against_reference(Case(case.run, tensors), slack=2)
