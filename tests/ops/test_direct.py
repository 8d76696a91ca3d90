"""Kernels are called past the dispatcher, but only for ordinary tensors where nothing in the thread looks at ops."""

import gc
import weakref

import pytest
import torch
from every_op import every_op
from harness import outputs
from torch.utils._python_dispatch import TorchDispatchMode

from vision_ops import _native, fused_layer_norm_2d, fused_split_cascade
from vision_ops.ops.layer_norm_2d import _op

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))


@pytest.fixture
def calls(monkeypatch):
    """Which kernels were called directly."""
    found = []
    direct = _op.direct
    monkeypatch.setattr(_op, "direct", lambda tensors: found.append(direct(tensors) is not None) or direct(tensors))
    return found


def problem():
    return [torch.randn(s).requires_grad_() for s in ((2, 16, 5, 4), (16,), (16,))]


def step(x, weight, bias):
    y = fused_layer_norm_2d(x, weight, bias, backend="fused")
    return y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))


def test_direct_and_through_the_dispatcher(calls, monkeypatch):
    given = problem()
    direct = step(*given)
    assert calls == [True, True]
    with torch.no_grad():
        assert torch.equal(fused_layer_norm_2d(*given, backend="fused"), direct[0])
    assert calls == [True] * 3
    monkeypatch.setattr(_op, "direct", lambda tensors: None)
    for a, b in zip(step(*given), direct, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["layer_norm_2d", "split_cascade"])
def test_a_gradient_is_freed_without_garbage_collection(op):
    case = every_op(size=7)[op]
    leaves = case.leaves()
    y = case.run(leaves, "fused")
    grad = torch.randn_like(y)
    kept = weakref.ref(grad)
    gc.disable()
    try:
        torch.autograd.grad(y, leaves[0], grad)
        del grad
        assert kept() is None
    finally:
        gc.enable()


def test_kernels_refuse_what_they_cannot_read():
    x, weight = torch.randn(2, 4, 5, 6), torch.ones(4)
    kernels = _native.cpu_kernels()
    assert kernels.reads_tensors(x)
    for bad in (x.int(), x[0], x.to("meta"), "x"):
        assert not kernels.reads_tensors(bad)
        with pytest.raises((TypeError, RuntimeError)):
            kernels.layer_norm_2d(bad, weight, weight, x, 1e-6)


def test_tensors_as_tuples(monkeypatch):
    """Where the kernels cannot read them."""
    cases = every_op(size=7)
    expected = {name: outputs(cases[name], "fused") for name in ("mlp", "xca", "s2_attention", "multi_order_dwconv")}
    monkeypatch.setattr(_native, "_read_by_kernels", False)
    for name, (found, grad) in expected.items():
        for a, b in zip(outputs(cases[name], "fused", grad)[0], found, strict=True):
            assert torch.equal(a, b)


def test_dispatch_modes_see_the_ops(calls):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    with Log():
        step(*problem())
    assert calls == [False, False]
    assert {"vision_ops.layer_norm_2d.default", "vision_ops.layer_norm_2d_backward.default"} <= set(names)


def test_the_profiler_sees_the_ops(calls):
    with torch.profiler.profile() as profile:
        step(*problem())
    assert calls == [False, False]
    assert {"vision_ops::layer_norm_2d", "vision_ops::layer_norm_2d_backward"} <= {
        e.key for e in profile.key_averages()
    }


def test_lazily_negated_tensors(calls):
    weight, bias = torch.randn(16), torch.randn(16)
    x = torch.randn(2, 16, 5, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    y = fused_layer_norm_2d(x, weight, bias, backend="fused")
    assert calls == [False]
    assert torch.equal(y, fused_layer_norm_2d(x.resolve_neg(), weight, bias, backend="fused"))


def test_lazily_negated_biases_in_lists():
    """Which the dispatcher hands over as they are."""
    x, weights = torch.randn(1, 2, 7, 7), [torch.randn(1, 1, 3, 3)]
    for bias in (torch.randn(1, dtype=torch.complex64).conj().imag, torch._efficientzerotensor((1,))):
        y, plain = (fused_split_cascade(x, weights, [bias], backend=backend) for backend in ("fused", "reference"))
        torch.testing.assert_close(y, plain)


def test_a_gradient_of_lazy_zeros(calls):
    given = problem()
    y = fused_layer_norm_2d(*given, backend="fused")
    grads = torch.autograd.grad(y, given, torch._efficientzerotensor(y.shape))
    assert calls == [True, False]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_subclasses_stay_subclasses(calls):
    class Mine(torch.Tensor):
        pass

    x, weight, bias = (t.detach() for t in problem())
    y = fused_layer_norm_2d(x.as_subclass(Mine), weight, bias, backend="fused")
    assert calls == [False] and type(y) is Mine


def test_inference_tensors(calls):
    x, weight, bias = (t.detach() for t in problem())
    with torch.inference_mode():
        y = fused_layer_norm_2d(x.clone(), weight, bias, backend="fused")
    assert calls == [True]
    assert torch.equal(y, fused_layer_norm_2d(x, weight, bias, backend="fused"))
