import pytest
import torch
from harness import (
    HALF,
    HEADS_LAYOUTS,
    Case,
    check_against_reference,
    float64_is_left_out,
    heads_laid_out,
    outputs,
    relative_error,
)

from vision_ops import fused_cross_covariance, reference

not_on_gpus = float64_is_left_out


def make(shape=(2, 4, 12, 50), layout="channel_major", dtype=torch.float32, scale=1.0):
    b, heads, d, n = shape

    def run(t, backend):
        return fused_cross_covariance(*t, backend=backend)

    q, k, v = (heads_laid_out((b, heads, n, d), layout, dtype).mT for _ in range(3))
    if scale != 1:
        q, k, v = (t * scale for t in (q, k, v))
    return Case(run, [q, k, v, torch.rand(shape[1], 1, 1, dtype=dtype) * 4 + 0.5])


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 12, 100),
        (1, 1, 16, 33),
        (2, 8, 20, 256),
        (1, 4, 25, 49),
        (2, 3, 38, 64),
        (1, 4, 48, 31),
        (1, 2, 73, 80),
        (1, 2, 96, 130),
        (1, 16, 4, 7),
        (1, 2, 1, 40),
        (1, 2, 30, 5),
        (1, 2, 12, 1500),
        (0, 2, 12, 9),
    ],
    ids=str,
)
def test_matches_reference(shape):
    check_against_reference(make(shape))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["channel_major", "token_major"])
def test_dtypes(dtype, layout):
    check_against_reference(make(layout=layout, dtype=dtype))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("d", [1, 12, 20, 38])
def test_what_lies_between_tokens_is_left_out(d):
    """Kernels read whole vectors of channels."""
    case = make((2, 3, d, 70))
    everything, grad = outputs(case, "fused")
    for i, t in enumerate(case.tensors[:3]):
        wide = torch.full((2, 3, 70, d + 7), torch.nan, device=t.device)
        case.tensors[i] = wide[..., :d].transpose(2, 3).copy_(t)
    found, _ = outputs(case, "fused", grad)
    torch.testing.assert_close(found, everything)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", HEADS_LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_layouts(layout, grad_layout):
    check_against_reference(make(layout=layout), grad_layout)


@pytest.mark.usefixtures("each_device")
def test_views_of_one_tensor():
    """q, k and v as modules have them, without copies; their gradients meet in that tensor."""
    qkv, temperature = torch.randn(2, 30, 3 * 48), torch.ones(4, 1, 1)

    def run(t, backend):
        return fused_cross_covariance(*reference_views(t[0]), t[1], backend=backend)

    def reference_views(t):
        return t.view(2, 30, 3, 4, 12).permute(2, 0, 3, 4, 1).unbind(0)

    check_against_reference(Case(run, [qkv, temperature]))
    y = run([qkv, temperature], "fused")
    assert y.permute(0, 3, 1, 2).is_contiguous()  # merging the heads is a view


@pytest.mark.usefixtures("each_device")
def test_one_token():
    """Cosines are 1 or -1 and gradients of q and k vanish, but for rounding."""
    case = make((2, 2, 12, 1))
    fused, grad = outputs(case, "fused")
    exact, _ = outputs(case.to(torch.float64), "reference", grad.double())
    for i in (0, 3, 4):
        assert relative_error(fused[i], exact[i]) < 1e-5
    smallest = min(t.abs().min() for t in case.tensors[:2])
    assert max(fused[1].abs().max(), fused[2].abs().max()) * smallest < 1e-4


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_rows_of_zeros(dtype):
    """Their cosines are 0. Gradients of such rows are divided by 1e-12, which float16 cannot hold, eager or fused."""
    case = make((1, 2, 12, 20), dtype=dtype)
    q, k, v, _ = case.tensors
    q[:, 0, 3] = 0
    k[:, 1, 5] = 0
    v[:, 1] = 0
    fused, grad = outputs(case, "fused")
    eager, _ = outputs(case, "reference", grad)
    for a, b in zip(fused, eager, strict=True):
        assert not a.isnan().any() and torch.equal(a.isinf(), b.isinf())
    if dtype not in HALF:
        check_against_reference(case)
    for t in (q, k, v):
        t.zero_()
    fused, _ = outputs(case, "fused")
    assert all(t.isfinite().all() for t in fused) and not fused[0].any()


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("scale", [1e4, 1e-6, 1e-11, 1e-14])
def test_scale_of_the_inputs(scale):
    """At 1e-14 norms are below their bound, and gradients do not go through them."""
    check_against_reference(make((1, 2, 12, 40), scale=scale))


@pytest.mark.usefixtures("each_device")
def test_nan_stays_nan():
    case = make((1, 2, 12, 20))
    case.tensors[0][0, 1, 4, 7] = float("nan")
    y = case.run(case.tensors, "fused")
    assert y[0, 1, 4].isnan().all() and y[0, 0].isfinite().all() and y[0, 1, 3].isfinite().all()


@pytest.mark.usefixtures("each_device")
def test_flat_and_float32_temperature():
    case = make(dtype=torch.bfloat16)
    case.tensors[3] = case.tensors[3].float().flatten() * 1.01
    check_against_reference(case)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.randn(2, 4, 12)}, ValueError, r"q must have the dimensions \(B, heads, d, N\)"),
        ({0: torch.ones(2, 4, 12, 50, dtype=torch.long)}, TypeError, "q must be float32"),
        ({1: torch.randn(2, 4, 12, 49)}, ValueError, r"k must have shape \(2, 4, 12, 50\) \(as q\)"),
        ({2: torch.randn(2, 4, 11, 50)}, ValueError, r"v must have shape \(2, 4, 12, 50\) \(as q\)"),
        ({2: torch.randn(2, 4, 12, 50).double()}, TypeError, "v must have the dtype of q"),
        ({3: torch.ones(3)}, ValueError, r"temperature must have shape \(4,\)"),
        ({3: torch.ones(4, 1)}, ValueError, r"temperature must have shape \(4, 1, 1\)"),
    ],
    ids=lambda value: "",
)
def test_refusals(change, error, message):
    tensors = make().tensors
    for i, t in change.items():
        tensors[i] = t
    with pytest.raises(error, match=message):
        fused_cross_covariance(*tensors)


def test_half_keys_beside_float32_queries_are_refused():
    q, k, v, temperature = make().tensors
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        fused_cross_covariance(q, k.bfloat16(), v, temperature)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    with pytest.raises(TypeError, match=r"k must have the dtype of q, torch.bfloat16, got torch.float32"):
        fused_cross_covariance(q, k.float(), v, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("d", [12, 24, 25, 48, 73, 96])
@pytest.mark.parametrize("n", [1, 2, 7, 196, 1023, 16384])
def test_sweep(heads, d, n):
    case = make((1, heads, d, n), "token_major" if (d + n) % 2 else "channel_major")
    if n == 1:
        fused, eager = (case.run(case.tensors, backend) for backend in ("fused", "reference"))
        torch.testing.assert_close(fused, eager)
    else:
        check_against_reference(case, slack=2)


def test_matches_the_definition():
    q, k, v, temperature = make((1, 2, 3, 5), dtype=torch.float64).tensors
    normalized = [t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k)]
    weights = torch.einsum("bhin,bhjn->bhij", *normalized).mul(temperature).softmax(-1)
    torch.testing.assert_close(fused_cross_covariance(q, k, v, temperature), weights @ v)
    torch.testing.assert_close(reference.cross_covariance(q, k, v, temperature), weights @ v)
