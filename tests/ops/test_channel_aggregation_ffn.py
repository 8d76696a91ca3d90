import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    check_opcheck,
    laid_out,
    outputs,
    saved_bytes,
)

from vision_ops import explain, fused_channel_aggregation_ffn, nn, reference
from vision_ops.ops import _channel_aggregation as chunked
from vision_ops.ops import _channel_aggregation_passes as passes
from vision_ops.ops._pointwise import products


def make(shape, hidden, *, kernel=3, bias=True, dtype=torch.float32, parameter_dtype=None, layout="contiguous"):
    c = shape[1]
    wanted = parameter_dtype or dtype
    x = laid_out(torch.randn(shape, dtype=dtype), layout)

    def parameter(*size, of=1):
        return (torch.randn(size) / of**0.5).to(wanted)

    parameters = [
        parameter(hidden, c, 1, 1, of=c),
        parameter(hidden),
        parameter(hidden, 1, kernel, kernel, of=kernel**2),
        parameter(hidden),
        parameter(c, hidden, 1, 1, of=hidden),
        parameter(c),
        parameter(1, hidden, 1, 1, of=hidden),
        parameter(1),
    ]
    if not bias:
        parameters[1::2] = [None] * 4
    sigma = parameter(1, hidden, 1, 1)
    return Case(lambda t, backend: fused_channel_aggregation_ffn(*t, backend=backend), [x, *parameters, sigma])


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("hidden", [64, 37])  # in place, and packed into panels
def test_matches_reference(hidden, layout, dtype):
    case = make((3, 13, 9, 11), hidden, dtype=dtype, layout=layout)
    check_against_reference(case, layout, slack=2)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((2, 64, 14, 14), 512),
        ((1, 72, 7, 7), 576),  # two bundles of blocks in place
        ((1, 16, 15, 5), 150),  # two in panels
        ((1, 7, 1, 1), 16),
        ((5, 20, 5, 1), 48),
        ((2, 3, 1, 33), 9),
        ((0, 8, 5, 5), 32),
    ],
    ids=str,
)
def test_sizes(shape, hidden):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(shape, hidden, layout=layout), slack=2)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_kernels(kernel):
    check_against_reference(make((2, 8, 9, 7), 32, kernel=kernel), slack=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("images", "rows", "hidden", "kernel"),
    [(1, 6, 32, 3), (2, 6, 32, 3), (1, 2, 32, 3), (1, 3, 37, 5)],
    ids=["images", "two_images", "rows", "rows_packed"],
)
def test_chunks_of_the_batch(images, rows, hidden, kernel, dtype, monkeypatch):
    """Of 5 images of 6 rows: the last chunk of two is not full. In rows, those around a chunk take part in it."""
    case = make((5, 8, 6, 5), hidden, kernel=kernel, dtype=dtype)
    whole, grad = outputs(case, "fused")
    monkeypatch.setattr(passes, "_CHUNK_BYTES", images * rows * (hidden + 64 // dtype.itemsize) * 5 * dtype.itemsize)
    monkeypatch.setattr(chunked.Chunks, "least_rows", 1)
    chunks = chunked.Chunks(chunked.Arguments(*case.tensors, True), passes.cpu(case.tensors[0]))
    assert (chunks.images, chunks.rows) == (images, rows)
    check_against_reference(case, slack=2)
    with torch.no_grad():
        torch.testing.assert_close(case.run(case.tensors, "fused"), whole[0], rtol=1e-2, atol=1e-2)
    for a, b in zip(outputs(case, "fused", grad)[0], whole, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4 if dtype == torch.float32 else 5e-2, atol=5e-4 if dtype == torch.float32 else 0.1
        )
    # Called as an op, it may have kept nothing: fc1 is then computed again.
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    again, kept = (
        torch.autograd.grad(torch.ops.vision_ops.channel_aggregation_ffn(*leaves, keep)[0].sum(), leaves)
        for keep in (False, True)
    )
    for a, b in zip(again, kept, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("each_device")
def test_a_large_score_is_not_rounded():
    """d is one number for all channels: rounded to a half type, here by up to 1, its error would add up in all."""
    case = make((1, 32, 5, 5), 64, dtype=torch.bfloat16)
    case.tensors[-1] = torch.full_like(case.tensors[-1], -1)  # y = fc2(d), and fc2 is a mean
    case.tensors[5] = torch.full_like(case.tensors[5], 1 / 64)
    case.tensors[6] = torch.full_like(case.tensors[6], -302)
    case.tensors[8] = torch.full_like(case.tensors[8], 302)
    exact = case.to(torch.float64)
    y, e = case.run(case.tensors, "fused"), exact.run(exact.tensors, "reference")
    assert (y - e).abs().max() <= 0.1


def test_reference_is_the_definition():
    x, w1, b1, wd, bd, w2, b2, wp, bp, sigma = make((2, 6, 5, 7), 20).tensors
    h = F.gelu(F.conv2d(F.conv2d(x, w1, b1), wd, bd, padding=1, groups=20))
    h = h + sigma * (h - F.gelu(F.conv2d(h, wp, bp)))
    expected = F.conv2d(h, w2, b2)
    for flat in (False, True):
        given = (w.flatten(1) if flat else w for w in (w1, w2, wp))
        v1, v2, vp = given
        y = reference.channel_aggregation_ffn(x, v1, b1, wd, bd, v2, b2, vp, bp, sigma)
        torch.testing.assert_close(y, expected)
        y = fused_channel_aggregation_ffn(x, v1, b1, wd, bd, v2, b2, vp, bp, sigma.flatten(), backend="fused")
        torch.testing.assert_close(y, expected)


def test_gelu_in_its_tails():
    """Of large negative values nothing is left, not even rounding errors; large positive ones stay."""
    case = make((1, 4, 3, 3), 16, dtype=torch.float32)
    case.tensors[2] = torch.linspace(-5000, 5000, 16)
    check_against_reference(case, slack=2)
    x, w1, b1, wd, _, w2, _, wp, _, sigma = case.tensors
    b1, wd = torch.full((16,), -5000.0), wd.abs()
    y = fused_channel_aggregation_ffn(x, w1, b1, wd, None, w2, None, wp, None, sigma, backend="fused")
    assert not y.any()


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((1, 3, 3, 2), 4))
    check_gradients(make((1, 3, 2, 3), 16, bias=False, layout="channels_last"), second=False)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("hidden", [64, 70])
def test_bitwise_repeatable(hidden):
    for dtype in (torch.float32, torch.bfloat16):
        case = make((3, 24, 33, 31), hidden, dtype=dtype, layout="channels_last")
        first, grad = outputs(case, "fused")
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(outputs(case, "fused", grad)[0], first, strict=True))


@pytest.mark.usefixtures("each_device")
def test_opcheck():
    tensors = make((2, 8, 5, 6), 16).tensors
    check_opcheck("channel_aggregation_ffn", (*tensors, True), tensors=10)
    check_opcheck("channel_aggregation_ffn", (*tensors[:8], None, tensors[9], False), tensors=10)


def test_keeps_one_hidden_tensor_for_backward():
    """Eager keeps 5: the inputs of the depthwise convolution, of GELU, of the decomposition, of sigma and of fc2."""
    case = make((2, 32, 14, 14), 256)
    x, *parameters = (t.nbytes for t in case.tensors)
    hidden = 8 * x
    gaps = 16 * 4 * (2 * 14 * 14 - 1)  # a cache line between pixels
    assert saved_bytes(case, "fused") == x + sum(parameters) + hidden + gaps + x // 32
    assert saved_bytes(case, "reference") > 5 * hidden
    with torch.no_grad():
        *_, kept = torch.ops.vision_ops.channel_aggregation_ffn(*case.tensors, False)
    assert kept.numel() == 0


@pytest.mark.parametrize("training", [False, True])
def test_module_drops_as_it_did(training):
    """Active dropout runs the composition, whose numbers are those of the reference."""
    module = nn.ChannelAggregationFFN(8, 32, ffn_drop=0.4).train(training)
    torch.nn.init.normal_(module.sigma.scale)
    x, found = torch.randn(2, 8, 6, 6), []
    for fused in (True, False):
        module.fused = fused
        torch.manual_seed(1)
        found.append(module(x))
    torch.testing.assert_close(*found)
    other = module(x)
    assert torch.equal(other, found[1]) != training


@pytest.mark.parametrize("act_type", ["GELU", "SiLU", "ReLU"])
def test_module_activations(act_type):
    module, x = nn.ChannelAggregationFFN(8, 32, act_type=act_type).double(), torch.randn(2, 8, 6, 6).double()
    torch.nn.init.normal_(module.sigma.scale)
    y = module(x)
    act = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}[act_type]
    h = act(module.dwconv(module.fc1(x)))
    expected = module.fc2(h + module.sigma.scale * (h - act(module.decompose(h))))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


