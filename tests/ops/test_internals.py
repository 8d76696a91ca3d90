"""Private names of PyTorch: without one of them, or any, ops go the public way and are right all the same."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vision_ops import _internals, _native

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))

NAMES = [
    "_C._AutoDispatchBelowAutograd",
    "_C._DisableAutocast",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._dispatch_isTensorSubclassLike",
    "_C._are_functorch_transforms_active",
    "autograd._profiler_enabled",
    "autograd.forward_ad._current_level",
    "Tensor.__dlpack_c_exchange_api__",
]

BELOW = NAMES[0]

# Hidden while the package is imported: PyTorch needs them itself.
CODE = """
import sys
sys.path[:0] = {paths}
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode


def import_without(names):
    for name in list(sys.modules):
        if name.split(".")[0] in ("vision_ops", "every_op", "harness") or name.startswith("test_"):
            del sys.modules[name]
    hidden = []
    for path in names:
        *owners, name = path.split(".")
        owner = torch
        for each in owners:
            owner = getattr(owner, each)
        hidden.append((owner, name, getattr(owner, name)))
        delattr(owner, name)
    import vision_ops
    for owner, name, value in hidden:
        setattr(owner, name, value)


def check():
    import vision_ops
    from every_op import every_op
    from harness import outputs

    for op in ("dwconv", "gnconv", "xca"):  # with neither lists nor saved tensors, with both, without lists
        case = every_op(size=6)[op]
        fused, dy = outputs(case, "fused")
        for a, b in zip(fused, outputs(case, "reference", dy)[0], strict=True):
            assert_close(a, b, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            assert torch.equal(case.run(case.tensors, "fused"), fused[0])
        with torch.inference_mode():
            assert torch.equal(case.run(case.tensors, "fused"), fused[0])
        with FlopCounterMode(display=False) as counter:
            outputs(case, "fused")
        assert counter.get_flop_counts()["Global"][getattr(torch.ops.vision_ops, op)] > 0

    case = every_op(size=6)["channel_aggregation_ffn"]  # inside of it, there is a product of float32
    *tensors, sigma = case.tensors
    with torch.autocast("cpu"):
        y = case.run(case.tensors, "fused")
    cast = case.run([*(t.bfloat16() for t in tensors), sigma], "fused")  # of parameters that autocast leaves to the op
    assert y.dtype == cast.dtype
    assert_close(y, cast, rtol=5e-2, atol=1e-1)

    x, weight = torch.randn(1, 2, 3, 4).double(), torch.randn(2, 1, 3, 3).double()
    run, plain = (
        lambda x, backend=backend: vision_ops.fused_dwconv(x, weight, activation="gelu", backend=backend)
        for backend in ("fused", "reference")
    )
    assert gradcheck(run, x.requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, x)
    assert_close(vmap(run)(torch.stack([x, x]))[1], plain(x))
    assert_close(grad(lambda x: run(x).sum())(x), grad(lambda x: plain(x).sum())(x))
    assert_close(jvp(run, (x,), (x,)), jvp(plain, (x,), (x,)))
    assert_close(jacobian(run, x, vectorize=True), jacobian(plain, x))
    block = vision_ops.nn.SDTAEncoder(16, num_heads=2, scales=2)
    for _ in range(2):
        block(torch.randn(1, 16, 6, 6)).sum().backward()


for names in {groups}:
    import_without(names)
    check()
    print(sys.modules["vision_ops._internals"].calls_directly)
"""
DIRECTLY = {"_C._DisableAutocast", "_C._are_functorch_transforms_active", *NAMES[-2:]}


# The first import in a process says how the dispatcher's ops are differentiated.
@pytest.mark.parametrize("first", [BELOW, "any", "others"])
def test_hidden(first):
    groups = {BELOW: [[BELOW]], "any": [NAMES], "others": [[name] for name in NAMES[1:]]}[first]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = CODE.format(groups=groups, paths=paths)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # all is small
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(set(names) <= DIRECTLY) for names in groups]


def test_apply_without_a_shorter_one(monkeypatch):
    class Function:
        @classmethod
        def apply(cls):
            return cls

    class Mine(Function):
        pass

    monkeypatch.setattr(_internals, "torch", SimpleNamespace(autograd=SimpleNamespace(Function=Function)))
    assert _internals.short_apply(Mine)() is Mine


def test_stream_without_a_shorter_way(monkeypatch):
    stream = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=40 + device))
    monkeypatch.setattr(_internals, "torch", SimpleNamespace(cuda=stream))
    assert _internals._current_stream(2) == 42


def test_what_no_graph_knows_is_not_known_to_be_true():
    assert _internals.known_true(True) and not _internals.known_true(False) and not _internals.known_true(object())


def test_private_names_are_in_one_place():
    private = re.compile(r"\btorch\._|\bfrom torch\._|\btorch(\.\w+)*\._\w|\bforward_ad\._")
    for path in Path(_internals.__file__).parent.rglob("*.py"):
        if path.name != "_internals.py":
            assert not private.findall(path.read_text()), path
