"""The kernels that do what MogaNet's channel aggregation does around its convolution, and the sums that they leave."""

import emulation
import pytest
import torch
import torch.nn.functional as F
from harness import HALF

from vision_ops import _native

FLOATS = (torch.float32, *HALF)
TARGET = (0, 0)
COLUMNS = 8  # of d, behind the channels


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setenv("VOPS_EMU_ORDER", "7")
    return emulation.kernels()


def nan(shape, dtype):
    """channels_last, within memory that has 7 elsewhere; and all of it."""
    n, channels, h, w = shape
    wide = torch.full((n, channels + 4, h, w), 7.0, dtype=dtype).to(memory_format=torch.channels_last)
    part = wide[:, :channels]
    part.fill_(float("nan"))
    return part, wide


def randn(shape, dtype):
    part, _ = nan(shape, dtype)
    return part.copy_(torch.randn(shape))


def problem(shape, dtype):
    torch.manual_seed(1)
    n, channels, h, w = shape
    parameters = torch.randn(channels, 1, 3, 3) / 3, torch.randn(channels), torch.randn(channels) / channels**0.5
    dscores = torch.randn(n, 1, h, w)
    return randn(shape, dtype), [*(t.to(dtype) for t in parameters), torch.randn(1)], dscores, randn(shape, dtype)


def run(engine, f, parameters, dscores, dh):
    """h, d, scores, the gradients of the convolution's output and input, and the sums; dh stays as it is."""
    n, channels, height, width = f.shape
    assert engine.has_aggregation_kernel(_native.view(f), 3)
    du, (df, whole), scores = nan(f.shape, f.dtype)[0], nan(f.shape, f.dtype), torch.full_like(dscores, float("nan"))
    du.copy_(dh)
    found, guards = [], [whole[:, channels:]]
    *given, bias = [_native.channels_view(t) for t in parameters]

    def room(bytes):
        return torch.full((bytes // 4,), float("nan"))

    for backward in (False, True):
        both, wide = nan((n, channels + COLUMNS, height, width), f.dtype)
        h, d = both[:, :channels], both[:, channels:]
        if not backward:
            parts = room(engine.channel_aggregation_workspace(_native.view(f)))
            views = map(_native.view, (h, d, scores))
            engine.channel_aggregation(_native.view(f), *given, bias, *views, parts.data_ptr(), *TARGET)
            found.append(d)
        else:
            sums = room(engine.channel_aggregation_backward_workspace(_native.view(f)))
            views = map(_native.view, (dscores, h, du))
            engine.channel_aggregation_backward(_native.view(f), *given, *views, sums.data_ptr(), *TARGET)
            assert d.isnan().all()
        found.append(h)
        guards.append(wide[:, channels + COLUMNS :])
    views = _native.view(du), _native.view(f), given[0], _native.view(df)
    engine.channel_aggregation_backward_input(*views, sums.data_ptr(), *TARGET)
    assert all((guard == 7).all() for guard in guards)
    return [*found, scores, du, df, sums.view(-1, 12 * channels + 1).sum(0)]


def expected(f, parameters, dscores, dh):
    f, dscores, dh, *parameters = (t.double() for t in (f, dscores, dh, *parameters))
    weight, bias, decompose, decompose_bias = (t.requires_grad_() for t in parameters)
    u = F.conv2d(f.requires_grad_(), weight, bias, padding=1, groups=len(weight))
    h = F.gelu(u)
    scores = F.conv2d(h, decompose.view(1, -1, 1, 1), decompose_bias)
    inputs = [u, weight, bias, f, decompose, decompose_bias]
    du, dweight, dbias, df, *others = torch.autograd.grad([h, scores], inputs, [dh, dscores])
    sums = torch.cat([t.flatten() for t in (dweight, dbias, df.sum((0, 2, 3)), *others)])
    return [t.detach() for t in (h, F.gelu(scores), scores, du, df, sums)]


def check(engine, shape, dtype):
    given = problem(shape, dtype)
    d, h, again, scores, du, df, sums = run(engine, *given)
    exact_h, exact_d, *others = expected(*given)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = [(h, exact_h), (again, exact_h), (d[:, :1].double() + d[:, 1:2].double(), exact_d)]
    for a, e in (*pairs, *zip((scores, du, df, sums), others, strict=True)):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * e.abs().max().item())
    assert not d[:, 2:].any()


SHAPES = [(2, 24, 9, 6), (1, 33, 4, 40), (3, 9, 1, 1), (1, 130, 7, 5)]  # the second one's columns are cut


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kernel(engine, dtype, shape):
    check(engine, shape, dtype)


def test_thread_orders(engine, monkeypatch):
    given = problem((2, 20, 6, 9), torch.bfloat16)
    first = run(engine, *given)
    for order in emulation.ORDERS:
        monkeypatch.setenv("VOPS_EMU_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(run(engine, *given), first, strict=True))


def test_which_convolutions(engine):
    f = torch.empty(2, 16, 5, 6).to(memory_format=torch.channels_last)
    assert engine.has_aggregation_kernel(_native.view(f), 3)
    for other, size in ((f, 5), (f.double(), 3), (f.contiguous(), 3)):
        assert not engine.has_aggregation_kernel(_native.view(other), size)


MUTATIONS = {
    "no-barrier": ("channel_aggregation_ffn.cu", "channel_aggregation_ffn.cu", "      __syncwarp();", "      "),
    "halo-summed": (
        "channel_aggregation_ffn_backward.cu",
        "channel_aggregation_ffn_backward.cu",
        "rows & 1u << r ? sum[0][r][v] : 0.f",
        "sum[0][r][v]",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    """The test above would see these bugs, in every order of the threads."""
    module = emulation.load(emulation.build(f"aggregation-{name}", mutation=emulation.Mutation(*MUTATIONS[name])))
    for order in emulation.ORDERS:
        monkeypatch.setenv("VOPS_EMU_ORDER", order)
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check(module, (2, 12, 7, 9), torch.float32)
