import pytest
import torch
from harness import laid_out
from torch.nn import functional

from vision_ops import _native
from vision_ops.ops import _pointwise

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))

# Channels and pixels around the tiles of all instruction sets, and depths of one, two and three steps.
SIZES = [
    ((1, 1, 1, 1), 1),
    ((2, 5, 3, 4), 7),
    ((1, 64, 7, 9), 96),
    ((3, 385, 5, 5), 33),
    ((2, 800, 9, 5), 20),
    ((2, 17, 16, 13), 70),
    ((2, 3, 1, 40), 129),
    ((4, 32, 31, 1), 12),
    ((2, 210, 33, 25), 41),  # rows that share panels
]
LAYOUTS = ["contiguous", "channels_last", "slice"]


def exact(x, weight, bias):
    y = torch.einsum("oc,nchw->nohw", weight.double(), x.double())
    return y if bias is None else y + bias.double()[:, None, None]


def close(y, expected, x, weight):
    """To the rounding of sums as long as the depth."""
    scale = torch.einsum("oc,nchw->nohw", weight.double().abs(), x.double().abs()).max() + 1
    assert (y.double() - expected).abs().max() <= 1e-6 * scale


def place(t, layout):
    """Its values in a layout; a slice is one of the channels of a channels_last tensor, expanded is its first pixel."""
    if layout != "slice":
        return laid_out(laid_out(t, "channels_last") if layout == "expanded" else t, layout)
    n, c, h, w = t.shape
    return laid_out(torch.full((n, c + 6, h, w), 3.0), "channels_last")[:, 3 : c + 3].copy_(t)


