import emulation
import harness
import pytest
import torch

from vision_ops import _native


def need_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if _native.cuda is None:
        pytest.skip(_native.cuda_missing)


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_device(request, monkeypatch):
    """As `device`, and besides the CUDA kernels in the emulation, on CPU tensors."""
    if request.param == "emulated":
        emulation.install(monkeypatch, emulation.kernels())
        return "cpu"
    if request.param == "cuda":
        need_gpu()
    return request.param


@pytest.fixture(
    params=["cpu", pytest.param("interpreted", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def each_device(request, monkeypatch):
    """Where a test's cases run: on a CPU, as they would on a GPU but in Triton's interpreter and the emulation, on a
    GPU. A module's `not_on_gpus` gives a reason for the parameters that GPU kernels do not take."""
    if request.param == "cpu":
        return
    parameters = dict(request.node.callspec.params)
    if reason := getattr(request.module, "not_on_gpus", lambda parameters: None)(parameters):
        pytest.skip(reason)
    if request.param == "cuda":
        need_gpu()
        monkeypatch.setattr(harness, "DEVICE", "cuda")
        return
    if torch.cuda.is_available():
        pytest.skip("Triton has no interpreter where it compiles for a GPU")
    import interpreter

    if any(word in request.function.__name__ for word in ("compile", "opcheck", "gradcheck")):
        pytest.skip("the interpreter takes the place of the ops themselves")
    interpreter.repair(monkeypatch)
    interpreter.redirect(monkeypatch, emulation.kernels())


@pytest.fixture(params=[False, True], ids=["exact", "tf32"])
def tf32(request):
    """Whether the user lets float32 products on GPUs round to TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, request.param
    yield request.param
    matmul.allow_tf32 = before
