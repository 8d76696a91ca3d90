"""The Triton kernels in the interpreter, in both ops; tests/ops has them on a GPU."""

import pytest
import torch
from harness import Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.ops import s2_attention, shift_split_attention

pytestmark = pytest.mark.usefixtures("interpreter")


def make_shift(interpreter, shape, *, dtype=torch.float32, parameter_dtype=None, layout="contiguous"):
    b, h, w, c = shape
    x = laid_out(torch.randn(b, h, w, 3 * c, dtype=dtype), layout)
    mlp1 = torch.randn(c + 1, c, dtype=parameter_dtype or dtype) / (c * h * w) ** 0.5
    mlp2 = torch.randn(3 * c, c + 1, dtype=parameter_dtype or dtype) / c**0.5

    def run(tensors, backend):
        if backend == "reference":
            return reference.shift_split_attention(*tensors)
        return interpreter.run(shift_split_attention._op, *tensors)

    return Case(run, [x, mlp1, mlp2])


def make_s2(interpreter, shape, *, dtype=torch.float32, bias=True):
    c = shape[3]
    x, mlp1, mlp2 = make_shift(interpreter, shape, dtype=dtype).tensors
    linears = torch.randn(3 * c, c, dtype=dtype) / c**0.5, torch.randn(c, c, dtype=dtype) / c**0.5
    biases = (torch.randn(3 * c, dtype=dtype), torch.randn(c, dtype=dtype)) if bias else (None, None)

    def run(tensors, backend):
        if backend == "reference":
            return reference.s2_attention(*tensors)
        return interpreter.run(s2_attention._op, *tensors, True)

    return Case(run, [x[..., :c].contiguous(), linears[0], biases[0], linears[1], biases[1], mlp1, mlp2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matches_reference(interpreter, dtype):
    check_against_reference(make_shift(interpreter, (2, 7, 9, 20), dtype=dtype))
    check_against_reference(make_s2(interpreter, (2, 5, 6, 10), dtype=dtype, bias=dtype != torch.float32))


@pytest.mark.parametrize(
    ("shape", "layout", "grad_layout"),
    [
        ((2, 5, 4, 16), "channels_last", "expanded"),
        ((2, 5, 4, 16), "cropped", "channels_last"),
        ((1, 1, 4, 10), "contiguous", "transposed"),
        ((2, 3, 1, 10), "expanded", "contiguous"),
        ((1, 1, 1, 3), "contiguous", "contiguous"),
        ((1, 2, 2, 1), "contiguous", "contiguous"),
        ((0, 3, 3, 8), "contiguous", "contiguous"),
        ((1, 9, 11, 72), "contiguous", "contiguous"),
    ],
)
def test_layouts_and_odd_sizes(interpreter, shape, layout, grad_layout):
    check_against_reference(make_shift(interpreter, shape, layout=layout), grad_layout)


def test_float32_parameters_beside_half_input(interpreter):
    check_against_reference(make_shift(interpreter, (1, 5, 5, 24), dtype=torch.bfloat16, parameter_dtype=torch.float32))


def test_shares_of_an_image(interpreter, monkeypatch):
    """Shares that end within a block, the last one early; one share alone where a batch has enough programs."""
    from vision_ops.kernels import shift_split_attention as kernels

    monkeypatch.setattr(kernels, "SHARE_PIXELS", 29)
    monkeypatch.setattr(kernels, "IMAGE_PROGRAMS", 99)
    case = make_shift(interpreter, (1, 11, 11, 12))
    check_against_reference(case)
    many, grad = outputs(case, "fused")
    monkeypatch.setattr(kernels, "IMAGE_PROGRAMS", 1)
    one, _ = outputs(case, "fused", grad)
    assert not all(torch.equal(a, b) for a, b in zip(many, one, strict=True))
    check_against_reference(case)


def test_gradients_that_are_not_needed(interpreter):
    case = make_s2(interpreter, (1, 3, 4, 8))
    everything, grad = outputs(case, "fused")
    for i in range(len(case.tensors)):
        tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
        (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
        assert torch.equal(alone, everything[1 + i])
