from types import SimpleNamespace

import pytest
import torch
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
)

from vision_ops import _native, explain, fused_layer_norm_2d, nn, reference
from vision_ops.ops import layer_norm_2d


def make(shape, *, dtype=torch.float32, parameter_dtype=None, layout="contiguous", eps=1e-6):
    x = laid_out(torch.randn(shape, dtype=dtype) * 2 + 1, layout)
    weight, bias = torch.randn(2, shape[1], dtype=parameter_dtype or dtype)
    return Case(lambda t, backend: fused_layer_norm_2d(*t, eps=eps, backend=backend), [x, weight, bias])


def official(x, weight, bias, eps):
    """What the definition says, step by step."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * ((x - mean) / torch.sqrt(variance + eps)) + bias[:, None, None]


SHAPES = [
    (2, 64, 14, 14),  # whole vectors; a tile of pixels and a ragged one
    (3, 20, 7, 9),
    (1, 100, 33, 15),
    (2, 37, 1, 5),
    (5, 300, 5, 1),
    (1, 1030, 3, 3),
    (1, 7, 1, 1),
    (0, 8, 5, 5),
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, layout):
    check_against_reference(make(shape, layout=layout), layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_dtypes(dtype, layout):
    check_against_reference(make((2, 40, 9, 15), dtype=dtype, layout=layout))


@pytest.mark.parametrize("eps", [1e-6, 0.0, 0.5])
def test_reference_is_the_definition(eps):
    x, weight, bias = make((2, 12, 5, 7), dtype=torch.float64).tensors
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(
            reference.layer_norm_2d(given, weight, bias, eps=eps),
            official(x, weight, bias, eps),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_parameters_beside_half_input(dtype):
    for layout in ("contiguous", "channels_last"):
        case = make((2, 24, 9, 9), dtype=dtype, parameter_dtype=torch.float32, layout=layout)
        check_against_reference(case)
        x, weight, bias = case.tensors
        exact = reference.layer_norm_2d(x.float(), weight, bias).to(dtype)
        # Rounded once: another way to sum the statistics moves it by one step at most.
        torch.testing.assert_close(case.run(case.tensors, "fused"), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))
@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_of_half_values_beside_a_float32_map(shape, layout, half):
    """What products read and write in half-blocks under autocast: as if it were converted, to the bit."""
    x, weight, bias = make(shape, layout=layout).tensors
    norm = layer_norm_2d.cpu_norm()
    y, rounded = torch.empty_like(x), torch.full_like(x, torch.nan, dtype=half)
    for out in (y, rounded):
        norm.run(x, weight, bias, out, 1e-6)
    assert torch.equal(rounded, y.to(half))
    grad, plus = torch.randn_like(x).to(half), torch.randn_like(x)
    found = []
    for given in (grad.float(), grad):
        results = [torch.full_like(t, torch.nan) for t in (x, weight, bias)]
        norm.run_backward(given, x, weight, *results, 1e-6, plus)
        found.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("each_device")
def test_variance_does_not_cancel():
    """A mean of 1000 standard deviations, of which E[x^2] - E[x]^2 in float32 would leave little."""
    for layout in ("contiguous", "channels_last", "transposed"):
        case = make((2, 64, 6, 6), layout=layout)
        case.tensors[0] = case.tensors[0] + 1000
        y, exact = (
            case.run(case.tensors, "fused"),
            case.to(torch.float64).run(case.to(torch.float64).tensors, "reference"),
        )
        assert (y - exact).abs().max() < 2e-4 * exact.abs().max()


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_constant_pixels_and_no_eps(layout):
    """Without eps a constant pixel is 0 / 0 as in PyTorch; it does not spread, nor do the lanes that hold no pixel."""
    x, weight, bias = make((2, 19, 3, 3), layout=layout).tensors
    for backend in ("fused", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = fused_layer_norm_2d(*leaves, eps=0.0, backend=backend)
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), leaves))
    x[1, :, 2, 1] = 3.0
    flat = fused_layer_norm_2d(x, weight, bias, backend="fused")[1, :, 2, 1]
    torch.testing.assert_close(flat, bias)
    y = fused_layer_norm_2d(x, weight, bias, eps=0.0, backend="fused")
    assert y[1, :, 2, 1].isnan().all() and y.isnan().sum() == 19


@pytest.mark.usefixtures("each_device")
def test_bad_values_stay_in_their_pixel():
    for layout in ("contiguous", "channels_last", "cropped"):
        x, weight, bias = make((1, 24, 5, 7), layout=layout).tensors
        x[0, 3, 1, 2], x[0, 5, 4, 4] = float("nan"), float("inf")
        y = fused_layer_norm_2d(x, weight, bias, backend="fused")
        bad = y.isnan().any(1)[0]
        assert bad.sum() == 2 and bad[1, 2] and bad[4, 4]


@pytest.mark.usefixtures("each_device")
def test_one_channel():
    case = make((2, 1, 4, 5))
    y = case.run(case.tensors, "fused")
    torch.testing.assert_close(y, case.tensors[2].reshape(1, 1, 1, 1).expand(y.shape))


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((2, 5, 3, 4)))
    check_gradients(make((1, 9, 3, 3), layout="channels_last", eps=0.1))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_hands_over_where_torch_is_faster(isa, monkeypatch):
    monkeypatch.setattr(_native, "cpu_kernels", lambda: SimpleNamespace(isa=isa))
    small, large = (torch.randn(1, 64, s, s).to(memory_format=torch.channels_last) for s in (10, 112))
    weight = torch.ones(64)
    found = explain("layer_norm_2d", small, weight, weight)
    assert found.parts == {"layer_norm_2d": "PyTorch"} and "faster for this channels_last" in found.slower[0]
    for kept in (large, small.contiguous(), small.double()):
        assert "C++" in explain("layer_norm_2d", kept, *[weight.to(kept.dtype)] * 2).parts["layer_norm_2d"]
    assert "C++" in explain("layer_norm_2d", small, weight, weight, backend="fused").parts["layer_norm_2d"]
    medium = torch.randn(1, 64, 45, 45).to(memory_format=torch.channels_last)
    expected = {"avx2": (True, True, True), "avx512": (False, True, False)}[isa]
    found = [
        explain("layer_norm_2d", t).parts for t in (medium, medium.detach().requires_grad_(), large.requires_grad_())
    ]
    assert [part == {"layer_norm_2d": "PyTorch"} for part in found] == list(expected)


def test_module_has_the_official_parameters():
    norm = nn.LayerNorm2d(24, 1e-5)
    assert {name: tuple(t.shape) for name, t in norm.state_dict().items()} == {"weight": (24,), "bias": (24,)}
    assert norm.eps == 1e-5 and nn.LayerNorm2d(8).eps == 1e-6
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 24, 7, 5)
    for fused in (True, False):
        norm.fused = fused
        torch.testing.assert_close(norm(x), official(x, norm.weight, norm.bias, 1e-5))
    assert "24" in repr(norm)


X, W = torch.randn(2, 8, 7, 7), torch.randn(8)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(N, C, H, W\), got shape \(8, 7, 7\)", (X[0], W, W), {}),
    "channels": (ValueError, r"weight must have shape \(8,\) \(C\), got \(7,\)", (X, W[:7], W), {}),
    "bias": (ValueError, r"bias must have shape \(8,\) \(C\), got \(1, 8\)", (X, W, W[None]), {}),
    "no bias": (TypeError, "bias must be a torch.Tensor, got NoneType", (X, W, None), {}),
    "eps": (ValueError, "eps must be finite and at least 0, got -1e-06", (X, W, W), {"eps": -1e-6}),
    "nan eps": (ValueError, "eps must be finite and at least 0, got nan", (X, W, W), {"eps": float("nan")}),
    "eps type": (TypeError, "eps must be a float, got str", (X, W, W), {"eps": "1e-6"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_layer_norm_2d(*arguments, **options)