GOOD = make((2, 8, 7, 7), 16).tensors


def replaced(i, t):
    return [*GOOD[:i], t, *GOOD[i + 1 :]]


REFUSED = {
    "rank": (ValueError, "x must have the dimensions", replaced(0, GOOD[0][0])),
    "fc1": (ValueError, r"fc1_weight must have shape \(16, 8, 1, 1\) \(h, C, 1, 1\)", replaced(1, GOOD[1][:, :7])),
    "fc1 bias": (ValueError, r"fc1_bias must have shape \(16,\) \(h\)", replaced(2, GOOD[2][:9])),
    "even kernel": (ValueError, "dw_weight must have an odd kernel size", replaced(3, torch.randn(16, 1, 2, 2))),
    "dw": (ValueError, r"dw_weight must have shape \(16, 1, 3, 3\)", replaced(3, torch.randn(15, 1, 3, 3))),
    "fc2": (ValueError, r"fc2_weight must have shape \(8, 16, 1, 1\) \(C, h, 1, 1\)", replaced(5, GOOD[1])),
    "decompose": (ValueError, r"decompose_weight must have shape \(1, 16\)", replaced(7, torch.randn(2, 16))),
    "decompose bias": (ValueError, r"decompose_bias must have shape \(1,\)", replaced(8, torch.randn(16))),
    "sigma": (
        ValueError,
        r"sigma must have shape \(1, 16, 1, 1\) \(1, h, 1, 1\)",
        replaced(9, torch.randn(1, 8, 1, 1)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_channel_aggregation_ffn(*arguments)


def test_explains():
    found = explain("channel_aggregation_ffn", GOOD[0], backend="fused").parts
    assert "C++" in found["depthwise convolution, GELU and aggregation"]
    assert found["1x1 convolutions"] == products(GOOD[0])
