"""fused_channel_aggregation_ffn on GPUs: its Triton kernels in the interpreter, and either convolution."""

import pytest
import torch
from harness import Case, check_against_reference, laid_out, outputs
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_ops import reference
from vision_ops.kernels import channel_aggregation_ffn as kernels
from vision_ops.ops import _channel_aggregation as chunks
from vision_ops.ops import _channel_aggregation_passes as passes
from vision_ops.ops import channel_aggregation_ffn as ops

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def no_gaps(monkeypatch):
    """In fc1's output, as on a GPU."""
    monkeypatch.setattr(chunks, "_fc1_channels", lambda a: a.dw_weight.shape[0])


def make(
    interpreter,
    shape,
    hidden,
    *,
    kernel=3,
    bias=True,
    dtype=torch.float32,
    parameter_dtype=None,
    layout="contiguous",
    keep=True,
):
    c, wanted = shape[1], parameter_dtype or dtype
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    sizes = (hidden, c, 1, 1), (hidden, 1, kernel, kernel), (c, hidden, 1, 1), (1, hidden, 1, 1)
    parameters = [
        t.to(wanted) for s in sizes for t in (torch.randn(s) / (s[1] * s[2] * s[3]) ** 0.5, torch.randn(s[0]))
    ]
    if not bias:
        parameters[1::2] = [None] * 4

    def run(tensors, backend):
        if backend == "reference":
            return reference.channel_aggregation_ffn(*tensors)
        return interpreter.run(ops._op, *tensors, keep)

    return Case(run, [x, *parameters, torch.randn(1, hidden, 1, 1).to(wanted)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(interpreter, convolution, layout, dtype):
    check_against_reference(make(interpreter, (2, 5, 7, 6), 24, dtype=dtype, layout=layout), layout, slack=2)


@pytest.mark.parametrize(
    ("shape", "hidden"), [((1, 8, 5, 3), 150), ((1, 7, 1, 1), 16), ((3, 20, 5, 1), 9), ((0, 8, 5, 5), 32)], ids=str
)
def test_sizes(interpreter, convolution, shape, hidden):
    """The channels of a block end before those of the tensor, or after."""
    for dtype in (torch.float32, torch.bfloat16):
        check_against_reference(make(interpreter, shape, hidden, dtype=dtype), slack=2)


@pytest.mark.parametrize("layout", ["channel_slice", "cropped", "transposed", "expanded"])
def test_layouts(interpreter, layout):
    for grad_layout in ("channel_slice", "expanded"):
        check_against_reference(make(interpreter, (2, 5, 4, 3), 16, layout=layout), grad_layout, slack=2)


def test_options(interpreter, convolution):
    check_against_reference(make(interpreter, (2, 4, 5, 6), 16, bias=False, dtype=torch.bfloat16), slack=2)
    check_against_reference(make(interpreter, (2, 4, 5, 6), 16, kernel=5), slack=2)
    mixed = {"dtype": torch.bfloat16, "parameter_dtype": torch.float32}
    check_against_reference(make(interpreter, (2, 4, 5, 6), 16, **mixed), slack=2)


def test_what_was_not_kept_is_computed_again(interpreter, convolution):
    for dtype in (torch.float32, torch.bfloat16):
        case = make(interpreter, (2, 4, 5, 6), 16, dtype=dtype)
        expected, grad = outputs(case, "fused")
        again = Case(make(interpreter, (2, 4, 5, 6), 16, dtype=dtype, keep=False).run, case.tensors)
        assert all(torch.equal(a, b) for a, b in zip(outputs(again, "fused", grad)[0], expected, strict=True))


def test_more_blocks_than_programs(interpreter, monkeypatch):
    """A program of the backward pass then sums several blocks, the last one fewer or none."""
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 5)
    check_against_reference(make(interpreter, (2, 4, 13, 9), 140), slack=2)


def test_a_large_score_is_not_rounded(interpreter):
    """d is one number for all channels: rounded to a half type, here by up to 1, its error would add up in all."""
    case = make(interpreter, (1, 32, 5, 5), 64, dtype=torch.bfloat16)
    case.tensors[-1] = torch.full_like(case.tensors[-1], -1)  # y = fc2(d), and fc2 is a mean
    case.tensors[5] = torch.full_like(case.tensors[5], 1 / 64)
    case.tensors[6] = torch.full_like(case.tensors[6], -302)
    case.tensors[8] = torch.full_like(case.tensors[8], 302)
    exact = case.to(torch.float64)
    y, e = case.run(case.tensors, "fused"), exact.run(exact.tensors, "reference")
    assert (y - e).abs().max() <= 0.1


def test_bitwise_repeatable(interpreter, convolution):
    case = make(interpreter, (2, 8, 9, 7), 32, dtype=torch.bfloat16)
    first, grad = outputs(case, "fused")
    assert all(torch.equal(a, b) for a, b in zip(outputs(case, "fused", grad)[0], first, strict=True))


def test_only_the_gradients_that_are_asked_for(interpreter, convolution):
    case = make(interpreter, (1, 4, 5, 6), 16)
    everything, grad = outputs(case, "fused")
    for i in range(len(case.tensors)):
        tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
        (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
        torch.testing.assert_close(alone, everything[1 + i])


def test_keeps_fc1_without_gaps(monkeypatch):
    monkeypatch.undo()
    shapes = [t.shape for t in make(None, (2, 8, 5, 6), 32).tensors]
    with FakeTensorMode():
        tensors = [torch.empty(shape, device="cuda") for shape in shapes]
        kept = chunks.output(chunks.Arguments(*tensors, True))[2]
    assert kept.shape == (2, 32, 5, 6) and kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("hidden", "columns"), [(512, 520), (9, 16)])
def test_fc2_is_as_tensor_cores_want_it(hidden, columns):
    """Rows of whole vectors; what fills them up counts for nothing."""
    x, *rest = make(None, (1, 8, 2, 2), hidden, dtype=torch.bfloat16).tensors
    fc2 = chunks.Fc2(chunks.Arguments(x, *rest, True), passes.cuda(x))
    assert fc2.matrix.shape == (8, columns) and fc2.matrix.is_contiguous() and not fc2.matrix[:, hidden + 2 :].any()
    assert chunks._hidden_channels(chunks.Arguments(x, *rest, True)) >= columns
