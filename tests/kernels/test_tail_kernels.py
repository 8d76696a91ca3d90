"""Triton kernels in the interpreter, by the cases of `every_op`: of ops that have no file of their own here."""

from pathlib import Path

import pytest
import torch
from every_op import NAMES, every_op, half_blocks
from harness import Case, check_against_reference, check_autocast, check_bits_of_needs

from vision_ops import fused_mlp
from vision_ops.ops import _registration

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HERE = Path(__file__).parent
WITH_KERNELS = [name for name in NAMES if (HERE.parents[1] / "kernels" / f"{name}.py").exists()]
OPS = [name for name in WITH_KERNELS if not (HERE / f"test_{name}_kernels.py").exists()]
ops = pytest.mark.parametrize("name", OPS)


@pytest.fixture
def on_gpu(interpreter, monkeypatch):
    """Cases of `every_op` that run what they run on a GPU."""
    call = _registration.FusedOp.__call__

    def redirected(op, *given, backend=None):
        return call(op, *given, backend=backend) if backend == "reference" else interpreter.run(op, *given)

    monkeypatch.setattr(_registration.FusedOp, "__call__", redirected)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ops
def test_matches_reference(name, dtype, layout):
    check_against_reference(every_op(dtype=dtype, layout=layout, size=5)[name], layout)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("layout", ["cropped", "channel_slice", "transposed"])
@ops
def test_layouts_and_absent_parameters(name, layout):
    case = every_op(layout=layout, size=4, bias=False)[name]
    check_against_reference(case, "channel_slice")
    check_bits_of_needs(case)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)  # of float32 on CPUs products end in it
@pytest.mark.parametrize("activation", ["silu", "hardswish"])
def test_activations(activation, dtype):
    shapes = (2, 5, 13), (21, 13), (21,), (13, 21), (13,)
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors[1][:3], tensors[2][:3] = 0, torch.tensor([3.0, -3.0, 0.0], dtype=dtype)  # the corners of Hardswish
    check_against_reference(Case(lambda t, b: fused_mlp(*t, activation=activation, backend=b), tensors))


@pytest.mark.usefixtures("on_gpu")
@ops
def test_empty(name):
    case = every_op(batch=0)[name]
    leaves = case.leaves()
    y = case.run(leaves, "fused")
    for g in torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], torch.empty_like(y)):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.usefixtures("on_gpu")
def test_half_branches_beside_a_float32_residual():
    from vision_ops import fused_scaled_residual

    for gamma_dtype in (torch.float32, torch.bfloat16):
        x, branch, gamma = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4).bfloat16(), torch.randn(5).to(gamma_dtype)
        leaves = [t.requires_grad_() for t in (x, branch, gamma)]
        y, exact = (fused_scaled_residual(*leaves, backend=b) for b in ("fused", "reference"))
        grad = torch.randn_like(y)
        assert y.dtype == exact.dtype == torch.float32
        for a, b in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", ["mlp", "mlp_of_x", "gnconv_half_block", "xca_half_block"])
def test_autocast(name):
    """The residual stays float32, norms write and read the half type of the products."""
    halves = half_blocks(size=5, adds_x=True)
    check_autocast({"mlp": every_op(size=5)["mlp"], "mlp_of_x": mlp_of_x(), **halves}[name])


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_is_the_residual(dtype):
    check_against_reference(mlp_of_x(dtype))


def mlp_of_x(dtype=torch.float32):
    shapes = (2, 5, 13), (21, 13), (21,), (13, 21), (13,), (13,), (13,), (13,)

    def run(t, backend):
        norm = {"norm_weight": t[5], "norm_bias": t[6]}
        return fused_mlp(*t[:5], **norm, gamma=t[7], residual=t[0], backend=backend)

    return Case(run, [torch.randn(shape, dtype=dtype) for shape in shapes])
