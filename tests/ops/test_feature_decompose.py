import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_compiles,
    check_gradients,
    check_opcheck,
    laid_out,
    saved_bytes,
)

from vision_ops import explain, fused_feature_decompose, reference

ACTIVATIONS = (None, "gelu", "silu")


def make(shape, *, activation="silu", dtype=torch.float32, sigma_dtype=None, layout="contiguous", flat=False):
    x = laid_out(torch.randn(shape, dtype=dtype) * 2 + 1, layout)
    sigma = torch.randn(shape[1] if flat else (1, shape[1], 1, 1), dtype=sigma_dtype or dtype)
    return Case(lambda t, backend: fused_feature_decompose(*t, activation=activation, backend=backend), [x, sigma])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(layout, dtype, activation, device):
    case = make((3, 37, 9, 11), activation=activation, dtype=dtype, layout=layout)
    check_against_reference(case.on(device), layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "shape", [(2, 64, 33, 14), (1, 7, 1, 1), (5, 20, 5, 1), (2, 3, 1, 33), (70, 4, 2, 2), (0, 8, 5, 5)], ids=str
)
def test_sizes(shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(shape, layout=layout, flat=True))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "channel_slice", "expanded"])
def test_layouts(layout, grad_layout):
    case = make((2, 21, 6, 7), layout=layout)
    # Where x is the same everywhere, sigma has no gradient: what is found is the rounding errors of the mean.
    check_against_reference(case, grad_layout, slack=20 if layout == "expanded" else 1)
    last = layout in ("channels_last", "channel_slice")
    form = torch.channels_last if last else torch.contiguous_format
    assert case.run(case.tensors, "fused").is_contiguous(memory_format=form)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_sigma_beside_half_input(dtype):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make((2, 24, 9, 9), dtype=dtype, sigma_dtype=torch.float32, layout=layout))


def test_reference_is_the_definition():
    x, sigma = make((2, 5, 3, 4)).tensors
    z = x + sigma * (x - F.adaptive_avg_pool2d(x, 1))
    for activation, act in ((None, lambda t: t), ("gelu", F.gelu), ("silu", lambda t: t * t.sigmoid())):
        torch.testing.assert_close(reference.feature_decompose(x, sigma, activation=activation), act(z))


def test_a_constant_image_is_only_activated():
    """However large sigma is: the difference is taken before the product."""
    x, sigma = torch.full((1, 16, 4, 4), 1.5), torch.full((16,), 1e6)
    for layout in ("contiguous", "channels_last"):
        torch.testing.assert_close(fused_feature_decompose(laid_out(x, layout), sigma, backend="fused"), F.silu(x))


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((2, 5, 3, 4)))
    check_gradients(make((1, 4, 2, 3), activation="gelu", layout="channels_last"))


@pytest.mark.usefixtures("each_device")
def test_only_the_gradients_that_are_asked_for():
    for layout in ("contiguous", "channels_last", "cropped"):
        case = make((2, 20, 7, 6), layout=layout)
        leaves = [t.detach().requires_grad_() for t in case.tensors]
        both = torch.autograd.grad(case.run(leaves, "fused").square().sum(), leaves)
        for i in range(2):
            tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
            (alone,) = torch.autograd.grad(case.run(tensors, "fused").square().sum(), tensors[i])
            assert torch.equal(alone, both[i])


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype):
    for layout in ("contiguous", "channels_last", "cropped"):
        check_bitwise_repeatable(make((3, 72, 33, 31), dtype=dtype, layout=layout))


def test_autocast_leaves_sigma_as_it_is():
    x, sigma = make((2, 16, 9, 9)).tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused_feature_decompose(x, sigma, backend="fused")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fused_feature_decompose(x.bfloat16(), sigma, backend="fused"))
    assert not torch.equal(y, fused_feature_decompose(x.bfloat16(), sigma.bfloat16(), backend="fused"))


@pytest.mark.usefixtures("each_device")
def test_compiles():
    check_compiles([make((2, 16, 9, 7)), make((2, 16, 5, 12))])


@pytest.mark.usefixtures("each_device")
def test_opcheck():
    check_opcheck("feature_decompose", (*make((2, 8, 5, 6)).tensors, "silu"), tensors=2)


def test_functorch_takes_the_reference():
    x, sigma = make((2, 6, 4, 3)).tensors
    both = fused_feature_decompose, reference.feature_decompose
    torch.testing.assert_close(*(torch.func.jvp(lambda t, f=f: f(t, sigma), (x,), (x.flip(1),)) for f in both))


def test_backward_keeps_the_arguments_only():
    case = make((2, 32, 8, 8))
    assert saved_bytes(case, "fused") == sum(t.nbytes for t in case.tensors)
    assert saved_bytes(case, "reference") > 2 * case.tensors[0].nbytes


X, S = torch.randn(2, 8, 7, 7), torch.randn(8)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(N, C, H, W\), got shape \(8, 7, 7\)", (X[0], S), {}),
    "channels": (ValueError, r"sigma must have shape \(8,\) \(C\), got \(7,\)", (X, S[:7]), {}),
    "shape": (
        ValueError,
        r"sigma must have shape \(1, 8, 1, 1\) \(1, C, 1, 1\), got \(8, 1, 1\)",
        (X, S.view(8, 1, 1)),
        {},
    ),
    "dtype": (TypeError, "sigma must have the dtype of x, torch.float32", (X, S.double()), {}),
    "activation": (ValueError, "activation must be one of .*, got 'relu'", (X, S), {"activation": "relu"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_feature_decompose(*arguments, **options)


def test_explains():
    assert "C++" in explain("feature_decompose", X, S, backend="fused").parts["feature_decompose"]


def test_hands_over_where_torch_is_faster():
    sigma, small, large = torch.ones(64), torch.randn(1, 64, 14, 14), torch.randn(2, 64, 56, 56)
    for x in (small, large.requires_grad_()):
        assert "C++" in explain("feature_decompose", x, sigma).parts["feature_decompose"]
    assert explain("feature_decompose", small.requires_grad_(), sigma).parts == {"feature_decompose": "PyTorch"}
