import subprocess
import sys

import pytest
import torch
from harness import (
    HALF,
    HEADS_LAYOUTS,
    Case,
    check_against_reference,
    check_bitwise_repeatable,
    check_gradients,
    float64_is_left_out,
    heads_laid_out,
    outputs,
)

from vision_ops import explain, fused_relative_attention, reference


def not_on_gpus(parameters):
    if parameters.get("options", {}).get("d", 0) > 64:
        return "the Triton kernels take at most 64 channels in a head"
    return float64_is_left_out(parameters)


def make(
    size=(5, 6), heads=3, d=32, *, batch=2, table=(27, 27), window=None, layout="contiguous", dtype=torch.float32,
    scale=None,
):  # fmt: skip
    height, width = size

    def run(t, backend):
        options = {"height": height, "width": width, "window_size": window, "scale": scale}
        return fused_relative_attention(*t, **options, backend=backend)

    q, k, v = (heads_laid_out((batch, heads, height * width, d), layout, dtype) for _ in range(3))
    return Case(run, [q, k, v, None if table is None else torch.randn(heads, *table, dtype=dtype)])


CASES = [
    {},
    {"size": (14, 14), "heads": 5},  # of MOAT at 224: 5, 7, 10 and 14 heads
    {"size": (7, 7), "heads": 10, "table": (13, 13)},
    {"size": (5, 4), "heads": 7},  # an image of 75x53
    {"size": (3, 2), "heads": 14, "table": (13, 13)},
    {"table": None},
    {"table": (9, 11)},  # of that size
    {"table": (1, 4)},
    {"size": (1, 1)},
    {"size": (1, 33), "heads": 1},
    {"size": (33, 1), "heads": 1, "d": 48},
    {"size": (20, 17), "heads": 2, "batch": 1},
    {"d": 1, "heads": 1},
    {"d": 20},
    {"d": 72, "heads": 2},
    {"scale": 0.3},
    {"batch": 0},
    {"size": (14, 14), "window": (7, 7), "table": (13, 13)},
    {"size": (9, 11), "window": (4, 3)},
    {"size": (5, 3), "window": (7, 7)},
    {"size": (6, 18), "window": (6, 16), "heads": 1},
    {"size": (6, 4), "window": (6, 4)},
]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_reference(options):
    check_against_reference(make(**options))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("options", [{"layout": "token_major"}, {"window": (3, 4), "d": 20}], ids=str)
def test_dtypes(dtype, options):
    check_against_reference(make(dtype=dtype, **options))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("layout", HEADS_LAYOUTS)
@pytest.mark.parametrize("window", [None, (4, 4)], ids=str)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
def test_layouts(layout, window, grad_layout):
    check_against_reference(make(layout=layout, window=window), grad_layout)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("d", [1, 20, 32])
def test_what_lies_between_tokens_is_left_out(d):
    """Kernels read whole vectors of channels, and whole rows of windows."""
    case = make((5, 6), d=d, window=(4, 4))
    everything, grad = outputs(case, "fused")
    for i, t in enumerate(case.tensors[:3]):
        wide = torch.full((2, 3, 30 + 9, d + 7), torch.nan, device=t.device)
        case.tensors[i] = wide[:, :, 3:33, :d].copy_(t)
    found, _ = outputs(case, "fused", grad)
    torch.testing.assert_close(found, everything)


def test_merging_the_heads_is_a_view():
    y = make(layout="token_major").run(make(layout="token_major").tensors, "fused")
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("scale", [1e2, 1e-4])
def test_scale_of_the_logits(scale):
    """At 1e2 the softmax picks one key, and others are nothing next to it. (GPUs round lse there, which shows.)"""
    check_against_reference(make(scale=scale))


def test_large_and_infinite_biases():
    case = make((4, 4), heads=1, table=(7, 7))
    case.tensors[3] *= 1e4
    check_against_reference(case)
    case.tensors[3][:, 0] = -torch.inf  # three rows above: masked
    fused, grad = outputs(case, "fused")
    eager, _ = outputs(case, "reference", grad)
    torch.testing.assert_close(fused[:4], eager[:4])


@pytest.mark.usefixtures("each_device")
def test_nan_stays_nan():
    case = make(heads=2)
    case.tensors[0][0, 1, 4, 7] = float("nan")
    y = case.run(case.tensors, "fused")
    assert y[0, 1, 4].isnan().all() and y[0, 0].isfinite().all() and y[0, 1, 3].isfinite().all()


