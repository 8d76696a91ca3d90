"""What the ops of EdgeNeXt run on a GPU, with the CPU's depthwise engine in the place of CUDA's."""

import pytest
import torch
from harness import HALF, LAYOUTS, Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.ops import dwconv, dwconv_layer_norm, split_cascade

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    for module in (dwconv_layer_norm, split_cascade):
        monkeypatch.setattr(module, "convolve_cuda", dwconv.convolve)
        monkeypatch.setattr(module, "convolve_backward_cuda", dwconv.convolve_backward)


def conv_and_norm(interpreter, shape, kernel, *, dtype=torch.float32, layout="contiguous", keep=True):
    channels = shape[1]
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype) / kernel

    def run(tensors, backend):
        if backend == "reference":
            return reference.dwconv_layer_norm(*tensors)
        return interpreter.run(dwconv_layer_norm._op, *tensors, 1e-6, keep)

    return Case(run, [x, weight, *torch.randn(3, channels, dtype=dtype)])


def cascade(interpreter, shape, scales, *, dtype=torch.float32, layout="contiguous"):
    width = -(-shape[1] // scales)
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    weights = [torch.randn(width, 1, 3, 3, dtype=dtype) / 3 for _ in range(scales - 1)]
    biases = list(torch.randn(scales - 1, width, dtype=dtype))

    def run(tensors, backend):
        given = tensors[0], list(tensors[1:scales]), list(tensors[scales:])
        if backend == "reference":
            return reference.split_cascade(*given)
        return interpreter.run(split_cascade._op, *given)

    return Case(run, [x, *weights, *biases])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(interpreter, layout):
    for grad_layout in ("contiguous", "channels_last", "channel_slice"):
        check_against_reference(conv_and_norm(interpreter, (2, 20, 5, 4), 3, layout=layout), grad_layout)
        check_against_reference(cascade(interpreter, (2, 20, 5, 4), 3, layout=layout), grad_layout)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_dtypes(interpreter, dtype):
    check_against_reference(conv_and_norm(interpreter, (1, 24, 6, 5), 7, dtype=dtype))
    check_against_reference(cascade(interpreter, (1, 22, 6, 5), 4, dtype=dtype))


def test_empty_batch_and_one_pixel(interpreter):
    for batch, size in ((0, 4), (2, 1)):
        check_against_reference(conv_and_norm(interpreter, (batch, 9, size, size), 3))
        check_against_reference(cascade(interpreter, (batch, 9, size, size), 2))


def test_what_was_not_kept_is_computed_again(interpreter):
    case = conv_and_norm(interpreter, (2, 20, 5, 4), 3)
    expected, grad = outputs(case, "fused")
    case.run = conv_and_norm(interpreter, (2, 20, 5, 4), 3, keep=False).run
    assert all(torch.equal(a, b) for a, b in zip(outputs(case, "fused", grad)[0], expected, strict=True))


@pytest.mark.parametrize("make", [lambda i: conv_and_norm(i, (2, 20, 5, 4), 3), lambda i: cascade(i, (2, 20, 5, 4), 3)])
def test_only_the_gradients_that_are_asked_for(interpreter, make):
    case = make(interpreter)
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    everything = torch.autograd.grad(case.run(leaves, "fused").square().sum(), leaves)
    for wanted in range(len(leaves)):
        tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(case.tensors)]
        (found,) = torch.autograd.grad(case.run(tensors, "fused").square().sum(), tensors[wanted])
        torch.testing.assert_close(found, everything[wanted], rtol=1e-5, atol=1e-4)
