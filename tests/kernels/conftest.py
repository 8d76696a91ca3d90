import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `launches` and `interpreter`


@pytest.fixture
def interpreter(monkeypatch):
    """Launches run in Triton's interpreter, on CPU tensors; temporaries are full of NaN before a kernel writes them."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the GPU tests run the same kernels on the GPU")
    import interpreter
    from launches import kernel_modules

    from vision_ops import kernels

    interpreter.repair(monkeypatch)
    scratch = kernels.scratch

    def poisoned(*args):
        return scratch(*args).fill_(float("nan"))

    for module in kernel_modules():
        if hasattr(module, "scratch"):
            monkeypatch.setattr(module, "scratch", poisoned)
    return interpreter
