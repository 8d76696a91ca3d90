import pytest
import torch
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_gradients,
    laid_out,
    outputs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vision_ops import fused_dwconv_layer_norm, nn


def make(
    shape, kernel, *, bias=True, dtype=torch.float32, norm_dtype=None, layout="contiguous", eps=1e-6, device="cpu"
):
    channels = shape[1]
    x = laid_out(torch.randn(shape, dtype=dtype, device=device), layout)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype, device=device) / kernel
    conv_bias = torch.randn(channels, dtype=dtype, device=device) if bias else None
    norm = torch.randn(2, channels, dtype=norm_dtype or dtype, device=device)
    run = lambda t, backend: fused_dwconv_layer_norm(*t, eps=eps, backend=backend)
    return Case(run, [x, weight, conv_bias, *norm])


CASES = [
    ((2, 16, 14, 14), 3),  # in place, where channels_last
    ((2, 20, 9, 7), 3),
    ((1, 48, 33, 15), 5),
    ((2, 96, 14, 14), 7),
    ((5, 37, 8, 8), 9),
    ((1, 300, 7, 5), 7),
    ((1, 9, 5, 5), 11),  # plain loops
    ((2, 8, 6, 5), 1),
    ((2, 24, 1, 1), 7),
    ((1, 7, 1, 33), 3),
    ((0, 8, 5, 5), 5),
    ((1, 64, 90, 70), 7),  # several chunks of rows
    ((2, 24, 90, 9), 3),  # and more of them to a task than it has room for
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "kernel"), CASES, ids=str)
def test_matches_reference(shape, kernel, layout):
    check_against_reference(make(shape, kernel, layout=layout))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout):
    check_against_reference(make((2, 24, 15, 14), 7, dtype=dtype, layout=layout))
    check_against_reference(make((2, 16, 9, 10), 3, dtype=dtype, layout=layout, bias=False))


def test_output_is_contiguous():
    for layout in LAYOUTS:
        case = make((2, 12, 6, 5), 3, layout=layout)
        for backend in ("fused", "reference"):
            y = case.run(case.tensors, backend)
            assert y.shape == (2, 6, 5, 12)
            assert backend == "reference" or y.is_contiguous()


def test_variance_does_not_cancel():
    """A mean of 1000 standard deviations, of which E[u^2] - E[u]^2 in float32 would leave little."""
    case = make((2, 64, 6, 6), 3)
    case.tensors[2] = case.tensors[2] + 1000
    exact = case.to(torch.float64).run(case.to(torch.float64).tensors, "reference")
    for layout in ("contiguous", "channels_last"):
        case.tensors[0] = laid_out(case.tensors[0], layout)
        assert (case.run(case.tensors, "fused") - exact).abs().max() < 2e-4 * exact.abs().max()


def test_bad_values_stay_within_reach_of_the_convolution():
    for layout in ("contiguous", "channels_last"):
        case = make((1, 24, 9, 9), 3, layout=layout)
        case.tensors[0][0, 3, 4, 4] = float("nan")
        bad = case.run(case.tensors, "fused").isnan().any(-1)[0]
        assert bad.sum() == 9 and bad[3:6, 3:6].all()


def test_without_eps_lanes_without_a_pixel_do_no_harm():
    for shape in ((1, 19, 3, 3), (1, 32, 1, 5)):
        case = make(shape, 3, eps=0.0)
        assert all(t.isfinite().all() for t in outputs(case, "fused")[0])


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((2, 5, 3, 4), 3))
    check_gradients(make((1, 9, 3, 3), 5, layout="channels_last", bias=False, eps=0.1), second=False)


def test_training_does_not_change_the_output():
    case = make((2, 40, 9, 9), 7)
    with torch.no_grad():
        expected = case.run(case.tensors, "fused")
    assert torch.equal(outputs(case, "fused")[0][0], expected)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype):
    for layout in ("contiguous", "channels_last"):
        check_bitwise_repeatable(make((3, 72, 33, 31), 7, dtype=dtype, layout=layout))
        check_bitwise_repeatable(make((1, 24, 90, 9), 3, dtype=dtype, layout=layout))


def test_a_graph_made_for_inference_still_has_gradients():
    """The op of such a graph has kept nothing: its backward pass computes the convolution again."""
    case = make((2, 20, 7, 6), 5)
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    y = torch.ops.vision_ops.dwconv_layer_norm(*leaves, 1e-6, False)[0]
    expected, grad = outputs(case, "fused")
    for a, b in zip(torch.autograd.grad(y, leaves, grad), expected[1:], strict=True):
        assert torch.equal(a, b)


def test_module_is_the_composition():
    block = nn.ConvEncoder(12, kernel_size=5, layer_scale_init_value=0.5).double()
    x = torch.randn(2, 12, 7, 6, dtype=torch.float64)
    y = torch.nn.functional.layer_norm(block.dwconv(x).permute(0, 2, 3, 1), (12,), *block.norm.parameters(), 1e-6)
    y = block.gamma * block.pwconv2(torch.nn.functional.gelu(block.pwconv1(y)))
    torch.testing.assert_close(block(x), x + y.permute(0, 3, 1, 2))


X, W, B = torch.randn(2, 8, 7, 7), torch.randn(8, 1, 3, 3), torch.randn(8)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(N, C, H, W\)", (X[0], W, B, B, B), {}),
    "even": (ValueError, "weight must have an odd kernel size", (X, W[..., :2, :2], B, B, B), {}),
    "weight": (ValueError, r"weight must have shape \(8, 1, 3, 3\) \(C, 1, K, K\)", (X, W[:7], B, B, B), {}),
    "rectangle": (ValueError, r"weight must have shape \(8, 1, 3, 3\)", (X, W[..., :2, :], B, B, B), {}),
    "bias": (ValueError, r"bias must have shape \(8,\) \(C\), got \(7,\)", (X, W, B[:7], B, B), {}),
    "ln_weight": (ValueError, r"ln_weight must have shape \(8,\) \(C\)", (X, W, B, B[:7], B), {}),
    "no ln_bias": (TypeError, "ln_bias must be a torch.Tensor, got NoneType", (X, W, B, B, None), {}),
    "eps": (ValueError, "eps must be finite and at least 0", (X, W, B, B, B), {"eps": -1.0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_dwconv_layer_norm(*arguments, **options)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arguments(data):
    torch.manual_seed(0)  # a drawn case that fails must fail again
    draw = data.draw
    shape = tuple(draw(st.integers(low, high)) for low, high in ((0, 3), (8, 90), (1, 60), (1, 60)))
    case = make(
        shape,
        draw(st.sampled_from([1, 3, 5, 7, 9, 11])),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, *HALF])),
        layout=draw(st.sampled_from(LAYOUTS[:5])) if shape[0] else "contiguous",
    )
    check_against_reference(case, slack=3)
