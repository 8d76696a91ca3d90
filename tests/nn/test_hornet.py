import pytest
import torch

from vision_ops import nn, reference
from vision_ops.reference.global_filter import _filter_without_fft


def test_gnconv_keys():
    keys = list(nn.GnConv(16, order=2).state_dict())
    names = "proj_in", "dwconv", "proj_out", "pws.0"
    assert sorted(keys) == sorted(f"{name}.{part}" for name in names for part in ("weight", "bias"))


@pytest.mark.parametrize(("dim", "order", "gflayer", "least"), [(24, 5, None, 16), (24, 4, nn.GlobalLocalFilter, 16)])
def test_gnconv_refuses_what_cannot_be_halved(dim, order, gflayer, least):
    with pytest.raises(ValueError, match=rf"dim must be a multiple of {least} for order {order}"):
        nn.GnConv(dim, order=order, gflayer=gflayer)
    assert nn.GnConv(2 * dim, order=order, gflayer=gflayer)(torch.randn(1, 2 * dim, 8, 8)).shape == (1, 2 * dim, 8, 8)


def test_gnconv_of_order_one():
    module = nn.GnConv(6, order=1)
    x = torch.randn(2, 6, 5, 4)
    gate, value = module.proj_in(x).chunk(2, dim=1)
    torch.testing.assert_close(module(x), module.proj_out(gate * module.dwconv(value)))


def test_modules_print_nothing(capsys):
    """The official gnconv prints a line whenever one is made."""
    nn.GnConv(16)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_global_filter_in_every_dtype(dtype):
    """The official one fails on bfloat16 weights, and gives float32 whatever comes in."""
    module, x = nn.GlobalLocalFilter(8, h=6, w=4).to(dtype), torch.randn(2, 8, 6, 6, dtype=dtype)
    x.requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == dtype and module.complex_weight.grad.dtype == dtype and x.grad.isfinite().all()
    exact = nn.GlobalLocalFilter(8, h=6, w=4).double()
    exact.load_state_dict(module.state_dict())
    difference = (y.double() - exact(x.double())).abs().max()
    assert difference <= 10 * torch.finfo(dtype).eps * y.double().abs().max()


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 1), (12, 5), (1, 4)])
def test_global_filter_without_fft(size):
    """What is exported to ONNX is the same function."""
    x, w = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(3, size[0], size[1] // 2 + 1, 2).double()
    expected = reference.global_filter(x, w)
    torch.testing.assert_close(_filter_without_fft(x, w), expected, rtol=1e-12, atol=1e-12)


def test_global_filter_is_a_circular_convolution():
    x, w = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 4, 2, dtype=torch.float64)
    kernel = torch.fft.irfft2(torch.view_as_complex(w), s=(5, 6))
    expected = torch.zeros_like(x)
    for i in range(5):
        for j in range(6):
            expected += kernel[:, i, j, None, None] * x.roll((i, j), dims=(2, 3))
    torch.testing.assert_close(reference.global_filter(x, w), expected)


def test_layer_scale_may_be_left_out():
    block = nn.HorBlock(16, layer_scale_init_value=0, gnconv=lambda dim: nn.GnConv(dim, order=2))
    assert block.gamma1 is None and block(torch.randn(1, 16, 5, 5)).shape == (1, 16, 5, 5)


def test_layer_norm_of_large_half_values():
    """Squares of them overflow in float16; statistics are float32."""
    x = 1000 * torch.randn(1, 8, 2, 2)
    found = nn.LayerNorm2d(8).half()(x.half()).float()
    torch.testing.assert_close(found, nn.LayerNorm2d(8)(x), atol=5e-3, rtol=5e-3)
