"""The Triton kernels in the interpreter, in all of their regimes; tests/ops has them on a GPU."""

import pytest
import torch
from harness import Case, check_against_reference, outputs

from vision_ops import reference
from vision_ops.kernels import relative_attention_gradients as kernels
from vision_ops.ops import relative_attention as ops
from vision_ops.ops import relative_self_attention as self_attention

pytestmark = pytest.mark.usefixtures("interpreter")


def make(interpreter, size, window=None, *, heads=1, d=32, batch=2, table=(5, 4), dtype=torch.bfloat16):
    """Views of a (B, N, 3C) tensor."""
    height, width = size
    scale = d**-0.5

    def run(t, backend):
        if backend == "reference":
            return reference.relative_attention(*t, height=height, width=width, window_size=window, scale=scale)
        return interpreter.run(ops._op, *t, height, width, *(window or size), scale)

    qkv = torch.randn(batch, height * width, 3, heads, d, dtype=dtype).permute(2, 0, 3, 1, 4).unbind()
    return Case(run, [*qkv, None if table is None else torch.randn(heads, *table, dtype=dtype)])


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "window", "options"),
    [
        ((7, 7), None, {"heads": 2}),  # one tile
        ((7, 7), None, {"dtype": torch.float32}),  # which float32 has none of
        ((9, 5), (4, 4), {"batch": 3}),
        ((10, 10), None, {}),  # pairs of positions
        pytest.param((10, 10), None, {"dtype": torch.float32}, marks=slow),
        ((11, 25), (10, 26), {"batch": 1}),  # pairs of columns
        ((3, 100), None, {"batch": 1, "dtype": torch.float32}),  # in blocks
        ((4, 70), None, {"batch": 1}),
        ((7, 7), None, {"table": None}),
        ((9, 9), None, {"table": None}),
        ((3, 5), None, {"d": 20}),
        pytest.param((3, 5), None, {"d": 50, "dtype": torch.float16}, marks=slow),
        ((9, 9), None, {"d": 40, "batch": 1}),
        ((1, 1), None, {}),
    ],
    ids=str,
)
def test_matches_reference(interpreter, size, window, options):
    check_against_reference(make(interpreter, size, window, **options))


@pytest.mark.parametrize("size", [(5, 5), (9, 8)], ids=str)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,)], ids=str)
def test_only_some_gradients(interpreter, size, needed):
    case = make(interpreter, size, batch=1)
    everything, grad = outputs(case, "fused")
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(case.tensors)]
    some = torch.autograd.grad(case.run(leaves, "fused"), [leaves[i] for i in needed], grad)
    assert all(torch.equal(a, everything[1 + i]) for i, a in zip(needed, some, strict=True))


@pytest.mark.parametrize(("size", "programs"), [((5, 5), 2), ((9, 8), 8)], ids=str)
def test_windows_in_chunks(interpreter, size, programs, monkeypatch):
    """The table's gradient is summed in two stages: chunks of three windows and of two."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check_against_reference(make(interpreter, size, batch=5))


def test_biases_that_mask_a_block_of_keys(interpreter):
    """The first that queries of the second half meet; those of the first half have themselves."""
    case = make(interpreter, (1, 80), table=(1, 159), dtype=torch.float32)
    case.tensors[3][:, :, :70] = -torch.inf
    fused, grad = outputs(case, "fused")
    eager, _ = outputs(case, "reference", grad)
    torch.testing.assert_close(fused[:4], eager[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "window"), [((4, 5), None), ((9, 9), None), ((5, 5), (3, 3))], ids=str)
def test_between_products(interpreter, size, window, dtype):
    """There what the kernels need of the weights comes from what the heads give."""
    channels, heads = 32, 2

    def run(t, backend):
        x, products, table = t[0], [*t[1:4], None, *t[4:8]], t[8]
        if backend == "reference":
            return reference.relative_self_attention(x, *products, table, num_heads=heads, window_size=window)
        return interpreter.run(self_attention._op, x, *products, table, heads, *(window or size), 0.25)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype) / (shape[1] ** 0.5 if len(shape) == 2 else 1)

    products = [draw(channels, channels) if i % 2 == 0 else draw(channels) for i in range(8)]
    del products[3]
    given = [draw(2, *size, channels), *products, draw(heads, 3, 4)]
    check_against_reference(Case(run, given), slack=2)
