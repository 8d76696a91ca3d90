import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_gradients,
    laid_out,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vision_ops import _native, explain, fused_dwconv, reference


def make(shape, kernel_size=3, *, bias=True, dtype=torch.float32, device="cpu", layout="contiguous", **options):
    channels = shape[1]
    x = laid_out(torch.randn(shape, dtype=dtype, device=device), layout)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, dtype=dtype, device=device) / kernel_size
    b = torch.randn(channels, dtype=dtype, device=device) if bias else None
    return Case(lambda t, backend: fused_dwconv(*t, **options, backend=backend), [x, weight, b])


SAME_2 = (0, 1, 0, 1)  # TensorFlow's "SAME" at stride 2
CASES = [
    # Every kernel size with tiles, in both layouts, and sizes that leave ragged tiles.
    ((2, 20, 14, 14), 3, {}),
    ((2, 32, 15, 33), 3, {"layout": "channels_last"}),
    ((1, 16, 7, 9), 3, {"layout": "channels_last", "activation": "gelu"}),
    ((2, 24, 33, 15), 5, {"layout": "channels_last"}),
    ((1, 40, 28, 28), 5, {"dilation": 2}),
    ((2, 17, 14, 14), 7, {"dilation": 3, "layout": "channels_last"}),
    ((2, 64, 7, 7), 7, {"bias": False}),
    ((1, 12, 8, 8), 9, {"activation": "silu"}),
    # Stride 2, with the paddings that the backbones use.
    ((2, 16, 14, 14), 3, {"stride": 2, "padding": SAME_2, "layout": "channels_last"}),
    ((2, 48, 15, 13), 3, {"stride": 2, "layout": "channels_last"}),
    ((1, 8, 13, 15), 5, {"stride": 2, "activation": "gelu"}),
    ((1, 8, 12, 11), 7, {"stride": 2, "dilation": 2}),
    ((1, 16, 33, 31), 9, {"stride": 2, "padding": (4, 3)}),
    # The general paths: other kernel sizes, strides and dilations.
    ((2, 5, 6, 7), 1, {}),
    ((1, 9, 14, 12), 11, {"layout": "channels_last"}),
    ((1, 8, 12, 12), 3, {"stride": 3, "dilation": 5, "padding": 6}),
    # Degenerate sizes and paddings.
    ((1, 3, 1, 1), 5, {}),
    ((2, 16, 1, 5), 7, {"dilation": 3, "layout": "channels_last"}),
    ((1, 1, 5, 1), 3, {}),
    ((1, 8, 9, 9), 5, {"padding": 0}),
    ((1, 8, 5, 5), 3, {"padding": (3, 0, 0, 4)}),
    ((0, 8, 5, 5), 3, {"activation": "gelu"}),
]


@pytest.mark.parametrize(("shape", "kernel_size", "options"), CASES, ids=str)
def test_matches_reference(shape, kernel_size, options, any_device):
    check_against_reference(make(shape, kernel_size, device=any_device, **options))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "layout"), [(3, 1, "channels_last"), (3, 2, "channels_last"), (7, 1, "contiguous")]
)
def test_dtypes(dtype, activation, kernel_size, stride, layout, any_device):
    options = {"dtype": dtype, "stride": stride, "layout": layout, "activation": activation, "device": any_device}
    check_against_reference(make((2, 32, 14, 15), kernel_size, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "channel_slice", "expanded"])
def test_layouts(layout, grad_layout, any_device):
    check_against_reference(make((2, 24, 9, 11), 5, layout=layout, device=any_device), grad_layout)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_parameters_beside_half_input(dtype, any_device):
    case = make((2, 16, 14, 14), 5, dtype=dtype, activation="silu", device=any_device)
    case.tensors[1:] = [t.float() for t in case.tensors[1:]]
    check_against_reference(case)


def test_autocast_does_not_mix_float64_with_less(device):
    x, weight, bias = make((1, 8, 6, 6), device=device).tensors
    with torch.autocast(device, dtype=torch.bfloat16):
        for given in ((x.double(), weight), (x, weight.double()), (x.double(), weight.bfloat16())):
            with pytest.raises(TypeError, match="weight must have the dtype of x"):
                fused_dwconv(*given)
        assert fused_dwconv(x.double(), weight.double(), backend="fused").dtype == torch.float64


