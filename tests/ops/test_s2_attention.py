import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
    outputs,
    saved_bytes,
)

from benchmarks.measure import peak_bytes
from vision_ops import _native, explain, fused_s2_attention, fused_shift_split_attention, nn


def make(shape, *, hidden=None, biases=(True, True), dtype=torch.float32, parameter_dtype=None, layout=None):
    """The pooled vector is a sum: the small MLP's first weights are small, or the softmax would choose one branch."""
    b, h, w, c = shape
    hidden = hidden or c
    drawn = {"dtype": parameter_dtype or dtype}
    mlp1, mlp2 = (torch.randn(n, c, **drawn) / c**0.5 for n in (3 * c, c))
    bias1, bias2 = (torch.randn(n, **drawn) if there else None for n, there in zip((3 * c, c), biases, strict=True))
    split1 = torch.randn(hidden, c, **drawn) / (h * w * c**0.5)
    split2 = torch.randn(3 * c, hidden, **drawn) / hidden**0.5
    x = laid_out(torch.randn(b, h, w, c, dtype=dtype), layout or "contiguous")
    tensors = [x, mlp1, bias1, mlp2, bias2, split1, split2]
    return Case(lambda t, backend: fused_s2_attention(*t, backend=backend), tensors)


SHAPES = [
    (2, 8, 9, 64),
    (3, 7, 7, 20),
    (1, 33, 14, 48),
    (2, 1, 5, 10),
    (2, 5, 1, 10),
    (1, 1, 1, 7),
    (1, 5, 4, 1),
    (0, 5, 5, 8),
    (6, 3, 4, 150),
    (2, 27, 19, 10),
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape):
    check_against_reference(make(shape))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_dtypes(dtype):
    check_against_reference(make((2, 9, 14, 40), dtype=dtype))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    ("layout", "grad_layout"),
    [
        ("channels_last", "contiguous"),
        ("channel_slice", "cropped"),
        ("cropped", "channels_last"),
        ("transposed", "expanded"),
        ("expanded", "transposed"),
    ],
)
def test_layouts(layout, grad_layout):
    case = make((2, 6, 11, 18), layout=layout)
    check_against_reference(case, grad_layout)
    assert case.run(case.tensors, "fused").is_contiguous()


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("biases", [(False, True), (True, False), (False, False)])
def test_biases_may_be_absent(biases):
    check_against_reference(make((2, 6, 5, 24), biases=biases, hidden=6))


@pytest.mark.usefixtures("each_device")
def test_images_at_a_time():
    """Several groups of images, the last one smaller, with and without what backward needs."""
    case = make((5, 12, 12, 20))
    check_against_reference(case)
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    torch.testing.assert_close(case.run(leaves, "fused"), case.run(case.tensors, "fused"))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("size", [3, 24])
def test_parameters_with_gaps(size):
    case = make((1, size, size, 20))
    spread = [t if t.ndim == 4 else torch.stack([t.t(), t.t()], -1)[..., 0].t() for t in case.tensors]
    check_against_reference(Case(case.run, spread))


def test_is_its_parts():
    x, mlp1, bias1, mlp2, bias2, *split = make((2, 6, 5, 16), dtype=torch.float64).tensors
    parts = F.linear(fused_shift_split_attention(F.linear(x, mlp1, bias1), *split, backend="fused"), mlp2, bias2)
    torch.testing.assert_close(fused_s2_attention(x, mlp1, bias1, mlp2, bias2, *split, backend="fused"), parts)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("shape", [(2, 2, 3, 5), (1, 1, 3, 10), (1, 3, 1, 10)], ids=str)
def test_gradcheck(shape):
    check_gradients(make(shape, hidden=2), second=shape[3] == 5)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype):
    case = make((3, 21, 23, 72), dtype=dtype)
    first, grad = outputs(case, "fused")
    for _ in range(3):
        again, _ = outputs(case, "fused", grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_exports_and_compiles_to_what_eager_gives():
    """The article's in-place slices give three different results."""
    module, x = nn.S2Attention(12), torch.randn(1, 6, 5, 12)
    with torch.no_grad():
        eager = module(x)
        module.fused = False
        torch.testing.assert_close(eager, module(x))
        module.fused = True
        assert torch.equal(torch.export.export(module, (x,)).module()(x), eager)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), eager)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep):
    given = (*make((2, 4, 5, 8), hidden=3, biases=(True, False)).tensors, keep)
    forward = torch.ops.vision_ops.s2_attention.default
    torch.library.opcheck(forward, given)
    torch.library.opcheck(forward, (given[0].clone().requires_grad_(), *given[1:]))
    y, *saved = forward(*given)
    grad = torch.randn_like(y)
    backward = torch.ops.vision_ops.s2_attention_backward.default
    torch.library.opcheck(backward, (grad, *given, saved, [True, True, True, False, False, True, True]))


