import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    LAYOUTS,
    Case,
    check_against_reference,
    laid_out,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vision_ops import fused_split_cascade, nn, reference


def make(shape, scales, *, bias=True, dtype=torch.float32, layout="contiguous", device="cpu"):
    width = -(-shape[1] // scales)
    x = laid_out(torch.randn(shape, dtype=dtype, device=device), layout)
    weights = [torch.randn(width, 1, 3, 3, dtype=dtype, device=device) / 3 for _ in range(scales - 1)]
    biases = [torch.randn(width, dtype=dtype, device=device) if bias else None for _ in range(scales - 1)]

    def run(t, backend):
        return fused_split_cascade(t[0], t[1:scales], t[scales:], backend=backend)

    return Case(run, [x, *weights, *biases])


CASES = [
    ((2, 48, 14, 14), 2),
    ((2, 88, 9, 7), 3),  # 30 + 30 + 28
    ((1, 168, 8, 8), 4),
    ((3, 20, 5, 6), 3),
    ((1, 11, 7, 5), 4),  # 3 + 3 + 3 + 2
    ((1, 300, 6, 7), 2),
    ((2, 17, 1, 1), 2),
    ((1, 10, 1, 33), 4),
    ((1, 10, 33, 1), 4),
    ((0, 8, 5, 5), 2),
    ((1, 40, 90, 70), 4),  # several chunks of rows
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "scales"), CASES, ids=str)
def test_matches_reference(shape, scales, layout):
    check_against_reference(make(shape, scales, layout=layout), layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout):
    check_against_reference(make((2, 44, 15, 14), 3, dtype=dtype, layout=layout))


@pytest.mark.parametrize("bias", [True, False])
def test_every_level_is_zero_outside_the_image(bias):
    """With a bias, a level evaluated on the padding of the one before it is not zero."""
    case = make((1, 12, 40, 5), 4, bias=bias)
    for t in case.tensors[4:]:
        if t is not None:
            t.fill_(100.0)
    x, *parameters = case.tensors
    y = F.conv2d(x[:, :3], parameters[0], parameters[3], padding=1, groups=3)
    levels = [y]
    for i in (1, 2):
        y = F.conv2d(y + x[:, 3 * i : 3 * i + 3], parameters[i], parameters[3 + i], padding=1, groups=3)
        levels.append(y)
    expected = torch.cat([*levels, x[:, 9:]], dim=1)
    for backend in ("fused", "reference"):
        torch.testing.assert_close(case.run(case.tensors, backend), expected)
    check_against_reference(case)


def test_last_split_is_copied():
    case = make((2, 20, 6, 5), 3, dtype=torch.float16)
    y = case.run(case.tensors, "fused")
    assert torch.equal(y[:, 14:], case.tensors[0][:, 14:])


def test_module_runs_it():
    module = nn.SDTAEncoder(20, scales=3, num_heads=4).double()
    x = torch.randn(2, 20, 7, 5, dtype=torch.float64)
    weights, biases = [c.weight for c in module.convs], [c.bias for c in module.convs]
    torch.testing.assert_close(module.cascade(x), reference.split_cascade(x, weights, biases))


X = torch.randn(2, 20, 7, 7)
W, B = [torch.randn(7, 1, 3, 3)] * 2, [torch.randn(7)] * 2
REFUSED = {
    "rank": (ValueError, "x must have the dimensions", (X[0], W, B), {}),
    "no weights": (ValueError, "weights must be a sequence of at least 1, got 0", (X, [], []), {}),
    "one weight": (ValueError, "weights must be a sequence, got Tensor", (X, W[0]), {}),
    "biases": (ValueError, "biases must be a sequence of 2, got 1", (X, W, B[:1]), {}),
    "width": (ValueError, r"weights\[1\] must have shape \(7, 1, 3, 3\) \(c, 1, 3, 3\)", (X, [W[0], W[1][:6]]), {}),
    "kernel": (ValueError, r"weights\[0\] must have shape", (X, [torch.randn(7, 1, 5, 5)] * 2), {}),
    "bias shape": (ValueError, r"biases\[0\] must have shape \(7,\) \(c\)", (X, W, [B[0][:6], B[1]]), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments, options = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_split_cascade(*arguments, **options)


@pytest.mark.parametrize(("channels", "scales"), [(16, 5), (9, 4), (12, 7), (2, 3)])
def test_refuses_what_the_official_class_refuses(channels, scales):
    width = -(-channels // scales)
    message = rf"\(scales - 1\) \* ceil\(C / scales\) < C: {scales - 1} splits of {width} use up all {channels}"
    with pytest.raises(ValueError, match=message):
        fused_split_cascade(torch.randn(1, channels, 5, 5), [torch.randn(width, 1, 3, 3)] * (scales - 1))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arguments(data):
    torch.manual_seed(0)  # a drawn case that fails must fail again
    draw = data.draw
    shape = tuple(draw(st.integers(low, high)) for low, high in ((0, 3), (2, 120), (1, 70), (1, 70)))
    scales = draw(st.integers(2, 8))
    assume((scales - 1) * -(-shape[1] // scales) < shape[1])
    case = make(
        shape,
        scales,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, *HALF])),
        layout=draw(st.sampled_from(LAYOUTS)) if shape[0] else "contiguous",
    )
    check_against_reference(case, slack=3)
