"""What only the CUDA engine has: alignments, instantiations, thread orders, fixed-order sums, errors of launches."""

import itertools

import emulation
import pytest
import torch
from harness import HALF, Case, check_against_reference, laid_out

from vision_ops import _native, fused_dwconv, reference
from vision_ops.ops import _allocation
from vision_ops.ops.dwconv import convolve_backward_cuda, convolve_cuda

FLOATS = (torch.float32, *HALF)
TARGET = (0, 0)


@pytest.fixture(params=emulation.ORDERS)
def order(request):
    return request.param


@pytest.fixture
def engine(monkeypatch):
    emulation.install(monkeypatch, emulation.kernels())
    return emulation.kernels()


def make(shape, kernel_size, *, dtype=torch.float32, layout="channels_last", **options):
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    weight = torch.randn(shape[1], 1, kernel_size, kernel_size, dtype=dtype) / kernel_size
    bias = torch.randn(shape[1], dtype=dtype)
    return Case(lambda t, backend: fused_dwconv(*t, **options, backend=backend), [x, weight, bias])


def conv_of(kernel_size, stride=1, dilation=1, padding=None):
    pad = dilation * (kernel_size - 1) // 2 if padding is None else padding
    return kernel_size, stride, dilation, pad, pad


def slice_of(channels, before, after, dtype, size=(2, 6, 7)):
    """A slice of channels full of random numbers, and the wider tensor, which has 7 elsewhere."""
    n, h, w = size
    wide = torch.full((n, before + channels + after, h, w), 7.0, dtype=dtype).to(memory_format=torch.channels_last)
    part = wide[:, before : before + channels]
    part.copy_(torch.randn(part.shape))
    return part, wide


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 1), (7, 1), (9, 1)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_march_kernel(engine, dtype, kernel_size, stride, activation):
    """Forward, gradient of the input and of the weights; 14 rows take tall strips, 10 do not."""
    options = {"stride": stride, "activation": activation, "dtype": dtype}
    height = 14 if activation is None else 10
    check_against_reference(make((2, 12, height, 9), kernel_size, **options), "channels_last")


GEOMETRIES = [
    # kernel size, stride, dilation, padding
    (3, 1, 1, (5, 0, 0, 6)),  # outputs that see padding only
    (3, 2, 1, (0, 1, 0, 1)),
    (3, 2, 1, (6, 5, 4, 3)),
    (3, 2, 3, (3, 1, 2, 5)),
    (5, 1, 2, (0, 9, 1, 3)),
    (7, 1, 3, (9, 9, 9, 9)),
    (3, 1, 13, (13, 13, 13, 13)),  # phases without points
    (3, 1, 17, (17, 17, 17, 17)),  # too many of them: the plain kernel
    (3, 2, 2, (2, 2, 2, 2)),  # an even dilation: the plain kernel
    (5, 2, 1, (2, 2, 2, 2)),
    (3, 3, 1, (1, 1, 1, 1)),
]


@pytest.mark.parametrize(("kernel_size", "stride", "dilation", "padding"), GEOMETRIES)
def test_geometries(engine, kernel_size, stride, dilation, padding):
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    check_against_reference(make((1, 8, 11, 12), kernel_size, activation="silu", **options))
    check_against_reference(make((2, 4, 12, 9), kernel_size, dtype=torch.bfloat16, **options))