@pytest.mark.parametrize("size, outputs", SIZES, ids=str)
@pytest.mark.parametrize("x_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("y_layout", LAYOUTS)
def test_linear(size, outputs, x_layout, y_layout):
    n, c, h, w = size
    x, y, other = (torch.randn(n, k, h, w) for k in (c, outputs, outputs))
    x, y, other = place(x, x_layout), place(y.fill_(float("nan")), y_layout), place(other, y_layout)
    for weight, bias in (torch.randn(outputs, c), torch.randn(outputs)), (torch.randn(c, outputs).t(), None):
        expected = exact(x, weight, bias)
        _pointwise.linear(x, weight, bias, y)
        close(y, expected, x, weight)
        _pointwise.linear_to(x, weight, bias, y, plus=other)
        close(y, expected + other, x, weight)
        own = other.clone()
        _pointwise.linear(x, weight, bias, own, plus=own)
        close(own, expected + other, x, weight)
        if _pointwise.linear_times(x, weight, bias, other, y):
            close(y / other, expected, x, weight)
        else:
            assert _native.cpu_kernels().isa == "baseline"


def test_writes_nothing_else():
    whole = laid_out(torch.full((2, 40, 5, 7), 7.0), "channels_last")
    x = laid_out(torch.randn(2, 9, 5, 7), "channels_last")
    _pointwise.linear(x, torch.randn(21, 9), None, whole[:, 8:29])
    assert (whole[:, :8] == 7).all() and (whole[:, 29:] == 7).all() and (whole[:, 8:29] != 7).all()


def test_planes_write_nothing_else():
    whole = torch.full((2, 23, 6, 7), 7.0)
    _pointwise.linear(torch.randn(2, 9, 6, 7), torch.randn(21, 9), None, whole[:, 1:22])
    assert (whole[:, 0] == 7).all() and (whole[:, 22] == 7).all() and (whole[:, 1:22] != 7).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", [(40, 41), (9, 10)], ids=str)
def test_sums_do_not_depend_on_the_threads(layout, pixels):
    x, y = (laid_out(torch.randn(2, c, *pixels), layout) for c in (400, 70))
    weight, bias, threads = torch.randn(70, 400), torch.randn(70), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _pointwise.linear(x, weight, bias, y)
            results.append(y.clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_pytorch(dtype):
    x, y = (laid_out(torch.randn(2, c, 4, 5, dtype=dtype), "channels_last") for c in (6, 8))
    weight, other = torch.randn(8, 6), torch.randn_like(y)
    assert not _pointwise.linear_times(x, weight, None, other, y)
    _pointwise.linear(x, weight, None, y, plus=other)
    expected = exact(x, weight.to(dtype), None) + other
    assert (y - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def sized(n, c, size, layout, *, images=None):
    """Random values; `images` are expanded to n."""
    return place(torch.randn(images or n, c, *size), layout).expand(n, c, *size)


def check_weight_gradient(grad, x, out):
    expected = torch.einsum("nohw,nihw->oi", grad.double(), x.double())
    scale = torch.einsum("nohw,nihw->oi", grad.double().abs(), x.double().abs()).max() if x.numel() else 1
    _pointwise.weight_gradient(grad, x, out)
    assert (out.flatten(1).double() - expected).abs().max() <= 1e-6 * scale + 1e-30


# Tiles, panels and pixels around those of all instruction sets, of one and several parts.
@pytest.mark.parametrize(
    "outputs, inputs",
    [(1, 1), (4, 16), (5, 17), (6, 15), (7, 33), (14, 32), (64, 65), (23, 100), (3, 130)],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 9), (3, 12, 16), (2, 193, 1), (1, 70, 70), (2, 57, 61)], ids=str)
def test_weight_gradient(outputs, inputs, size):
    n, *pixels = size
    grad, x = sized(n, outputs, pixels, "channels_last"), sized(n, inputs, pixels, "channels_last")
    check_weight_gradient(grad, x, torch.full((outputs, inputs, 1, 1), float("nan")))


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_weight_gradient_layouts(grad_layout, x_layout):
    grad, x = sized(2, 20, (17, 31), grad_layout), sized(2, 37, (17, 31), x_layout)
    check_weight_gradient(grad, x, torch.full((20, 37), float("nan")))
    check_weight_gradient(grad, x, torch.full((37, 20), float("nan")).t())
    check_weight_gradient(grad[:, :, 3:9], x[:, :, 3:9], torch.full((20, 37), float("nan")))  # images do not follow
    check_weight_gradient(grad[:, :, :, 3:9], x[:, :, :, 3:9], torch.full((20, 37), float("nan")))  # nor do rows


def test_weight_gradient_expanded():
    x, out = sized(3, 20, (9, 11), "channels_last"), torch.empty(8, 20)
    check_weight_gradient(sized(3, 8, (9, 11), "channels_last", images=1), x, out)
    check_weight_gradient(torch.randn(1, 1, 1, 1).expand(3, 8, 9, 11), x, out)


@pytest.mark.parametrize("size", [(0, 5, 5), (2, 0, 5)], ids=str)
def test_weight_gradient_of_nothing(size):
    n, *pixels = size
    out = torch.full((6, 7), float("nan"))
    _pointwise.weight_gradient(sized(n, 6, pixels, "channels_last"), sized(n, 7, pixels, "channels_last"), out)
    assert (out == 0).all()


@pytest.mark.parametrize(
    "size, outputs", [((3, 50, 20), 33), ((4, 4, 5), 1), ((2, 130, 200), 97), ((1, 40, 9), 70), ((2, 5, 6), 7)], ids=str
)
def test_tokens_with_a_matrix_for_each_sample(size, outputs):
    b, n, c = size
    x, y = torch.randn(b, n, c + 3)[:, :, 2:-1], torch.zeros(b, n, outputs + 2)[:, :, :outputs].fill_(torch.nan)
    weights, biases = torch.randn(b, outputs, c), torch.randn(b, outputs)
    expected = torch.baddbmm(biases.double()[:, None], x.double(), weights.double().mT)
    close = {"rtol": 0, "atol": 1e-6 * (c + 1) ** 0.5 * expected.abs().max().item()}
    _pointwise.linear_tokens(x, weights, biases, y)
    torch.testing.assert_close(y.double(), expected, **close)
    _pointwise.linear_tokens(x, weights.mT.contiguous().mT, None, y, plus=y)
    torch.testing.assert_close(y.double(), 2 * expected - biases[:, None], **close)
    dense = torch.full((b, n, outputs), torch.nan)
    _pointwise.linear_tokens(x, weights[0], biases[0], dense)
    torch.testing.assert_close(dense.double(), x.double() @ weights[0].double().T + biases[0], **close)

    expected = dense.double().mT @ x.double()
    close = {"rtol": 0, "atol": 1e-6 * n**0.5 * expected.abs().max().item()}
    _pointwise.weight_gradient_tokens(dense, x, weights)
    torch.testing.assert_close(weights.double(), expected, **close)
    total = torch.full((outputs, c), torch.nan)
    _pointwise.weight_gradient_tokens(dense, x, total)
    torch.testing.assert_close(total.double(), expected.sum(0), **close)


@pytest.mark.parametrize("size", [(1, 900, 70), (3, 400, 33), (2, 20, 7), (1, 1700, 160)], ids=str)
def test_second_moments(size):
    """Of which one half is mirrored: the same numbers as of a copy."""
    b, n, c = size
    x = torch.randn(b, n, c)
    moments, whole = (torch.full((b, c, c), torch.nan) for _ in range(2))
    _pointwise.weight_gradient_tokens(x, x, moments)
    _pointwise.weight_gradient_tokens(x, x.clone(), whole)
    if _pointwise.multiplies_tokens(x):
        assert torch.equal(moments, whole) and torch.equal(moments, moments.mT)
    torch.testing.assert_close(moments, whole)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_long_sums_round_no_more_than_pytorchs(layout):
    x, weight = sized(1, 768, (20, 20), layout), torch.randn(96, 768)
    y = torch.empty_like(x[:, :96])
    _pointwise.linear(x, weight, None, y)
    expected = exact(x, weight, None)
    eager = functional.conv2d(x, weight[:, :, None, None])
    assert (y - expected).abs().max() <= 2 * (eager - expected).abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_bias_rounds_no_more_than_pytorchs(layout):
    """It is added to complete sums: those that begin with it err by half as much again."""
    x, weight, bias, y = ended((1, 64, 40, 50), 96, layout, layout)
    _pointwise.linear(x, weight, bias, y)
    expected = exact(x, weight, bias)
    eager = functional.conv2d(x, weight[:, :, None, None], bias)
    assert (y - expected).norm() <= 1.3 * (eager - expected).norm()


def test_weight_gradient_writes_nothing_else():
    whole = torch.full((40, 50), 7.0)
    part = whole[3:37, 5:44]
    check_weight_gradient(sized(2, 34, (40, 40), "slice"), sized(2, 39, (40, 40), "slice"), part)
    part.fill_(7)
    assert (whole == 7).all()


@pytest.mark.parametrize("outputs, inputs", [(200, 64), (40, 300), (16, 16)], ids=str)
@pytest.mark.parametrize("size", [(2, 14, 14), (2, 60, 61)], ids=str)
def test_weight_gradients_do_not_depend_on_the_threads(outputs, inputs, size):
    n, *pixels = size
    grad, x = sized(n, outputs, pixels, "channels_last"), sized(n, inputs, pixels, "channels_last")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.empty(outputs, inputs))
            _pointwise.weight_gradient(grad, x, results[-1])
    finally:
        torch.set_num_threads(threads)
    if _native.cpu_kernels().isa != "baseline":
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


