"""Accelerated models under DDP and FSDP2, in a group of one process."""

import copy

import pytest
import standins
import torch
import torch.distributed as dist
from torch import nn

import vision_ops
from vision_ops.dispatch import use_backend

DIM = 16


@pytest.fixture
def group(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def blocks():
    return nn.Sequential(standins.ConvEncoder(DIM), standins.SDTAEncoder(DIM), standins.Block(DIM))


def step(model, x):
    y = model(x)
    y.square().mean().backward()
    return y.detach(), [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def assert_same(found, expected):
    assert (found[0] - expected[0]).abs().max() < 1e-5 * expected[0].abs().max()
    largest = max(e.abs().max() for e in expected[1])
    for f, e in zip(found[1], expected[1], strict=True):
        assert (f - e).abs().max() < 1e-5 * max(e.abs().max(), 1e-2 * largest)


def test_ddp(group):
    model, x = blocks(), torch.randn(2, DIM, 9, 7)
    plain = copy.deepcopy(model)
    vision_ops.accelerate(model)
    with use_backend("fused"):
        assert_same(step(nn.parallel.DistributedDataParallel(model), x), step(plain, x))


@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fsdp2(group, first):
    from torch.distributed.fsdp import fully_shard

    model, x = blocks(), torch.randn(2, DIM, 9, 7)
    plain = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    if first == "accelerate":
        report = vision_ops.accelerate(model)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        report = vision_ops.accelerate(model)
    assert set(report.fused) >= {"0", "1", "2"} and not report.left
    with use_backend("fused"):
        assert_same(step(model, x), step(plain, x))
