import pytest
import torch
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_compiles,
    check_gradients,
    laid_out,
    outputs,
    saved_bytes,
)

from benchmarks.measure import peak_bytes
from vision_ops import _native, explain, fused_shift_split_attention, reference
from vision_ops.reference.shift_split_attention import spatial_shift


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Unlike the others', this op's CUDA kernels are not compiled beforehand."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    return request.param


def make(shape, *, hidden=None, dtype=torch.float32, parameter_dtype=None, device="cpu", layout="contiguous"):
    """shape (B, H, W, C). The pooled vector is a sum: mlp1 is small, or the softmax would choose one branch."""
    b, h, w, c = shape
    hidden = hidden or c
    x = laid_out(torch.randn(b, h, w, 3 * c, dtype=dtype, device=device), layout)
    mlp1 = torch.randn(hidden, c, dtype=parameter_dtype or dtype, device=device) / (c * h * w) ** 0.5
    mlp2 = torch.randn(3 * c, hidden, dtype=parameter_dtype or dtype, device=device) / hidden**0.5
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, device):
    check_against_reference(make(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_dtypes(dtype, device):
    check_against_reference(make((2, 9, 14, 40), dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "cropped", "expanded"])
def test_layouts(dtype, layout, grad_layout, device):
    check_against_reference(make((2, 6, 11, 18), dtype=dtype, layout=layout, device=device), grad_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_is_contiguous(layout, device):
    case = make((2, 5, 6, 12), layout=layout, device=device)
    assert case.run(case.tensors, "fused").is_contiguous()


@pytest.mark.parametrize("hidden", [1, 6, 24, 50])
def test_any_hidden_width(hidden, device):
    check_against_reference(make((2, 6, 5, 24), hidden=hidden, device=device))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_parameters_beside_half_input(dtype, device):
    check_against_reference(make((2, 9, 9, 24), dtype=dtype, parameter_dtype=torch.float32, device=device))


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_moves_are_exact(branch, device):
    """Of weights that choose one branch, the output is that branch, moved."""
    c, h, w = 18, 4, 5
    x = torch.randn(2, h, w, 3 * c, device=device)
    pooled = [spatial_shift(x[..., :c], (1, 2)), spatial_shift(x[..., c : 2 * c], (2, 1)), x[..., 2 * c :]]
    total = sum(pooled).sum(dim=(1, 2))
    mlp1 = torch.linalg.pinv(total.double()).float() * 100  # its product with total is 100
    mlp2 = torch.zeros(3, c, 2, device=device)
    mlp2[branch] = 10
    y = fused_shift_split_attention(x, mlp1.T.contiguous(), mlp2.flatten(0, 1), backend="fused")
    assert torch.equal(y, pooled[branch])


def test_bad_values_stay_where_they_go(device):
    """An infinity makes its image's weights NaN, but no other image's."""
    x, mlp1, mlp2 = make((3, 4, 4, 8), device=device).tensors
    x[1, 2, 2, 3] = float("inf")
    y = fused_shift_split_attention(x, mlp1, mlp2, backend="fused")
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().all()


def test_weights_with_gaps(device):
    case = make((2, 6, 5, 24), hidden=7, device=device)
    x, *mlps = case.tensors
    check_against_reference(Case(case.run, [x, *(torch.stack([w.t(), w.t()], -1)[..., 0].t() for w in mlps)]))


def test_autocast(device):
    case = make((2, 9, 9, 16), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        fused, _ = outputs(case, "fused")
    assert [t.dtype for t in fused] == [torch.bfloat16, *[torch.float32] * 3]
    x, *parameters = case.tensors
    torch.testing.assert_close(fused[0], case.run([x.bfloat16(), *parameters], "fused"))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 3, 10), (1, 3, 1, 10), (1, 2, 2, 8)], ids=str)
def test_gradcheck(shape, device):
    check_gradients(make(shape, hidden=3, device=device), second=shape[3] == 5)


def test_only_the_gradients_that_are_asked_for(device):
    case = make((2, 7, 6, 20), device=device)
    everything, grad = outputs(case, "fused")
    for i in range(3):
        tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
        (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
        assert torch.equal(alone, everything[1 + i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype, device):
    case = make((3, 31, 33, 72), dtype=dtype, device=device)
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


def test_compiles(device):
    check_compiles([make((2, 14, 14, 16), device=device), make((2, 9, 12, 16), device=device)])


def test_exports_and_compiles_to_what_eager_gives(device):
    """The article's in-place slices give three different results."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return fused_shift_split_attention(*tensors)

    tensors = make((1, 6, 5, 12), device=device).tensors
    eager, exact = Module()(*tensors), reference.shift_split_attention(*(t.double() for t in tensors)).float()
    torch.testing.assert_close(eager, exact)
    assert torch.equal(torch.export.export(Module(), tuple(tensors)).module()(*tensors), eager)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(*tensors), eager)


def test_opcheck(device):
    x, mlp1, mlp2 = make((2, 4, 5, 8), hidden=3, device=device).tensors
    forward = torch.ops.vision_ops.shift_split_attention.default
    for given in (x, laid_out(x, "channels_last")):
        torch.library.opcheck(forward, (given, mlp1, mlp2))
        torch.library.opcheck(forward, (given.clone().requires_grad_(), mlp1, mlp2))
        y, *saved = forward(given, mlp1, mlp2)
        arguments = torch.randn_like(y), given, mlp1, mlp2, saved, [True, False, True]
        torch.library.opcheck(torch.ops.vision_ops.shift_split_attention_backward.default, arguments)


def test_functorch_takes_the_reference():
    x, mlp1, mlp2 = make((2, 4, 3, 6)).tensors
    both = fused_shift_split_attention, reference.shift_split_attention
    torch.testing.assert_close(*(torch.func.vmap(h, (0, None, None))(x[:, None], mlp1, mlp2) for h in both))
    torch.testing.assert_close(*(torch.func.jvp(lambda t, h=h: h(t, mlp1, mlp2), (x,), (x.flip(1),)) for h in both))


def test_backward_keeps_the_arguments_and_a_few_numbers_per_image(device):
    case = make((2, 16, 16, 32), hidden=8, device=device)
    assert saved_bytes(case, "fused") == sum(t.nbytes for t in case.tensors) + 4 * 2 * (32 + 8 + 3 * 32)


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
    "integers": (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64", (X.long(), W1, W2)),
    "wide weight": (TypeError, "split_mlp2_weight must have the dtype of x, torch.float32", (X, W1, W2.double())),
    "devices": (ValueError, "split_mlp1_weight must be on the device of x, cpu, got meta", (X, W1.to("meta"), W2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_shift_split_attention(*arguments)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_missing", "they were never compiled")
    torch.testing.assert_close(fused_shift_split_attention(X, W1, W2), reference.shift_split_attention(X, W1, W2))
    with pytest.raises(ValueError, match="fused_shift_split_attention cannot run: they were never compiled"):
        fused_shift_split_attention(X, W1, W2, backend="fused")
