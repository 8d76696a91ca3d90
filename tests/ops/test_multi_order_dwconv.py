import pytest
import torch
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_gradients,
    laid_out,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vision_ops import fused_multi_order_dwconv, reference
from vision_ops.reference.multi_order_dwconv import split_channels


def make(
    shape,
    *,
    split=(1, 3, 4),
    kernels=(5, 5, 7),
    bias=True,
    dtype=torch.float32,
    device="cpu",
    layout="contiguous",
    **options,
):
    channels = shape[1]
    _, c1, c2 = split_channels(channels, split)
    x = laid_out(torch.randn(shape, dtype=dtype, device=device), layout)
    widths = tuple(zip((channels, c1, c2), kernels, strict=True))
    weights = [torch.randn(c, 1, k, k, dtype=dtype, device=device) / k for c, k in widths]
    biases = [torch.randn(c, dtype=dtype, device=device) if bias else None for c, _ in widths]

    def run(t, backend):
        return fused_multi_order_dwconv(t[0], t[1:4], t[4:], split=split, **options, backend=backend)

    return Case(run, [x, *weights, *biases])


CASES = [
    ((2, 16, 9, 7), {}),
    ((1, 64, 14, 14), {"layout": "channels_last"}),
    ((2, 24, 33, 15), {"layout": "channels_last", "bias": False}),
    ((1, 40, 7, 7), {"dilations": (1, 2, 1)}),
    ((1, 80, 28, 28), {"dilations": (2, 1, 3)}),
    ((1, 18, 12, 10), {"split": (0, 1, 2)}),
    ((1, 90, 6, 5), {"split": (1, 2, 7)}),
    ((1, 16, 5, 5), {"kernels": (3, 9, 11)}),
    ((1, 16, 1, 1), {}),
    ((1, 8, 1, 33), {"layout": "channels_last"}),
    ((0, 16, 7, 7), {}),
    ((1, 8, 96, 80), {}),  # several chunks of rows
]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_matches_reference(shape, options, any_device):
    check_against_reference(make(shape, device=any_device, **options))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout, any_device):
    check_against_reference(make((2, 24, 15, 14), dtype=dtype, layout=layout, device=any_device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channel_slice", "expanded"])
def test_layouts(layout, grad_layout, any_device):
    check_against_reference(make((2, 24, 9, 11), layout=layout, device=any_device), grad_layout)


def test_float32_parameters_beside_half_input(any_device):
    case = make((2, 16, 14, 14), dtype=torch.bfloat16, device=any_device)
    case.tensors[1:] = [t.float() for t in case.tensors[1:]]
    check_against_reference(case)


def test_intermediate_is_zero_outside_the_image():
    """With a bias, dw0 evaluated on the padding is not zero: the fastest way to be wrong (models.md 6)."""
    case = make((1, 8, 4, 4))
    x, w0, w1, w2, b0, b1, b2 = case.tensors
    b0.fill_(100.0)
    check_against_reference(case)


def test_gradcheck():
    check_gradients(make((1, 8, 5, 4), kernels=(3, 3, 5)))
    check_gradients(make((2, 8, 2, 3), bias=False), second=False)


def test_bitwise_repeatable(any_device):
    check_bitwise_repeatable(make((4, 64, 28, 28), layout="channels_last", device=any_device))


X = torch.randn(2, 16, 7, 7)
GOOD = make((2, 16, 7, 7)).tensors
WEIGHTS, BIASES = GOOD[1:4], GOOD[4:]
REFUSED = {
    "rank": (ValueError, "x must have the dimensions", (X[0], WEIGHTS), {}),
    "no channels": (ValueError, "x may be empty in N only", (X[:, :0], [w[:0] for w in WEIGHTS]), {}),
    "channels": (
        ValueError,
        r"split \(1, 3, 4\) adds up to 8, which must divide the 12 channels",
        (X[:, :12], WEIGHTS),
        {},
    ),
    "split": (
        ValueError,
        r"split \(1, 1, 3\) adds up to 5, which must divide the 16 channels",
        (X, WEIGHTS),
        {"split": (1, 1, 3)},
    ),
    "split length": (ValueError, r"split must be a sequence of 3, got 2", (X, WEIGHTS), {"split": (1, 7)}),
    "empty branch": (ValueError, r"split\[1\] must be at least 1, got 0", (X, WEIGHTS), {"split": (1, 0, 7)}),
    "dilation": (ValueError, r"dilations\[2\] must be from 1 to 3, got 4", (X, WEIGHTS), {"dilations": (1, 2, 4)}),
    "dilation type": (TypeError, r"dilations\[0\] must be an int, got float", (X, WEIGHTS), {"dilations": (1.0, 2, 3)}),
    "two weights": (ValueError, "weights must be a sequence of 3", (X, WEIGHTS[:2]), {}),
    "one weight": (ValueError, "weights must be a sequence of 3", (X, WEIGHTS[0]), {}),
    "weight shape": (
        ValueError,
        r"weights\[1\] must have shape \(6, 1, 5, 5\) \(c1, 1, K, K\), got \(8, 1, 5, 5\)",
        (X, [WEIGHTS[0], WEIGHTS[2][:, :, 1:6, 1:6], WEIGHTS[2]]),
        {},
    ),
    "even kernel": (
        ValueError,
        r"weights\[2\] must have an odd kernel size",
        (X, [*WEIGHTS[:2], WEIGHTS[2][..., :6, :6]]),
        {},
    ),
    "bias shape": (
        ValueError,
        r"biases\[1\] must have shape \(6,\)",
        (X, WEIGHTS, [BIASES[0], BIASES[0], BIASES[2]]),
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_multi_order_dwconv(*arguments, **options)


def test_widths_are_exact():
    """The official code computes them in floating point and loses a channel at, for example, 90 of 1:2:7."""
    assert split_channels(90, (1, 2, 7)) == (9, 18, 63)
    assert int(7 / 10 * 90) == 62
    for channels in range(8, 2049, 8):
        assert split_channels(channels, (1, 3, 4)) == (channels // 8, 3 * channels // 8, channels // 2)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arguments(data):
    torch.manual_seed(0)  # a drawn case that fails must fail again
    draw = data.draw
    split = draw(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)))
    shape = (
        draw(st.integers(0, 2)),
        sum(split) * draw(st.integers(1, 9)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
    )
    case = make(
        shape,
        split=split,
        kernels=draw(st.tuples(*[st.sampled_from([1, 3, 5, 7, 9, 11])] * 3)),
        dilations=draw(st.tuples(*[st.integers(1, 3)] * 3)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, *HALF])),
        layout=draw(st.sampled_from(LAYOUTS)) if shape[0] else "contiguous",
    )
    check_against_reference(case, slack=3)


def test_matches_a_plain_composition():
    """The reference against torch's own modules, written out."""
    x, w0, w1, w2, b0, b1, b2 = make((2, 16, 9, 8), dtype=torch.float64).tensors
    x0 = torch.nn.functional.conv2d(x, w0, b0, padding=2, groups=16)
    x1 = torch.nn.functional.conv2d(x0[:, 2:8], w1, b1, padding=4, dilation=2, groups=6)
    x2 = torch.nn.functional.conv2d(x0[:, 8:], w2, b2, padding=9, dilation=3, groups=8)
    expected = torch.cat([x0[:, :2], x1, x2], dim=1)
    assert torch.equal(reference.multi_order_dwconv(x, (w0, w1, w2), (b0, b1, b2)), expected)
