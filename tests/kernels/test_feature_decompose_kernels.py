"""The Triton kernels in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from harness import LAYOUTS, Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.kernels import feature_decompose as kernels
from vision_ops.ops import feature_decompose as ops

pytestmark = pytest.mark.usefixtures("interpreter")


def make(interpreter, shape, *, activation="silu", dtype=torch.float32, sigma_dtype=None, layout="contiguous"):
    x = laid_out(torch.randn(shape, dtype=dtype) * 2 + 1, layout)
    sigma = torch.randn(1, shape[1], 1, 1, dtype=sigma_dtype or dtype)

    def run(tensors, backend):
        if backend == "reference":
            return reference.feature_decompose(*tensors, activation=activation)
        return interpreter.run(ops._op, *tensors, activation)

    return Case(run, [x, sigma])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(interpreter, layout, dtype):
    check_against_reference(make(interpreter, (2, 13, 7, 6), dtype=dtype, layout=layout), layout)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations(interpreter, dtype, activation):
    check_against_reference(make(interpreter, (1, 8, 7, 6), activation=activation, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(interpreter, layout):
    # Where x is the same everywhere, sigma has no gradient: what is found is the rounding errors of the mean.
    slack = 20 if layout == "expanded" else 1
    for grad_layout in ("contiguous", "channel_slice", "expanded"):
        check_against_reference(make(interpreter, (2, 7, 6, 7), layout=layout), grad_layout, slack=slack)


@pytest.mark.parametrize("shape", [(1, 70, 3, 5), (1, 7, 1, 1), (3, 9, 5, 1), (2, 3, 1, 33), (0, 8, 5, 5)], ids=str)
def test_sizes(interpreter, shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(interpreter, shape, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_in_several_shares(interpreter, layout, monkeypatch):
    """Of several tiles; the last share has fewer pixels, or none."""
    monkeypatch.setattr(kernels, "SHARE_PIXELS", 30)
    for size in (39, 48):
        check_against_reference(make(interpreter, (1, 6, size, 13), layout=layout))


def test_float32_sigma_beside_half_input(interpreter):
    check_against_reference(make(interpreter, (2, 8, 5, 5), dtype=torch.bfloat16, sigma_dtype=torch.float32))


def test_a_constant_image_is_only_activated(interpreter):
    """However large sigma is: of 49 pixels the mean is exact."""
    x, sigma = torch.full((1, 8, 7, 7), 1.5), torch.full((8,), 1e6)
    for layout in ("contiguous", "channels_last"):
        y = interpreter.run(ops._op, laid_out(x, layout), sigma, "silu")
        torch.testing.assert_close(y, F.silu(x))


def test_only_the_gradients_that_are_asked_for(interpreter):
    for layout in ("contiguous", "channels_last"):
        case = make(interpreter, (1, 8, 7, 6), layout=layout)
        everything, grad = outputs(case, "fused")
        for i in range(2):
            tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
            (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
            assert torch.equal(alone, everything[1 + i])


def test_gradient_in_place_of_grad_output(interpreter):
    """As `fused_moga_aggregation` may have it."""
    x, grad, dx = torch.randn(3, 2, 8, 5, 7).unbind(0)
    sigma, means = torch.randn(8), x.mean((2, 3), keepdim=True)
    kernels.decompose_backward(grad, x, means, sigma, "silu", dx, None)
    kernels.decompose_backward(grad, x, means, sigma, "silu", grad, None)
    assert torch.equal(grad, dx)