@pytest.mark.parametrize(
    ("channels", "before", "after"),
    [(24, 8, 8), (12, 4, 4), (10, 2, 6), (9, 3, 5), (33, 1, 30), (100, 4, 0), (40, 0, 24)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channel_slices(engine, dtype, channels, before, after):
    """Pieces of 16, 8, 4 and 2 bytes; whole and single channels per store. The neighbours are left alone."""
    x, _ = slice_of(channels, before, after, dtype)
    dy, _ = slice_of(channels, after, before, dtype)
    y, y_wide = slice_of(channels, before, after, dtype)
    dx, dx_wide = slice_of(channels, after, before, dtype)
    weight, bias = torch.randn(channels, 1, 3, 3, dtype=dtype), torch.randn(channels, dtype=dtype)
    dweight, dbias = torch.full_like(weight, float("nan")), torch.full_like(bias, float("nan"))
    w, conv = _native.channels_view(weight), conv_of(3)
    engine.dwconv(_native.view(x), w, _native.channels_view(bias), _native.view(y), conv, 0, *TARGET)
    engine.dwconv_backward_input(_native.view(dy), w, _native.view(dx), conv, *TARGET)
    room = torch.full((engine.dwconv_backward_weight_workspace(_native.view(dy), conv) // 4,), float("nan"))
    sums = _native.channels_view(dweight), _native.channels_view(dbias), conv, 1.0, room.data_ptr(), *TARGET
    engine.dwconv_backward_weight(_native.view(dy), _native.view(x), *sums)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.dwconv(*leaves)
    expected = torch.autograd.grad(exact, leaves, dy.double())
    for got, want in zip((y, dx, dweight, dbias), (exact.detach(), *expected), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
    for wide, first in ((y_wide, before), (dx_wide, after)):
        assert (wide[:, :first] == 7).all() and (wide[:, first + channels :] == 7).all()


def results(engine, case):
    """Output and gradients by the kernels that install() has put in place."""
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    y = case.run(leaves, "fused")
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def test_thread_orders(engine, order, monkeypatch):
    case = make((2, 20, 10, 9), 5, dilation=2, activation="gelu")
    expected = results(engine, case)
    monkeypatch.setenv("VOPS_EMU_ORDER", order)
    assert all(torch.equal(a, b) for a, b in zip(results(engine, case), expected, strict=True))


def test_sums_do_not_depend_on_alignment(engine):
    """How the sum is cut depends on the shape only: a slice gives the same bits."""
    weight = torch.randn(12, 1, 5, 5)
    sliced, _ = slice_of(12, 3, 2, torch.float32, (3, 15, 9))
    aligned = sliced.clone(memory_format=torch.channels_last)
    grads = [results(engine, Case(lambda t, backend: fused_dwconv(*t), [x, weight])) for x in (aligned, sliced)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_offsets_beyond_32_bits(engine):
    """Two images 2^31 elements apart; the memory between them is never touched."""
    far = torch.empty(2**31 + 10 * 8, dtype=torch.bfloat16).as_strided((2, 8, 2, 5), (2**31, 1, 40, 8))
    near = torch.randn(2, 8, 2, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    far.copy_(near)
    weight = torch.randn(8, 1, 3, 3, dtype=torch.bfloat16)
    assert torch.equal(fused_dwconv(far, weight), fused_dwconv(near, weight))


def test_errors_become_exceptions(engine):
    (x, _), (y, _), weight = slice_of(8, 0, 0, torch.float32), slice_of(8, 0, 0, torch.float32), torch.randn(8, 1, 3, 3)
    views = _native.view(x), _native.channels_view(weight), None, _native.view(y)
    with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        engine.dwconv(*views, conv_of(3), 0, 5, 0)
    engine.dwconv(*views, conv_of(3), 0, *TARGET)  # the error is not reported again


def test_which_kernel(engine):
    """March kernels for every published convolution."""
    published = itertools.product((0, 1, 2), (3, 5, 7, 9), (1, 2, 3))
    assert all(engine.has_march_kernel(dtype, conv_of(k, 1, d)) for dtype, k, d in published)
    assert engine.has_march_kernel(0, conv_of(3, 2)) and engine.has_march_kernel(1, conv_of(3, 2, 3))
    others = [conv_of(11), conv_of(1), conv_of(3, 3), conv_of(3, 2, 2), conv_of(5, 2)]
    assert not any(engine.has_march_kernel(0, conv) for conv in others) and not engine.has_march_kernel(3, conv_of(3))


MUTATIONS = {
    "removed-barrier": emulation.Mutation("dwconv_k3.cu", "march_conv.cuh", "    __syncwarp();", ""),
    "row-too-many": emulation.Mutation(
        "dwconv_k3.cu", "march_conv.cuh", "existing<kRows>(in_row0, rows.in,", "existing<kRows>(in_row0, rows.in + 1,"
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    """The tests above would see these bugs, in every order of the threads."""
    module = emulation.load(emulation.build(name, mutation=MUTATIONS[name]))
    for order in emulation.ORDERS:
        emulation.install(monkeypatch, module, order)
        with pytest.raises(AssertionError, match="output: error"):
            check_against_reference(make((2, 12, 7, 9), 3))


def test_outputs_are_poisoned(engine):
    """The checks rely on it for CUDA as for the CPU."""
    x = torch.randn(1, 4, 3, 3)
    assert _allocation.allocate_channels_last(x.shape, x).isnan().all()
    assert _allocation.workspace(64, x).isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)  # PyTorch takes minutes for all of it in float16
def test_sweep(engine, dtype):
    sizes = (1, 5, 7, 14, 15, 33)
    channels = itertools.cycle((8, 12, 24, 33, 100))
    for kernel_size, stride, dilation in itertools.product((3, 5, 7, 9), (1, 2), (1, 2, 3)):
        for h, w in itertools.product(sizes, sizes):
            case = make((1, next(channels), h, w), kernel_size, dtype=dtype, stride=stride, dilation=dilation)
            check_against_reference(case, slack=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_inside_of_gnconv(engine, dtype):
    """It reads a slice of channels and writes the gradient of one; parameters are float32 beside half values."""
    x, _ = slice_of(24, 8, 0, dtype)
    dx, wide = slice_of(24, 8, 0, dtype)
    weight, bias = torch.randn(24, 1, 7, 7) / 7, torch.randn(24)
    y, grad = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))
    grad.copy_(torch.randn(grad.shape))
    dweight, dbias = weight.clone(), bias.clone()
    convolve_cuda(x, weight, bias, y)
    convolve_backward_cuda(grad, x, weight, dx, dweight, dbias)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.dwconv(*leaves)
    found = (y, dx, dweight, dbias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, e in zip(found, (exact, *torch.autograd.grad(exact, leaves, grad.double())), strict=True):
        torch.testing.assert_close(a.double(), e.detach(), rtol=tolerance, atol=tolerance * e.abs().max().item())
    assert (wide[:, :8] == 7).all()
