import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import (
    HALF,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    laid_out,
)

from vision_ops import _native, explain, fused_gated_recursion
from vision_ops.ops._pointwise import products


def make(size=(2, 9, 7), widths=(8, 16, 32), *, bias=True, dtype=torch.float32, layout="contiguous", dw_layout=None):
    n, h, w = size
    pwa = laid_out(torch.randn(n, widths[0], h, w, dtype=dtype), layout)
    dw = laid_out(torch.randn(n, sum(widths), h, w, dtype=dtype), dw_layout or layout)
    weights = [torch.randn(o, i, 1, 1, dtype=dtype) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(o, dtype=dtype) if bias else None for o in widths[1:]]
    k = len(weights)

    def run(t, backend):
        return fused_gated_recursion(t[0], t[1], t[2 : 2 + k], t[2 + k :], backend=backend)

    return Case(run, [pwa, dw, *weights, *biases])


CASES = [
    {},
    {"layout": "channels_last"},
    {"widths": (24,)},
    {"widths": (3, 6, 12, 24, 48), "layout": "channels_last"},
    {"widths": (5, 17, 9)},
    {"size": (1, 14, 14), "bias": False},
    {"size": (3, 1, 1), "layout": "channels_last"},
    {"size": (2, 5, 1)},
    {"size": (2, 1, 33), "layout": "channels_last"},
    {"size": (1, 15, 33), "widths": (1, 2)},
    {"size": (0, 4, 4)},
    {"size": (0, 4, 4), "layout": "channels_last"},
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_reference(options):
    check_against_reference(make(**options))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout):
    check_against_reference(make(dtype=dtype, layout=layout))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(("layout", "dw_layout"), [("channels_last", "contiguous"), ("contiguous", "channel_slice")])
def test_operands_of_different_layouts(layout, dw_layout):
    check_against_reference(make(layout=layout, dw_layout=dw_layout))


def test_slices_are_read_in_place():
    """No part of a gate's operands is copied: the kernels take slices of channels in both layouts."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        wide = torch.randn(2, 30, 5, 6).contiguous(memory_format=memory_format)
        out = torch.full((2, 20, 5, 6), 7.0).contiguous(memory_format=memory_format)
        u, q, p = wide[:, 3:12], wide[:, 15:24], out[:, 5:14]
        bias = torch.randn(9)
        _native.cpu_kernels().gate(_native.view(u), _native.channels_view(bias), _native.view(q), _native.view(p))
        torch.testing.assert_close(p, (u + bias[:, None, None]) * q)
        assert (out[:, :5] == 7).all() and (out[:, 14:] == 7).all()
    with pytest.raises(RuntimeError, match="neither their channels nor the pixels of their planes side by side"):
        views = [_native.view(t) for t in (wide[:, :9, ::2], wide[:, :9, ::2], out[:, :9, ::2])]
        _native.cpu_kernels().gate(views[0], None, *views[1:])


@pytest.mark.usefixtures("each_device")
def test_flat_weights_and_no_biases():
    case = make(bias=False)
    pwa, dw, *weights = case.tensors[:4]
    y = fused_gated_recursion(pwa, dw, [w.flatten(1) for w in weights], backend="fused")
    assert torch.equal(y, case.run(case.tensors, "fused"))


def test_gate_gradients_do_not_depend_on_threads():
    for layout in ("contiguous", "channels_last"):
        check_bitwise_repeatable(make((4, 28, 28), (48,), layout=layout))


def test_explains():
    x = torch.randn(1, 8, 4, 4)
    parts = explain("gated_recursion", x, backend="fused").parts
    assert "C++" in parts["gates"] and parts["1x1 convolutions"] == products(x)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_hands_over_where_torch_is_faster(isa, monkeypatch):
    monkeypatch.setattr(_native, "cpu_kernels", lambda: SimpleNamespace(isa=isa))
    pwa, dw, *_ = make().tensors
    assert not explain("gated_recursion", pwa.requires_grad_(), dw).slower
    pwa, dw = pwa.detach().bfloat16(), dw.bfloat16()
    assert bool(explain("gated_recursion", pwa, dw).slower) == (isa == "avx2")
    assert explain("gated_recursion", pwa.requires_grad_(), dw).parts == {"gated_recursion": "PyTorch"}
    with torch.no_grad():
        assert bool(explain("gated_recursion", pwa, dw).slower) == (isa == "avx2")


P, D, W, B = torch.randn(2, 4, 5, 5), torch.randn(2, 12, 5, 5), torch.randn(8, 4), torch.randn(8)
REFUSED = {
    "rank": (ValueError, r"pwa must have the dimensions \(N, C, H, W\)", (P[0], D, [W])),
    "dw channels": (ValueError, r"dw must have shape \(2, 12, 5, 5\) \(N, sum of all d_k, H, W\)", (P, D[:, 1:], [W])),
    "dw size": (ValueError, r"dw must have shape \(2, 12, 5, 5\)", (P, D[:, :, 1:], [W])),
    "weight": (ValueError, r"pw_weights\[0\] must have shape \(8, 4\) \(d_1, d_0\), got \(8, 3\)", (P, D, [W[:, :3]])),
    "second weight": (ValueError, r"pw_weights\[1\] must have shape \(8, 8\) \(d_2, d_1\)", (P, D, [W, W])),
    "3x3": (ValueError, r"pw_weights\[0\] must have shape \(8, 4, 1, 1\)", (P, D, [torch.randn(8, 4, 3, 3)])),
    "no list": (ValueError, "pw_weights must be a sequence, got Tensor", (P, D, W)),
    "no weight": (TypeError, r"pw_weights\[0\] must be a torch.Tensor, got NoneType", (P, D, [None])),
    "biases": (ValueError, "pw_biases must be a sequence of 1, got 2", (P, D, [W], [B, B])),
    "bias": (ValueError, r"pw_biases\[0\] must have shape \(8,\) \(d_1\), got \(7,\)", (P, D, [W], [B[1:]])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        fused_gated_recursion(*arguments)


def test_channel_sums_in_a_fresh_process():
    """It needs no scratch, and must not take having none for being out of memory."""
    call = (
        "import torch; from vision_ops import _native; t, sums = torch.ones(1, 8, 3, 3), torch.empty(8)\n"
        "_native.cpu_kernels().channel_sums(_native.view(t), _native.channels_view(sums))\n"
        "assert sums.tolist() == [9.0] * 8"
    )
    subprocess.run([sys.executable, "-c", call], check=True)
