"""What would run on a GPU, asked of tensors that pretend to be on one."""

import emulation
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_ops import _native, explain


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(_native, "cuda", emulation.kernels())
    monkeypatch.setattr(_native, "gpu_missing", lambda index: None)
    monkeypatch.setattr(_native, "_triton_missing", lambda index: None)
    with FakeTensorMode():
        yield


def image(channels_last=True, dtype=torch.bfloat16):
    x = torch.empty(2, 16, 14, 14, dtype=dtype, device="cuda")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def weight(kernel_size, dtype=torch.bfloat16, channels=16):
    return torch.empty(channels, 1, kernel_size, kernel_size, dtype=dtype, device="cuda")


def test_march_kernels():
    assert explain("dwconv", image(), weight(7)).parts == {"dwconv": "CUDA kernel"}
    assert explain("dwconv", image()).parts == {"dwconv": "CUDA kernel"}
    assert explain("dwconv", image(False), weight(7)).parts == {"dwconv": "CUDA kernel, on channels_last copies"}


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dtype"), [(11, 1, None), (5, 2, None), (3, 3, None), (3, 1, torch.float64)]
)
def test_plain_kernels_only_when_asked_for(kernel_size, stride, dtype):
    dtype = dtype or torch.bfloat16
    given = image(dtype=dtype), weight(kernel_size, dtype)
    choice = explain("dwconv", *given, stride=stride)
    assert choice.parts == {"dwconv": "PyTorch"} and "untuned" in choice.slower[0]
    assert explain("dwconv", *given, stride=stride, backend="fused").parts == {"dwconv": "CUDA kernel (untuned)"}


def test_multi_order():
    weights = weight(5), weight(5, channels=6), weight(7, channels=8)
    assert explain("multi_order_dwconv", image(), weights).parts == {"multi_order_dwconv": "CUDA kernels"}
    assert explain("multi_order_dwconv", image()).parts == {"multi_order_dwconv": "CUDA kernel"}
    copies = explain("multi_order_dwconv", image(False), weights)
    assert copies.parts == {"multi_order_dwconv": "CUDA kernels, on channels_last copies"}


def test_global_filter():
    for size, dtype, kernel in (((14, 14), None, True), ((14, 9), None, False), ((14, 14), torch.float64, False)):
        x = torch.empty(2, 16, *size, dtype=dtype or torch.bfloat16, device="cuda")
        choice = explain("global_filter", x)
        assert choice.parts == {"global_filter": "CUDA kernel" if kernel else "PyTorch"}
        assert bool(choice.slower) != kernel and not choice.cannot
        fused = explain("global_filter", x, backend="fused").parts
        assert fused == {"global_filter": "CUDA kernel" if kernel else "PyTorch's FFT"}


@pytest.mark.parametrize("op", ["moga_aggregation", "channel_aggregation_ffn", "gnconv"])
def test_blocks_without_the_engine(op, monkeypatch):
    """Their other kernels are Triton's."""
    pytest.importorskip("triton")
    for reason, runs in ((None, "CUDA kernel"), ("the driver is too old", "PyTorch")):
        monkeypatch.setattr(_native, "gpu_missing", lambda index, reason=reason: reason)
        convolution, *others = explain(op, image()).parts.values()
        assert convolution == runs and any("Triton" in part for part in others)


def test_reasons_against(monkeypatch):
    monkeypatch.setattr(_native, "gpu_missing", lambda index: "the driver is too old")
    assert explain("dwconv", image(), weight(3)).cannot == ["the driver is too old"]
