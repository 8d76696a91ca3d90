import pytest
import torch
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
    outputs,
)

from benchmarks.measure import peak_bytes
from vision_ops import _native, explain, fused_shift_split_attention, reference
from vision_ops.reference.shift_split_attention import spatial_shift


def make(shape, *, hidden=None, dtype=torch.float32, parameter_dtype=None, layout="contiguous"):
    """shape (B, H, W, C). The pooled vector is a sum: mlp1 is small, or the softmax would choose one branch."""
    b, h, w, c = shape
    hidden = hidden or c
    x = laid_out(torch.randn(b, h, w, 3 * c, dtype=dtype), layout)
    mlp1 = torch.randn(hidden, c, dtype=parameter_dtype or dtype) / (c * h * w) ** 0.5
    mlp2 = torch.randn(3 * c, hidden, dtype=parameter_dtype or dtype) / hidden**0.5
    return Case(lambda t, backend: fused_shift_split_attention(*t, backend=backend), [x, mlp1, mlp2])


SHAPES = [
    (2, 8, 9, 64),  # quarters of whole vectors
    (3, 7, 7, 20),
    (1, 33, 14, 96),  # several shares of an image
    (2, 1, 5, 10),
    (2, 5, 1, 10),
    (1, 1, 1, 7),
    (2, 2, 2, 3),  # empty quarters
    (1, 15, 5, 1),
    (6, 3, 4, 150),  # two groups of images and several blocks of the small MLP's matrices
    (0, 5, 5, 8),
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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_is_contiguous(layout):
    case = make((2, 5, 6, 12), layout=layout)
    assert case.run(case.tensors, "fused").is_contiguous()


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("hidden", [1, 6, 24, 50])
def test_any_hidden_width(hidden):
    check_against_reference(make((2, 6, 5, 24), hidden=hidden))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_moves_are_exact(branch):
    """Of weights that choose one branch, the output is that branch, moved."""
    c, h, w = 18, 4, 5
    x = torch.randn(2, h, w, 3 * c)
    pooled = [spatial_shift(x[..., :c], (1, 2)), spatial_shift(x[..., c : 2 * c], (2, 1)), x[..., 2 * c :]]
    total = sum(pooled).sum(dim=(1, 2))
    mlp1 = torch.linalg.pinv(total.double()).float() * 100  # its product with total is 100
    mlp2 = torch.zeros(3, c, 2)
    mlp2[branch] = 10
    case = Case(make((1, 1, 1, 1)).run, [x, mlp1.T.contiguous(), mlp2.flatten(0, 1)])
    assert torch.equal(case.run(case.tensors, "fused").cpu(), pooled[branch])


@pytest.mark.usefixtures("each_device")
def test_bad_values_stay_where_they_go():
    """An infinity makes its image's weights NaN, but no other image's."""
    x, mlp1, mlp2 = make((3, 4, 4, 8)).tensors
    x[1, 2, 2, 3] = float("inf")
    y = fused_shift_split_attention(x, mlp1, mlp2, backend="fused")
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().all()


@pytest.mark.usefixtures("each_device")
def test_weights_with_gaps():
    case = make((2, 6, 5, 24), hidden=7)
    x, *mlps = case.tensors
    check_against_reference(Case(case.run, [x, *(torch.stack([w.t(), w.t()], -1)[..., 0].t() for w in mlps)]))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 3, 10), (1, 3, 1, 10), (1, 2, 2, 8)], ids=str)
def test_gradcheck(shape):
    check_gradients(make(shape, hidden=3), second=shape[3] == 5)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype):
    case = make((3, 31, 33, 72), dtype=dtype)
    first, grad = outputs(case, "fused")
    for _ in range(3):
        again, _ = outputs(case, "fused", grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_sums_do_not_depend_on_the_threads():
    """Those of our kernels; PyTorch's GEMMs may."""
    from vision_ops.ops.shift_split_attention import CPUPasses, small

    x, dy = torch.randn(2, 33, 31, 60), torch.randn(2, 33, 31, 20)
    weights, found = torch.rand(2, 3, 20), []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            edges, sums = small(x, 3, 60), small(x, 4, 20)
            CPUPasses.edge_sums(x, edges)
            CPUPasses.weigh_backward_weights(dy, x, weights, None, sums, None)
        finally:
            torch.set_num_threads(before)
        found.append(torch.cat([edges.flatten(), sums.flatten()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("each_device")
def test_exports_and_compiles_to_what_eager_gives():
    """The article's in-place slices give three different results."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return fused_shift_split_attention(*tensors)

    tensors = make((1, 6, 5, 12)).tensors
    eager, exact = Module()(*tensors), reference.shift_split_attention(*(t.double() for t in tensors)).float()
    torch.testing.assert_close(eager, exact)
    assert torch.equal(torch.export.export(Module(), tuple(tensors)).module()(*tensors), eager)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(*tensors), eager)


@pytest.mark.parametrize("train", [False, True])
def test_memory_of_the_forward_pass(train):
    """Beyond its output almost none; eager PyTorch takes six times the output."""
    case = make((4, 16, 16, 96))
    leaves = [t.requires_grad_(train) for t in case.tensors]
    output = 4 * 16 * 16 * 96 * 4
    assert peak_bytes(lambda: case.run(leaves, "fused"), "cpu") < (1 + 0.2) * output
    assert peak_bytes(lambda: case.run(leaves, "reference"), "cpu") > (1 + 5.5) * output


def test_explain():
    x, mlp1, mlp2 = make((1, 4, 4, 8)).tensors
    assert explain("shift_split_attention", x).cannot == []
    kernel = f"C++ kernel ({_native.cpu.isa})"
    expected = {"shifts and weights": kernel, "split_mlp1 and split_mlp2": kernel}
    assert explain("shift_split_attention", x, mlp1, mlp2).parts == expected
    assert explain("shift_split_attention", x, backend="reference").parts == {"shift_split_attention": "PyTorch"}


X, W1, W2 = torch.randn(2, 4, 4, 12), torch.randn(5, 4), torch.randn(12, 5)
REFUSED = {
    "rank": (ValueError, r"x must have the dimensions \(B, H, W, 3C\), got shape \(4, 4, 12\)", (X[0], W1, W2)),
    "thirds": (ValueError, r"x must have a multiple of 3 channels, got shape \(2, 4, 4, 11\)", (X[..., :11], W1, W2)),
    "rows": (ValueError, r"x may be empty in N only, got shape \(2, 0, 4, 12\)", (X[:, :0], W1, W2)),
    "channels": (ValueError, r"split_mlp1_weight must have shape \(5, 4\) \(hidden, C\)", (X, W1[:, :3], W2)),
    "no matrix": (ValueError, r"split_mlp1_weight must have shape \(1, 4\) \(hidden, C\)", (X, W1[0], W2)),
    "hidden": (ValueError, r"split_mlp2_weight must have shape \(12, 4\) \(3C, hidden\)", (X, W1[:4], W2)),
    "outputs": (ValueError, r"split_mlp2_weight must have shape \(12, 5\) \(3C, hidden\)", (X, W1, W2[:8])),
    "no weight": (TypeError, "split_mlp1_weight must be a torch.Tensor, got NoneType", (X, None, W2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_shift_split_attention(*arguments)
