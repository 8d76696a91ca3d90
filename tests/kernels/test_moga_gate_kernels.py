"""The Triton kernels in the interpreter."""

import pytest
import torch
from harness import LAYOUTS, Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.ops import moga_gate as ops

pytestmark = pytest.mark.usefixtures("interpreter")


def make(interpreter, shape, *, doubled=False, dtype=torch.float32, layout="contiguous", value_layout=None):
    gate, value = (laid_out(torch.randn(shape, dtype=dtype) * 3, form) for form in (layout, value_layout or layout))

    def run(tensors, backend):
        if backend == "reference":
            return reference.moga_gate(*tensors, double_gate_act=doubled)
        return interpreter.run(ops._op, *tensors, doubled)

    return Case(run, [gate, value])


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(interpreter, layout, dtype, doubled):
    check_against_reference(make(interpreter, (2, 13, 7, 9), doubled=doubled, dtype=dtype, layout=layout), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_layout", ["contiguous", "channels_last", "channel_slice"])
def test_layouts(interpreter, layout, value_layout):
    """Where gate, value and grad differ in strides, tiles take the place of lines."""
    case = make(interpreter, (1, 11, 6, 7), layout=layout, value_layout=value_layout)
    for grad_layout in ("contiguous", "channel_slice"):
        check_against_reference(case, grad_layout)


@pytest.mark.parametrize("shape", [(1, 70, 9, 5), (1, 7, 1, 1), (3, 20, 5, 1), (2, 1, 1, 33), (0, 8, 5, 5)], ids=str)
def test_sizes(interpreter, shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(interpreter, shape, layout=layout))
        check_against_reference(make(interpreter, shape, layout=layout, value_layout="channel_slice"))


def test_extreme_values(interpreter):
    values = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e15]).reshape(1, 7, 1, 1)
    for doubled in (False, True):
        case = make(interpreter, (1, 1, 1, 1), doubled=doubled)
        check_against_reference(Case(case.run, [values, values.flip(1).contiguous()]))


def test_results_in_place_of_arguments(interpreter):
    """As `fused_moga_aggregation` has them."""
    from vision_ops.kernels import moga_gate

    gate, value, grad = torch.randn(3, 2, 24, 5, 7).unbind(0)
    expected = torch.empty_like(gate)
    dgate, dvalue = torch.empty_like(gate), torch.empty_like(gate)
    moga_gate.gate(gate, value, False, expected)
    moga_gate.gate_backward(grad, gate, value, False, dgate, dvalue)
    y = gate.clone()
    moga_gate.gate(y, value, False, y)
    moga_gate.gate_backward(grad, gate, value, False, gate, value)
    assert torch.equal(y, expected) and torch.equal(gate, dgate) and torch.equal(value, dvalue)


def test_only_the_gradients_that_are_asked_for(interpreter):
    for layout in ("contiguous", "channel_slice"):
        case = make(interpreter, (2, 20, 7, 6), layout=layout)
        everything, grad = outputs(case, "fused")
        for i in range(2):
            tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
            (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
            assert torch.equal(alone, everything[1 + i])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_sums_of_more_blocks_than_programs(form):
    from vision_ops.kernels import moga_gate

    grad, gate, value = (t.contiguous(memory_format=form) for t in torch.randn(3, 3, 5, 13, 17))
    dgate, dvalue = torch.empty_like(gate), torch.empty_like(value)
    sums = [torch.full((5,), torch.nan) for _ in range(2)]
    moga_gate.gate_backward(grad, gate, value, True, dgate, dvalue, None, sums)
    for found, t in zip(sums, (dgate, dvalue), strict=True):
        torch.testing.assert_close(found, t.sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
