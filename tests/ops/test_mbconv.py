import copy
import itertools

import pytest
import torch
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_compiles,
    check_gradients,
    check_opcheck,
    laid_out,
    relative_error,
    saved_bytes,
)

from vision_ops import explain, fused_mbconv, nn, reference, use_backend
from vision_ops.ops import _mbconv


def make(
    shape,
    outputs=None,
    *,
    stride=1,
    pool_size=2,
    se=True,
    training=False,
    drop=False,
    dtype=torch.float32,
    parameter_dtype=None,
    layout="contiguous",
    mean=0.0,
):
    """outputs: other channels than x's, which takes a convolution in the shortcut. In training the bias of pre_norm is
    no tensor of the case: its gradient is zero, as expand_norm takes away all constants."""
    (n, c), o = shape[:2], outputs or shape[1]
    hidden, reduced, wanted = 4 * o, max(1, o // 4), parameter_dtype or dtype
    x = laid_out((torch.randn(shape) + mean * torch.randn(c, 1, 1)).to(dtype), layout)

    def draw(*size):
        return (torch.randn(size) / max(1, torch.Size(size[1:]).numel()) ** 0.5).to(wanted)

    def norm(size):
        return [torch.rand(size).to(wanted) + 0.5, draw(size) * 0.3]

    running = [(torch.randn(size) * 0.3, torch.rand(size) + 0.5) for size in (c, hidden, hidden)]
    if mean:
        running[0] = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3))
    pre = norm(c)
    weights = [
        draw(hidden, c, 1, 1),
        *norm(hidden),
        draw(hidden, 1, 3, 3),
        *norm(hidden),
        draw(o, hidden, 1, 1),
        draw(o),
    ]
    excitation = [draw(reduced, hidden, 1, 1), draw(reduced), draw(hidden, reduced, 1, 1), draw(hidden)] if se else []
    shortcut = [draw(o, c, 1, 1), draw(o)] if outputs else []
    path_scale = torch.arange(n).remainder(2) * 1.5 if drop else None

    def run(t, backend):
        statistics = [[r.to(t[0].device, t[1].dtype) for r in pair] for pair in running]
        bias, rest = (pre[1].to(t[0].device, t[1].dtype), t[2:]) if training else (t[2], t[3:])
        end = rest[8:]
        return fused_mbconv(
            *(t[0], [t[1], bias, *statistics[0]], rest[0], [*rest[1:3], *statistics[1]], rest[3]),
            *([*rest[4:6], *statistics[2]], rest[6], rest[7]),
            se=end[:4] if se else None,
            shortcut=end[-2:] if shortcut else None,
            path_scale=None if path_scale is None else path_scale.to(t[0].device, t[1].dtype),
            stride=stride,
            pool_size=pool_size,
            training=training,
            backend=backend,
        )

    return Case(run, [x, *pre[: 1 if training else 2], *weights, *excitation, *shortcut])


