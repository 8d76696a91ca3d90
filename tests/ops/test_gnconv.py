import pytest
import torch
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_compiles,
    check_gradients,
    check_half_types_among_nan,
    check_opcheck,
    laid_out,
    outputs,
    saved_bytes,
)

from vision_ops import _native, explain, fused_gnconv, reference

SCALE = 1 / 3


def make(
    shape=(2, 32, 9, 7), order=3, *, kernel_size=7, bias=True, dtype=torch.float32, layout="contiguous", flat=False
):
    c = shape[1]
    widths = [c >> k for k in reversed(range(order))]
    ones = () if flat else (1, 1)

    def weight(*size):
        return torch.randn(size, dtype=dtype) / (size[-1] if len(size) == 4 and size[-1] > 1 else size[1] ** 0.5)

    def vector(size):
        return torch.randn(size, dtype=dtype) if bias else None

    total = sum(widths)
    depthwise = torch.randn(total, 1, kernel_size, kernel_size, dtype=dtype) / kernel_size
    projections = [weight(2 * c, c, *ones), vector(2 * c), depthwise, vector(total), weight(c, c, *ones), vector(c)]
    weights = [weight(2 * d, d, *ones) for d in widths[:-1]]
    biases = [vector(2 * d) for d in widths[:-1]]
    k = order - 1

    def run(t, backend):
        return fused_gnconv(*t[:5], t[7 : 7 + k], t[7 + k :], *t[5:7], scale=SCALE, backend=backend)

    return Case(run, [laid_out(torch.randn(shape, dtype=dtype), layout), *projections, *weights, *biases])


CASES = [
    {},
    {"layout": "channels_last"},
    {"order": 1},
    {"order": 2, "kernel_size": 3, "layout": "channels_last"},
    {"shape": (1, 24, 14, 14), "order": 4, "kernel_size": 5},
    {"shape": (2, 48, 7, 7), "order": 5, "layout": "channels_last"},
    {"shape": (1, 32, 5, 6), "order": 6},
    {"shape": (2, 20, 15, 33), "bias": False},
    {"shape": (3, 8, 1, 1), "order": 2},
    {"shape": (1, 4, 1, 5), "order": 3, "layout": "channels_last"},
    {"shape": (2, 1, 5, 5), "order": 1},
    {"shape": (2, 8, 5, 1), "order": 2, "flat": True},
    {"shape": (0, 8, 5, 5), "order": 2},
    {"shape": (0, 8, 5, 5), "order": 2, "layout": "channels_last"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_reference(options, device):
    # Of one channel, gradients of weights are single numbers, whose rounding is luck.
    check_against_reference(make(**options).on(device), slack=3.0 if options.get("shape", (0, 0))[1] == 1 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout, device):
    check_against_reference(make(dtype=dtype, layout=layout).on(device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "channel_slice", "expanded"])
def test_layouts(layout, grad_layout, device):
    check_against_reference(make(layout=layout).on(device), grad_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_memory_format(layout):
    case = make(layout=layout)
    last = layout in ("channels_last", "channel_slice")
    expected = torch.channels_last if last else torch.contiguous_format
    assert case.run(case.tensors, "fused").is_contiguous(memory_format=expected)


@pytest.mark.usefixtures("each_device")
def test_float32_parameters_beside_half_input():
    case = make(dtype=torch.bfloat16)
    case.tensors[1:] = [t.float() for t in case.tensors[1:]]
    check_against_reference(case)


def test_autocast():
    case = make()
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.run(leaves, "fused")
    x, *parameters = case.tensors
    assert y.dtype == torch.bfloat16 and torch.equal(y, case.run([x.bfloat16(), *parameters], "fused"))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_autocast_leaves_a_float32_backward_alone():
    case = make()
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    y = case.run(leaves, "fused")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(inside, torch.autograd.grad(y.sum(), leaves), rtol=0, atol=0)


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((1, 4, 3, 4), 2, kernel_size=3))
    check_gradients(make((2, 4, 2, 2), 3, kernel_size=3, layout="channels_last"), second=False)


def test_slices_of_half_types():
    check_half_types_among_nan(make((2, 32, 9, 7)))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("needed", [(0,), (1, 7), (2, 6), (3, 9), (4, 5)])
def test_only_some_gradients(needed):
    case = make()
    everything, grad = outputs(case, "fused")
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(case.tensors)]
    some = torch.autograd.grad(case.run(leaves, "fused"), [leaves[i] for i in needed], grad)
    assert all(torch.equal(a, everything[1 + i]) for i, a in zip(needed, some, strict=True))


def test_saved_bytes():
    """x, the output of proj_in and that of the convolution: at most 5C numbers a pixel beside the parameters."""
    case = make((2, 32, 28, 28), 5)
    x, *parameters = case.tensors
    kept = saved_bytes(case, "fused") - sum(t.nbytes for t in parameters)
    assert kept <= 5 * x.nbytes
    assert kept < 0.6 * (saved_bytes(case, "reference") - sum(t.nbytes for t in parameters))


@pytest.mark.usefixtures("each_device")
def test_saved_tensors_survive_a_second_backward():
    case = make()
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    y = case.run(leaves, "fused").square().sum()
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, leaves), strict=True))


