import pytest
import torch
import torch.nn.functional as F
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_gradients,
    laid_out,
)

from vision_ops import explain, fused_moga_aggregation, nn, reference
from vision_ops.ops import moga_aggregation as ops
from vision_ops.ops._pointwise import products
from vision_ops.reference.multi_order_dwconv import split_channels


def make(
    shape,
    *,
    doubled=False,
    split=(1, 3, 4),
    kernels=(5, 5, 7),
    bias=True,
    dtype=torch.float32,
    parameter_dtype=None,
    layout="contiguous",
    dilations=(1, 2, 3),
):
    c, wanted = shape[1], parameter_dtype or dtype
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    _, c1, c2 = split_channels(c, split)
    pointwise = [
        t
        for _ in range(4)
        for t in ((torch.randn(c, c, 1, 1) / c**0.5).to(wanted), torch.randn(c).to(wanted) if bias else None)
    ]
    dw = [(torch.randn(w, 1, k, k) / k).to(wanted) for w, k in zip((c, c1, c2), kernels, strict=True)]
    dw_biases = [torch.randn(w).to(wanted) if bias else None for w in (c, c1, c2)]
    sigma = torch.randn(1, c, 1, 1).to(wanted)

    def run(t, backend):
        pw, weights, biases = t[1:9], t[10:13], t[13:]
        options = {"dilations": dilations, "split": split, "double_gate_act": doubled}
        return fused_moga_aggregation(t[0], *pw[:4], weights, biases, *pw[4:], t[9], **options, backend=backend)

    return Case(run, [x, *pointwise, sigma, *dw, *dw_biases])


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(layout, dtype, doubled):
    # In float64 a chain of ten layers leaves errors of some units of rounding, which eager's happen to be below.
    slack = 20 if dtype == torch.float64 else 2
    case = make((3, 24, 9, 11), doubled=doubled, dtype=dtype, layout=layout)
    check_against_reference(case, layout, slack=slack)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "shape", [(2, 64, 14, 14), (1, 8, 1, 1), (5, 16, 5, 1), (2, 40, 1, 33), (1, 8, 33, 15), (0, 8, 5, 5)], ids=str
)
def test_sizes(shape):
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(shape, layout=layout), slack=2)


@pytest.mark.usefixtures("each_device")
def test_options():
    check_against_reference(make((2, 20, 9, 7), split=(0, 1, 3), kernels=(3, 5, 3), dilations=(1, 2, 1)), slack=2)
    check_against_reference(make((2, 20, 9, 7), split=(2, 1, 1), bias=False, dtype=torch.bfloat16), slack=2)


def test_reference_is_the_definition():
    case = make((2, 16, 5, 7))
    x, w1, b1, wg, bg, wp, bp, w2, b2, sigma, *dw = case.tensors
    p = F.conv2d(x, w1, b1)
    u = F.silu(p + sigma * (p - F.adaptive_avg_pool2d(p, 1)))
    value = reference.multi_order_dwconv(u, dw[:3], dw[3:])
    y = F.conv2d(F.silu(F.conv2d(u, wg, bg)) * F.silu(F.conv2d(value, wp, bp)), w2, b2) + x
    for backend in ("reference", "fused"):
        torch.testing.assert_close(case.run(case.tensors, backend), y)


@pytest.mark.usefixtures("each_device")
def test_gradcheck():
    check_gradients(make((1, 8, 2, 3), doubled=True), second=False)


@pytest.mark.parametrize("act_type", ["SiLU", "GELU", "ReLU"])
@pytest.mark.parametrize("doubled", [False, True])
def test_module(act_type, doubled):
    module = nn.MultiOrderGatedAggregation(16, attn_act_type=act_type, double_gate_act=doubled).double()
    torch.nn.init.normal_(module.sigma.scale)
    x = torch.randn(2, 16, 6, 6).double()
    act = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}[act_type]
    p = module.proj_1(x)
    u = act(p + module.sigma.scale * (p - p.mean((2, 3), keepdim=True)))
    gate, value = act(module.gate(u)), act(module.value(u))
    if doubled:
        gate, value = act(gate), act(value)
    torch.testing.assert_close(module(x), module.proj_2(gate * value) + x, rtol=1e-12, atol=1e-12)


GOOD = make((2, 8, 7, 7)).tensors
REFUSED = {
    "rank": (ValueError, "x must have the dimensions", {0: GOOD[0][0]}, {}),
    "proj_1": (ValueError, r"proj_1_weight must have shape \(8, 8\) \(C, C\)", {1: torch.randn(8, 7)}, {}),
    "pw bias": (ValueError, r"pw_bias must have shape \(8,\) \(C\)", {6: torch.randn(7)}, {}),
    "sigma": (ValueError, r"sigma must have shape \(8,\) \(C\)", {9: torch.randn(7)}, {}),
    "branch": (ValueError, r"dw_weights\[1\] must have shape \(3, 1, 5, 5\)", {11: torch.randn(4, 1, 5, 5)}, {}),
    "branch bias": (ValueError, r"dw_biases\[2\] must have shape \(4,\)", {15: torch.randn(5)}, {}),
    "split": (ValueError, r"split \(1, 1, 1\) adds up to 3", {}, {"split": (1, 1, 1)}),
    "flag": (TypeError, "double_gate_act must be a bool", {}, {"double_gate_act": 1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, changes, options = REFUSED[name]
    t = [changes.get(i, given) for i, given in enumerate(GOOD)]
    with pytest.raises(error, match=message):
        fused_moga_aggregation(t[0], *t[1:5], t[10:13], t[13:], *t[5:10], **options)


def test_explains():
    found = explain("moga_aggregation", GOOD[0], backend="fused", double_gate_act=True).parts
    assert "C++" in found["decomposition, depthwise convolutions and gate"]
    assert found["1x1 convolutions"] == products(GOOD[0])


def test_means_come_before_the_convolution():
    x, *parameters = make((3, 24, 9, 11), dtype=torch.float64).tensors
    given = ops._Arguments(x, *parameters[:9], parameters[9:12], parameters[12:], [1, 2, 3], False)
    exact = F.conv2d(x, parameters[0], parameters[1]).mean((2, 3), keepdim=True)
    means = torch.empty_like(exact)
    ops._means(ops._cpu(x), x, given, means)
    torch.testing.assert_close(means, exact, rtol=1e-12, atol=1e-12)


def test_means_are_not_rounded_to_tf32(tf32, monkeypatch):
    found = []
    monkeypatch.setattr(ops, "linear", lambda x, weight, bias, out: found.extend((x, weight, bias, out)))
    x, *parameters = (t.to("meta") for t in make((3, 24, 9, 11)).tensors)
    given = ops._Arguments(x, *parameters[:9], parameters[9:12], parameters[12:], [1, 2, 3], False)
    device = ops._cpu(x)._replace(decomposition=ops.Decomposition(lambda x, means: None, *[None] * 2))
    ops._means(device, x, given, torch.empty(3, 24, 1, 1, device="meta"))
    assert {t.dtype for t in found} == {torch.float64 if tf32 else torch.float32}