def test_backward_without_what_is_kept():
    """The op itself, in a graph, may have been called without; backward then computes the branches again."""
    case = make((2, 5, 6, 12))
    forward, backward = torch.ops.vision_ops.s2_attention, torch.ops.vision_ops.s2_attention_backward
    found = []
    for keep in (True, False):
        with torch.no_grad():
            y, *saved = forward(*case.tensors, keep)
            assert (len(saved[0]) > 0) == keep
            found.append([y, *backward(y, *case.tensors, keep, saved, [True] * 7)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("each_device")
def test_saves_x_and_the_branches():
    """4C a pixel; eager PyTorch saves mlp2's input, too."""
    case = make((2, 16, 16, 32), hidden=8)
    x = case.tensors[0]
    expected = sum(t.nbytes for t in case.tensors) + 3 * x.nbytes + 4 * 2 * (32 + 8 + 3 * 32)
    assert saved_bytes(case, "fused") == expected
    assert saved_bytes(case, "reference") > expected + 0.9 * x.nbytes


@pytest.mark.parametrize("size", [16, 32])
def test_memory_of_the_forward_pass(size):
    """Of four images, one has its branches at a time: 3C and C beside the output. In training all are kept."""
    case = make((4, size, size, 48))
    output = case.tensors[0].nbytes
    assert peak_bytes(lambda: case.run(case.tensors, "fused"), "cpu") < (1 + 1.2) * output
    assert peak_bytes(lambda: case.run(case.tensors, "reference"), "cpu") > 9 * output
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    assert peak_bytes(lambda: case.run(leaves, "fused"), "cpu") < (1 + 3 + 0.5) * output


def test_explain():
    x, *rest = make((1, 32, 16, 8)).tensors
    kernel, gemms = f"C++ kernel ({_native.cpu.isa})", "PyTorch's GEMMs"
    own = gemms if _native.cpu.isa == "baseline" else kernel
    expected = {"shifts and weights": kernel, "mlp1 and mlp2": own, "split_mlp1 and split_mlp2": kernel}
    assert explain("s2_attention", x).parts == explain("s2_attention", x, *rest).parts == expected
    for other in (x.double(), x[:, :5, :3].contiguous()):
        assert explain("s2_attention", other).parts["mlp1 and mlp2"] == gemms


X, _, _, M2, _, S1, S2 = make((2, 4, 4, 4), hidden=5).tensors
M1, B1, B2 = torch.randn(12, 4), torch.randn(12), torch.randn(4)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(B, H, W, C\), got", (X[0], M1, B1, M2, B2, S1, S2)),
    "columns": (ValueError, "x may be empty in N only", (X[:, :, :0], M1, B1, M2, B2, S1, S2)),
    "mlp1": (ValueError, r"mlp1_weight must have shape \(12, 4\) \(3C, C\), got", (X, M2, B1, M2, B2, S1, S2)),
    "mlp1_bias": (ValueError, r"mlp1_bias must have shape \(12,\) \(3C\), got", (X, M1, B2, M2, B2, S1, S2)),
    "mlp2": (ValueError, r"mlp2_weight must have shape \(4, 4\) \(C, C\), got", (X, M1, B1, M1, B2, S1, S2)),
    "mlp2_bias": (ValueError, r"mlp2_bias must have shape \(4,\) \(C\), got", (X, M1, B1, M2, B1, S1, S2)),
    "split1": (ValueError, r"split_mlp1_weight must have shape \(12, 4\) \(hidden, C\)", (X, M1, B1, M2, B2, S2, S2)),
    "split2": (ValueError, r"split_mlp2_weight must have shape \(12, 5\)", (X, M1, B1, M2, B2, S1, S1)),
    "no weight": (TypeError, "mlp2_weight must be a torch.Tensor, got NoneType", (X, M1, B1, None, B2, S1, S2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_s2_attention(*arguments)
