"""The Triton kernels in the interpreter, and what is built of them: fused_gated_recursion and fused_gnconv on GPUs."""

import itertools

import pytest
import torch
from harness import Case, check_against_reference, laid_out, outputs

from vision_ops import reference
from vision_ops.kernels import gated_recursion as kernels
from vision_ops.kernels import recursion_chain
from vision_ops.ops import gated_recursion, gnconv

pytestmark = pytest.mark.usefixtures("interpreter")


def make(interpreter, size, widths, *, dtype=torch.float32, layout="contiguous", bias=True):
    n, h, w = size
    operands = [laid_out(torch.randn(n, c, h, w, dtype=dtype), layout) for c in (widths[0], sum(widths))]
    weights = [torch.randn(o, i, 1, 1, dtype=dtype) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(o, dtype=dtype) if bias else None for o in widths[1:]]
    k = len(weights)

    def run(t, backend):
        given = t[0], t[1], list(t[2 : 2 + k]), list(t[2 + k :])
        return (
            reference.gated_recursion(*given)
            if backend == "reference"
            else interpreter.run(gated_recursion._op, *given)
        )

    return Case(run, [*operands, *weights, *biases])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(interpreter, dtype, layout):
    check_against_reference(make(interpreter, (2, 7, 9), (8, 16, 32), dtype=dtype, layout=layout), layout)


@pytest.mark.parametrize(
    ("size", "widths", "options"),
    [
        ((1, 5, 4), (20,), {"layout": "channel_slice"}),
        ((2, 3, 5), (3, 6, 12, 24), {"layout": "cropped", "dtype": torch.bfloat16}),
        ((1, 9, 9), (40, 17), {"layout": "transposed", "dtype": torch.float16}),
        ((2, 4, 4), (16, 33), {"layout": "expanded", "dtype": torch.bfloat16, "bias": False}),
        ((3, 1, 1), (5, 10), {"layout": "channels_last", "dtype": torch.bfloat16}),
        ((2, 4, 3), (160, 320), {"layout": "channels_last", "dtype": torch.bfloat16}),
        ((0, 4, 4), (4, 8), {"dtype": torch.bfloat16}),
    ],
)
def test_layouts_and_widths(interpreter, size, widths, options):
    check_against_reference(make(interpreter, size, widths, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["gates", "chain"])
def test_more_blocks_than_programs(interpreter, dtype, monkeypatch):
    """A program of the backward pass then sums several blocks, the last one fewer or none."""
    for module in (kernels, recursion_chain):
        monkeypatch.setattr(module, "PROGRAMS", 4)
    for layout in ("contiguous", "channels_last"):
        check_against_reference(make(interpreter, (3, 19, 11), (24, 8), dtype=dtype, layout=layout))


def test_which_chains_stay_on_chip(interpreter):
    """HorNet-T's first three stages and S's first two, in half types."""
    for last, order, fits in ((64, 2, True), (128, 3, True), (256, 4, True), (512, 5, False), (384, 4, False)):
        widths = [last >> k for k in reversed(range(order))]
        assert recursion_chain.has_chain(widths, torch.bfloat16) == fits
        assert not recursion_chain.has_chain(widths, torch.float32)
    assert not recursion_chain.has_chain([64], torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.float32, "channels_last"), (torch.bfloat16, "channels_last")],
    ids=str,
)
def test_gnconv(interpreter, dtype, layout):
    c, widths = 16, (4, 8, 16)
    total = sum(widths)

    def draw(*size):
        return torch.randn(size, dtype=dtype) / (size[1] ** 0.5 if len(size) == 2 else 1)

    x = laid_out(draw(2, c, 5, 6), layout)
    projections = draw(2 * c, c), draw(2 * c), draw(total, 1, 3, 3) / 3, draw(total), draw(c, c), draw(c)
    weights, biases = [draw(o, i) for i, o in itertools.pairwise(widths)], [draw(o) for o in widths[1:]]

    def run(t, backend):
        if backend == "reference":
            return reference.gnconv(*t[:5], t[7:9], t[9:], *t[5:7], scale=1 / 3)
        return interpreter.run(gnconv._op, *t[:7], list(t[7:9]), list(t[9:]), 1 / 3)

    case = Case(run, [x, *projections, *weights, *biases])
    check_against_reference(case, layout)
    everything, grad = outputs(case, "fused")
    again, _ = outputs(case, "fused", grad)
    assert all(torch.equal(a, b) for a, b in zip(everything, again, strict=True))
