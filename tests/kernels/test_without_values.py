"""What runs on GPUs, on tensors without values: it waits for none of them, so that CUDA graphs can capture it."""

import pytest
import torch
from every_op import every_op
from harness import HALF

pytest.importorskip("triton")

import recording

from vision_ops.models import create_model
from vision_ops.ops import xca
from vision_ops.ops._registration import fused_ops

OPS = tuple(fused_ops)


@pytest.fixture(params=["ours", "PyTorch's"])
def recorder(request, monkeypatch):
    """With either depthwise convolution in the ops whose other kernels are Triton's."""
    return recording.install(monkeypatch, convolves=request.param == "ours")


def step(case):
    leaves = case.leaves()
    y = case.run(leaves, "fused")
    present = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(y, present, torch.empty_like(y))
    assert [g.shape for g in grads] == [t.shape for t in present]
    with torch.no_grad():
        assert case.run(case.tensors, "fused").shape == y.shape


def test_every_op_is_here():
    assert set(every_op("meta")) == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_ops(recorder, name):
    for dtype in (torch.float32, *HALF):
        for options in ({}, {"layout": "contiguous", "bias": False}):
            recorder.launches.clear()
            step(every_op("meta", dtype, **options)[name])
            assert recorder.launches


@pytest.mark.parametrize("name", OPS)
def test_batches_larger_than_a_grid_is_high(name, monkeypatch):
    recording.install(monkeypatch)
    step(every_op("meta", torch.bfloat16, batch=70_000, size=24 if name == "global_filter" else 28)[name])


def test_gram_form(recorder, monkeypatch):
    monkeypatch.setattr(xca, "_takes_gram", lambda x: True)
    step(every_op("meta")["xca"])
    assert recorder.launches


def test_nothing_hides_that_a_value_is_wanted(recorder):
    t = torch.empty(3, device="meta")
    for wants in (lambda: t[0].item(), lambda: bool(t[0]), t.cpu, t.nonzero, lambda: t[t > 0], t.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wants()


NETWORKS = {
    "hornet_tiny_7x7": {"depths": (1, 1, 1, 1)},
    "hornet_tiny_gf": {"depths": (1, 1, 1, 1)},
    "moganet_tiny": {"depths": (1, 1, 1, 1)},
    "edgenext_small": {"depths": (1, 2, 2, 2)},
    "s2mlpv2_small_7": {"depth": (1, 1)},
    "tiny_moat_0": {"depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, monkeypatch):
    recorder = recording.install(monkeypatch)
    with torch.device("meta"):
        model = create_model(name, drop_path_rate=0.1, **NETWORKS[name]).bfloat16()
    x = torch.empty(2, 3, 224, 224, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with torch.no_grad():
        model.eval()(x)
    assert recorder.launches