# Chains of three norms leave errors of some units of rounding, which eager's happen to be below.
SLACK = {torch.float64: 50, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
KINDS = {
    "plain": {"se": False},
    "se": {},
    "drop": {"drop": True},
    "stride 2": {"outputs": 20, "stride": 2},
    "stride 2, pool 3, no conv": {"stride": 2, "pool_size": 3, "se": False, "drop": True},
}


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_matches_reference(dtype, kind, training):
    for layout in ("contiguous", "channels_last"):
        case = make((3, 12, 9, 8), training=training, dtype=dtype, layout=layout, **KINDS[kind])
        check_against_reference(case, layout, slack=SLACK[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_without_gradients(dtype, kind, monkeypatch):
    """Norms are part of the weights, and images are taken some at a time."""
    monkeypatch.setattr(_mbconv, "_CHUNK_BYTES", 2 * 48 * 9 * 8 * dtype.itemsize)
    for layout in ("contiguous", "channels_last"):
        case = make((3, 12, 9, 8), dtype=dtype, layout=layout, **KINDS[kind])
        with torch.no_grad():
            found, eager = (case.run(case.tensors, backend) for backend in ("fused", "reference"))
            double = case.to(torch.float64)
            exact = double.run(double.tensors, "reference")
        assert found.stride() == eager.stride() and found.dtype == eager.dtype
        floor = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 4e-3)
        assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + floor


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "shape", [(2, 32, 14, 14), (2, 8, 1, 1), (5, 16, 5, 1), (2, 24, 1, 33), (1, 8, 75, 53), (0, 8, 5, 5)], ids=str
)
def test_sizes(shape):
    for kind, training in itertools.product(("se", "stride 2", "stride 2, pool 3, no conv"), (False, True)):
        if training and shape[0] * shape[2] * shape[3] <= 2:
            continue  # norms of two values are signs
        check_against_reference(make(shape, training=training, layout="channels_last", **KINDS[kind]), slack=8)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = make((2, 12, 6, 7), layout=layout)
    for grad_layout in ("contiguous", "channel_slice", "cropped", "expanded"):
        check_against_reference(case, grad_layout, slack=4)
    last = layout in ("channels_last", "channel_slice")
    form = torch.channels_last if last else torch.contiguous_format
    assert case.run(case.tensors, "fused").is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_means_of_ten_times_the_spread(dtype, training):
    case = make((4, 16, 14, 14), mean=10.0, training=training, dtype=dtype, parameter_dtype=torch.float32, se=False)
    check_against_reference(case, slack=10 if dtype == torch.float32 else 1.5)
    if training:
        return
    with torch.no_grad():
        found, eager = (case.run(case.tensors, backend) for backend in ("fused", "reference"))
        exact = (double := case.to(torch.float64)).run(double.tensors, "reference")
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_running_statistics_are_pytorchs(stride):
    block = nn.MBConv(12, 12, stride=stride)
    layers = copy.deepcopy(block)
    layers.fused = False
    for _ in range(10):
        x = torch.randn(3, 12, 9, 8) * 2 + torch.randn(12, 1, 1)
        with use_backend("fused"):
            block(x)
        layers(x)
    for (key, found), expected in zip(block.named_buffers(), layers.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=key)
    assert block.pre_norm.num_batches_tracked == 10


@pytest.mark.parametrize("frozen", [["pre_norm"], ["pre_norm", "expand_norm", "depthwise_norm"]])
def test_frozen_norms(frozen):
    """One norm in evaluation is no case of the op; all three are one that trains."""
    block, x = nn.MBConv(12, 12), torch.randn(2, 12, 7, 7)
    for name in frozen:
        block.get_submodule(name).eval()
    layers = copy.deepcopy(block)
    layers.fused = False
    grads = []
    for module in (block, layers):
        y = module(x)
        grads.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(block.buffers(), layers.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_draws_as_its_module_does():
    block, x = nn.MBConv(12, 12, drop_path=0.5), torch.randn(8, 12, 7, 7)
    layers = copy.deepcopy(block)
    layers.fused = False
    found = []
    for module in (block, layers):
        torch.manual_seed(3)
        found.append(module(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert any(torch.equal(y, x[i]) for i, y in enumerate(found[0]))


def test_gradcheck():
    for kind in ("se", "stride 2, pool 3, no conv"):
        check_gradients(make((2, 3, 4, 3), **KINDS[kind]), second=False)
    check_gradients(make((3, 2, 3, 3), training=True, **KINDS["drop"]), second=False)
    check_gradients(make((2, 1, 2, 2), 2, se=False), second=True)


@pytest.mark.parametrize("kind", ["se", "stride 2"])
def test_autocast(kind):
    """x and the norms are not cast: the stream of residuals stays in float32."""
    case = make((2, 16, 9, 9), **KINDS[kind])
    exact = (double := case.to(torch.float64)).run(double.tensors, "reference")
    for grad in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            tensors = [t.detach().requires_grad_(grad) for t in case.tensors]
            found, eager = (case.run(tensors, backend) for backend in ("fused", "reference"))
        assert found.dtype == eager.dtype == (torch.float32 if kind == "se" else torch.bfloat16)
        assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 4e-3
        if grad:
            grads = [torch.autograd.grad(y.float().square().sum(), tensors) for y in (found, eager)]
            assert all(
                a.dtype == torch.float32 and relative_error(a, b.double()) < 0.1 for a, b in zip(*grads, strict=True)
            )


def test_compiles():
    check_compiles([make((2, 8, 9, 7), training=True), make((2, 8, 5, 12), training=True)])
    first = make((2, 8, 9, 7), 12, stride=2)  # a case has its own running statistics
    check_compiles([first, Case(first.run, make((2, 8, 6, 12), 12, stride=2).tensors)])


def test_opcheck():
    t = make((2, 4, 5, 6), training=False).tensors
    for path_scale in (None, torch.ones(2)):
        arguments = t[0], t[1:3], t[3], t[4:6], t[6], t[7:9], t[11:15], t[9], t[10], None, None, path_scale
        check_opcheck("mbconv", (*arguments, 1, 2, 1e-3, True), tensors=12)


def test_what_backward_keeps():
    """The inputs of two norms in hidden channels, where eager keeps seven tensors as large."""
    case = make((2, 32, 14, 14), training=True)
    kept, eager = (saved_bytes(case, backend) for backend in ("fused", "reference"))
    x = case.tensors[0]
    assert kept < 9.2 * x.nbytes + sum(t.nbytes for t in case.tensors[1:])
    assert kept < 0.45 * eager


P = [torch.ones(8) for _ in range(4)], torch.randn(32, 8), [torch.ones(32) for _ in range(4)]
ARGUMENTS = [*P, torch.randn(32, 1, 3, 3), P[2], torch.randn(8, 32), torch.randn(8)]


@pytest.mark.parametrize("half", HALF, ids=str)
def test_autocast_to_the_other_half_type(half):
    """Products are of its type, and the sum with x is float32."""
    case = make((2, 8, 5, 6), training=True)
    case.tensors[0] = case.tensors[0].to(half)
    with torch.autocast("cpu", dtype=next(dtype for dtype in HALF if dtype != half)):
        fused, eager = (case.run(case.tensors, backend) for backend in ("fused", "reference"))
    assert fused.dtype == eager.dtype == torch.float32 and relative_error(fused, eager) < 2e-2


X = torch.randn(2, 8, 7, 7)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(N, C, H, W\)", {0: X[0]}, {}),
    "norm": (ValueError, "pre_norm must be a sequence of 4, got 3", {1: P[0][:3]}, {}),
    "norm's shape": (ValueError, r"expand_norm\[0\] \(weight\) must have shape \(32,\)", {3: P[0]}, {}),
    "expand": (ValueError, r"expand_weight must have shape \(32, 8\) \(E, C\)", {2: torch.randn(32, 9)}, {}),
    "depthwise": (ValueError, r"dw_weight must have shape \(32, 1, 3, 3\)", {4: torch.randn(32, 1, 5, 5)}, {}),
    "channels": (ValueError, "without shortcut, got 9", {6: torch.randn(9, 32), 7: None}, {}),
    "shortcut": (ValueError, r"shortcut\[0\] must have shape \(8, 8\)", {}, {"shortcut": (torch.randn(9, 8), None)}),
    "se": (ValueError, "se must be a sequence of 4, got 2", {}, {"se": (None, None)}),
    "stride": (ValueError, "stride must be from 1 to 2, got 3", {}, {"stride": 3}),
    "pool_size": (ValueError, "pool_size must be from 2 to 3, got 4", {}, {"pool_size": 4}),
    "training": (TypeError, "training must be a bool, got int", {}, {"training": 1}),
    "path_scale": (ValueError, r"path_scale must have shape \(2,\) \(N\)", {}, {"path_scale": torch.ones(3)}),
    "a gradient": (ValueError, "path_scale has no gradient", {}, {"path_scale": torch.ones(2, requires_grad=True)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, changed, options = REFUSED[name]
    arguments = [changed.get(i, t) for i, t in enumerate([X, *ARGUMENTS])]
    with pytest.raises(error, match=message):
        fused_mbconv(*arguments, **options)


def test_refuses_one_value_per_channel():
    with pytest.raises(ValueError, match="more than one value per channel in training"):
        fused_mbconv(X[:1, :, :2, :2], *ARGUMENTS, stride=2, training=True)


def test_explains():
    for training in (False, True):
        found = explain("mbconv", X, *ARGUMENTS, training=training, backend="fused")
        assert "C++" in found.parts["norms and depthwise convolution"] and not found.cannot
    assert "C++" in explain("mbconv", X).parts["norms and depthwise convolution"]
    assert explain(nn.MBConv(8, 8), X).cannot == []


def test_reference_is_the_module():
    block, x = nn.MBConv(8, 12, stride=2, pool_size=3, fused=False).eval(), X
    norms = [
        [n.weight, n.bias, n.running_mean, n.running_var]
        for n in (block.pre_norm, block.expand_norm, block.depthwise_norm)
    ]
    se = [t for conv in (block.se.reduce_conv2d, block.se.expand_conv2d) for t in (conv.weight, conv.bias)]
    shortcut = block.shortcut_conv.weight, block.shortcut_conv.bias
    weights = norms[0], block.expand_conv.weight, norms[1], block.depthwise_conv.weight, norms[2]
    shrink = block.shrink_conv.weight, block.shrink_conv.bias
    found = reference.mbconv(x, *weights, *shrink, se=se, shortcut=shortcut, stride=2, pool_size=3)
    torch.testing.assert_close(found, block(x))
