"""What the emulation has no word on: streams, graphs, devices."""

import pytest
import torch

from vision_ops import _native, fused_dwconv, fused_global_filter, fused_multi_order_dwconv


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if _native.cuda is None:
        pytest.skip(_native.cuda_missing)


def arguments(device="cuda"):
    x = torch.randn(4, 32, 28, 28, device=device).to(memory_format=torch.channels_last)
    shapes = ((32, 5), (12, 5), (16, 7))
    weights = [torch.randn(c, 1, k, k, device=device) / k for c, k in shapes]
    return x, [*weights, torch.randn(32, 14, 8, 2, device=device)]


def step(x, weights):
    y = fused_dwconv(x, weights[0], activation="gelu", backend="fused")
    y = fused_multi_order_dwconv(y, weights[:3], backend="fused")
    y = fused_global_filter(y[:, :, :14, :14], weights[3], backend="fused")
    return y, *torch.autograd.grad(y.square().sum(), (x, *weights))


@pytest.mark.gpu
def test_cuda_graph():
    x, weights = arguments()
    leaves = x.requires_grad_(), [w.requires_grad_() for w in weights]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*leaves)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(*leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_current_stream():
    """Work that is queued before ours on the stream is waited for."""
    x, weights = arguments()
    expected = fused_dwconv(x * 2, weights[0], backend="fused")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        y = fused_dwconv(x.mul_(2), weights[0], backend="fused")
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_other_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x, weights = arguments("cuda:1")
    y = fused_dwconv(x, weights[0], backend="fused")
    assert torch.cuda.current_device() == 0 and y.device.index == 1
    torch.testing.assert_close(y, fused_dwconv(x, weights[0], backend="reference"), rtol=1e-4, atol=1e-4)
