import emulation
import pytest
import torch

from vision_ops import _native


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_device(request, monkeypatch):
    """As `device`, and besides the CUDA kernels in the emulation, on CPU tensors."""
    if request.param == "emulated":
        emulation.install(monkeypatch, emulation.kernels())
        return "cpu"
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if request.param == "cuda" and _native.cuda is None:
        pytest.skip(_native.cuda_missing)
    return request.param
