"""The Triton kernels in the interpreter, part by part and as the ops run them."""

import pytest
import torch
from harness import Case, check_against_reference

from vision_ops import reference
from vision_ops.ops import _heads
from vision_ops.ops import cross_covariance as cross_covariance_op
from vision_ops.ops import xca as xca_op

pytestmark = pytest.mark.usefixtures("interpreter")
POISON = float("nan")


class _OnCPU(torch.autograd.Function):
    """The CUDA implementation of an op on CPU tensors. `interpreter.run` knows no saved tensors."""

    @staticmethod
    def forward(ctx, op, count, *given):
        ctx.op, ctx.options = op, given[count:]
        result = op.kernels["CUDA"][0](op.arguments(*given))
        y, *saved = result if isinstance(result, tuple) else (result,)
        ctx.count = count
        ctx.save_for_backward(*given[:count], *saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        tensors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needs = ctx.needs_input_grad[2 : 2 + ctx.count]
        grads = [torch.full_like(t, POISON) if n else None for t, n in zip(tensors, needs, strict=True)]
        ctx.op.kernels["CUDA"][1](grads, grad, ctx.op.arguments(*tensors, *ctx.options), *saved)
        return (None, None, *grads, *(None for _ in ctx.options))


def make(shape, dtype=torch.float32, token_major=False):
    b, heads, d, n = shape
    if token_major:
        tokens = [torch.randn(b, n, heads, d, dtype=dtype).permute(0, 2, 3, 1) for _ in range(3)]
    else:
        tokens = [torch.randn(shape, dtype=dtype) for _ in range(3)]

    def run(t, backend):
        if backend == "reference":
            return reference.cross_covariance(*t)
        return _OnCPU.apply(cross_covariance_op._op, 4, *t)

    return Case(run, [*tokens, torch.rand(heads, 1, 1, dtype=dtype) * 4 + 0.5])


@pytest.mark.parametrize(
    ("dtype", "token_major"),
    [
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.float16, False),
        pytest.param(torch.float32, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_matches_reference(dtype, token_major):
    check_against_reference(make((2, 8, 12, 70), dtype, token_major))


@pytest.mark.parametrize(
    "shape", [(1, 3, 20, 33), (1, 2, 25, 5), (1, 1, 38, 64), (1, 2, 64, 9), (1, 2, 4, 600)], ids=str
)
def test_head_widths_and_chunks(shape):
    check_against_reference(make(shape))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 2, 73, 40), torch.float32), ((1, 2, 73, 9), torch.bfloat16), ((1, 1, 96, 520), torch.bfloat16)],
    ids=str,
)
def test_wide_heads(shape, dtype):
    """Their rows are shared by programs, the last of which has fewer; the norms of k are stored by one."""
    check_against_reference(make(shape, dtype, token_major=True))


@pytest.mark.parametrize("d", [12, 73])
def test_heads_with_gaps_between(d):
    """No one stride leads through the channels of all heads."""
    case = make((1, 3, d + 2, 20))
    case.tensors[0] = case.tensors[0][:, :, :d]
    case.tensors[1] = case.tensors[1][:, :, 2:]
    case.tensors[2] = torch.randn(1, 20, 3, d + 1).permute(0, 2, 3, 1)[:, :, :d]
    check_against_reference(case)


def test_rows_of_zeros():
    case = make((1, 2, 12, 20))
    case.tensors[0][:, 0, 3] = 0
    case.tensors[1][:, 1, 5] = 0
    check_against_reference(case)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [10, 40])
def test_xca(gram, dtype, tokens):
    c, heads = 24, 2

    def run(t, backend):
        if backend == "reference":
            return reference.xca(*t, num_heads=heads)
        return _OnCPU.apply(xca_op._op, 6, *t, heads, gram)

    weights = [torch.randn(n * c, c, dtype=dtype) / c**0.5 for n in (3, 1)]
    biases = [torch.randn(n * c, dtype=dtype) for n in (3, 1)]
    temperature = torch.rand(heads, 1, 1, dtype=dtype) + 1
    x = torch.randn(2, tokens, c, dtype=dtype)
    check_against_reference(Case(run, [x, weights[0], biases[0], temperature, weights[1], biases[1]]))


@pytest.mark.parametrize("d", [12, 25, 73])
def test_float64_of_the_softmax(d):
    """The Gram form has its backward pass in float64; the compiled kernels are the measure."""
    from vision_ops.kernels import cross_covariance as kernels

    gram = torch.randn(2, 3, d, d, dtype=torch.float64)
    norms, temperature = torch.rand(2, 2, 3, d, dtype=torch.float64) + 0.5, torch.rand(3, dtype=torch.float64)
    weights, grad = torch.randn_like(gram).softmax(-1), torch.randn_like(gram)
    results = []
    for module in (_heads, kernels):
        results.append([grad.clone(), torch.full_like(norms, POISON), torch.full((2, 3, 1, 1), POISON).double()])
        module.softmax_backward(results[-1][0], weights, gram, norms, temperature, *results[-1][1:])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
