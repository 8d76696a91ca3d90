import hashlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Inductor knows our ops by their names and schemas, not by what they save: every state of them has a cache of its own.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"vision_ops_inductor_{os.getuid()}")
    + hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted((Path(__file__).parents[1] / "vision_ops/ops").glob("*.py")))
    ).hexdigest()[:12],
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch: the processes share the cores, but what runs on several threads has to be tested on several.
    cores, workers = len(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(min(cores, max(2, cores // workers))))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels run in the interpreter (tests/kernels).
    os.environ["TRITON_INTERPRET"] = "1"

from torch._subclasses.fake_tensor import FakeTensor

from vision_ops.ops import _allocation

sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # for `interpreter`
sys.path.insert(0, str(Path(__file__).parent))  # for `harness`

import unwritten


def pytest_report_header():
    return None if torch.cuda.is_available() else "no GPU that torch can use: what is marked gpu is left out"


def pytest_collection_modifyitems(config, items):
    """Without a GPU what needs one is left out, not skipped a thousand times; whoever asks for it hears why it cannot
    run."""
    if torch.cuda.is_available() or "gpu" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def poisoned(function):
    def fill(*args, **kwargs):
        t = function(*args, **kwargs)
        return t if isinstance(t, FakeTensor) or torch.compiler.is_compiling() else t.fill_(float("nan"))

    return fill


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output is full of NaN before its kernel runs: what a kernel forgets to write shows."""
    for function in (_allocation.allocate, _allocation.gradient_like):
        for name, module in list(sys.modules.items()):
            if name.startswith("vision_ops") and getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, poisoned(function))


@pytest.fixture(scope="session")
def compiler_knows_pytorch():
    """As it is before anything is patched: see `unwritten.install`."""
    torch._dynamo.trace_rules.get_torch_obj_rule_map()


@pytest.fixture(autouse=True)
def written_operands(compiler_knows_pytorch, poisoned_outputs, monkeypatch, request):
    """No product of PyTorch spans memory that nobody wrote, be it between the rows of an operand."""
    if request.node.get_closest_marker("not_finite"):
        return
    unwritten.install(monkeypatch)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch can use")
        from vision_ops import _native

        if _native.cuda is None:
            pytest.skip(_native.cuda_missing)
    return request.param


@pytest.fixture(scope="session")
def timm():
    """timm, also beside a torchvision that was not built for this torch."""
    sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not installed
    from benchmarks.timm_peer import import_timm

    try:
        timm = import_timm()
    except ImportError as error:
        pytest.skip(f"{error}; the Makefile installs timm and torchvision")
    import timm.data
    import timm.models
    import timm.optim

    yield timm
