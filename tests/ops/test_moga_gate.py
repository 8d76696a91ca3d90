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

from vision_ops import explain, fused_moga_gate, reference


def make(shape, *, doubled=False, dtype=torch.float32, layout="contiguous", value_layout=None):
    gate, value = (laid_out(torch.randn(shape, dtype=dtype) * 3, form) for form in (layout, value_layout or layout))
    return Case(lambda t, backend: fused_moga_gate(*t, double_gate_act=doubled, backend=backend), [gate, value])


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(layout, dtype, doubled):
    case = make((3, 37, 9, 11), doubled=doubled, dtype=dtype, layout=layout)
    check_against_reference(case, layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (1, 7, 1, 1), (5, 20, 5, 1), (2, 3, 1, 33), (0, 8, 5, 5)], ids=str)
def test_sizes(shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(shape, layout=layout))


def test_reference_is_the_definition():
    gate, value = make((2, 5, 3, 4)).tensors
    once, twice = (lambda t: t * t.sigmoid()), (lambda t: F.silu(t * t.sigmoid()))
    for doubled, act in ((False, once), (True, twice)):
        expected = act(gate) * act(value)
        torch.testing.assert_close(reference.moga_gate(gate, value, double_gate_act=doubled), expected)


@pytest.mark.usefixtures("each_device")
def test_extreme_values():
    values = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e15]).reshape(1, 7, 1, 1)
    for doubled in (False, True):
        case = Case(make((1, 1, 1, 1), doubled=doubled).run, [values, values.flip(1).contiguous()])
        check_against_reference(case)


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((1, 5, 3, 4)))
    check_gradients(make((2, 4, 2, 3), doubled=True, layout="channels_last"))


X = torch.randn(2, 8, 7, 7)
REFUSED = {
    "rank": (ValueError, r"gate must have the dimensions \(N, C, H, W\), got shape \(8, 7, 7\)", (X[0], X[0]), {}),
    "shapes": (ValueError, r"value must have shape \(2, 8, 7, 7\) \(the shape of gate\)", (X, X[:1]), {}),
    "flag": (TypeError, "double_gate_act must be a bool, got int", (X, X), {"double_gate_act": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_moga_gate(*arguments, **options)


def test_hands_over_where_torch_is_faster():
    small, large = torch.randn(2, 512, 7, 7), torch.randn(2, 64, 56, 56)
    assert explain("moga_gate", small, small).parts == {"moga_gate": "PyTorch"}
    small = small.to(memory_format=torch.channels_last)
    assert "C++" in explain("moga_gate", small, small).parts["moga_gate"]
    assert explain("moga_gate", small.requires_grad_(), small).parts == {"moga_gate": "PyTorch"}
    assert "C++" in explain("moga_gate", large.requires_grad_(), large).parts["moga_gate"]
    assert explain("moga_gate", small.detach()[:1], small[:1]).parts == {"moga_gate": "PyTorch"}
