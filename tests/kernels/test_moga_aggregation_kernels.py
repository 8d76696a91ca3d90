"""fused_moga_aggregation on GPUs: the Triton kernels of its parts in the interpreter, and either convolution."""

import pytest
import torch
from harness import Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.ops import moga_aggregation as ops

pytestmark = pytest.mark.usefixtures("interpreter")


def make(
    interpreter, shape, *, doubled=False, dtype=torch.float32, layout="contiguous", bias=True, kernels=(5, 5, 7), c0=1
):
    """c0: channels of the first branch, of eight."""
    c = shape[1]
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    widths, dilations = (c, c * 3 // 8, c * (5 - c0) // 8), [1, 2, 3]
    pointwise = [
        t
        for _ in range(4)
        for t in ((torch.randn(c, c, 1, 1) / c**0.5).to(dtype), torch.randn(c).to(dtype) if bias else None)
    ]
    weights = [(torch.randn(w, 1, k, k) / k).to(dtype) for w, k in zip(widths, kernels, strict=True)]
    biases = [torch.randn(w).to(dtype) if bias else None for w in widths]

    def run(t, backend):
        pw, sigma, weights, biases = t[1:9], t[9], list(t[10:13]), list(t[13:])
        if backend == "reference":
            options = {"split": (c0, 3, 5 - c0), "double_gate_act": doubled}
            return reference.moga_aggregation(t[0], *pw[:4], weights, biases, *pw[4:], sigma, **options)
        return interpreter.run(ops._op, t[0], *pw, sigma, weights, biases, dilations, doubled)

    return Case(run, [x, *pointwise, torch.randn(1, c, 1, 1).to(dtype), *weights, *biases])


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "contiguous"),
        (torch.float64, "channels_last"),
    ],
    ids=str,
)
def test_matches_reference(interpreter, convolution, dtype, layout):
    # In float64 a chain of ten layers leaves errors of some units of rounding, which eager's happen to be below.
    slack = 20 if dtype == torch.float64 else 2
    check_against_reference(make(interpreter, (2, 16, 5, 7), dtype=dtype, layout=layout), layout, slack=slack)


@pytest.mark.parametrize("layout", ["channel_slice", "cropped", "expanded"])
def test_layouts(interpreter, convolution, layout):
    slack = 20 if layout == "expanded" else 2  # as in tests/ops
    check_against_reference(make(interpreter, (2, 8, 3, 4), layout=layout), "channel_slice", slack=slack)


def test_options_and_sizes(interpreter, convolution):
    for options in ({"doubled": True, "bias": False}, {"c0": 0, "kernels": (3, 5, 3)}):
        check_against_reference(make(interpreter, (1, 8, 4, 3), **options), slack=2)
    for size in ((0, 8, 3, 3), (2, 8, 2, 1)):
        check_against_reference(make(interpreter, size), slack=2)


def test_bitwise_repeatable(interpreter, convolution):
    case = make(interpreter, (2, 16, 5, 7), dtype=torch.bfloat16)
    first, grad = outputs(case, "fused")
    assert all(torch.equal(a, b) for a, b in zip(outputs(case, "fused", grad)[0], first, strict=True))


def test_only_the_gradients_that_are_asked_for(interpreter, convolution):
    case = make(interpreter, (1, 8, 3, 4))
    everything, grad = outputs(case, "fused")
    for i in (0, 1, 4, 9, 10, 12, 14):
        tensors = [t.detach().requires_grad_(k == i) for k, t in enumerate(case.tensors)]
        (alone,) = torch.autograd.grad(case.run(tensors, "fused"), tensors[i], grad)
        torch.testing.assert_close(alone, everything[1 + i])