def test_checkpoint_and_in_place_edits():
    case = make()
    leaves = [t.detach().requires_grad_() for t in case.tensors]

    def run(*t):
        return case.run(t, "fused")

    y = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(run(*leaves).sum(), leaves))
    leaves[7] = leaves[7] * 1  # a weight in a list
    y = run(*leaves)
    leaves[7].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("each_device")
def test_bitwise_repeatable():
    for layout in ("contiguous", "channels_last"):
        check_bitwise_repeatable(make((2, 64, 28, 28), layout=layout), other_threads=())


@pytest.mark.usefixtures("each_device")
def test_compiles():
    check_compiles([make(), make((2, 32, 5, 8))])
    check_compiles([make(layout="channels_last")], dynamic=False)


@pytest.mark.usefixtures("each_device")
def test_opcheck():
    t = make((2, 8, 3, 4), 3, kernel_size=3).tensors
    check_opcheck("gnconv", (*t[:7], t[7:9], t[9:11], SCALE), tensors=9)
    check_opcheck("gnconv", (t[0], t[1], None, t[2 + 1], *t[4:7], t[7:9], [None, t[10]], 1.0), tensors=9)


def test_export_and_functorch():
    case = make((2, 8, 6, 6), 2, kernel_size=3)
    x, *parameters = case.tensors

    class Module(torch.nn.Module):
        def forward(self, x):
            return case.run([x, *parameters], "auto")

    n = torch.export.Dim("n", max=8)
    exported = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: n}})
    assert any("vision_ops.gnconv" in str(node.target) for node in exported.graph.nodes)
    other = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(exported.module()(other), Module()(other))
    torch.testing.assert_close(torch.jit.trace(Module(), x)(x), Module()(x))
    found = [torch.func.jvp(lambda x, b=b: case.run([x, *parameters], b), (x,), (x,)) for b in ("fused", "reference")]
    torch.testing.assert_close(*found)
    leaf = x.clone().requires_grad_()
    exported.module()(leaf).sum().backward()  # an exported program can be trained on
    again = x.clone().requires_grad_()
    Module()(again).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad)


def test_explains():
    found = explain("gnconv", torch.randn(1, 32, 8, 8))
    assert set(found.parts) == {"depthwise convolution", "gates", "1x1 convolutions"}
    assert "C++" in found.parts["depthwise convolution"]
    case = make()
    given = [*case.tensors[:5], case.tensors[7:9], case.tensors[9:], *case.tensors[5:7]]
    assert explain("gnconv", *given, scale=SCALE).parts == found.parts


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_missing", "they were never compiled")
    case = make()
    t = case.tensors
    exact = reference.gnconv(*t[:5], t[7:9], t[9:], *t[5:7], scale=SCALE)
    torch.testing.assert_close(case.run(t, "auto"), exact)
    with pytest.raises(ValueError, match="fused_gnconv cannot run: they were never compiled"):
        case.run(t, "fused")


def refused(change):
    """The arguments of a call after a change of the list [x, w_in, b_in, w_dw, b_dw, ws, bs, w_out, b_out]."""
    t = make((2, 8, 5, 5), 3, kernel_size=3).tensors
    given = [*t[:5], t[7:9], t[9:], *t[5:7]]
    change(given)
    return given


REFUSED = {
    "rank": (ValueError, "x must have the dimensions", lambda g: g.__setitem__(0, g[0][0])),
    "dim": (
        ValueError,
        r"x must have a multiple of 2\^\(order - 1\) = 4 channels, got 6",
        lambda g: g.__setitem__(0, g[0][:, :6]),
    ),
    "proj_in": (
        ValueError,
        r"proj_in_weight must have shape \(16, 8, 1, 1\) \(2C, C, 1, 1\)",
        lambda g: g.__setitem__(1, g[1][:8]),
    ),
    "proj_in bias": (ValueError, r"proj_in_bias must have shape \(16,\)", lambda g: g.__setitem__(2, g[2][:8])),
    "depthwise": (
        ValueError,
        r"dw_weight must have shape \(14, 1, 3, 3\) \(D, 1, K, K\)",
        lambda g: g.__setitem__(3, g[3][:13]),
    ),
    "even kernel": (
        ValueError,
        "dw_weight must have an odd kernel size",
        lambda g: g.__setitem__(3, torch.randn(14, 1, 2, 2)),
    ),
    "widths": (
        ValueError,
        r"pw_weights\[0\] must have shape \(4, 2, 1, 1\) \(C/2, C/4, 1, 1\), got \(8, 4, 1, 1\)",
        lambda g: g[5].reverse(),
    ),
    "biases": (ValueError, "pw_biases must be a sequence of 2, got 1", lambda g: g[6].pop()),
    "proj_out": (ValueError, r"proj_out_weight must have shape \(8, 8", lambda g: g.__setitem__(7, g[7][:4])),
    "dtype": (TypeError, "pw_weights.* must have the dtype of x", lambda g: g[5].__setitem__(1, g[5][1].double())),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, change = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_gnconv(*refused(change))
