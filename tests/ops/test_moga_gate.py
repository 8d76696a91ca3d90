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

from vision_ops import explain, fused_moga_gate, reference


def make(shape, *, doubled=False, dtype=torch.float32, layout="contiguous", value_layout=None):
    gate, value = (laid_out(torch.randn(shape, dtype=dtype) * 3, form) for form in (layout, value_layout or layout))
    return Case(lambda t, backend: fused_moga_gate(*t, double_gate_act=doubled, backend=backend), [gate, value])


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(layout, dtype, doubled, device):
    case = make((3, 37, 9, 11), doubled=doubled, dtype=dtype, layout=layout)
    check_against_reference(case.on(device), layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (1, 7, 1, 1), (5, 20, 5, 1), (2, 3, 1, 33), (0, 8, 5, 5)], ids=str)
def test_sizes(shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(shape, layout=layout))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_layout", ["contiguous", "channels_last", "channel_slice", "expanded"])
def test_layouts(layout, value_layout):
    case = make((2, 21, 6, 7), layout=layout, value_layout=value_layout)
    for grad_layout in ("contiguous", "channel_slice", "cropped", "expanded"):
        check_against_reference(case, grad_layout)
    last = layout in ("channels_last", "channel_slice")
    form = torch.channels_last if last else torch.contiguous_format
    assert case.run(case.tensors, "fused").is_contiguous(memory_format=form)


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
def test_bitwise_repeatable():
    check_bitwise_repeatable(make((3, 40, 33, 31), layout="channels_last"))


def test_autocast():
    case = make((2, 16, 9, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.run(case.tensors, "fused")
    assert y.dtype == torch.bfloat16 and torch.equal(y, case.run([t.bfloat16() for t in case.tensors], "fused"))


@pytest.mark.usefixtures("each_device")
def test_compiles():
    check_compiles([make((2, 16, 9, 7)), make((2, 16, 5, 12))])


@pytest.mark.usefixtures("each_device")
def test_opcheck():
    check_opcheck("moga_gate", (*make((2, 8, 5, 6)).tensors, True), tensors=2)


def test_functorch_takes_the_reference():
    gate, value = make((2, 6, 4, 3)).tensors
    both = fused_moga_gate, reference.moga_gate
    torch.testing.assert_close(*(torch.func.jvp(f, (gate, value), (value, gate)) for f in both))


def test_backward_keeps_the_arguments_only():
    case = make((2, 32, 8, 8))
    assert saved_bytes(case, "fused") == sum(t.nbytes for t in case.tensors)
    assert saved_bytes(case, "reference") == 2 * sum(t.nbytes for t in case.tensors)


X = torch.randn(2, 8, 7, 7)
REFUSED = {
    "rank": (ValueError, r"gate must have the dimensions \(N, C, H, W\), got shape \(8, 7, 7\)", (X[0], X[0]), {}),
    "shapes": (ValueError, r"value must have shape \(2, 8, 7, 7\) \(the shape of gate\)", (X, X[:1]), {}),
    "dtypes": (TypeError, "value must have the dtype of gate, torch.bfloat16", (X.bfloat16(), X), {}),
    "flag": (TypeError, "double_gate_act must be a bool, got int", (X, X), {"double_gate_act": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_moga_gate(*arguments, **options)


def test_explains():
    assert "C++" in explain("moga_gate", X, X, double_gate_act=True, backend="fused").parts["moga_gate"]


def test_hands_over_where_torch_is_faster():
    small, large = torch.randn(2, 512, 7, 7), torch.randn(2, 64, 56, 56)
    assert explain("moga_gate", small, small).parts == {"moga_gate": "PyTorch"}
    small = small.to(memory_format=torch.channels_last)
    assert "C++" in explain("moga_gate", small, small).parts["moga_gate"]
    assert explain("moga_gate", small.requires_grad_(), small).parts == {"moga_gate": "PyTorch"}
    assert "C++" in explain("moga_gate", large.requires_grad_(), large).parts["moga_gate"]
    assert explain("moga_gate", small.detach()[:1], small[:1]).parts == {"moga_gate": "PyTorch"}
