"""Autograd in unusual company: hooks on saved tensors, vmap over the backward pass, two imports, threads of others."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from every_op import NAMES, every_op
from harness import outputs
from torch.autograd.functional import hessian, jacobian

from vision_ops import _native, fused_dwconv

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))


def reversed_in_memory(t):
    return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))


def with_gaps(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7.0, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


AWAY = {"contiguous": lambda t: t.contiguous().clone(), "reversed": reversed_in_memory, "gaps": with_gaps}


@pytest.mark.parametrize("layout", AWAY)
@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_come_back_in_another_layout(name, layout):
    case = every_op(size=6)[name]
    expected, grad = outputs(case, "fused")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), AWAY[layout]):
        found, _ = outputs(case, "fused", grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_save_on_cpu():
    case = every_op(size=6)["gnconv"]
    expected, grad = outputs(case, "fused")
    with torch.autograd.graph.save_on_cpu():
        found, _ = outputs(case, "fused", grad)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_the_backward_pass(name):
    """One gradient after the other, and all at once."""
    case = every_op(dtype=torch.float64, size=6)[name]
    leaves = case.leaves()
    inputs = [t for t in leaves if t is not None and t.requires_grad]
    y = case.run(leaves, "fused")
    grads = torch.randn(2, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for a, b in zip(batched, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_vectorized_jacobian_and_hessian():
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64)

    def run(x):
        return fused_dwconv(x, weight, activation="gelu", backend="fused")

    x = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(jacobian(run, x, vectorize=True), jacobian(run, x))
    torch.testing.assert_close(hessian(lambda x: run(x).sum(), x, vectorize=True), hessian(lambda x: run(x).sum(), x))


def python(code, folder=None, **environment):
    """What a new process prints, in a folder."""
    kept = {name: value for name, value in os.environ.items() if name not in environment}
    there = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=kept | there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


AGAIN = """
import gc, importlib, os, shutil, sys
import torch
from torch.utils.flop_counter import FlopCounterMode
import vision_ops as old

def import_again(n):
    if {how!r} == "copied":
        shutil.copytree(os.path.dirname(old.__file__), f"copy_{{n}}")
        return importlib.import_module(f"copy_{{n}}")
    if {how!r} == "reloaded":
        for name in [n for n in sys.modules if n.startswith("vision_ops.ops")]:
            importlib.reload(sys.modules[name])
        return importlib.reload(old)
    for name in [n for n in sys.modules if n.split(".")[0] == "vision_ops"]:
        del sys.modules[name]
    return importlib.import_module("vision_ops")

x, weight, bias = torch.randn(1, 8, 9, 9).requires_grad_(), torch.randn(8, 1, 7, 7), torch.randn(8)

def results(fused_dwconv):
    y = fused_dwconv(x, weight, bias, backend="fused")
    return y, *torch.autograd.grad(y.square().sum(), x)

functions = [old.fused_dwconv]
for n in range(2):
    again = import_again(n)
    functions.append(again.fused_dwconv)
gc.collect()
expected = results(functions[0])
for run in functions:
    assert all(map(torch.equal, results(run), expected))
    with FlopCounterMode(display=False) as flops:
        assert all(map(torch.equal, results(run), expected))
    assert flops.get_total_flops() > 0
for run in functions[::2]:
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled), expected))
network = again.models.MogaNet((16, 32, 48, 64), (1, 1, 1, 1), num_classes=5)
network(torch.randn(1, 3, 64, 64)).sum().backward()
print(len(functions))
"""


@pytest.mark.parametrize("how", ["dropped", "reloaded", "copied"])
def test_imported_again(how, tmp_path):
    assert python(AGAIN.format(how=how), tmp_path) == "3"


def test_another_op_of_the_same_name():
    """As two versions of the package have it: each keeps its own."""
    from vision_ops.ops import _definitions

    before = dict(_definitions.definitions)
    made = [_definitions.define("twice", f"Tensor x{more}", "Tensor", "bool[] needs") for more in ("", ", int n", "")]
    try:
        assert [d.name for d in made] == ["twice", "twice_2", "twice"]
        assert made[0] is made[2]
    finally:
        for name in _definitions.definitions.keys() - before:
            del _definitions.definitions[name]


IN_THREADS = """
import os, threading
import torch
import vision_ops
torch.set_num_threads(1)
x, weight, gnconv = torch.randn(4, 128, 56, 56), torch.randn(128, 1, 7, 7), vision_ops.nn.GnConv(128)
calls = [
    lambda: vision_ops.fused_dwconv(x, weight),
    lambda: vision_ops.fused_moga_gate(x, x, backend="fused"),
    lambda: gnconv(x[:1]).sum().backward(),
]
found, end = [], threading.Event()
def count(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    found.append(len(os.listdir("/proc/self/task")) - before)
    counted.set()
    end.wait()
for call in calls:
    counted = threading.Event()
    threading.Thread(target=count, args=(call,)).start()
    counted.wait(100)
end.set()
print(found)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor starts no threads")
def test_one_thread_in_threads_that_start_later():
    assert python(IN_THREADS, OMP_NUM_THREADS=None) == "[0, 0, 0]"


def test_number_of_threads_is_that_of_the_thread():
    before, found = torch.get_num_threads(), []

    def run():
        fused_dwconv(torch.randn(1, 8, 7, 7), torch.randn(8, 1, 3, 3), backend="fused")
        torch.set_num_threads(before + 1)
        fused_dwconv(torch.randn(1, 8, 7, 7), torch.randn(8, 1, 3, 3), backend="fused")
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert found == [before + 1]