@pytest.mark.usefixtures("each_device")
def test_float32_table_beside_half_tokens():
    case = make(dtype=torch.bfloat16)
    case.tensors[3] = case.tensors[3].float() * 1.01
    check_against_reference(case)


@pytest.mark.parametrize("table", [(3, 5), (4, 3)], ids=["as it is", "resized"])
def test_gradcheck(table):
    check_gradients(make((2, 3), heads=2, d=3, table=table))
    check_gradients(make((2, 3), 1, 2, table=table, window=(2, 2)), second=False)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    "options",
    [
        {"size": (20, 17), "batch": 1, "heads": 2},  # heads are cut
        {"size": (14, 14), "heads": 5, "layout": "token_major"},
        {"size": (9, 11), "window": (4, 3), "batch": 3},
    ],
    ids=str,
)
def test_bitwise_repeatable(options):
    check_bitwise_repeatable(make(**options))


def test_explain():
    q = make().tensors[0]
    assert "C++ kernel" in str(explain("relative_attention", q, height=5, width=6))
    assert explain("relative_attention", q, height=5, width=6, backend="reference").parts == {
        "relative_attention": "PyTorch"
    }
    with pytest.raises(TypeError, match="at least q and height and width"):
        explain("relative_attention", q)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({0: torch.randn(2, 3, 30)}, {}, ValueError, r"q must have the dimensions \(B, heads, N, d\)"),
        ({0: torch.ones(2, 3, 30, 32, dtype=torch.long)}, {}, TypeError, "q must be float32"),
        ({1: torch.randn(2, 3, 29, 32)}, {}, ValueError, r"k must have shape \(2, 3, 30, 32\) \(as q\)"),
        ({2: torch.randn(2, 3, 30, 32).double()}, {}, TypeError, "v must have the dtype of q"),
        (
            {3: torch.randn(4, 9, 11)},
            {},
            ValueError,
            r"bias_table must have shape \(3, 9, 11\) \(heads, height, width\)",
        ),
        ({3: torch.randn(3, 9)}, {}, ValueError, "bias_table must have shape"),
        ({3: torch.randn(3, 0, 11)}, {}, ValueError, "bias_table must have shape"),
        ({}, {"height": 6}, ValueError, r"height \* width must be 30, the tokens of q, got 6 \* 6"),
        ({}, {"height": 5.0}, TypeError, "height must be an int"),
        ({}, {"window_size": 7}, ValueError, "window_size must be a sequence of 2"),
        ({}, {"window_size": (7, 0)}, ValueError, "window_size must be at least 1, got 0"),
        ({}, {"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ],
    ids=lambda value: "",
)
def test_refusals(change, options, error, message):
    given = make().tensors
    for i, t in change.items():
        given[i] = t
    with pytest.raises(error, match=message):
        fused_relative_attention(*given, **{"height": 5, "width": 6, **options})


def test_matches_the_definition():
    height, width = 2, 3
    q, k, v, table = make((height, width), 2, 4, table=(3, 5), dtype=torch.float64).tensors
    logits = torch.empty(2, 2, 6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            dy, dx = j // width - i // width, j % width - i % width
            logits[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) / 2 + table[:, dy + height - 1, dx + width - 1]
    expected = logits.softmax(-1) @ v
    for attend in (fused_relative_attention, reference.relative_attention):
        torch.testing.assert_close(attend(q, k, v, table, height=height, width=width), expected)


MEMORY = """
import resource, torch, vision_ops
from vision_ops import fused_relative_attention
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 5, 4096, 32, requires_grad=True) for _ in range(3))
table = torch.randn(5, 27, 27, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fused_relative_attention(q, k, v, table, height=64, width=64, backend="fused").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_of_4096_tokens():
    """tiny MOAT-1's third stage of an image of 1024x1024, whose weights would take 335 MB each time."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert int(done.stdout) < 128, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 7), (14, 15), (33, 5), (24, 24)], ids=str)
@pytest.mark.parametrize("d", [12, 32, 33, 64])
@pytest.mark.parametrize("window", [None, (7, 7), (1, 5)], ids=str)
def test_sweep(size, d, window):
    case = make(size, 2, d, batch=1, window=window, layout="token_major" if d % 2 else "contiguous")
    check_against_reference(case, slack=2)