ACTIVATIONS = {"gelu": functional.gelu, "silu": functional.silu, "hardswish": functional.hardswish}
# Of one and of several steps of the depth, in tiles that lack rows and columns, of images that are cut.
ENDED = [((1, 1, 1, 1), 1), ((3, 33, 7, 9), 70), ((2, 400, 9, 5), 20), ((4, 32, 31, 1), 129), ((2, 210, 33, 25), 41)]


activated_cases = pytest.mark.parametrize(
    "size, outputs, layout, activation",
    [(*sizes, layout, "gelu") for sizes in ENDED for layout in LAYOUTS]
    + [(*ENDED[2], "slice", activation) for activation in ("silu", "hardswish")],
    ids=str,
)


def ended(size, outputs, *layouts):
    """x, weight, bias, and tensors like their product."""
    n, c, h, w = size
    given = place(torch.randn(n, c, h, w), layouts[0]), torch.randn(outputs, c) / c**0.5, torch.randn(outputs)
    return *given, *(place(torch.randn(n, outputs, h, w), layout) for layout in layouts[1:])


def slope(activation, v):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](v).sum(), v)[0]


def refused():
    return _native.cpu_kernels().isa == "baseline"


@activated_cases
def test_linear_activated(size, outputs, layout, activation):
    x, weight, bias, out, before = ended(size, outputs, "channels_last", layout, layout)
    out.fill_(torch.nan), before.fill_(torch.nan)
    if not _pointwise.linear_activated(x, weight, bias, activation, out, before):
        assert refused()
        return
    expected = exact(x, weight, bias)
    torch.testing.assert_close(before.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), ACTIVATIONS[activation](expected), rtol=2e-6, atol=4e-6)
    alone = torch.full_like(out, torch.nan)
    assert _pointwise.linear_activated(x, weight, bias, activation, alone) and torch.equal(alone, out)
    assert _pointwise.linear_activated(x, weight, None, activation, out)
    torch.testing.assert_close(out.double(), ACTIVATIONS[activation](exact(x, weight, None)), rtol=2e-6, atol=4e-6)