def test_channel_slice_of_an_output():
    """The engine writes into a slice of a larger tensor and leaves the neighbours alone."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, weight, bias = make((2, 11, 9, 10), 5).tensors
        wide = torch.full((2, 20, 9, 10), 7.0).contiguous(memory_format=memory_format)
        views = _native.view(x), _native.channels_view(weight), _native.channels_view(bias), _native.view(wide[:, 4:15])
        _native.cpu.dwconv(*views, (5, 1, 1, 2, 2), 0)
        torch.testing.assert_close(wide[:, 4:15], reference.dwconv(x, weight, bias))
        assert (wide[:, :4] == 7).all() and (wide[:, 15:] == 7).all()


def test_no_input_is_copied():
    """An expanded tensor of 9.6e9 elements, more than the memory holds and more than 32 bits count."""
    x = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 40000, 60000)
    y = fused_dwconv(x, torch.ones(4, 1, 1, 1), stride=20000, backend="fused")
    assert torch.equal(y, x[:, :, :2, :3])


@pytest.mark.not_finite
def test_non_finite_values_spread_as_in_eager():
    x, weight, _ = make((1, 16, 9, 9), 5, dilation=2).tensors
    x[0, 3, 4, 4], x[0, 5, 0, 0], x[0, 7, 8, 8] = float("inf"), float("nan"), float("-inf")
    ours, eager = (fused_dwconv(x, weight, dilation=2, backend=b) for b in ("fused", "reference"))
    assert torch.equal(ours.isnan(), eager.isnan()) and torch.equal(ours.isinf(), eager.isinf())


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_over_their_whole_range(activation):
    x = torch.cat(
        [torch.linspace(-110, 110, 40001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, float("nan")])]
    )
    x = x.reshape(1, 1, 1, -1)
    y = fused_dwconv(x, torch.ones(1, 1, 1, 1), activation=activation, backend="fused")
    exact = getattr(F, activation)(x.double())
    assert torch.equal(y.isnan(), exact.isnan())
    error = (y.double() - exact).abs() / exact.abs().clamp_min(1e-2)
    assert error.nan_to_num().max() < 3e-6  # the far tail, 1e-2 of which is all that fp32 sums can see


def test_gradcheck():
    check_gradients(make((2, 3, 5, 4), 3, activation="gelu"))
    check_gradients(make((1, 2, 6, 5), 5, stride=2, dilation=2, padding=(1, 2, 3, 4), activation="silu"))
    check_gradients(make((1, 2, 1, 3), 7, bias=False))


@pytest.mark.parametrize(("kernel_size", "layout"), [(3, "channels_last"), (7, "contiguous")])
def test_bitwise_repeatable(kernel_size, layout, any_device):
    check_bitwise_repeatable(make((4, 64, 28, 28), kernel_size, layout=layout, device=any_device))


def test_export_and_trace():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 1, 3, 3))

        def forward(self, x):
            return fused_dwconv(x, self.weight, stride=2, activation="silu")

    module, x, other = Module(), torch.randn(2, 4, 8, 8), torch.randn(3, 4, 9, 7)
    sizes = {
        0: torch.export.Dim("n", max=8),
        2: torch.export.Dim("h", min=3, max=64),
        3: torch.export.Dim("w", min=3, max=64),
    }
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": sizes})
    assert any("vision_ops.dwconv" in str(node.target) for node in exported.graph.nodes)
    y = exported.module()(other)
    torch.testing.assert_close(y, module(other))
    y.sum().backward()  # an exported program can be trained on
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_functorch_and_forward_mode():
    """They take the reference, which has rules for them; the bare op would have none."""
    x, weight, bias = make((2, 4, 7, 6)).tensors

    def f(x, weight):
        return fused_dwconv(x, weight, bias, activation="gelu")

    def g(x, weight):
        return reference.dwconv(x, weight, bias, activation="gelu")

    torch.testing.assert_close(
        torch.func.vmap(f, (0, None))(x[:, None], weight), torch.func.vmap(g, (0, None))(x[:, None], weight)
    )
    torch.testing.assert_close(torch.func.jvp(f, (x, weight), (x, weight)), torch.func.jvp(g, (x, weight), (x, weight)))
    torch.testing.assert_close(*(torch.func.grad(lambda w, h=h: h(x, w).sum())(weight) for h in (f, g)))


def test_checkpoint_and_in_place_edits():
    x, weight, _ = make((2, 4, 7, 6)).tensors
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(fused_dwconv, x, weight, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(fused_dwconv(x, weight).sum(), x))
    z = x * 1
    y = fused_dwconv(z, weight.requires_grad_())
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_negative_view():
    x = torch.randn(1, 4, 5, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    weight = torch.randn(4, 1, 3, 3)
    torch.testing.assert_close(fused_dwconv(x, weight, backend="fused"), reference.dwconv(x.resolve_neg(), weight))


def test_called_from_many_threads():
    case = make((2, 32, 28, 28), 5, layout="channels_last")
    expected, results = case.run(case.tensors, "fused"), []
    threads = [threading.Thread(target=lambda: results.append(case.run(case.tensors, "fused"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(r, expected) for r in results)


def test_hands_over_where_torch_is_faster():
    """Large channels_last 3x3: for inference, and with GELU always. Told to be fused, the kernel runs all the same."""
    case = make((1, 800, 56, 56), 3, dtype=torch.bfloat16, layout="channels_last")
    x, weight, bias = case.tensors
    found = explain("dwconv", x, weight, bias)
    assert found.parts == {"dwconv": "PyTorch"} and "oneDNN is faster" in found.slower[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain("dwconv", x.float(), weight.float(), bias.float()).parts == {"dwconv": "PyTorch"}
    for kept in ((x.contiguous(), weight), (x.clone().requires_grad_(), weight)):
        assert "C++" in explain("dwconv", *kept, bias).parts["dwconv"]
    assert "C++" in explain("dwconv", x, weight, bias, backend="fused").parts["dwconv"]
    check_against_reference(case)
    check_against_reference(make((1, 16, 56, 56), 3, layout="channels_last", activation="gelu"))


def test_second_order_gradients_of_dependent_arguments():
    """Tied weights: what reaches the weight through x must not be counted by the recomputation, too."""
    x, weight, _ = make((1, 4, 6, 6), dtype=torch.float64).tensors
    results = []
    for backend in ("fused", "reference"):
        w = weight.detach().requires_grad_()
        y = fused_dwconv(fused_dwconv(x, w, backend=backend), w, w.sum((1, 2, 3)), activation="silu", backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), w)))
    torch.testing.assert_close(*results)


X, W, B = torch.randn(2, 8, 7, 7), torch.randn(8, 1, 3, 3), torch.randn(8)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(N, C, H, W\), got shape \(8, 7, 7\)", (X[0], W), {}),
    "channels": (ValueError, r"weight must have shape \(8, 1, 3, 3\).*got \(4, 1, 3, 3\)", (X, W[:4]), {}),
    "full convolution": (ValueError, r"weight must have shape .*got \(8, 8, 3, 3\)", (X, W.expand(8, 8, 3, 3)), {}),
    "even kernel": (
        ValueError,
        r"weight must have an odd kernel size, got shape \(8, 1, 4, 4\)",
        (X, torch.randn(8, 1, 4, 4)),
        {},
    ),
    "oblong kernel": (ValueError, "weight must have shape", (X, torch.randn(8, 1, 5, 3)), {}),
    "bias shape": (ValueError, r"bias must have shape \(8,\) \(C\), got \(7,\)", (X, W, B[:7]), {}),
    "integers": (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", (X.long(), W), {}),
    "integer weight": (TypeError, "weight must have the dtype of x", (X, W.int()), {}),
    "wide weight": (TypeError, "weight must have the dtype of x, torch.float32", (X, W.double()), {}),
    "half weight": (TypeError, "weight must have the dtype of x", (X, W.half()), {}),
    "sparse": (TypeError, "x must be a dense tensor, got torch.sparse_coo", (X.to_sparse(), W), {}),
    "nested": (TypeError, "x must be a dense tensor", (torch.nested.nested_tensor([X[0]]), W), {}),
    "list": (TypeError, "x must be a torch.Tensor, got list", ([1.0], W), {}),
    "no weight": (TypeError, "weight must be a torch.Tensor, got NoneType", (X, None), {}),
    "devices": (ValueError, "weight must be on the device of x, cpu, got meta", (X, W.to("meta")), {}),
    "backend": (
        ValueError,
        r"backend must be one of \('auto', 'fused', 'reference'\) or None, got 'cudnn'",
        (X, W),
        {"backend": "cudnn"},
    ),
    "activation": (ValueError, "activation must be one of .*got 'relu'", (X, W), {"activation": "relu"}),
    "stride": (ValueError, "stride must be from 1 to 16777216, got 0", (X, W), {"stride": 0}),
    "huge stride": (ValueError, "stride must be from 1 to 16777216, got 288230376151711744", (X, W), {"stride": 2**58}),
    "no channels": (ValueError, "x may be empty in N only", (X[:, :0], W[:0]), {}),
    "no rows": (ValueError, "x may be empty in N only", (X[:, :, :0], W), {"padding": 3}),
    "nested weight": (TypeError, "weight must be a dense tensor", (X, torch.nested.nested_tensor([W])), {}),
    "stride type": (TypeError, "stride must be an int, got tuple", (X, W), {"stride": (1, 1)}),
    "dilation": (ValueError, "dilation must be from 1 to 16777216, got -1", (X, W), {"dilation": -1}),
    "padding": (ValueError, "padding must be from 0 to 16777216, got -1", (X, W), {"padding": -1}),
    "padding length": (ValueError, r"padding must be None, an int, .*got \(1, 1, 1\)", (X, W), {"padding": (1, 1, 1)}),
    "padding entry": (
        ValueError,
        r"padding\[2\] must be from 0 to 16777216, got -1",
        (X, W),
        {"padding": (1, 1, -1, 1)},
    ),
    "padding word": (ValueError, "padding must be None.*got 'same'", (X, W), {"padding": "same"}),
    "too small": (
        ValueError,
        "x of shape .* is smaller than the kernel, which spans 9",
        (X, W),
        {"padding": 0, "dilation": 4},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_dwconv(*arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_every_kernel_stride_dilation_and_size(dtype, layout):
    sizes = (1, 5, 7, 14, 15, 33)
    for kernel_size, stride, dilation in itertools.product((1, 3, 5, 7, 9, 11), (1, 2, 3), (1, 2, 3, 4)):
        for (h, w), channels in zip(
            itertools.product(sizes, sizes), itertools.cycle((8, 12, 16, 24, 40, 32, 100)), strict=False
        ):
            case = make((1, channels, h, w), kernel_size, dtype=dtype, layout=layout, stride=stride, dilation=dilation)
            check_against_reference(case, slack=3)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arguments(data):
    torch.manual_seed(0)  # a drawn case that fails must fail again
    draw = data.draw
    kernel_size, stride, dilation = (
        draw(st.sampled_from([1, 3, 5, 7, 9, 11, 13])),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
    )
    reach = dilation * (kernel_size - 1) + 1
    padding = tuple(draw(st.integers(0, reach + 1)) for _ in range(4))
    height = draw(st.integers(max(1, reach - padding[0] - padding[1]), reach + 20))
    width = draw(st.integers(max(1, reach - padding[2] - padding[3]), reach + 40))
    shape = draw(st.integers(0, 3)), draw(st.integers(1, 50)), height, width
    case = make(
        shape,
        kernel_size,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, *HALF])),
        layout=draw(st.sampled_from(LAYOUTS)) if shape[0] else "contiguous",
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=draw(st.sampled_from([None, "gelu", "silu"])),
    )
    check_against_reference(case, slack=3)
