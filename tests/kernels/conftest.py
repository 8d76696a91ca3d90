import emulation
import pytest
import torch

from vision_ops.ops import _channel_aggregation_passes, _mbconv, moga_aggregation


@pytest.fixture
def interpreter(monkeypatch):
    """Launches run in Triton's interpreter, on CPU tensors; temporaries are full of NaN before a kernel writes them.
    Programs are few and tiles small, so that each takes several tiles of a tensor that is small enough for a test."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the GPU tests run the same kernels on the GPU")
    import interpreter
    from launches import kernel_modules

    from vision_ops import kernels
    from vision_ops.kernels import _maps, _quarters

    interpreter.repair(monkeypatch)
    scratch = kernels.scratch

    def poisoned(*args):
        return scratch(*args).fill_(float("nan"))

    for module in kernel_modules():
        if hasattr(module, "scratch"):
            monkeypatch.setattr(module, "scratch", poisoned)
        for name in ("PROGRAMS", "ROW_PROGRAMS", "IMAGE_PROGRAMS", "MOST_PROGRAMS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 3)
    monkeypatch.setattr(_maps, "CHANNELS_LAST_VALUES", 4)
    monkeypatch.setattr(_quarters, "VALUES", 2)
    return interpreter


@pytest.fixture(params=["PyTorch", "emulated"])
def convolution(request, monkeypatch):
    """What convolves in an op whose other kernels are Triton's: PyTorch, or the CUDA kernels in the emulation."""
    if request.param == "emulated":
        emulation.install(monkeypatch, emulation.kernels())
        for op in (_channel_aggregation_passes, _mbconv, moga_aggregation):
            monkeypatch.setattr(op, "convolves_cuda", lambda x: True)
    return request.param