@activated_cases
def test_linear_activation_backward(size, outputs, layout, activation):
    grad, weight, _, out, before, activated = ended(size, outputs, "channels_last", layout, layout, layout)
    out.fill_(torch.nan), activated.fill_(torch.nan)
    if not _pointwise.linear_activation_backward(grad, weight, before, activation, out, activated):
        assert refused()
        return
    expected = exact(grad, weight, None) * slope(activation, before.double())
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(activated.double(), ACTIVATIONS[activation](before.double()), rtol=2e-6, atol=2e-6)
    assert _pointwise.linear_activation_backward(grad, weight, before, activation, before)
    assert torch.equal(before, out)


@pytest.mark.parametrize("size, outputs", ENDED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_scaled(size, outputs, layout):
    x, weight, bias, out, residual = ended(size, outputs, "channels_last", layout, layout)
    for gamma, path_scale, given in [
        (torch.randn(2 * outputs)[::2], torch.randn(len(x)), bias),
        (torch.randn(outputs), None, None),
        (None, torch.randn(2 * len(x), 1)[::2, 0], bias),
        (None, None, bias),
    ]:
        if not _pointwise.linear_scaled(x, weight, given, gamma, path_scale, residual, out.fill_(torch.nan)):
            assert refused()
            return
        factors = [1 if t is None else t.double() for t in (gamma, path_scale)]
        factor = torch.ones(len(x), outputs).double() * factors[0]
        factor = factor if path_scale is None else factor * factors[1][:, None]
        expected = residual + factor[:, :, None, None] * exact(x, weight, given)
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=4e-6)
        own = residual.clone()
        assert _pointwise.linear_scaled(x, weight, given, gamma, path_scale, own, own) and torch.equal(own, out)


def test_small_scales_round_once():
    """What is added to a residual is whole before: sums of a deep product would each round it."""
    x, weight, bias, out, residual = ended((1, 1600, 8, 9), 64, *["channels_last"] * 3)
    gamma = torch.full((64,), 1e-6)
    expected = residual + gamma.double()[:, None, None] * exact(x, weight, bias)
    if _pointwise.linear_scaled(x, weight, bias, gamma, None, residual, out):
        eager = residual + gamma[:, None, None] * functional.conv2d(x, weight[:, :, None, None], bias)
        assert (out - expected).norm() <= 1.1 * (eager - expected).norm()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_endings_write_nothing_else(layout):
    whole = laid_out(torch.full((4, 2, 40, 6, 7), 7.0).flatten(0, 1), layout).unflatten(0, (4, 2))
    x, weight, bias = ended((2, 300, 6, 7), 21, layout)
    out, before, residual, inside = (t[:, 8:29] for t in whole)
    done = [
        _pointwise.linear_activated(x, weight, bias, "gelu", out, before),
        _pointwise.linear_activation_backward(x, weight, before, "silu", inside, out),
        _pointwise.linear_scaled(x, weight, bias, bias, None, residual, residual),
    ]
    assert (whole[:, :, :8] == 7).all() and (whole[:, :, 29:] == 7).all() and done == [not refused()] * 3


