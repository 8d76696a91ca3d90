"""Batch norms in the blocks: as their modules have it in training, part of their neighbours in evaluation."""

import copy

import pytest
import torch
from harness import relative_error

from vision_ops import explain, nn, use_backend
from vision_ops.nn.moat_article import DepthwiseSeparable

BLOCKS = {
    "MogaBlock": lambda: nn.MogaBlock(16, init_value=1.0),
    "ConvEncoderBNHS": lambda: nn.ConvEncoderBNHS(16, layer_scale_init_value=1.0, kernel_size=5),
    "SDTAEncoderBNHS": lambda: nn.SDTAEncoderBNHS(16, layer_scale_init_value=1.0, scales=2, num_heads=4),
    "DepthwiseSeparable": lambda: DepthwiseSeparable(16, 32, stride=2),
    "MBConv": lambda: nn.MBConv(16, 16),
}
each_block = pytest.mark.parametrize("name", BLOCKS)


def pair(name):
    """A block, and one that calls its layers."""
    block = BLOCKS[name]()
    for norm in norms_of(block):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    layers = copy.deepcopy(block)
    for module in layers.modules():
        module.fused = False
    return block, layers


def norms_of(block):
    return [module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)]


@each_block
def test_evaluation(name):
    block, layers = (module.eval() for module in pair(name))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 14, 13).contiguous(memory_format=layout)
        for grad in (True, False):
            with use_backend("fused"), torch.set_grad_enabled(grad):
                found = block(x)
            assert relative_error(found, layers(x).double()) < 1e-5


@each_block
def test_gradients_in_evaluation(name):
    block, layers = (module.eval().double() for module in pair(name))
    x, grads = torch.randn(2, 16, 7, 8, dtype=torch.float64), []
    for module in (block, layers):
        with use_backend("fused"):
            y = module(x) if module is block else None
        y = module(x) if y is None else y
        grads.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("name", ["MogaBlock", "ConvEncoderBNHS", "MBConv"])
def test_bfloat16_with_means_of_ten_times_the_spread(name):
    block, layers = (module.eval() for module in pair(name))
    x = torch.randn(4, 16, 14, 14) + 10 * torch.randn(16, 1, 1)
    first = norms_of(layers)[0]
    seen = []
    handle = first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layers(x)
    handle.remove()
    with torch.no_grad():
        for norm in (first, norms_of(block)[0]):
            norm.running_mean.copy_(seen[0].mean((0, 2, 3)))
            norm.running_var.copy_(seen[0].var((0, 2, 3)))
        exact = copy.deepcopy(layers).double()(x.double())
        half = x.bfloat16()
        found, eager = (module.bfloat16()(half) for module in (block, layers))
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact)


@pytest.mark.parametrize("momentum", [0.1, None])
@each_block
def test_running_statistics(name, momentum):
    block, layers = pair(name)
    for norm in (*norms_of(block), *norms_of(layers)):
        norm.momentum = momentum
    for _ in range(10):
        x = torch.randn(3, 16, 14, 14) + torch.randn(16, 1, 1)
        with use_backend("fused"):
            block(x)
        layers(x)
    for (key, found), expected in zip(block.named_buffers(), layers.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=key)


def test_synchronized_norms_are_left_to_pytorch():
    block, x = nn.MogaBlock(16, norm_type="SyncBN").eval(), torch.randn(2, 16, 7, 7)
    assert [f"{name} is a SyncBatchNorm, not a BatchNorm2d" for name in ("norm1", "norm2")] == explain(block, x).cannot
    plain = nn.MogaBlock(16).eval()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), plain(x))
