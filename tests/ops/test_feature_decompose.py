import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
)

from vision_ops import explain, fused_feature_decompose, reference

ACTIVATIONS = (None, "gelu", "silu")


def make(shape, *, activation="silu", dtype=torch.float32, sigma_dtype=None, layout="contiguous", flat=False):
    x = laid_out(torch.randn(shape, dtype=dtype) * 2 + 1, layout)
    sigma = torch.randn(shape[1] if flat else (1, shape[1], 1, 1), dtype=sigma_dtype or dtype)
    return Case(lambda t, backend: fused_feature_decompose(*t, activation=activation, backend=backend), [x, sigma])


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(layout, dtype, activation):
    case = make((3, 37, 9, 11), activation=activation, dtype=dtype, layout=layout)
    check_against_reference(case, layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "shape", [(2, 64, 33, 14), (1, 7, 1, 1), (5, 20, 5, 1), (2, 3, 1, 33), (70, 4, 2, 2), (0, 8, 5, 5)], ids=str
)
def test_sizes(shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(shape, layout=layout, flat=True))


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
    "activation": (ValueError, "activation must be one of .*, got 'relu'", (X, S), {"activation": "relu"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_feature_decompose(*arguments, **options)


def test_hands_over_where_torch_is_faster():
    sigma, small, large = torch.ones(64), torch.randn(1, 64, 14, 14), torch.randn(2, 64, 56, 56)
    for x in (small, large.requires_grad_()):
        assert "C++" in explain("feature_decompose", x, sigma).parts["feature_decompose"]
    assert explain("feature_decompose", small.requires_grad_(), sigma).parts == {"feature_decompose": "PyTorch"}