def test_endings_want_one_layout_and_dtype():
    x, weight, bias, out, other = ended((2, 5, 3, 4), 7, "contiguous", "contiguous", "channels_last")
    assert not _pointwise.linear_activated(x, weight, bias, "gelu", out, other)
    assert not _pointwise.linear_activation_backward(x, weight, other, "gelu", out)
    assert not _pointwise.linear_scaled(x, weight, bias, None, None, other, out)
    assert not _pointwise.linear_scaled(x, weight, bias, bias.double(), None, out, out)
    assert not _pointwise.linear_activated(x.double(), weight.double(), bias.double(), "gelu", out.double())


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("outputs, inputs", [(20, 37), (97, 10), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 5), (2, 57, 61)], ids=str)
def test_bias_gradient(grad_layout, outputs, inputs, size):
    n, *pixels = size
    grad, x = sized(n, outputs, pixels, grad_layout), sized(n, inputs, pixels, "channels_last")
    bias, (weight, alone) = torch.full((outputs,), torch.nan), torch.full((2, outputs, inputs), torch.nan)
    _pointwise.weight_gradient(grad, x, weight, bias)
    torch.testing.assert_close(
        bias.double(), grad.double().sum((0, 2, 3)), rtol=0, atol=1e-6 * n * pixels[0] * pixels[1]
    )
    _pointwise.weight_gradient(grad, x, alone)
    assert refused() or torch.equal(alone, weight)
    again, threads = torch.full((outputs,), torch.nan), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        _pointwise.weight_gradient(grad, x, None, again)
    finally:
        torch.set_num_threads(threads)
    assert refused() or torch.equal(bias, again)


def test_bias_gradient_of_nothing():
    grad, bias = sized(0, 6, (5, 5), "channels_last"), torch.full((6,), torch.nan)
    _pointwise.weight_gradient(grad, sized(0, 7, (5, 5), "channels_last"), torch.empty(6, 7), bias)
    assert (bias == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bias_gradient_of_other_dtypes(dtype):
    grad, x = (laid_out(torch.randn(2, c, 9, 7, dtype=dtype), "channels_last") for c in (6, 5))
    weight, bias = torch.empty(6, 5, dtype=dtype), torch.empty(6)
    for t in grad, grad[:, :, :, 1:4]:
        _pointwise.weight_gradient(t, x[..., : t.shape[3]], weight, bias)
        torch.testing.assert_close(bias.double(), t.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_explains():
    x = torch.randn(1, 3, 4, 5)
    assert _pointwise.products(x.double()) == "PyTorch's GEMMs"
    ours = _native.cpu_kernels().isa != "baseline"
    assert _pointwise.products(x) == (_native.kernel_name("cpu") if ours else "PyTorch's GEMMs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, None], ids=str)
def test_half_types_are_summed_in_float32_on_gpus(dtype, wanted, monkeypatch):
    """PyTorch cuts long sums into parts, and rounds these to the dtype that it is asked for."""
    asked, mm = [], torch.mm

    def record(*args, out_dtype=None, **options):
        asked.append(out_dtype)
        return mm(*args, out_dtype=out_dtype, **options)

    monkeypatch.setattr(torch, "mm", record)
    x, grad = (
        torch.empty(4, c, 9, 8, dtype=dtype, device="meta").to(memory_format=torch.channels_last) for c in (5, 6)
    )
    out = torch.empty(6, 5, dtype=wanted or dtype, device="meta")
    _pointwise.weight_gradient(grad, x, out)
    _pointwise.weight_gradient(grad[:, :, 1:], x[:, :, 1:], out)  # image by image
    _pointwise.weight_gradient_tokens(grad.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2), out)
    assert asked == [torch.float32] * 6


def test_pooled_images_are_one_product(monkeypatch):
    monkeypatch.setattr(torch, "baddbmm", None)  # one for each image
    pooled, weight, bias = torch.randn(5, 8, 1, 1).double(), torch.randn(3, 8).double(), torch.randn(3).double()
    out = torch.empty(5, 3, 1, 1).double()
    _pointwise.linear(pooled, weight, bias, out)
    torch.testing.assert_close(out[:, :, 0, 0], pooled[:, :, 0, 0] @ weight.t() + bias)
