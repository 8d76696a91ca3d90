"""The Triton kernels in the interpreter; tests/ops/test_layer_norm_2d.py has them on a GPU."""

import pytest
import torch
from harness import Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.ops import layer_norm_2d as ops

pytestmark = pytest.mark.usefixtures("interpreter")


def make(interpreter, shape, *, dtype=torch.float32, parameter_dtype=None, layout="contiguous", eps=1e-6):
    x = laid_out(torch.randn(shape, dtype=dtype) * 2 + 1, layout)
    weight, bias = torch.randn(2, shape[1], dtype=parameter_dtype or dtype)

    def run(tensors, backend):
        if backend == "reference":
            return reference.layer_norm_2d(*tensors, eps=eps)
        return interpreter.run(ops._op, *tensors, eps)

    return Case(run, [x, weight, bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(interpreter, dtype, layout):
    check_against_reference(make(interpreter, (2, 20, 7, 9), dtype=dtype, layout=layout), layout)


@pytest.mark.parametrize(
    ("shape", "layout", "grad_layout"),
    [
        ((2, 16, 5, 4), "channel_slice", "contiguous"),
        ((2, 16, 5, 4), "cropped", "channels_last"),
        ((2, 16, 5, 4), "transposed", "expanded"),
        ((2, 16, 5, 4), "expanded", "channel_slice"),
        ((1, 130, 1, 5), "contiguous", "contiguous"),
        ((3, 9, 5, 1), "channels_last", "cropped"),
        ((1, 7, 1, 1), "contiguous", "channels_last"),
        ((0, 8, 3, 3), "contiguous", "contiguous"),
    ],
)
def test_layouts_and_odd_sizes(interpreter, shape, layout, grad_layout):
    check_against_reference(make(interpreter, shape, layout=layout), grad_layout)


def test_float32_parameters_beside_half_input(interpreter):
    check_against_reference(make(interpreter, (1, 24, 5, 5), dtype=torch.bfloat16, parameter_dtype=torch.float32))


def test_more_blocks_than_programs(interpreter, monkeypatch):
    """A program of the backward pass then sums several blocks, the last one fewer or none."""
    from vision_ops.kernels import layer_norm_2d

    monkeypatch.setattr(layer_norm_2d, "PROGRAMS", 5)
    for layout in ("contiguous", "channels_last"):
        case = make(interpreter, (3, 64, 9, 9), layout=layout)
        check_against_reference(case)


def test_no_eps_and_gradients_that_are_not_needed(interpreter):
    """Without eps the pixels of the last block that do not exist would divide by 0."""
    case = make(interpreter, (1, 64, 5, 7), layout="channels_last", eps=0.0)
    check_against_reference(case)
    everything, grad = outputs(case, "fused")
    for i in range(3):
        tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
        (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
        assert torch.equal(alone, everything[1 + i])
