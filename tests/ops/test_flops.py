"""FLOPs in torch.utils.flop_counter: of every op, forward and backward, those of plain PyTorch."""

import subprocess
import sys

import pytest
import torch
from every_op import NAMES, every_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vision_ops import _native, nn

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=str(_native.cpu_missing))


def flops(case, backend, needs):
    """Of the forward and of the backward pass, and what was counted."""
    leaves = [
        t if t is None else t.detach().requires_grad_(needed) for t, needed in zip(case.tensors, needs, strict=True)
    ]
    with FlopCounterMode(display=False) as forward:
        y = case.run(leaves, backend)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    return (forward.get_total_flops(), backward.get_total_flops()), set(forward.get_flop_counts()["Global"])


@pytest.mark.parametrize("needed", ["all", "first", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_as_plain_pytorch(name, needed):
    case = every_op(size=6)[name]
    which = [i for i, t in enumerate(case.leaves()) if t is not None and t.requires_grad]
    which = {"all": which, "first": which[:1], "last": which[-1:]}[needed]
    needs = [i in which for i in range(len(case.tensors))]
    (fused, counted), (plain, _) = flops(case, "fused", needs), flops(case, "reference", needs)
    assert fused == plain
    assert counted == {getattr(torch.ops.vision_ops, name)}


def test_without_gradients():
    case = every_op(size=6)["gnconv"]
    found = []
    for backend in ("fused", "reference"):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            case.run(case.tensors, backend)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_of_fake_tensors():
    """As memory and FLOPs of large networks are estimated."""
    found = []
    for fused in (True, False):
        with FakeTensorMode():
            block = nn.MogaBlock(16, fused=fused)
            with FlopCounterMode(display=False) as counter:
                block(torch.randn(2, 16, 8, 8)).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


ORDERS = {
    "counter last": "import vision_ops; assert 'triton' not in sys.modules; import torch.utils.flop_counter as counter",
    "counter first": "import torch.utils.flop_counter as counter; import vision_ops",
}


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_is_imported_first(order):
    code = f"""
import sys
import torch
finders = len(sys.meta_path)
{ORDERS[order]}
with counter.FlopCounterMode(display=False) as mode:
    vision_ops.fused_dwconv(torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3))
print(mode.get_total_flops(), counter.__spec__.name, len(sys.meta_path) == finders)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(2 * 8 * 25 * 9), "torch.utils.flop_counter", "True"], done.stderr
