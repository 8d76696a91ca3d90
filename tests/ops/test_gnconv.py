import pytest
import torch
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
    saved_bytes,
)

from vision_ops import explain, fused_gnconv

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


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_reference(options):
    # Of one channel, gradients of weights are single numbers, whose rounding is luck.
    check_against_reference(make(**options), slack=3.0 if options.get("shape", (0, 0))[1] == 1 else 1.0)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout):
    check_against_reference(make(dtype=dtype, layout=layout))


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((1, 4, 3, 4), 2, kernel_size=3))
    check_gradients(make((2, 4, 2, 2), 3, kernel_size=3, layout="channels_last"), second=False)


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
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, change = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_gnconv(*refused(change))
