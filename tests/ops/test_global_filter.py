import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_compiles,
    check_gradients,
    laid_out,
    outputs,
)

from vision_ops import explain, fused_global_filter, reference, use_backend
from vision_ops.reference._resize import resize, resize_backward


def make(shape=(2, 20, 14, 14), size=None, *, dtype=torch.float32, device="cpu", layout="contiguous"):
    h, w = size or (shape[2], shape[3] // 2 + 1)
    x = laid_out(torch.randn(shape, dtype=dtype, device=device), layout)
    weight = torch.randn(shape[1], h, w, 2, device=device).to(dtype)
    return Case(lambda t, backend: fused_global_filter(*t, backend=backend), [x, weight])


CASES = [
    ((2, 20, 14, 14), {}),
    ((2, 33, 7, 7), {"layout": "channels_last"}),
    ((1, 16, 24, 24), {"layout": "channels_last"}),
    ((3, 34, 12, 12), {}),
    ((70, 5, 7, 6), {}),  # several images to a group
    ((2, 3, 15, 33), {}),
    ((2, 3, 5, 8), {"layout": "channels_last"}),
    ((1, 9, 1, 1), {}),
    ((1, 4, 1, 6), {}),
    ((2, 4, 9, 1), {"layout": "channels_last"}),
    ((2, 2, 2, 2), {}),
    ((0, 8, 7, 7), {}),
    # The weights of another size, larger, smaller and degenerate.
    ((2, 8, 9, 6), {"size": (14, 8)}),
    ((1, 8, 20, 12), {"size": (7, 4)}),
    ((1, 8, 6, 7), {"size": (1, 1)}),
    ((1, 8, 8, 8), {"size": (8, 8)}),
]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_matches_reference(shape, options, any_device):
    check_against_reference(make(shape, device=any_device, **options))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize(("width", "size"), [(9, None), (9, (5, 9)), (14, None)], ids=str)
def test_dtypes(dtype, width, size, any_device):
    check_against_reference(make((2, 20, 14, width), size, dtype=dtype, device=any_device))


def test_float32_weight_beside_half_input(any_device):
    case = make(dtype=torch.bfloat16, device=any_device)
    x, weight = case.tensors[0], case.tensors[1].float() * 1.001
    case.tensors[1] = weight
    check_against_reference(case)
    assert not torch.equal(case.run([x, weight], "fused"), case.run([x, weight.bfloat16()], "fused"))


def test_is_a_circular_convolution():
    x, weight = make((1, 3, 6, 5), dtype=torch.float64).tensors
    kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=(6, 5))
    shifted = sum(kernel[:, i, j, None, None] * x.roll((i, j), (2, 3)) for i in range(6) for j in range(5))
    torch.testing.assert_close(fused_global_filter(x, weight, backend="fused"), shifted)


def test_gradcheck():
    check_gradients(make((2, 3, 4, 5)))
    check_gradients(make((1, 2, 4, 4), (3, 2)))


@pytest.mark.parametrize("needed", [0, 1])
@pytest.mark.parametrize("width", [13, 14])
def test_only_one_gradient(needed, width, any_device):
    case = make((2, 20, 14, width), device=any_device)
    everything, grad = outputs(case, "fused")
    leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate(case.tensors)]
    (alone,) = torch.autograd.grad(case.run(leaves, "fused"), leaves[needed], grad)
    assert torch.equal(alone, everything[1 + needed])


def test_bitwise_repeatable(any_device):
    check_bitwise_repeatable(make((9, 40, 14, 14), layout="channels_last", device=any_device))


def test_compiles(device):
    check_compiles([make(device=device), make((2, 20, 7, 9), device=device)])
    check_compiles([make((2, 20, 9, 9), (14, 8), layout="channels_last", device=device)], dynamic=False)


def test_hands_large_images_to_the_fft():
    for size, reason in ((30, False), (31, True)):
        case = make((1, 4, size, 8))
        found = explain("global_filter", *case.tensors)
        assert bool(found.slower) == reason and (found.parts == {"global_filter": "PyTorch"}) == reason
    check_against_reference(case)
    assert "C++" in explain("global_filter", *case.tensors, backend="fused").parts["global_filter"]


def test_export_and_functorch():
    x, weight = make((2, 4, 7, 6)).tensors

    class Module(torch.nn.Module):
        def forward(self, x):
            return fused_global_filter(x, weight)

    exported = torch.export.export(Module(), (x,))
    assert any("vision_ops.global_filter" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), reference.global_filter(x, weight))
    with use_backend("reference"):
        exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(exported.module()(x[:1]), reference.global_filter(x[:1], weight))
    for f in (torch.func.jvp, torch.func.vjp):
        arguments = (x,) if f is torch.func.vjp else ((x,), (x,))
        found = [f(lambda t, h=h: h(t, weight), *arguments)[0] for h in (fused_global_filter, reference.global_filter)]
        torch.testing.assert_close(*found)


X, W = torch.randn(2, 8, 6, 6), torch.randn(8, 6, 4, 2)
REFUSED = {
    "rank": (ValueError, "x must have the dimensions", (X[0], W)),
    "channels": (ValueError, r"complex_weight must have shape \(8, 6, 4, 2\) \(C, h, w, 2\)", (X, W[:4])),
    "parts": (ValueError, r"complex_weight must have shape \(8, 6, 4, 2\)", (X, W[..., :1])),
    "weight rank": (ValueError, r"complex_weight must have shape .* got \(8, 6, 4\)", (X, W[..., 0])),
    "no frequencies": (ValueError, "complex_weight must have frequencies", (X, W[:, :0])),
    "no weight": (TypeError, "complex_weight must be a torch.Tensor, got NoneType", (X, None)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_global_filter(*arguments)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), [((14, 8), (7, 4)), ((7, 4), (12, 7)), ((5, 1), (1, 6))], ids=str)
def test_repeatable_interpolation_is_interpolation(before, after, align_corners, monkeypatch):
    """On GPUs, where PyTorch's own adds in no fixed order."""
    planes, grad = torch.randn(2, 3, *before).requires_grad_(), torch.randn(2, 3, *after)
    expected = F.interpolate(planes, after, mode="bilinear", align_corners=align_corners)
    (expected_gradient,) = torch.autograd.grad(expected, planes, grad)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = resize(planes, after, align_corners=align_corners)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, planes, grad)[0], expected_gradient)
    torch.testing.assert_close(resize_backward(grad, before, align_corners=align_corners), expected_gradient)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weight_within_a_buffer(backend):
    """A complex view needs an even storage offset."""
    x, buffer = torch.randn(1, 3, 8, 8), torch.randn(3 * 8 * 5 * 2 + 1)
    weight = buffer[1:].view(3, 8, 5, 2)
    assert torch.equal(*(fused_global_filter(x, w, backend=backend) for w in (weight, weight.clone())))
