"""Every op launches on CUDA what the committed ledger says: one launch more is seen here."""

import emulation
import pytest
import torch

from benchmarks.cases import OPS
from benchmarks.gpu_check.parts import CASES

pytest.importorskip("triton")

from launches import kernel_modules

from benchmarks.ledger import count
from benchmarks.ledger.launches import Launch, resident_blocks
from benchmarks.ledger.recorder import recording
from vision_ops.kernels import moga_gate
from vision_ops.ops import fused_dwconv

ANEW = "python -m benchmarks ledger --write"


@pytest.fixture(autouse=True)
def written_operands():
    """In the place of the fixtures of all tests, which fill outputs: that would be counted."""


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Likewise."""


@pytest.fixture(scope="module")
def cuda():
    return emulation.kernels()


@pytest.fixture(scope="module")
def committed():
    return count.read(count.RESULTS)


def test_all_are_committed(committed):
    assert {op: set(cases) for op, cases in committed["ops"].items()} == {op: set(c) for op, c in CASES.items()}, ANEW


def launches(passes):
    return {name: count.Count.of(found, None).launches for name, found in passes.items()}


@pytest.mark.parametrize("op", CASES)
def test_launches(op, cuda, committed):
    for case in CASES[op]:
        for name, found in launches(count.count_op(OPS[op], case, cuda)).items():
            expected = committed["ops"][op][case]["ours"][name]["launches"]
            assert {k: found[k] for k in ("Triton", "CUDA C++")} == {k: expected[k] for k in ("Triton", "CUDA C++")}, (
                ANEW
            )
            # How PyTorch takes its own operators apart is not the same in all of its versions.
            assert found["PyTorch"] <= expected["PyTorch"] and found["cast"] <= expected["cast"], (case, name, ANEW)


def test_a_launch_more_is_counted(cuda, monkeypatch):
    before = launches(count.count_op(OPS["moga_gate"], "MogaNet-S.1", cuda))
    gate = moga_gate.gate
    monkeypatch.setattr(moga_gate, "gate", lambda g, value, doubled, y: gate(g, value.clone(), doubled, y))
    after = launches(count.count_op(OPS["moga_gate"], "MogaNet-S.1", cuda))
    assert after["forward"] == {**before["forward"], "PyTorch": before["forward"]["PyTorch"] + 1}


def test_networks_take_the_way_of_cuda(cuda):
    """And the hooks of the ledger are gone behind it."""
    with recording(cuda) as recorder:
        net, x = count.network("MogaNet-T", fused=True)
        assert net(x).shape == (count.BATCH, 1000)
    kinds = {launch.kind for launch in recorder.launches}
    assert kinds == {"Triton", "CUDA C++", "PyTorch", "cast"}
    assert not torch.is_autocast_enabled("cuda")
    assert torch.empty(3, device="meta").data_ptr() == 0
    with pytest.raises(ValueError, match="device 'meta'"):
        fused_dwconv(*(torch.empty(s, device="meta") for s in ((1, 8, 4, 4), (8, 1, 3, 3))), backend="fused")


def test_costs_of_cuda_kernels(cuda):
    x = torch.empty(4, 64, 28, 28, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty(64, 1, 7, 7, device="meta", requires_grad=True)
    with recording(cuda, autocast=False) as recorder:
        y = fused_dwconv(x, weight)
        (forward,) = recorder.taken()
        torch.autograd.grad(y, weight, torch.empty_like(y))
        *_, wgrad, add = recorder.taken()
    assert (forward.read, forward.written) == (x.nbytes + weight.nbytes, x.nbytes)
    assert forward.multiply_adds == 49 * x.numel()
    assert wgrad.read == 2 * x.nbytes
    assert wgrad.written == add.read == add.written * wgrad.written // (64 * 50 * 4)


def test_waves():
    name = "march_kernel<__nv_bfloat16, 7, 1, 1, 2, 7, false, 2>"
    assert resident_blocks(name, 50 << 10) == 2
    assert resident_blocks(name, 200 << 10) == 1  # that shared memory holds
    assert resident_blocks("add_splits_kernel<float>", 0) == 0
    for blocks, waves, idle in ((396, 1.5, 0.25), (264, 1.0, 0.0), (198, 0.75, 0.25), (33, 0.125, 0.75)):
        launch = Launch("", "CUDA C++", 0, 0, blocks=blocks, resident=2)
        assert (launch.waves, launch.idle) == (waves, idle)


def test_every_kernel_declares_what_it_moves():
    for module in kernel_modules():
        for kernel in module.KERNELS:
            assert {*kernel.fn.moves.written, *kernel.fn.moves.updated} <= {*kernel.fn.__code__.co_varnames}
